"""The search: resumed where it was, judged by validation alone, refused in one line."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluation.cells
from evaluation import search as search_module
from evaluation.search import SPACES, best_of, main, search
from training.command_line import flag_types, read_command
from training.config import RunConfig
from training.run_folder import read_record

CHOICES = {"--lora.r": (1, 2), "--lr": (1e-3, 1e-2)}


@pytest.fixture
def shared(base: Path, notes: Path) -> list[str]:
    """The flags behind `--`: a classifier of seconds."""
    arguments = "--stage downstream --task label --label-column label --text-column text"
    arguments += " --patient-column patient --max-length 64 --batch-size 16 --steps 4"
    arguments += f" --eval-every 2 --device cpu --workers 1 --model {base} --data {notes}"
    return arguments.split()


def test_the_spaces_name_flags_of_the_command_line() -> None:
    known = flag_types(RunConfig)
    for choices in SPACES.values():
        assert choices.keys() <= known.keys()


def test_an_interrupted_search_ends_as_if_it_had_not_been(
    shared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(shared, CHOICES, tmp_path / "whole", trials=5, seed=3)
    real, calls = evaluation.cells.run, 0

    def dying(*args: Any, **kwargs: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluation.cells, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        search(shared, CHOICES, tmp_path / "broken", trials=5, seed=3)
    made = calls
    again = search(shared, CHOICES, tmp_path / "broken", trials=5, seed=3)
    assert again == whole
    distinct = {tuple(trial.settings.items()) for trial in whole}
    assert calls - made == len(distinct) - 1  # the first run was kept
    rows = list(csv.DictReader((tmp_path / "broken" / "trials.csv").open()))
    assert [float(row["validation"]) for row in rows] == [trial.value for trial in whole]
    longer = search(shared, CHOICES, tmp_path / "broken", trials=6, seed=3)
    assert longer[:5] == whole


def test_the_value_is_that_of_the_kept_validation(shared: list[str], tmp_path: Path) -> None:
    trials = search(shared, CHOICES, tmp_path, trials=2, seed=0)
    for trial in trials:
        if trial.same_as is None:
            kept = read_record(tmp_path / "trials" / f"{trial.number:03d}")["kept"]
            assert trial.value == kept["best"]["metrics"]["auroc"]
    assert best_of(trials).value == max(trial.value for trial in trials)


def test_of_a_language_model_the_smallest_loss_is_the_best(
    shared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, math.nan, 1.0, 3.0])

    def record(_: RunConfig) -> dict[str, Any]:
        return {"kept": {"best": {"metrics": {"loss": next(losses)}, "step": 1}}}

    monkeypatch.setattr(search_module, "finished_record", record)
    choices = {"--seed": tuple(range(100))}  # so many that none comes twice
    trials = search(shared, choices, tmp_path, trials=4, seed=0)
    assert [trial.value for trial in trials] == [-2.0, -math.inf, -1.0, -3.0]
    assert best_of(trials) is trials[2]


def test_the_command_refits_the_best_and_scores_the_test_notes_of_those_alone(
    shared: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(SPACES, "lr", {"--lr": (1e-3,)})  # type: ignore[arg-type]
    out = tmp_path / "search"
    own = f"--space lr --trials 2 --seeds 2 --bootstrap 10 --out {out} --".split()
    assert main([*own, *shared]) == 0
    summary = json.loads((out / "search.json").read_text())
    assert summary["runs"] == 1 and summary["trials"] == 2
    assert summary["test"]["metric"] == "auroc" and len(summary["test"]["values"]) == 2
    assert not (out / "trials" / "000" / "eval").exists()
    assert "best of 2" in capsys.readouterr().out
    # Another search in that folder is another run.
    shorter = [{"64": "32"}.get(word, word) for word in shared]
    assert main([*own, *shorter]) == 2
    assert "holds another run: --max-length was 64 and is 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "more", "said"),
    [
        (["--space", "lora", "--trials", "0"], [], "--trials must be at least 1"),
        (["--space", "lara"], [], "invalid choice"),
        (["--space", "lora"], ["--lora.r", "4"], "--lora.r is chosen by the search"),
        (["--space", "lora"], ["--out", "x"], "--out is chosen by the search"),
        (["--space", "prefix"], [], "--prefix"),
    ],
)
def test_mistakes_are_one_line(
    own: list[str],
    more: list[str],
    said: str,
    shared: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*own, "--out", str(tmp_path / "o"), "--", *shared, *more]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_without_optuna_it_says_what_to_install(
    shared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(search_module.sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="pip install 'optuna"):
        search(shared, CHOICES, tmp_path, trials=1, seed=0)


def test_switches_are_written_as_switches(shared: list[str], tmp_path: Path) -> None:
    config: Callable[..., RunConfig] = search_module._config
    on = config(shared, {"--lora.rslora": True}, tmp_path)
    off = config(shared, {"--lora.rslora": False}, tmp_path)
    assert on.lora.rslora and not off.lora.rslora
    assert read_command([*shared, "--out", str(tmp_path)]).config == off
