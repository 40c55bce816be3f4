"""A finished run scored: perplexity and outcomes against independent sums over the same notes."""

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from data.synthetic import make_cohort
from evaluation.report import seen_warning
from evaluation.score import ScoreConfig, score_run, summary
from lora.attach import adapter_names, without_adapters
from model.batch import TokenBatch
from model.files import read_json
from tests.evaluation.conftest import CANARY_PATIENT, CANARY_TEXT, settings, write_notes
from training.assemble import restore
from training.notes import load_notes
from training.run import run
from training.stages import downstream

CPU = torch.device("cpu")


def score(run_folder: Path, **flags: Any) -> dict[str, Any]:
    return score_run(ScoreConfig(run=str(run_folder), device="cpu", **flags))


def predictions(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def naive_perplexity(run_folder: Path, *, with_adapters: bool) -> tuple[float, int]:
    """Note by note, one pass for each piece of at most 32 tokens, full logits in float64."""
    finished = restore(run_folder, CPU)
    model = finished.model.double()
    notes = load_notes(finished.config, finished.tokenizer)
    loss, tokens = 0.0, 0
    for row in notes.splits.test:
        ids = [1, *notes.cache.tokens_of(int(row)).tolist(), 2]
        for begin in range(0, len(ids) - 1, 31):
            piece = ids[begin : begin + 32]
            batch = TokenBatch.from_arrays(np.array(piece), [0, len(piece)], np.array([0]))
            with torch.no_grad():
                if with_adapters:
                    logits = model.logits(batch)
                else:
                    with without_adapters(model):
                        logits = model.logits(batch)
            chances = logits.log_softmax(-1)[range(len(piece) - 1), piece[1:]]
            loss -= float(chances.sum())
            tokens += len(piece) - 1
    return math.exp(loss / tokens), tokens


def test_perplexity_is_that_of_whole_notes(clinical_run: Path) -> None:
    results = score(clinical_run)
    adapted, tokens = naive_perplexity(clinical_run, with_adapters=True)
    base, _ = naive_perplexity(clinical_run, with_adapters=False)
    assert results["tokens"] == tokens
    assert results["perplexity"] == pytest.approx(adapted, rel=1e-5)
    assert results["perplexity_base"] == pytest.approx(base, rel=1e-5)
    assert results["perplexity"] < 0.9 * results["perplexity_base"]
    assert read_json(clinical_run / "eval" / "results.json") == results


def test_perplexity_does_not_depend_on_the_packing(clinical_run: Path) -> None:
    one_note_a_batch = score(clinical_run, micro_tokens=32)["perplexity"]
    assert score(clinical_run)["perplexity"] == pytest.approx(one_note_a_batch, rel=1e-6)


def test_every_split_is_scored(clinical_run: Path) -> None:
    tokens = {
        split: score(clinical_run, split=split)["tokens"]
        for split in ("train", "validation", "test")
    }
    finished = restore(clinical_run, CPU)
    cache = load_notes(finished.config, finished.tokenizer).cache
    left_out = sum(score(clinical_run, split=split)["left_out"] for split in ("validation", "test"))
    assert left_out == 0
    # BOS gives a note its first score, EOS its last: one token more than the note has.
    assert sum(tokens.values()) == len(cache.tokens) + len(cache)


def test_adapters_come_back_after_scoring_the_base(clinical_run: Path) -> None:
    model = restore(clinical_run, CPU).model
    with pytest.raises(RuntimeError), without_adapters(model):
        assert adapter_names(model) == []
        raise RuntimeError
    assert adapter_names(model) == ["clinical"]


def test_outcomes_equal_scikit_learn_on_the_written_predictions(downstream_run: Path) -> None:
    results = score(downstream_run, bootstrap=200)
    rows = predictions(downstream_run / "eval" / "predictions.csv")
    labels = np.array([row["label"] == "yes" for row in rows])
    chance = np.array([float(row["p_yes"]) for row in rows])
    assert results["n"] == len(rows)
    assert results["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(labels, chance), abs=1e-9
    )
    assert results["accuracy"] == pytest.approx(np.mean(labels == (chance > 0.5)))
    assert results["positives"] == labels.sum()
    assert results["clusters_are"] == "patients"
    assert results["clusters"] == len({row["patient"] for row in rows}) == len(rows) / 2
    low, high = results["auroc_ci"]
    assert low < results["auroc"] <= high
    assert results["auroc"] > 0.7  # the label is in the text
    assert read_json(downstream_run / "eval" / "results.json") == results


def test_predictions_name_the_rows_of_the_source(downstream_run: Path, notes: Path) -> None:
    score(downstream_run, bootstrap=0)
    with notes.open(newline="") as file:
        source = list(csv.DictReader(file))
    for row in predictions(downstream_run / "eval" / "predictions.csv"):
        assert source[int(row["row"])]["label"] == row["label"]


def test_nothing_written_tells_a_note_or_a_patient(
    downstream_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    score(downstream_run, bootstrap=10)
    output = "".join(capfd.readouterr())
    files = [path for path in (downstream_run / "eval").iterdir() if path.is_file()]
    assert {path.name for path in files} == {"results.json", "predictions.csv", "report.html"}
    for text in (output, *(path.read_text() for path in files)):
        assert CANARY_TEXT not in text
        assert CANARY_PATIENT not in text
    for path in files:
        assert path.stat().st_mode & 0o077 == 0


def test_notes_without_labels_are_predicted(downstream_run: Path, tmp_path: Path) -> None:
    unlabelled = write_notes(tmp_path / "new.csv", patients=20, seed=5, labelled=False)
    before = score(downstream_run, bootstrap=0)
    results = score(downstream_run, data=str(unlabelled), predict=str(tmp_path / "scores.csv"))
    rows = predictions(tmp_path / "scores.csv")
    assert results["n"] == len(rows) == 40
    assert list(rows[0]) == ["row", "predicted", "p_no", "p_yes"]
    assert [int(row["row"]) for row in rows] == list(range(40))
    assert read_json(downstream_run / "eval" / "results.json") == before


def test_predictions_of_a_split_are_those_of_its_scoring(
    downstream_run: Path, tmp_path: Path
) -> None:
    score(downstream_run, bootstrap=0)
    score(downstream_run, split="test", predict=str(tmp_path / "scores.csv"))
    scored = predictions(downstream_run / "eval" / "predictions.csv")
    for a, b in zip(scored, predictions(tmp_path / "scores.csv"), strict=True):
        assert (a["row"], a["p_yes"]) == (b["row"], b["p_yes"])


def test_other_notes_are_scored_whole(downstream_run: Path, tmp_path: Path) -> None:
    other = write_notes(tmp_path / "other.csv", patients=30, seed=6)
    before = score(downstream_run, bootstrap=0)
    results = score(downstream_run, data=str(other), bootstrap=0)
    assert results["split"] == "all"
    assert results["n"] == 60
    assert results["auroc"] > 0.7
    assert results["seen_in_training"] == {"text": 0, "patient": 0}
    assert seen_warning(results) is None
    # The run's own results stay where they are; these stand beside them.
    assert read_json(downstream_run / "eval" / "results.json") == before
    beside = downstream_run / "eval" / f"other-{results['data_fingerprint'][:8]}"
    assert read_json(beside / "results.json") == results
    # The same temperature and thresholds: they come from the run's own validation notes.
    temperatures = {found["calibration"]["temperature"] for found in (before, results)}
    assert len(temperatures) == 1
    for rule in ("youden", "sensitivity 0.9"):
        chosen = [
            [row["threshold"] for row in found["thresholds"] if row["rule"] == rule]
            for found in (before, results)
        ]
        assert chosen[0] == chosen[1] != []


def test_each_split_has_its_own_results(downstream_run: Path) -> None:
    score(downstream_run, bootstrap=0)
    results = score(downstream_run, split="validation", bootstrap=0)
    assert read_json(downstream_run / "eval" / "results.json")["split"] == "test"
    assert read_json(downstream_run / "eval" / "validation" / "results.json") == results


def test_training_notes_that_come_as_other_data_are_told(
    downstream_run: Path, notes: Path, tmp_path: Path
) -> None:
    """The same file under another name: all patients of the training part are recognised."""
    copy = tmp_path / "copy.csv"
    shutil.copy(notes, copy)
    results = score(downstream_run, data=str(copy), bootstrap=0)
    train = score(downstream_run, split="train", bootstrap=0)["n"]
    assert 0 < train < results["n"]
    assert results["seen_in_training"] == {"text": train, "patient": train}
    warnings = [line for line in summary(results) if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"{train} of {results['n']} notes with the text" in warnings[0]


def test_columns_that_are_typed_must_be_there(downstream_run: Path, tmp_path: Path) -> None:
    other = write_notes(tmp_path / "other.csv", patients=5, seed=6)
    for predict in (None, str(tmp_path / "scores.csv")):
        with pytest.raises(ValueError, match="no patient column 'person'"):
            score(downstream_run, data=str(other), patient_column="person", predict=predict)
    with pytest.raises(ValueError, match="no subgroup column 'sex'"):
        score(downstream_run, data=str(other), subgroup_columns=("sex",))


def test_groups_come_from_columns_of_the_table(
    base: Path, notes: Path, downstream_run: Path, tmp_path: Path
) -> None:
    with notes.open(newline="") as file:
        rows = list(csv.DictReader(file))
    grouped = tmp_path / "grouped.csv"
    with grouped.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "sex", "age"])
        writer.writeheader()
        for i, row in enumerate(rows):
            patient = i // 2
            sex = "other" if patient < 4 else "FM"[patient % 2]
            writer.writerow({**row, "sex": sex, "age": 30 + patient // 2})
    results = score(
        downstream_run, data=str(grouped), subgroup_columns=("sex", "age"), bootstrap=50
    )
    table = {(row["group"], row["value"]): row for row in results["subgroups"]}
    assert table["sex", "other"] == {"group": "sex", "value": "other", "suppressed": True}
    assert table["sex", "F"]["n"] + table["sex", "M"]["n"] == len(rows) - 8
    assert {value for group, value in table if group == "age"} == {
        "18 to 44", "45 to 64", "65 to 74", "75 to 84", "85 and over"
    }  # fmt: skip
    low, high = table["sex", "F"]["auroc_ci"]
    assert low < table["sex", "F"]["auroc"] <= high


def test_a_column_of_identifiers_is_refused_before_scoring(
    downstream_run: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with notes.open(newline="") as file:
        rows = list(csv.DictReader(file))
    copy = tmp_path / "numbered.csv"
    with copy.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "number"])
        writer.writeheader()
        writer.writerows({**row, "number": str(i)} for i, row in enumerate(rows))
    scored: list[int] = []
    monkeypatch.setattr("evaluation.score.classifier_logits", lambda *_, **__: scored.append(1))
    with pytest.raises(ValueError, match="never one of identifiers"):
        score(downstream_run, data=str(copy), subgroup_columns=("number",))
    assert not scored


def test_two_runs_are_compared_on_the_same_notes(
    downstream_run: Path,
    base: Path,
    notes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(
        settings(downstream(), base, notes, tmp_path / "other"),
        task="label",
        label_column="label",
        adapter="none",
        steps=2,
    )
    other = run(config)
    theirs = score(other, bootstrap=0)
    results = score(downstream_run, compare=str(other), bootstrap=100)
    found = results["comparison"]["auroc"]
    assert found["other"] == pytest.approx(theirs["auroc"], abs=1e-12)
    assert found["this"] == pytest.approx(results["auroc"], abs=1e-12)
    assert found["ci"][0] < found["difference"] < found["ci"][1]
    assert 0 < found["p"] <= 1
    assert any(line.startswith(f"auroc difference to {other}: ") for line in summary(results))

    # What cannot be compared is refused before the run's own notes are scored.
    monkeypatch.setattr("evaluation.score.classifier_logits", lambda *_, **__: pytest.fail())
    with pytest.raises(ValueError, match="has not been scored on these notes"):
        score(downstream_run, compare=str(other), split="train")
    found = other / "eval" / "results.json"
    whole = found.read_text()
    found.write_text(whole.replace('"data_fingerprint": "', '"data_fingerprint": "0'))
    with pytest.raises(ValueError, match="holds results of other notes; score it again"):
        score(downstream_run, compare=str(other))
    found.write_text(whole)
    table = other / "eval" / "predictions.csv"
    table.write_text(table.read_text().replace('"yes","no"', '"no","no"', 1))
    with pytest.raises(ValueError, match="cannot be paired"):
        score(downstream_run, compare=str(other))
    table.write_text("row,label\n")
    with pytest.raises(ValueError, match="score that run again"):
        score(downstream_run, compare=str(other))


def test_lists_of_patients_that_changed_are_refused(
    base: Path, notes: Path, tmp_path: Path
) -> None:
    with notes.open(newline="") as file:
        patients = sorted({row["patient"] for row in csv.DictReader(file)})
    lists = tmp_path / "lists"
    lists.mkdir()
    parts = {"train": patients[:80], "validation": patients[80:100], "test": patients[100:]}
    for name, part in parts.items():
        (lists / f"{name}.csv").write_text("\n".join(["patient", *part]) + "\n")
    config = replace(
        settings(downstream(), base, notes, tmp_path / "run"),
        task="label",
        label_column="label",
        splits=str(lists),
        steps=1,
    )
    out = run(config)
    assert score(out, bootstrap=0)["n"] == 40
    (lists / "test.csv").write_text("\n".join(["patient", *patients[101:]]) + "\n")
    with pytest.raises(ValueError, match="patient lists"):
        score(out)


def test_a_label_that_was_not_trained_on_is_refused(downstream_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("text,patient,label\nfever,1,yes\npain,2,maybe\n")
    with pytest.raises(ValueError, match="1 of 2 notes with a label"):
        score(downstream_run, data=str(other))


def test_changed_notes_are_refused(clinical_run: Path, notes: Path, tmp_path: Path) -> None:
    """A run that is moved is scored as before; once its notes change its split means nothing."""
    moved = tmp_path / "moved"
    shutil.copytree(clinical_run, moved)
    assert score(moved)["perplexity"] == score(clinical_run)["perplexity"]
    text = notes.read_text()
    try:
        notes.write_text(text + "one more note,p,yes\n")
        with pytest.raises(ValueError, match="have changed since the run was trained"):
            score(moved)
    finally:
        notes.write_text(text)


def test_the_ceiling_of_a_synthetic_cohort_is_reported(base: Path, tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort", patients=150, seed=1)
    config = replace(
        settings(downstream(), base, cohort / "mimic-iii", tmp_path / "run"),
        patient_column=None,
        steps=2,
    )
    results = score(run(config), bootstrap=0)
    assert results["task"] == "mor"
    assert 0.6 < results["auroc_ceiling"] <= 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bootstrap": -1}, "--bootstrap must be at least 0"),
        ({"micro_tokens": 0}, "--micro-tokens must be at least 1"),
        ({"micro_tokens": 16}, r"at least the run's --max-length \(32\)"),
        ({"text_column": "note"}, "--text-column names a column of --data"),
        ({"predict": "scores.txt"}, "ends in .csv"),
        ({"predict": "scores.csv"}, "--predict needs a classifier"),
        ({"data": "absent.csv"}, "absent.csv"),
        ({"compare": "other"}, "--compare needs a classifier"),
        ({"subgroup_columns": ("sex",)}, "--subgroup-columns need a classifier"),
        ({"predict": "scores.csv", "compare": "other"}, "--compare is not used with --predict"),
    ],
)
def test_wrong_requests_are_refused(
    clinical_run: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(clinical_run, **flags)


def test_a_folder_without_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        score(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
