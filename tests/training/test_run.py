"""Whole runs of seconds: resume to the same bytes, what trains and what not, files, privacy."""

import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model.quantise
import train
import training.loop
import training.run
from evaluation.metrics import headline_metrics
from model.activations import Activations
from model.checkpoint import load_causal_lm
from model.ending import RunFailed
from model.files import read_json, read_sealed_json, write_sealed_json
from model.linear import Linear
from tests.training.conftest import CANARY_PATIENT, CANARY_TEXT
from training.assemble import restore
from training.checkpoint import load_checkpoint, saved_steps
from training.config import Int8Settings, LoraSettings, RunConfig, to_dict
from training.loop import is_better
from training.objective import compute_dtype
from training.record import identity, peak_memory
from training.run import run
from training.run_folder import locked, read_record

MakeConfig = Callable[..., RunConfig]
WALL_CLOCK = ("tokens_per_second",)  # what differs between two runs of the same steps


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(out) if "loss" in line]


def metrics_of(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def weights_and_states(out: Path) -> dict[str, bytes]:
    """The bytes of every tensor that a run leaves, last checkpoint included, by file and name."""
    last = f"step-{saved_steps(out / 'checkpoints')[-1]:06d}"
    return {
        f"{path.relative_to(out)}: {name}": tensor.numpy().tobytes()
        for path in sorted(out.rglob("*.safetensors"))
        if "checkpoints" not in path.parts or path.parent.name == last
        for name, tensor in load_file(path).items()
    }


class Dies(BaseException):
    """Ends a run where a pulled plug would: nothing is written after it."""


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run take `step` steps and die in the middle of the next."""
    real, taken = training.loop.optimiser_step, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > step:
            raise Dies
        return real(*args, **kwargs)

    monkeypatch.setattr(training.loop, "optimiser_step", dying)


@pytest.mark.parametrize(
    ("stage", "states", "activations"),
    [
        ("clinical", "float32", "save"),
        ("downstream", "float32", "selective"),
        ("pretrain", "int8", "checkpoint"),
    ],
)
def test_a_resumed_run_ends_in_the_same_bytes(
    stage: str,
    states: str,
    activations: Activations,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed twice: before the first checkpoint, and between two of them.

    The whole run keeps all activations, so that what is made again is held to the same bytes.
    """
    config = make_config(stage, adapter="full" if stage == "pretrain" else "lora")
    config = replace(config, optim=replace(config.optim, states=states))
    whole = run(replace(config, out=str(tmp_path / "whole")), score=headline_metrics)
    broken = replace(config, out=str(tmp_path / "broken"), activations=activations)
    for steps, resume in ((1, False), (5, True)):
        with monkeypatch.context() as patch, pytest.raises(Dies):
            die_at(steps, patch)
            run(broken, score=headline_metrics, resume=resume)
    assert saved_steps(tmp_path / "broken" / "checkpoints")[-1] == 4
    out = run(broken, score=headline_metrics, resume=True)
    assert metrics_of(out) == metrics_of(whole)
    assert weights_and_states(out) == weights_and_states(whole)
    assert any("exp_avg_sq_root" in n for n in weights_and_states(out)) == (states == "int8")
    kept = {"kept", "finished", "total_steps", "fingerprints", "labels", "adapters"}
    records = [read_json(folder / "run.json") for folder in (out, whole)]
    assert {k: records[0][k] for k in kept} == {k: records[1][k] for k in kept}
    assert records[0]["config"]["activations"] == activations


def test_patience_ends_a_run_and_a_resumed_one_at_the_same_step(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The AUROC falls after the second validation: two more and the run is over, at step 8."""
    aurocs = [0.5, 0.7, 0.6, 0.69, 0.9, 0.9]

    def score_from(validation: int) -> Callable[..., dict[str, float]]:
        left = iter(aurocs[validation:])
        return lambda *_: {"auroc": next(left)}

    config = make_config("downstream", steps=12, patience=2)
    whole = run(replace(config, out=str(tmp_path / "whole")), score=score_from(0))
    assert "stopped after step 8 of 12" in capfd.readouterr().err
    kept = read_json(whole / "run.json")["kept"]
    assert (kept["step"], kept["last_step"], kept["best"]["metrics"]["auroc"]) == (4, 8, 0.7)
    assert read_json(whole / "run.json")["config"]["patience"] == 2
    broken = replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(Dies):
        die_at(7, patch)
        run(broken, score=score_from(0))
    # Of step 6: one validation has not been better. The rest of the run sees one more.
    out = run(broken, score=score_from(3), resume=True)
    assert metrics_of(out) == metrics_of(whole)
    assert weights_and_states(out) == weights_and_states(whole)
    # Killed when all steps were taken and nothing else was written: no further step.
    run(broken, score=score_from(0), resume=True)
    assert weights_and_states(out) == weights_and_states(whole)
    assert read_json(out / "run.json")["kept"] == kept
    patient = run(replace(config, patience=3, out=str(tmp_path / "more")), score=score_from(0))
    assert read_json(patient / "run.json")["kept"]["last_step"] == 12


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config("clinical")
    whole = run(replace(config, out=str(tmp_path / "whole")))
    out = run(config)
    weights = out / "checkpoints" / "step-000008" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    # The damaged folder makes way only when a good one of its step is written.
    run(config, resume=True)
    shown = capfd.readouterr().err
    assert "weights.safetensors is damaged" in shown and "resumed after step 6 of 8" in shown
    assert weights_and_states(out) == weights_and_states(whole)


def test_resuming_a_finished_run_changes_nothing(make_config: MakeConfig) -> None:
    config = make_config("clinical")
    before = weights_and_states(run(config))
    assert weights_and_states(run(config, resume=True)) == before


def test_the_peak_of_memory_is_that_of_the_run_alone(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process held before is not in it; what a step held for a moment is."""
    moment = 400 << 20
    np.ones(moment, np.uint8)
    config = make_config("clinical", steps=2)
    low = read_json(run(config) / "run.json")["peak_memory"]
    step = training.loop.optimiser_step

    def greedy(*args: Any, **kwargs: Any) -> Any:
        np.ones(moment, np.uint8)
        return step(*args, **kwargs)

    monkeypatch.setattr(training.loop, "optimiser_step", greedy)
    high = read_json(run(config, overwrite=True) / "run.json")["peak_memory"]
    assert 0.8 * moment < high - low < 1.2 * moment
    monkeypatch.undo()
    # Taking no step, a finished run that is resumed keeps what it was.
    assert read_json(run(config, resume=True) / "run.json")["peak_memory"] >= high


def test_a_system_that_tells_no_peak_still_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some kernels leave VmHWM out of /proc/self/status; the process's own account is there."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmSize:\t  123 kB\n")
    monkeypatch.setattr("training.record._STATUS", status)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if platform.system() == "Darwin" else 1024
    assert used * unit <= peak_memory(torch.device("cpu")) < 1 << 40


@pytest.mark.parametrize("freeze", [True, False])
def test_the_init_adapter_trains_unless_it_is_frozen(make_config: MakeConfig, freeze: bool) -> None:
    first = run(make_config("clinical"))
    config = make_config(
        "downstream", init_adapter=str(first), freeze_init_adapter=freeze, keep="last", lr=1e-2
    )
    out = run(config)
    name = "adapter_model.safetensors"
    before = load_file(first / "adapter" / "clinical" / name)
    after = load_file(out / "adapter" / "clinical" / name)
    assert all(torch.equal(before[k], after[k]) == freeze for k in before)
    downstream = load_file(out / "adapter" / "downstream" / name)
    assert all(tensor.any() for key, tensor in downstream.items() if "lora_B" in key)
    head = load_file(out / "head.safetensors")["score.weight"]
    assert torch.equal(downstream["base_model.model.score.weight"], head)
    saved = set(
        load_checkpoint(out / "checkpoints" / "step-000008", run=identity(read_record(out))).weights
    )
    assert any("clinical" in key for key in saved) != freeze
    assert read_json(out / "run.json")["adapters"] == ["clinical", "downstream"]


@pytest.mark.parametrize("adapter", ["none", "full"])
def test_downstream_without_a_new_adapter(make_config: MakeConfig, adapter: str) -> None:
    out = run(make_config("downstream", adapter=adapter, lora=LoraSettings()))
    restored = restore(out, torch.device("cpu"))
    assert restored.record["adapters"] == []
    head = load_file(out / "head.safetensors")["score.weight"]
    assert torch.equal(restored.model.score.weight, head)
    assert (out / "model").is_dir() == (adapter == "full")
    assert not (out / "adapter").exists()


def test_a_clinical_adapter_is_continued(make_config: MakeConfig, tmp_path: Path) -> None:
    first = run(make_config("clinical"))
    config = make_config(
        "clinical", adapter="none", init_adapter=str(first), lora=LoraSettings(), out=tmp_path / "b"
    )
    second = run(config)
    states = [load_file(f / "adapter/clinical/adapter_model.safetensors") for f in (first, second)]
    assert all(not torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_pretraining_from_scratch_writes_a_base(make_config: MakeConfig, base: Path) -> None:
    config = make_config(
        "pretrain", from_scratch=True, adapter="full", lora=LoraSettings(), steps=30, lr=1e-2
    )
    out = run(config)
    losses = [line["loss"] for line in metrics_of(out) if "loss" in line]
    assert losses[0] == pytest.approx(np.log(512), abs=0.5) and losses[-1] < losses[0] - 1
    model = load_causal_lm(out / "model")
    assert (out / "model" / "tokenizer.model").read_bytes() == (
        base / "tokenizer.model"
    ).read_bytes()
    other = run(replace(config, out=f"{out}-other-seed", seed=1))
    assert not torch.equal(model.head_weight, load_causal_lm(other / "model").head_weight)
    clinical = run(make_config("clinical", model=str(out / "model"), steps=2))
    assert read_json(clinical / "run.json")["finished"]


def test_the_best_validation_is_kept_or_the_last(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [5.0, 3.0, 4.0, 6.0, 3.0, 4.0, 4.0, 4.0] * 2
    monkeypatch.setattr(training.run, "validate_language", lambda *_, **__: {"loss": losses.pop(0)})
    config = make_config("clinical", eval_every=1)
    out = run(replace(config, out=str(tmp_path / "best")))
    assert read_json(out / "run.json")["kept"]["step"] == 2
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in (2, 7, 8)
    ]
    assert saved_steps(out / "checkpoints") == [2, 7, 8]
    last = run(replace(config, out=str(tmp_path / "last"), keep="last"))
    assert read_json(last / "run.json")["kept"]["step"] == 8

    def sums(tensors: Mapping[str, torch.Tensor]) -> list[float]:
        return sorted(float(tensor.sum()) for tensor in tensors.values())

    for folder, step in ((out, 2), (last, 8)):
        adapter = load_file(folder / "adapter/clinical/adapter_model.safetensors")
        path = last / "checkpoints" / f"step-{step:06d}"
        checkpoint = load_checkpoint(path, run=identity(read_record(last)))
        assert sums(adapter) == sums(checkpoint.weights)


def test_a_higher_auroc_is_better_then_a_lower_loss() -> None:
    def best(**metrics: float) -> Mapping[str, Any]:
        return {"step": 1, "metrics": metrics}

    assert is_better({"loss": 9.0}, None)
    assert is_better({"loss": 1.0}, best(loss=2.0))
    assert not is_better({"loss": 2.0}, best(loss=2.0))
    assert is_better({"loss": 3.0, "auroc": 0.8}, best(loss=2.0, auroc=0.7))
    assert not is_better({"loss": 1.0, "auroc": 0.6}, best(loss=2.0, auroc=0.7))
    assert is_better({"loss": 1.0, "auroc": 0.7}, best(loss=2.0, auroc=0.7))
    assert not is_better({"loss": 1.0}, best(loss=2.0, auroc=0.7))


def test_a_loss_that_is_not_finite_ends_the_run(make_config: MakeConfig) -> None:
    config = make_config("clinical", lr=1e30, steps=8, checkpoint_every=1, eval_every=8)
    config = replace(config, optim=replace(config.optim, clip=None, warmup_steps=8))
    with pytest.raises(RunFailed) as failed:
        run(config)
    assert "was not taken: the loss is" in str(failed.value)
    steps = saved_steps(Path(config.out) / "checkpoints")
    assert f"the last good checkpoint is {config.out}/checkpoints/step-{steps[-1]:06d}" in str(
        failed.value
    )


def test_a_full_disk_ends_the_run_and_names_the_last_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("clinical")
    real, saves = training.loop.save_checkpoint, 0

    def full(*args: Any, **kwargs: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves == 3:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(training.loop, "save_checkpoint", full)
    with pytest.raises(RunFailed, match=r"step 6: .*No space left on device.*step-000004"):
        run(config)


# Refusals -----------------------------------------------------------------------------------------


def test_a_second_run_names_resume_and_overwrite(make_config: MakeConfig) -> None:
    config = make_config("clinical", steps=2)
    before = weights_and_states(run(config))
    with pytest.raises(ValueError, match=r"--resume.*--overwrite"):
        run(config)
    assert weights_and_states(Path(config.out)) == before
    (Path(config.out) / "eval").mkdir()
    run(replace(config, seed=1), overwrite=True)
    assert weights_and_states(Path(config.out)) != before
    assert not (Path(config.out) / "eval").exists()


def test_a_folder_of_other_things_is_never_touched(make_config: MakeConfig, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not empty and not a run's folder"):
            run(make_config("clinical", out=theirs), overwrite=overwrite)
    out = run(make_config("clinical", steps=2))
    (out / "thesis.txt").write_text("years of work")
    run(make_config("clinical", steps=2), overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    link = tmp_path / "link"
    link.symlink_to(theirs)
    with pytest.raises(ValueError, match="symbolic link"):
        run(make_config("clinical", out=link))
    with pytest.raises(ValueError, match="is a file"):
        run(make_config("clinical", out=theirs / "thesis.txt"))


def test_a_folder_in_use_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "busy"
    with locked(out), pytest.raises(ValueError, match="in use by another run"):
        run(make_config("clinical", out=out))
    run(make_config("clinical", out=out, steps=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, "--lr was 0.02 and is 0.5"),
        ({"seed": 3}, "--seed was 0 and is 3"),
        ({"lora": LoraSettings(r=2, dropout=0.1)}, "--lora.r was 4 and is 2"),
        ({"steps": 9}, "--steps was 8 and is 9"),
        ({"max_length": 16}, "--max-length was 32 and is 16"),
        ({"test_share": 0.4}, "--test-share was 0.3 and is 0.4"),
    ],
)
def test_another_setting_is_not_resumed(
    make_config: MakeConfig, change: dict[str, Any], message: str
) -> None:
    run(make_config("clinical"))
    with pytest.raises(ValueError, match=message):
        run(make_config("clinical", **change), resume=True)


def test_other_notes_or_another_base_are_not_resumed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    import shutil

    config = make_config("clinical", steps=2)
    base, notes = tmp_path / "base", tmp_path / "notes.csv"
    shutil.copytree(config.model, base)
    shutil.copy(config.data, notes)
    run(config)
    moved = replace(config, model=str(base), data=str(notes))
    run(moved, resume=True)  # the same content elsewhere is the same run
    with notes.open("a") as file:
        file.write("one more,P-1,yes\n")
    with pytest.raises(ValueError, match="the content of the data is not what it was"):
        run(moved, resume=True)
    shutil.copy(config.data, notes)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match="the content of the base is not what it was"):
        run(moved, resume=True)
    for given in (config.out, f"{config.out}/adapter/clinical"):
        with pytest.raises(ValueError, match="was trained on another base"):
            run(
                make_config(
                    "downstream", model=str(base), init_adapter=given, out=tmp_path / "next"
                )
            )


def test_what_cannot_be_an_init_adapter_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        run(make_config("downstream", init_adapter=str(tmp_path / "nowhere")))
    out = run(make_config("clinical", steps=2))
    unfinished = read_sealed_json(out / "run.json")
    (out / "adapter" / "clinical").rename(out / "adapter" / "other")
    with pytest.raises(ValueError, match='a run without an adapter "clinical"'):
        run(make_config("downstream", init_adapter=str(out)))
    write_sealed_json(out / "run.json", unfinished | {"finished": False})
    with pytest.raises(ValueError, match="has not ended; continue it with --resume"):
        restore(out, torch.device("cpu"))


def test_lengths_beyond_the_base_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"--max-length is 400, .*at most 256 positions"):
        run(make_config("clinical", max_length=400, batch_tokens=800))


# A process of its own -----------------------------------------------------------------------------


def command_of(config: RunConfig, tmp_path: Path) -> list[str]:
    file = tmp_path / f"{Path(config.out).name}.json"
    file.write_text(json.dumps(to_dict(config)))
    return [sys.executable, "train.py", "--config", str(file)]


def start(command: list[str], repository_root: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=repository_root, env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_saves_and_exits_with_143_and_sigkill_loses_little(
    make_config: MakeConfig, tmp_path: Path, repository_root: Path
) -> None:
    config = make_config("clinical", steps=200, eval_every=100, checkpoint_every=10)
    whole = run(replace(config, out=str(tmp_path / "whole")))
    config = replace(config, out=str(tmp_path / "broken"))
    checkpoints = Path(config.out) / "checkpoints"

    killed = start(command_of(config, tmp_path), repository_root)
    wait_for(checkpoints / "step-000010", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    at_the_kill = saved_steps(checkpoints)[-1]

    resume = [sys.executable, "train.py", "--resume", "--out", config.out]
    stopped = start(resume, repository_root)
    wait_for(checkpoints / f"step-{at_the_kill + 20:06d}", stopped)
    stopped.send_signal(signal.SIGTERM)
    _, shown = stopped.communicate()
    assert stopped.returncode == 143
    newest = saved_steps(checkpoints)[-1]
    assert f"stopped by SIGTERM after step {newest}, which is saved" in shown
    assert "Traceback" not in shown

    ended = start(resume, repository_root)
    ended.communicate()
    assert ended.returncode == 0
    assert metrics_of(Path(config.out)) == metrics_of(whole)
    assert weights_and_states(Path(config.out)) == weights_and_states(whole)


def test_a_run_opens_no_socket_writes_no_text_and_keeps_to_itself(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    first = make_config("clinical")
    second = make_config("downstream", init_adapter=first.out)
    for config in (first, second):
        assert train.main(command_of(config, tmp_path)[2:]) == 0
    shown = capfd.readouterr()
    for config in (first, second):
        out = Path(config.out)
        allowed = {
            "run.json", "metrics.jsonl", "tensorboard", "adapter", "checkpoints",
            *(["head.safetensors"] if config.stage == "downstream" else []),
        }  # fmt: skip
        assert {path.name for path in out.iterdir()} == allowed
        for path in (out, *out.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    cache = tmp_path / "runs" / "token-cache"
    for path in (cache, *cache.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    for canary in (CANARY_TEXT, CANARY_PATIENT):
        assert canary not in shown.out + shown.err
        for path in (tmp_path / "runs").rglob("*"):
            assert path.is_dir() or canary.encode() not in path.read_bytes(), path


def test_a_failure_is_one_line_and_its_own_exit_code(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config("clinical", lr=1e30)
    config = replace(config, optim=replace(config.optim, clip=None))
    arguments = command_of(config, tmp_path)[2:]
    assert train.main(arguments) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: step ") and "was not taken" in last
    assert train.main([*arguments, "--overwrite", "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_a_base_in_bfloat16_is_computed_in_float32_on_a_cpu(make_config: MakeConfig) -> None:
    out = run(make_config("clinical", base_dtype="bfloat16", steps=2))
    wide = run(make_config("clinical", steps=2, out=f"{out}-float32"))
    assert metrics_of(out)[0]["loss"] == pytest.approx(metrics_of(wide)[0]["loss"], rel=1e-2)
    assert metrics_of(out)[0]["loss"] != metrics_of(wide)[0]["loss"]
    restored = restore(out, torch.device("cpu"))
    assert restored.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert compute_dtype(restored.model, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("stage", ["clinical", "downstream"])
def test_a_base_in_int8_trains_resumes_and_is_restored(
    stage: str,
    compute: str,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its losses are nearly those of the float base, and its weights are int8 all the way."""
    floating = run(make_config(stage, steps=4, out=str(tmp_path / "floating")))
    int8 = Int8Settings(compute=compute)  # type: ignore[arg-type]
    config = make_config(stage, steps=4, base_dtype="int8", int8=int8)
    whole = run(replace(config, out=str(tmp_path / "whole")))
    broken = replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(Dies):
        die_at(3, patch)
        run(broken)
    out = run(broken, resume=True)
    assert weights_and_states(out) == weights_and_states(whole)
    losses, expected = losses_of(out), losses_of(floating)
    assert losses == pytest.approx(expected, rel=0.02) and losses != expected
    restored = restore(out, torch.device("cpu")).model
    layers = [m for m in restored.modules() if isinstance(m, Linear)]
    assert all(m.weight.dtype == torch.int8 for m in layers)
    assert {m.is_int8_math for m in layers} == {compute == "int8"}


def test_a_base_that_is_stored_as_int8_is_held_so(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("clinical", steps=2)
    assert config.model is not None
    quantised = tmp_path / "quantised"
    command = ["--model", config.model, "--out", str(quantised)]
    assert model.quantise.main(command) == 0
    assert model.quantise.main(command) == 2  # the folder is there
    out = run(replace(config, model=str(quantised)))
    assert read_json(out / "run.json")["config"]["base_dtype"] == "int8"
    same = run(replace(config, base_dtype="int8", out=f"{out}-same"))
    assert losses_of(out) == losses_of(same)
