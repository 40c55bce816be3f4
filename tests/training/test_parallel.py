"""Two ranks under torchrun are one run: the same losses, one set of files, stopped together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.metrics import headline_metrics
from model.files import read_json
from training.assemble import load_notes, make_dataset
from training.config import LoraSettings, RunConfig, to_dict
from training.parallel import Ranks, choose_device
from training.run import run

LAUNCHES = 4  # gloo's first connection sometimes fails where many processes start at once
GLOO_FAILED = ("connectFullMesh", "Connection refused", "Connect timeout", "Connection reset")


def launch(
    arguments: list[str], repository_root: Path, *, stop_at: Path | None = None
) -> tuple[int, str]:
    """Run train.py on two ranks; SIGTERM once `stop_at` exists. Exit code and output."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "train.py", *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for _ in range(LAUNCHES):
        process = subprocess.Popen(
            command,
            cwd=repository_root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while stop_at is not None and process.poll() is None and not stop_at.exists():
            time.sleep(0.02)
        if stop_at is not None:
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=150)
        if process.returncode == 0 or not any(text in output for text in GLOO_FAILED):
            break
        if "--overwrite" not in arguments and "--resume" not in arguments:
            command.append("--overwrite")
    return process.returncode, output


def as_file(config: RunConfig, tmp_path: Path) -> list[str]:
    path = tmp_path / f"{Path(config.out).name}.json"
    path.write_text(json.dumps(to_dict(config)))
    return ["--config", str(path)]


def numbers(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("stage", ["clinical", "downstream"])
def test_two_ranks_are_one_run(
    stage: str, make_config: Callable[..., RunConfig], tmp_path: Path, repository_root: Path
) -> None:
    """Twenty steps with dropout at one global batch: losses and gradients within 1e-5.

    The last step of each epoch holds one segment, so one rank has nothing to do there.
    """
    notes = load_notes(make_config(stage))
    segments = len(make_dataset(make_config(stage), notes, notes.splits.train))
    batch_size = next(size for size in range(segments // 6, segments) if segments % size == 1)
    config = make_config(
        stage,
        steps=20,
        eval_every=10,
        lr=1e-2,
        lora=LoraSettings(r=4, dropout=0.2),
        batch_tokens=None,
        batch_size=batch_size,
        micro_tokens=128,
    )
    one = run(replace(config, out=str(tmp_path / "one")), score=headline_metrics)
    two = tmp_path / "two"
    code, output = launch(as_file(replace(config, out=str(two)), tmp_path), repository_root)
    assert code == 0, output
    for name in ("loss", "gradient_norm", "validation_loss"):
        found = numbers(two, name)
        assert found == pytest.approx(numbers(one, name), rel=1e-5)
        assert len(found) == (2 if name == "validation_loss" else 20)
    assert numbers(two, "tokens") == numbers(one, "tokens")
    if stage == "downstream":
        assert numbers(two, "validation_auroc") == pytest.approx(numbers(one, "validation_auroc"))
    assert read_json(two / "run.json")["environment"]["ranks"] == 2
    assert output.count("step 20/20  validation") == 1
    # One rank takes up what two have left.
    run(replace(config, out=str(two)), resume=True, score=headline_metrics)


@pytest.mark.slow
def test_two_ranks_stop_and_go_on_together(
    make_config: Callable[..., RunConfig], tmp_path: Path, repository_root: Path
) -> None:
    config = make_config("clinical", steps=300, checkpoint_every=20, eval_every=100)
    one = run(replace(config, out=str(tmp_path / "one")))
    two = tmp_path / "two"
    arguments = as_file(replace(config, out=str(two)), tmp_path)
    code, output = launch(arguments, repository_root, stop_at=two / "checkpoints" / "step-000040")
    assert code != 0 and "stopped by SIGTERM after step" in output
    assert not read_json(two / "run.json")["finished"]
    code, output = launch(["--resume", "--out", str(two)], repository_root)
    assert code == 0 and "resumed after step" in output
    assert numbers(two, "loss") == pytest.approx(numbers(one, "loss"), rel=1e-4)


def test_one_rank_exchanges_nothing() -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    tensor = torch.ones(3)
    ranks.sum_tensors([tensor])
    ranks.wait()
    assert ranks.sum_floats([1.0, 2.0]) == [1.0, 2.0] and tensor.tolist() == [1.0, 1.0, 1.0]
    assert choose_device("cpu") == torch.device("cpu")
