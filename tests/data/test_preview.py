"""What the preview says is what packing does, and no text leaves without a terminal."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from data.preview import main, printable
from data.prompts import PromptEncoder, Turn
from data.tokenizer import load_tokenizer
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


@pytest.mark.parametrize(
    ("stage", "flags", "found"),
    [
        ("clinical", ["--max-length", "65"], 65),
        ("downstream", [], 512),
        ("instruct", ["--max-length", "64"], None),
    ],
)
def test_segments_are_as_long_as_the_base_can_take(
    stage: str,
    flags: list[str],
    found: int | None,
    given: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    shutil.copy(Path(given[-1]) / "tokenizer.model", tmp_path)
    notes = given[1]
    if stage == "instruct":
        notes = str(tmp_path / "rows.jsonl")
        Path(notes).write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    words = ["--data", notes, "--model", str(tmp_path), "--stage", stage, *flags]
    assert main(words) == (0 if found is None else 2)
    said = capfd.readouterr().err
    assert (f"--max-length is {found}, but the base was made for at most 64" in said) == bool(found)


# Instruction rows ---------------------------------------------------------------------------------

ROWS = [
    {"instruction": "Name it.", "input": SECRET, "output": "pain and fever"},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is it fever?"},
            {"role": "assistant", "content": "pain"},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "fever"},
        ]
    },
    {"instruction": "Name it.", "input": "", "output": "pain " * 500},
]


@pytest.fixture(scope="module")
def rows(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return ["--data", str(path), *given[2:], "--stage", "instruct", "--max-length", "400"]


def told(shown: str, row: int) -> list[tuple[int, int, str, str]]:
    """First and last token, kind and what is said of each run of a row."""
    block = shown.split(f"\nrow {row}: ")[1].split("\nrow ")[0]
    found = re.findall(r"^ +(\d+)(?: to (\d+))?  (\S+) +((?:not )?scored)$", block, re.MULTILINE)
    return [(int(a), int(b or a), kind, scored) for a, b, kind, scored in found]


@pytest.mark.parametrize("name", ["alpaca", "llama-2", "mistral", "med42", "plain"])
def test_prompts_and_responses_are_shown_as_they_are_encoded(
    name, given: list[str], rows: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Against the encoder: every token once, BOS and EOS where they are, responses supervised."""
    assert main([*rows, "--prompt-format", name]) == 0
    shown = capfd.readouterr().out
    tokenizer = load_tokenizer(given[-1])
    encoder = PromptEncoder(tokenizer, name)
    row, chat = ROWS[0], ROWS[1]["messages"]
    conversations = [
        [Turn("user", row["instruction"], row["input"]), Turn("assistant", row["output"])],
        [Turn(said["role"], said["content"]) for said in chat],
    ]
    for number, turns in enumerate(conversations):
        ids, supervised = encoder.encode(turns)
        runs = told(shown, number)
        assert (runs[0][0], runs[-1][1]) == (0, len(ids) - 1)
        kinds, scored = [""] * len(ids), [False] * len(ids)
        for first, last, kind, said in runs:
            kinds[first : last + 1] = [kind] * (last + 1 - first)
            scored[first : last + 1] = [said == "scored"] * (last + 1 - first)
        assert scored == supervised
        for id, kind, is_supervised in zip(ids, kinds, supervised, strict=True):
            special = {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}.get(id)
            assert kind == (special or ("response" if is_supervised else "prompt"))
        assert kinds.count("EOS") == sum(turn.role == "assistant" for turn in turns)
        assert kinds.count("BOS") == (2 if number and name == "llama-2" else 1)
    assert f"prompt format: {name}, a response ends with token {tokenizer.eos_id}" in shown
    assert "left out: more tokens than --max-length 400" in shown.split("\nrow 2: ")[1]
    assert SECRET not in shown and "pain" not in shown


def test_with_inputs_trained_on_all_but_the_first_token_are_scored(
    rows: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*rows, "--train-on-inputs", "--notes", "1"]) == 0
    first, *others = told(capfd.readouterr().out, 0)
    assert first[:2] == (0, 0) and first[2:] == ("BOS", "not scored")
    assert others and all(scored == "scored" for *_, scored in others)


def test_text_of_rows_is_shown_on_a_terminal_alone(
    rows: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*rows, "--show-text"]) == 2
    assert SECRET not in "".join(capfd.readouterr())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*rows, "--show-text", "--notes", "1", "--prompt-format", "plain"]) == 0
    shown = capfd.readouterr().out
    assert f"text: Name it.\n\n{SECRET}\n" in shown and "text: pain and fever\n" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text-column", "text"], "reads rows and chats"),
        (["--prompt-format", "llama-3"], "which the tokenizer"),
        (["--prompt-format", "alpacca"], "invalid choice"),
    ],
)
def test_mistakes_with_rows_are_one_line(
    rows: list[str], flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*rows, *flags]) == 2
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1 and message in shown.err


def test_settings_of_rows_and_bad_rows(
    given: list[str], rows: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, "--bad-rows", "skip"]) == 2
    assert "settings of --stage instruct" in capfd.readouterr().err
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(rows[1]).read_text() + '{"instruction": "a"}\n', encoding="utf-8")
    assert main(["--data", str(path), *rows[2:]]) == 2
    assert "line 4" in capfd.readouterr().err
    assert main(["--data", str(path), *rows[2:], "--bad-rows", "skip"]) == 0
    assert "bad rows, left out: 1 with no input" in capfd.readouterr().out
