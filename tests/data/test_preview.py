"""What the preview says is what packing does, and no text leaves without a terminal."""

import csv
import sys

import pytest

from data.preview import main, printable
from tests.data.conftest import train_sentencepiece

SECRET = "zebrafinch"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("preview")
    train_sentencepiece(folder / "tokenizer.model")
    with (folder / "notes.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [
            ("text", "label"),
            (f"{SECRET} pain", "yes"),
            (" ".join(["pain"] * 40), "no"),
            ("fever", "no"),
        ]
        csv.writer(file).writerows(rows)
    return ["--data", str(folder / "notes.csv"), "--model", str(folder)]


def test_pieces_positions_and_masks(given: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*given, "--max-length", "20", "--notes", "2"]) == 0
    shown = capfd.readouterr().out
    assert "note in row 1: 40 tokens" in shown and "row 2" not in shown
    second = shown.split("note in row 1")[1].splitlines()
    # BOS + 40 tokens + EOS, cut into 20 + 20 + 4 that overlap by one: 41 are scored.
    heads = [line.strip() for line in second if "segment " in line and " of " in line]
    assert heads == [
        "segment 1 of 3: 20 tokens at positions 0 to 19, 19 scored",
        "segment 2 of 3: 20 tokens at positions 0 to 19, 19 scored",
        "segment 3 of 3: 4 tokens at positions 0 to 3, 3 scored",
    ]
    assert [line.split() for line in second if "BOS" in line] == [
        ["0", "BOS", "not", "scored:", "nothing", "stands", "before", "it"]
    ]
    assert [line.split() for line in second if "EOS" in line] == [["3", "EOS", "scored"]]
    assert SECRET not in shown and "pain" not in shown


def test_truncation(given: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    flags = "--stage downstream --label-column label --max-length 20 --truncate tail --notes 3"
    assert main([*given, *flags.split()]) == 0
    shown = capfd.readouterr().out
    assert shown.count("truncated:") == 1
    assert "truncated: 21 tokens are left out, the tail is kept" in shown
    assert "40 tokens, label 'no'" in shown


def test_text_is_refused_without_a_terminal(
    given: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*given, "--show-text"]) == 2
    shown = capfd.readouterr()
    assert not shown.out and shown.err.count("\n") == 1 and "on a terminal only" in shown.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*given, "--show-text", "--notes", "1"]) == 0
    assert SECRET in capfd.readouterr().out


def test_a_note_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\nd\u202e") == "a\\x1b[2Jb\\tc\nd\\u202e"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--notes", "0"], "--notes must be from 1 to 1000, got 0"),
        (["--max-length", "1"], "max length is 1"),
        (["--text-column", "absent"], "absent"),
        (["--show"], "--show is not a flag; did you mean --show-text?"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str], flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, *flags]) == 2
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1 and message in shown.err
