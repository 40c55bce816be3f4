"""The study: cells made once, gone on with after a kill, tables that say what the cells found."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data.synthetic import make_cohort
from evaluation.published import ADAPTATION, OUTCOMES, TASKS
from evaluation.study import (
    DECODER_ROWS,
    ENCODER_ROWS,
    Study,
    _cell,
    _macro,
    adaptation_config,
    main,
    outcome_configs,
    outcome_rows,
    train_perplexity,
)
from tests.conftest import ROOT
from tests.evaluation.conftest import tables_of
from training.run_folder import read_record

CLINICAL = "max-length: 64\nbatch-tokens: 1024\nsteps: 3\ndevice: cpu\nworkers: 1\n"
DOWNSTREAM = "max-length: 64\nbatch-size: 16\nsteps: 3\ndevice: cpu\nworkers: 1\n"


@pytest.fixture(scope="module")
def words(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command's arguments but for --out: one decoder, two methods, one task."""
    folder = tmp_path_factory.mktemp("study")
    make_cohort(folder / "cohort", patients=160)
    (folder / "clinical.yaml").write_text(CLINICAL)
    (folder / "downstream.yaml").write_text(DOWNSTREAM)
    return [
        *("--data", str(folder / "cohort" / "mimic-iii")),
        *("--notes", str(folder / "cohort" / "mimic-iv-note")),
        *("--models", f"tiny={base}", "--tasks", "mor", "--methods", "lora", "prompt"),
        *("--clinical-config", str(folder / "clinical.yaml"), "--bootstrap", "20"),
        *("--downstream-config", str(folder / "downstream.yaml")),
    ]


def test_every_cell_is_a_run_that_trained_what_its_row_says(whole: Path) -> None:
    tables = tables_of(whole)
    assert [row["method"] for row in tables["adaptation"]] == ["lora", "prompt"]
    assert sum(row["chosen"] for row in tables["adaptation"]) == 1
    assert [line["variant"] for line in tables["outcomes"]] == list(DECODER_ROWS)
    trained = {
        "head": [], "lora": ["downstream"], "frozen": ["clinical"], "trainable": ["clinical"],
        "frozen+downstream": ["clinical", "downstream"],
        "trainable+downstream": ["clinical", "downstream"],
    }  # fmt: skip
    counts = {}
    for line in tables["outcomes"]:
        record = read_record(whole / "outcomes" / "tiny" / line["variant"] / "mor" / "seed-0")
        assert record["adapters"] == trained[line["variant"]]
        counts[line["variant"]] = record["parameters"]["trainable"]
        cell = line["tasks"]["mor"]
        assert line["auroc_macro"] == cell["auroc"]
        results = whole / "outcomes" / "tiny" / line["variant"] / "mor" / "seed-0" / "eval"
        assert cell["auroc"] == json.loads((results / "results.json").read_text())["auroc"]
    assert counts["frozen"] == counts["head"] < counts["trainable"] == counts["lora"]
    assert counts["trainable+downstream"] + counts["head"] == 2 * counts["lora"]


@pytest.mark.parametrize(
    ("count", "late"), [(1, [0]), (9, [8]), (20, [18, 19]), (39, [36, 37, 38])]
)
def test_a_perplexity_in_training_is_that_of_the_last_steps(count: int, late: list[int]) -> None:
    steps = [{"step": i + 1, "loss": 3.0 - 0.1 * i**0.5} for i in range(count)]
    mean = sum(steps[i]["loss"] for i in late) / len(late)
    assert train_perplexity(steps) == pytest.approx(math.exp(mean), rel=1e-12)


def test_the_tables_are_readable(whole: Path) -> None:
    text = (whole / "study.md").read_text()
    assert "| tiny | trainable+downstream | " in text and "| tiny | prompt | " in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


@pytest.mark.usefixtures("nothing_made")
def test_a_finished_study_makes_nothing_again(words: list[str], whole: Path) -> None:
    before = tables_of(whole)
    assert main([*words, "--out", str(whole)]) == 0
    assert tables_of(whole) == before


