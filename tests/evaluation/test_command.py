"""eval.py as it is typed: what it says, and its exit codes."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

import eval as command
from tests.evaluation.conftest import settings
from training.run import run
from training.stages import clinical


def test_it_says_the_perplexities(clinical_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--run", str(clinical_run), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "notes of the test split" in lines[0]
    assert lines[1].startswith("perplexity ")
    assert "the base alone" in lines[1]


def test_it_says_the_outcome_metrics(
    downstream_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--run", str(downstream_run), "--bootstrap", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["accuracy", "f1", "auroc", "auprc", "calibration"]
    assert [line.split()[0] for line in lines[1:]] == names
    assert all("[" in line for line in lines[1:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run is missing"),
        (["--run", "absent"], "absent holds no run"),
        (["--rum", "x"], "did you mean --run?"),
        (["--run", "x", "--run", "y"], "--run is given twice"),
        (["--run", "x", "--split", "tset"], "did you mean test?"),
        (["--run", "x", "--bootstrap", "-3"], "--bootstrap must be at least 0, got -3"),
        (["--run", "x", "--bootstrap", "many"], "--bootstrap must be a whole number"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("eval.py: ")


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        command.main(["--help"])
    assert ending.value.code == 0
    assert "--predict" in capsys.readouterr().out


def test_an_unexpected_fault_shows_its_kind_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(_: object) -> None:
        raise KeyError("the text of a note")

    monkeypatch.setattr(command, "score_run", fault)
    assert command.main(["--run", "x"]) == 1
    assert "KeyError" in (shown := capsys.readouterr().err)
    assert "the text of a note" not in shown
    assert command.main(["--run", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_run_and_its_scoring_open_no_connection(
    base: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    out = run(replace(settings(clinical(), base, notes, tmp_path / "run"), steps=1))
    assert command.main(["--run", str(out), "--device", "cpu"]) == 0
