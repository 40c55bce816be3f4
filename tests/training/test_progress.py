"""Plain lines where there is no terminal, a bar where there is one, metrics that are cut back."""

import json
import sys
from pathlib import Path

import pytest

import training.progress
from training.progress import Progress

METRICS = {"loss": 1.5, "lr": 1e-3, "gradient_norm": 0.5, "tokens": 100}


def make(folder: Path | None, *, first: int = 0, lines: int = 0) -> Progress:
    return Progress(folder, total_steps=10, first_step=first, metrics_lines=lines)


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_plain_lines_say_first_last_and_now_and_then(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(training.progress.time, "perf_counter", lambda: clock[0])
    progress = make(tmp_path)
    for step in range(1, 11):
        clock[0] += 4.0
        progress.step(step, seconds=2.0, tokens=1000, metrics=METRICS)
    progress.validation(10, {"loss": 1.25, "perplexity": 3.5})
    progress.close()
    shown = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown] == ["1/10", "4/10", "7/10", "10/10", "10/10"]
    assert "500 tokens/s  left 0:00:24" in shown[1]
    assert shown[-1] == "step 10/10  validation: loss 1.2500  perplexity 3.5000"
    assert "\r" not in "".join(shown)
    records = lines_of(tmp_path)
    assert records[0] == {"step": 1, **METRICS, "tokens_per_second": 500.0}
    assert records[-1] == {"step": 10, "validation_loss": 1.25, "validation_perplexity": 3.5}


def test_a_terminal_gets_a_bar(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = make(tmp_path)
    for step in range(1, 11):
        progress.step(step, seconds=0.1, tokens=1000, metrics=METRICS)
    progress.say("a line")
    progress.close()
    shown = capfd.readouterr().err
    assert "10/10" in shown and "tokens/s" in shown and "a line" in shown


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    progress = make(tmp_path)
    for step in (1, 2):
        progress.step(step, seconds=0.1, tokens=1000, metrics=METRICS)
    lines = progress.sync()
    assert lines == 2
    progress.step(3, seconds=0.1, tokens=1000, metrics=METRICS)
    progress.close()
    assert len(lines_of(tmp_path)) == 3
    progress = make(tmp_path, first=2, lines=lines)
    progress.step(3, seconds=0.1, tokens=7, metrics=METRICS)
    progress.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    with pytest.raises(ValueError, match="shorter than when the checkpoint was written"):
        make(tmp_path, first=2, lines=4)


def test_other_ranks_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = make(None)
    progress.step(1, seconds=0.1, tokens=1000, metrics=METRICS)
    progress.validation(1, {"loss": 1.0})
    progress.say("nothing")
    assert progress.sync() == 0
    progress.close()
    assert capfd.readouterr() == ("", "")


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    progress = make(tmp_path)
    progress.step(1, seconds=0.1, tokens=1000, metrics=METRICS)
    progress.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