def test_killed_and_called_again_it_ends_in_the_same_tables(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    rng, out = random.Random(5), tmp_path / "study"
    command = [sys.executable, "-m", "evaluation.study", *words, "--out", str(out)]
    killed = 0
    while killed < 3:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # From the third second on something is being made.
        time.sleep(rng.uniform(3, 7))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert killed > 0
    assert tables_of(out) == tables_of(whole)


def test_another_setting_in_the_same_folder_is_refused(
    words: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.yaml").write_text(DOWNSTREAM.replace("steps: 3", "steps: 4"))
    other = [*words[:-1], str(tmp_path / "other.yaml")]
    assert main([*other, "--out", str(whole)]) == 2
    assert "holds another run: --steps was 3 and is 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--models", "tiny"], "--models takes NAME=DIR"),
        (["--models", "Tiny=x"], "--models takes NAME=DIR"),
        (["--models", "tiny=/nowhere"], "there is no folder /nowhere"),
        (["--models"], "expected at least one argument"),
        (["--tasks", "mort"], "invalid choice"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    change: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), *change]
    if "--models" not in change:
        words += ["--models", f"tiny={tmp_path}"]
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_wrong_setting_of_the_last_table_is_told_before_the_first(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(DOWNSTREAM + "lr: fast\n")
    out = tmp_path / "study"
    assert main([*words[:-1], str(wrong), "--out", str(out)]) == 2
    assert "--lr must be a number, got 'fast'" in capfd.readouterr().err
    assert not out.exists()


def test_without_notes_the_rows_of_the_clinical_adapter_are_left_out(tmp_path: Path) -> None:
    study = Study(out=tmp_path, data="", notes=None, models={"a": ""}, encoders={"b": ""})
    expected = [("b", "full"), ("b", "lora"), ("a", "head"), ("a", "lora")]
    assert list(outcome_rows(study)) == expected


def test_the_paper_has_a_preset_for_every_cell(base: Path, tmp_path: Path) -> None:
    folders = dict.fromkeys(("llama", "pmc-llama"), str(base))
    study = Study(
        out=tmp_path, data="D", notes="N", models=folders, encoders={"core": str(base)},
        is_paper=True, seeds=(1234,),
    )  # fmt: skip
    for name in folders:
        config = adaptation_config(study, name, "prefix")
        assert config.preset == f"paper-{name}" and config.adapter == "prefix"
        assert config.prefix.num_virtual_tokens == {"llama": 20, "pmc-llama": 10}[name]
    expected = {
        ("llama", "head", "mor"): "paper-outcome",
        ("llama", "lora", "mor"): "paper-lora-mor",
        ("pmc-llama", "lora", "mor"): "paper-outcome",
        ("llama", "trainable+downstream", "proc"): "paper-outcome-proc",
        ("core", "full", "los"): "paper-encoder",
        ("core", "lora", "los"): "paper-encoder",
    }
    for (name, row, task), preset in expected.items():
        (config,) = outcome_configs(study, name, row, task)
        flags = (ENCODER_ROWS if name == "core" else DECODER_ROWS)[row].split()
        assert (config.preset, config.task, config.seed) == (preset, task, 1234)
        assert config.adapter == flags[flags.index("--adapter") + 1]
        assert config.tokenizer_preset == ("pmc-llama" if name == "pmc-llama" else None)
        assert (config.cohort, config.max_length, config.keep) == ("paper", 128, "last")
    file = tmp_path / "own.yaml"
    file.write_text("max-length: 64\n")
    (config,) = outcome_configs(replace(study, downstream_config=str(file)), "llama", "head", "los")
    assert (config.max_length, config.preset) == (64, "paper-outcome")


def test_the_macro_average_waits_for_all_tasks_and_is_their_plain_mean() -> None:
    cells = {task: {"auroc": i / 10} for i, task in enumerate(TASKS)}
    assert _macro(cells, TASKS) == pytest.approx(0.2)
    del cells["los"]
    assert _macro(cells, TASKS) is None
    cells["los"] = {"auroc": None}  # type: ignore[dict-item]
    assert _macro(cells, TASKS) is None


def test_a_mean_over_seeds_stands_without_one_seeds_interval() -> None:
    cell = {"auroc": 0.7, "auroc_sd": None, "auroc_ci": [0.6, 0.8], "published": 71.5}
    assert _cell(cell) == "70.00 [60.00, 80.00] (71.50)"
    assert _cell(cell | {"auroc_sd": 0.01}) == "70.00 ± 1.00 (71.50)"


def test_the_published_figures_are_whole() -> None:
    assert len(ADAPTATION) == 10 and len(OUTCOMES) == 20
    assert all(len(row) == len(TASKS) for row in OUTCOMES.values())
    # The paper's own macro average of its best row.
    best = OUTCOMES["llama", "trainable+downstream"]
    assert sum(best) / 5 == pytest.approx(72.81, abs=0.01)
