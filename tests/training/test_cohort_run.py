"""Runs on a MIMIC cohort: several labels a note, from the tables to the scores; notes left out."""

import csv
import gzip
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logit, softmax
from sklearn import metrics as sklearn_metrics

from data.mimic import open_mimic
from data.splits import write_exclusions
from data.synthetic import make_cohort
from evaluation.metrics import headline_metrics, validation_score
from evaluation.score import ScoreConfig, score_run, summary
from model.files import read_json
from training.config import RunConfig
from training.notes import load_notes
from training.run import run

pytest.importorskip("duckdb", reason="the optional library duckdb is absent")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=120, seed=2) / "mimic-iii"


def diag_config(config: RunConfig, cohort: Path) -> RunConfig:
    return replace(
        config, task="diag", label_column=None, patient_column=None, data=str(cohort), steps=4
    )


def scored_rows(out: Path) -> list[int]:
    """The rows of the scored notes, as predictions.csv lists them."""
    with (out / "eval" / "predictions.csv").open(newline="") as file:
        return [int(row["row"]) for row in csv.DictReader(file)]


def test_diagnoses_are_learned_and_scored_label_by_label(
    cohort: Path, make_config: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    out = run(diag_config(make_config("downstream"), cohort), score=headline_metrics)
    source = open_mimic(cohort, "diag")
    known = {str(row): set(note.label or ()) for row, note in enumerate(source)}
    record = read_json(out / "run.json")
    assert record["counts"]["cohort"] == source.counts
    said = capfd.readouterr().err
    assert all(f"cohort: {count:,} {reason}" in said for reason, count in source.counts.items())

    results = score_run(ScoreConfig(run=str(out), bootstrap=0))
    assert list(results["per_label"]) == record["labels"]
    # Groups need no flag; how many notes are in those that are large enough is checked by hand.
    told = {(row["group"], row["value"]): row for row in results["subgroups"]}
    assert {group for group, _ in told} == {"sex", "age", "ethnicity", "insurance"}
    grouped = list(open_mimic(cohort, "diag", grouped=True))
    scored = [grouped[row] for row in scored_rows(out)]
    for value in ("F", "M"):
        notes = [note for note in scored if note.groups[0] == value]
        is_small = len({note.patient for note in notes}) < 10
        row = told["sex", value]
        assert row["suppressed"] == is_small and (is_small or row["n"] == len(notes))
    with (out / "eval" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == results["n"] == record["counts"]["test_notes"]
    labels = record["labels"]
    for row in rows:
        assert {name for name in labels if row[f"label_{name}"] == "1"} == known[row["row"]] & set(
            labels
        )
    # Of more than a dozen labels the terminal has the mean, and says where the others are.
    lines = list(summary(results))
    assert len(labels) > 12 and len(lines) < 10
    scored_labels = sum(label["auroc"] is not None for label in results["per_label"].values())
    assert f"the mean of {scored_labels:,} of {len(labels):,} labels" in lines[-1]
    predicted = out / "predicted.csv"
    score_run(ScoreConfig(run=str(out), split="test", predict=str(predicted)))
    with predicted.open(newline="") as file:
        again = list(csv.DictReader(file))
    assert list(again[0]) == ["row", *(f"p_{name}" for name in labels)]
    for one, other in zip(rows, again, strict=True):
        assert {name: one[name] for name in other} == other
    # Sigmoids: nothing makes a note's labels add up to one.
    total = np.array([[float(row[f"p_{name}"]) for name in labels] for row in rows]).sum(1)
    assert (abs(total - 1) > 0.1).all()
    check_that_what_holds_no_groups_is_left_out_aloud(out, cohort, out.with_name("other-hospital"))


def check_that_what_holds_no_groups_is_left_out_aloud(out: Path, cohort: Path, other: Path) -> None:
    """Scored on tables with a damaged date of birth and an insurance of its own for everybody."""
    shutil.copytree(cohort, other)
    for name, column, value in (
        ("PATIENTS", "DOB", lambda _: "hearsay"),
        ("ADMISSIONS", "INSURANCE", lambda number: f"plan {number}"),
    ):
        (path,) = other.glob(f"{name}.csv*")
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", newline="") as file:
            rows = [
                {**row, column: value(number)} for number, row in enumerate(csv.DictReader(file))
            ]
        with opener(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, rows[0], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    results = score_run(ScoreConfig(run=str(out), data=str(other), bootstrap=0))
    assert {row["group"] for row in results["subgroups"]} == {"ethnicity"}
    reasons = results["subgroups_left_out"]
    assert set(reasons) == {"sex", "age", "insurance"}
    assert "a date of birth is not a date" in reasons["sex"] == reasons["age"]
    assert "more than 40 different values" in reasons["insurance"]
    said = "\n".join(summary(results))
    page = next(out.glob("eval/other-hospital-*/report.html")).read_text()
    for shown in (said, page):
        assert all(reason in shown for reason in reasons.values())
        assert "plan 1" not in shown and "hearsay" not in shown


def test_runs_of_the_papers_cohort_rank_labels_as_the_paper_did(
    cohort: Path, make_config: Callable[..., RunConfig]
) -> None:
    config = replace(diag_config(make_config("downstream"), cohort), cohort="paper", steps=1)
    out = run(replace(config, eval_every=1), score=validation_score(config))
    # The validation that chooses the weights ranks as the results do.
    kept = read_json(out / "run.json")["kept"]["best"]["metrics"]["auroc"]
    on_same = ScoreConfig(run=str(out), split="validation", bootstrap=0, calibrate=False)
    assert kept == pytest.approx(score_run(on_same)["auroc"], abs=1e-6)
    as_sigmoids = score_run(replace(on_same, label_scores="sigmoid"))["auroc"]
    assert abs(kept - as_sigmoids) > 1e-4
    results = score_run(ScoreConfig(run=str(out), bootstrap=0, calibrate=False))
    assert results["label_scores"] == "softmax"
    with (out / "eval" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [
        name
        for name in read_json(out / "run.json")["labels"]
        if {row[f"label_{name}"] for row in rows} == {"0", "1"}
    ]
    every = [name for name in rows[0] if name.startswith("p_")]
    logits = logit(np.array([[float(row[name]) for name in every] for row in rows]))
    shares = dict(zip(every, softmax(logits, axis=1).T, strict=True))
    areas = [
        sklearn_metrics.roc_auc_score([int(row[f"label_{n}"]) for row in rows], shares[f"p_{n}"])
        for n in names
    ]
    assert results["labels_scored"] == len(names)
    assert results["auroc"] == pytest.approx(np.mean(areas), abs=1e-9)
    typed = score_run(
        ScoreConfig(run=str(out), bootstrap=0, calibrate=False, label_scores="sigmoid")
    )
    assert typed["label_scores"] == "sigmoid" and typed["auroc"] != results["auroc"]


def test_the_label_list_is_that_of_training_and_of_the_whole_table_in_the_paper(
    cohort: Path, make_config: Callable[..., RunConfig]
) -> None:
    labels = {}
    for quirks in ("correct", "paper"):
        config = replace(
            diag_config(make_config("downstream"), cohort), cohort=quirks, steps=1, eval_every=1
        )
        labels[quirks] = read_json(run(replace(config, out=config.out + quirks)) / "run.json")[
            "labels"
        ]
    assert set(labels["correct"]) < set(labels["paper"])
    notes = load_notes(diag_config(make_config("downstream"), cohort))
    counts = notes.cache.label_counts(notes.splits.train)
    names = notes.cache.label_names
    assert labels["correct"] == [name for name, count in zip(names, counts, strict=True) if count]
    assert len(labels["correct"]) < len(names)  # some stand in held-out notes alone
    assert "V300" in labels["paper"]  # a newborn's


def test_listed_notes_are_left_out_of_a_run(
    cohort: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = diag_config(make_config("downstream"), cohort)
    texts = [note.text for note in open_mimic(cohort, "diag")][:9]
    write_exclusions(tmp_path / "out.txt", [hashlib.md5(text.encode()).digest() for text in texts])
    config = replace(config, exclude=str(tmp_path / "out.txt"), steps=1, eval_every=1)
    record = read_json(run(config) / "run.json")
    assert record["counts"]["excluded_notes"] == 9
    used = (record["counts"][f"{part}_notes"] for part in ("train", "validation", "test"))
    assert sum(used) == record["counts"]["cohort"]["admission notes"] - 9
    assert record["fingerprints"]["exclude"]
