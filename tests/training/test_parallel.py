"""Two ranks under torchrun are one run: the same losses, one set of files, stopped together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from evaluation.metrics import headline_metrics
from model.files import read_json
from training.assemble import base_parameters, build_model
from training.config import LoraSettings, RunConfig, to_dict
from training.estimate import spread_bytes
from training.notes import load_notes, make_dataset
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
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_stop_and_go_on_together(
    shard: bool, make_config: Callable[..., RunConfig], tmp_path: Path, repository_root: Path
) -> None:
    config = make_config("clinical", steps=300, checkpoint_every=20, eval_every=100)
    one = run(replace(config, out=str(tmp_path / "one")))
    two = tmp_path / "two"
    config = replace(config, shard=shard)
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


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("clinical", {"base_dtype": "int8", "activations": "checkpoint"}),
        ("downstream", {}),
    ],
    ids=["language, int8, checkpointing", "classifier"],
)
def test_a_base_spread_over_ranks_trains_as_a_whole_one(
    stage: str,
    changes: dict[str, object],
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    repository_root: Path,
) -> None:
    """Losses and gradients within 1e-5; checkpoints and files are those of a whole base.

    Micro-batches are small, so ranks have different numbers of them, and sometimes none.
    """
    notes = load_notes(make_config(stage))
    segments = len(make_dataset(make_config(stage), notes, notes.splits.train))
    batch_size = next(size for size in range(segments // 6, segments) if segments % size == 1)
    settings = {"batch_tokens": None, "batch_size": batch_size, "micro_tokens": 64, **changes}
    settings |= {"steps": 8, "lr": 1e-2, "max_length": 64}
    config = make_config(stage, **settings)
    whole = run(replace(config, out=str(tmp_path / "whole")), score=headline_metrics)
    spread = tmp_path / "spread"
    arguments = as_file(replace(config, shard=True, out=str(spread)), tmp_path)
    code, output = launch(arguments, repository_root)
    assert code == 0, output
    for name in ("loss", "gradient_norm", "validation_loss"):
        assert numbers(spread, name) == pytest.approx(numbers(whole, name), rel=1e-5)
    found = re.search(r"over 2 ranks: ([\d,]+) of ([\d,]+) parameters lie on the first", output)
    assert found is not None
    held, total = (int(group.replace(",", "")) for group in found.groups())
    trainable = read_json(spread / "run.json")["parameters"]["trainable"]
    assert held - trainable <= 0.51 * (total - trainable) + 1000
    # Two ranks that each hold the whole base come to the same bits.
    both = tmp_path / "both"
    code, output = launch(as_file(replace(config, out=str(both)), tmp_path), repository_root)
    assert code == 0, output
    files = sorted(both.rglob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        assert file.read_bytes() == (spread / file.relative_to(both)).read_bytes(), file
    # What both have left is whole, so that one rank takes it up.
    run(replace(config, out=str(spread)), resume=True, score=headline_metrics)


def test_eight_bit_states_beside_a_spread_base_are_those_beside_whole_ones(
    make_config: Callable[..., RunConfig], tmp_path: Path, repository_root: Path
) -> None:
    """To the bit, checkpoints of the states too."""
    config = make_config("clinical", steps=2, base_dtype="int8", lora=LoraSettings(r=128))
    config = replace(config, optim=replace(config.optim, states="int8"))
    for name, shard in (("whole", False), ("spread", True)):
        one = replace(config, shard=shard, out=str(tmp_path / name))
        code, output = launch(as_file(one, tmp_path), repository_root)
        assert code == 0, output
    files = sorted((tmp_path / "whole").rglob("*.safetensors"))
    names = set()
    for file in files:
        other = tmp_path / "spread" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes(), file
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    assert any("exp_avg_sq_root" in name for name in names)


def test_spreading_takes_several_ranks_and_a_frozen_base(
    make_config: Callable[..., RunConfig],
) -> None:
    with pytest.raises(ValueError, match="several ranks, but there is one: start them with"):
        run(make_config("clinical", shard=True))
    with pytest.raises(ValueError, match="--adapter full leaves nothing frozen"):
        make_config("clinical", shard=True, adapter="full")


def test_the_estimate_of_a_shared_base(make_config: Callable[..., RunConfig]) -> None:
    """A share of the base, and whole for a moment two blocks and what stands outside of them."""
    config = make_config("clinical")
    model = build_model(config, load_notes(config), torch.device("meta"))
    base = base_parameters(model)
    bytes_of = {name: p.nbytes for name, p in model.named_parameters()}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    inside = {
        i: sum(n for name, n in bytes_of.items() if f".{i}." in name and ".adapters." not in name)
        for i in range(len(model.network.blocks))
    }
    whole = sum(bytes_of.values()) - trained
    assert whole == sum(p.nbytes for p in base)
    outside, two = whole - sum(inside.values()), sum(sorted(inside.values())[-2:])
    assert spread_bytes(model, base, 4) == trained + buffers + -(-whole // 4) + outside + two
