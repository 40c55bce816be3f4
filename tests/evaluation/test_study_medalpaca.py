"""MedAlpaca's study: its rows, what they took, and that a killed one ends in the same table."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.questions import USMLE_IMAGES
from evaluation.published import FOOTPRINT, USMLE
from evaluation.study_medalpaca import ROWS, STEPS, main
from tests.conftest import ROOT
from tests.data.conftest import WORDS
from tests.evaluation.conftest import tables_of
from training.run_folder import read_record

CONFIG = """prompt-format: plain
max-length: 64
batch-size: 8
steps: 2
optim: {warmup-steps: 0}
device: cpu
workers: 1
"""
BAD_ROWS = '{"instruction": "a", "input": "", "output": "b"}\n{"instruction": \n'


def write_rows(path: Path) -> Path:
    rng = random.Random(0)
    rows = [
        {"instruction": "Say it.", "input": " ".join(rng.choices(WORDS, k=5)), "output": "A"}
        for _ in range(60)
    ]
    path.write_text(json.dumps(rows))
    return path


def write_usmle(folder: Path, each: int) -> Path:
    """Three steps of `each` questions, and one with an image in front of them."""
    folder.mkdir()
    for step in STEPS:
        numbers = sorted(set(range(1, 60)) - USMLE_IMAGES[step])[:each]
        asked = [min(USMLE_IMAGES[step]), *numbers]
        rows = [
            {"no": no, "question": f"{WORDS[no % 9]} {no}?", "options": {"A": "pain", "B": "fever"}}
            for no in asked
        ]
        (folder / f"{step}.json").write_text(json.dumps(rows))
        solutions = {str(no): "AB"[no % 2] for no in asked}
        (folder / f"{step}_solutions.json").write_text(json.dumps(solutions))
    return folder


@pytest.fixture(scope="module")
def words(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command's arguments but for --out."""
    folder = tmp_path_factory.mktemp("medalpaca")
    (folder / "instruct.yaml").write_text(CONFIG)
    return [
        *("--data", str(write_rows(folder / "rows.json"))),
        *("--questions", str(write_usmle(folder / "usmle", 4))),
        *("--models", f"llama-7b={base}", "--instruct-config", str(folder / "instruct.yaml")),
        *("--bootstrap", "0", "--prompt", "letter"),
    ]


def test_every_row_trained_what_it_says_and_sat_every_step(whole: Path) -> None:
    table = json.loads((whole / "study.json").read_text())
    assert [row["row"] for row in table["rows"]] == list(ROWS)
    base, *tuned = table["rows"]
    assert "trainable" not in base and base["published_footprint"] is None
    for row in tuned:
        record = read_record(whole / "tuned" / "llama-7b" / row["row"])
        assert row["peak_memory"] == record["peak_memory"] > 1 << 20
        assert row["seconds_per_epoch"] > 0 and row["train_rows"] == record["counts"]["train_notes"]
        assert row["published_footprint"] == list(FOOTPRINT["llama-7b", row["row"]])
        config = record["config"]
        assert (config["adapter"], config["base_dtype"]) == {
            "full": ("full", "float32"), "lora": ("lora", "float32"), "lora-8bit": ("lora", "int8"),
        }[row["row"]]  # fmt: skip
        assert config["lr"] == 2e-5  # the recipe's, which the file does not change
    assert tuned[0]["trainable"] > tuned[1]["trainable"] == tuned[2]["trainable"]
    for row in table["rows"]:
        assert [row["steps"][step]["n"] for step in STEPS] == [4, 4, 4]
        assert row["published"] == list(USMLE["llama-7b", row["row"]])
        assert row["questions"]["step1 image questions"] == 1
        (answers,) = whole.rglob(f"{row['row']}.json")
        kept = json.loads(answers.read_text())["results"]
        assert {step: kept["per_step"][step]["accuracy"] for step in STEPS} == {
            step: row["steps"][step]["accuracy"] for step in STEPS
        }


def test_the_table_is_readable_and_has_what_was_published(whole: Path) -> None:
    text = (whole / "study.md").read_text()
    assert "of 4 (29.7) |" in text and "(79.5) |" in text and "(35:30) |" in text
    assert "| llama-13b, full | 47.3 | 47.7 | 60.2 |" in text and "| ChatDoctor |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


@pytest.mark.usefixtures("nothing_made")
def test_a_finished_study_makes_nothing_again(words: list[str], whole: Path) -> None:
    before = tables_of(whole)
    assert main([*words, "--out", str(whole)]) == 0
    assert tables_of(whole) == before


def test_a_study_that_is_asked_otherwise_asks_again(words: list[str], whole: Path) -> None:
    before = tables_of(whole)
    assert main([*words[:-1], "choice", "--out", str(whole), "--rows", "base"]) == 0
    kept = json.loads((whole / "answers" / "llama-7b" / "base.json").read_text())
    assert tables_of(whole)["prompt"] == kept["results"]["strategy"] == "choice"
    assert main([*words, "--out", str(whole)]) == 0
    assert tables_of(whole) == before


def test_killed_and_called_again_it_ends_in_the_same_table(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    command = [sys.executable, "-m", "tests.evaluation.kill_study", "evaluation.study_medalpaca"]
    command += [str(out), "20,60,110,30", *words, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[:4] == [str(-signal.SIGKILL)] * 4, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "0", done.stderr[-2000:]
    assert tables_of(out) == tables_of(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--models": "tiny"}, "--models takes NAME=DIR"),
        ({"--models": "tiny=/nowhere"}, "there is no folder /nowhere"),
        ({"--questions": "/nowhere"}, "/nowhere does not exist"),
        ({"--rows": "qlora"}, "invalid choice"),
        ({"--instruct-config": "/nowhere"}, "--config /nowhere does not exist"),
        ({"--data": "/nowhere.json"}, "/nowhere.json: no such file"),
        ({"--data": "BAD"}, "line 2: the row that begins there has no valid JSON"),
        ({"--bootstrap": "-1", "--rows": "lora"}, "--bootstrap must be at least 0"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_made(
    change: dict[str, str],
    said: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.jsonl").write_text(BAD_ROWS)
    change = {name: str(tmp_path / "bad.jsonl") if v == "BAD" else v for name, v in change.items()}
    given = dict(zip(words[::2], words[1::2], strict=True)) | change
    out = tmp_path / "out"
    assert main([word for pair in given.items() for word in pair] + ["--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not out.exists()


def test_the_published_figures_are_whole() -> None:
    assert len(USMLE) == 9 and all(len(row) == len(STEPS) for row in USMLE.values())
    # Its best model, as shares of the questions that must have been scored.
    shares = [round(right / n, 3) for right, n in ((43, 91), (52, 109), (74, 123))]
    assert list(USMLE["llama-13b", "full"]) == shares
