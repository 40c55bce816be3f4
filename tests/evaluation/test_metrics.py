"""Outcome metrics against scikit-learn, and their intervals against what an interval promises."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from evaluation.metrics import (
    HEADLINES,
    Comparison,
    auroc,
    classification_metrics,
    kind_of,
    probabilities,
)

UNDEFINED = {"positives": 0, **dict.fromkeys(("auroc", "auroc_ci", "auprc", "auprc_ci"))}


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both classes and scores with few or many ties, in any balance."""
    n = int(rng.integers(2, 300))
    labels = (rng.random(n) < rng.uniform(0.02, 0.98)).astype(np.int64)
    labels[:2] = [0, 1]
    levels = int(rng.choice([1, 2, 5, 50, 10**6]))
    scores = rng.integers(0, levels, n) / levels + rng.choice([0.0, 0.3]) * labels
    return labels, scores


def patient_cohort(
    rng: np.random.Generator, patients: int, notes_each: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and scores that agree within a patient: (labels [n], logits [n, 2], patients [n])."""
    of_note = np.repeat(np.arange(patients), notes_each)
    labels = (rng.random(patients) < 0.4).astype(np.int64)[of_note]
    common = rng.normal(size=patients)[of_note]
    margin = labels + common + 0.2 * rng.normal(size=len(of_note))
    return labels, np.stack([np.zeros_like(margin), margin], axis=1), of_note


def test_auroc_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels, scores = random_case(rng)
        expected = sklearn_metrics.roc_auc_score(labels, scores)
        assert auroc(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_one_class_is_undefined() -> None:
    scores = np.array([0.1, 0.2, 0.3])
    assert auroc(np.zeros(3, np.int64), scores) is None
    assert auroc(np.ones(3, np.int64), scores) is None


def test_resampled_areas_equal_scikit_learn_on_repeated_notes() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        labels, scores = random_case(rng)
        cluster_of_row = rng.integers(0, 40, len(labels))
        counts = rng.poisson(1.0, (40, 7))
        comparison = Comparison(np.arange(len(labels)), labels > 0, scores)
        values, precisions = comparison.areas(
            cluster_of_row, torch.tensor(counts, dtype=torch.float32)
        )
        for b in range(counts.shape[1]):
            rows = np.repeat(np.arange(len(labels)), counts[cluster_of_row, b])
            if len(set(labels[rows])) < 2:
                assert math.isnan(values[b])
                assert math.isnan(precisions[b])
            else:
                expected = sklearn_metrics.roc_auc_score(labels[rows], scores[rows])
                assert values[b] == pytest.approx(expected, abs=1e-12)
                expected = sklearn_metrics.average_precision_score(labels[rows], scores[rows])
                assert precisions[b] == pytest.approx(expected, abs=1e-12)


def test_binary_metrics_equal_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    labels, logits = rng.integers(0, 2, 200), rng.normal(size=(200, 2))
    found = classification_metrics(labels, logits, ["survived", "died"])
    predicted = logits.argmax(axis=1)
    score = probabilities(logits, multilabel=False)[:, 1]
    assert found["n"] == 200
    assert found["positives"] == labels.sum()
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted))
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, score), abs=1e-12)


def test_multiclass_auroc_is_scikit_learns_one_against_one_mean() -> None:
    rng = np.random.default_rng(3)
    for n_classes in (3, 4, 6):
        labels = rng.integers(0, n_classes, 300)
        logits = rng.normal(size=(300, n_classes)) + np.eye(n_classes)[labels]
        logits = logits.round(1)  # ties
        names = [f"class {c}" for c in range(n_classes)]
        found = classification_metrics(labels, logits, names)
        scores = probabilities(logits, multilabel=False)
        predicted = scores.argmax(axis=1)
        expected = sklearn_metrics.roc_auc_score(labels, scores, multi_class="ovo")
        assert found["auroc"] == pytest.approx(expected, abs=1e-12)
        expected_f1 = sklearn_metrics.f1_score(labels, predicted, average="macro")
        assert found["f1"] == pytest.approx(expected_f1)
        for c, name in enumerate(names):
            against_rest = sklearn_metrics.roc_auc_score(labels == c, scores[:, c])
            assert found["per_label"][name]["auroc"] == pytest.approx(against_rest, abs=1e-12)


def test_multilabel_metrics_equal_scikit_learn_over_labels_with_both_classes() -> None:
    rng = np.random.default_rng(4)
    labels = (rng.random((200, 6)) < 0.3).astype(np.float32)
    labels[:, 4] = 0
    labels[:, 5] = 1
    logits = rng.normal(size=(200, 6)) + labels
    found = classification_metrics(labels, logits, list("abcdef"))
    scores = probabilities(logits, multilabel=True)
    expected = sklearn_metrics.roc_auc_score(labels[:, :4], scores[:, :4], average="macro")
    assert found["auroc"] == pytest.approx(expected, abs=1e-12)
    assert found["labels_scored"] == 4
    assert found["per_label"]["e"] == UNDEFINED
    assert found["per_label"]["f"]["auroc"] is None
    predicted = scores >= 0.5
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    expected_f1 = sklearn_metrics.f1_score(labels, predicted, average="macro", zero_division=np.nan)
    assert found["f1"] == pytest.approx(expected_f1)


def test_a_class_without_notes_stays_out_of_every_mean() -> None:
    rng = np.random.default_rng(5)
    labels = rng.choice([0, 2], 100)
    logits = rng.normal(size=(100, 3)) + np.eye(3)[labels]
    logits[:, 1] = -30
    found = classification_metrics(labels, logits, ["a", "b", "c"], resamples=50, seed=0)
    assert found["per_label"]["b"] == UNDEFINED
    assert found["labels_scored"] == 2
    two = [0, 2]
    scores = probabilities(logits, multilabel=False)
    pairs = [sklearn_metrics.roc_auc_score(labels == c, scores[:, c]) for c in two]
    assert found["auroc"] == pytest.approx(np.mean(pairs), abs=1e-12)
    expected_f1 = sklearn_metrics.f1_score(labels, scores.argmax(1), labels=two, average="macro")
    assert found["f1"] == pytest.approx(expected_f1)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_undefined_is_null_in_strict_json(kind: str) -> None:
    labels = np.zeros((5, 3), np.float32) if kind == "multilabel" else np.zeros(5, np.int64)
    logits = np.zeros((5, 2 if kind == "binary" else 3))
    logits[:, 0] = -1
    assert kind_of(labels, logits) == kind
    names = ["a", "b", "c"][: logits.shape[1]]
    found = classification_metrics(labels, logits, names, resamples=20, seed=0)
    assert found["auroc"] is None
    assert found["auroc_ci"] is None
    json.dumps(found, allow_nan=False)


def test_a_rare_label_has_no_interval() -> None:
    """One positive patient is missing from 37% of the resamples: that is no interval."""
    labels = np.zeros(60, np.int64)
    labels[0] = 1
    logits = np.random.default_rng(0).normal(size=(60, 2))
    found = classification_metrics(labels, logits, ["no", "yes"], resamples=200, seed=0)
    assert found["auroc"] is not None
    assert found["auroc_ci"] is None
    assert found["accuracy_ci"] is not None


def test_the_seed_decides_the_interval_and_blocks_of_resamples_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels, logits, patients = patient_cohort(np.random.default_rng(6), 40, 3)

    def interval(seed: int) -> list[float]:
        return classification_metrics(
            labels, logits, ["no", "yes"], clusters=patients, resamples=100, seed=seed
        )["auroc_ci"]

    first = interval(1)
    assert interval(1) == first
    assert interval(2) != first
    monkeypatch.setattr("evaluation.bootstrap.DRAW_ELEMENTS", 40 * 7)
    assert interval(1) == first


def test_patients_widen_the_interval_when_their_notes_agree() -> None:
    labels, logits, patients = patient_cohort(np.random.default_rng(7), 80, 6)

    def width(**by: np.ndarray) -> float:
        low, high = classification_metrics(
            labels, logits, ["no", "yes"], resamples=400, seed=0, **by
        )["auroc_ci"]
        return high - low

    assert width(clusters=patients) > 1.5 * width()


def test_intervals_cover_the_truth_in_simulated_cohorts() -> None:
    """Nominal 95%: between 92% and 98% of 300 cohorts of 120 patients with two notes each.

    The average precision of so few patients is far from normal; it needs some 300 for as much.
    """
    area = 0.5 * (1 + math.erf(1 / math.sqrt(1 + 0.2**2) / 2))
    many_labels, many_logits, _ = patient_cohort(np.random.default_rng(0), 400_000, 1)
    precision = sklearn_metrics.average_precision_score(many_labels, many_logits[:, 1])
    covered = {"auroc": 0, "auprc": 0}
    for seed in range(300):
        labels, logits, patients = patient_cohort(np.random.default_rng(1000 + seed), 120, 2)
        found = classification_metrics(
            labels, logits, ["no", "yes"], clusters=patients, resamples=300, seed=seed
        )
        for name, truth in (("auroc", area), ("auprc", precision)):
            low, high = found[f"{name}_ci"]
            covered[name] += low <= truth <= high
    assert 0.92 <= covered["auroc"] / 300 <= 0.98
    assert 0.90 <= covered["auprc"] / 300 <= 0.98


def test_an_average_precision_lies_in_its_interval() -> None:
    """Its resamples lie too high: with hundreds of rare labels all of them above the estimate."""
    rng = np.random.default_rng(11)
    labels = (rng.random((500, 100)) < 0.02).astype(np.int8)
    logits = rng.normal(size=labels.shape) + labels
    names = [str(c) for c in range(100)]
    found = classification_metrics(labels, logits, names, resamples=200)
    low, high = found["auprc_ci"]
    assert low < found["auprc"] < high


def test_too_little_to_tell_an_interval() -> None:
    """Few patients, or a model that is never wrong: null instead of an interval of width 0."""
    labels = np.arange(60) % 2
    logits = np.stack([-labels, labels], axis=1).astype(float)
    patients = np.arange(60) // 2 % 9
    few = classification_metrics(labels, logits, ["a", "b"], clusters=patients, resamples=50)
    never_wrong = classification_metrics(labels, logits, ["a", "b"], resamples=50)
    for name in HEADLINES:
        assert few[name] == never_wrong[name] == 1.0
        assert few[f"{name}_ci"] is None
        assert never_wrong[f"{name}_ci"] is None


def test_labels_that_compete_are_ranked_as_in_the_paper() -> None:
    """AUROC of the softmax over the labels; accuracy and F1 keep the sigmoid."""
    rng = np.random.default_rng(12)
    labels = (rng.random((300, 5)) < 0.3).astype(np.int8)
    logits = 2 * rng.normal(size=labels.shape) + labels
    names = list("abcde")
    own = classification_metrics(labels, logits, names)
    paper = classification_metrics(labels, logits, names, label_scores="softmax")
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert paper["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(labels, chances, average="macro"), abs=1e-12
    )
    assert paper["auprc"] == pytest.approx(
        sklearn_metrics.average_precision_score(labels, chances, average="macro"), abs=1e-12
    )
    assert paper["auroc"] != own["auroc"]
    assert (paper["f1"], paper["accuracy"]) == (own["f1"], own["accuracy"])


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([-1e300, -1.0, 0.0, 0.1, 1e-300, 0.5, 1.0])),
        min_size=2,
        max_size=60,
    ).filter(lambda rows: len({positive for positive, _ in rows}) == 2)
)
@settings(max_examples=300, deadline=None)
def test_areas_equal_scikit_learn_however_scores_tie(rows: list[tuple[bool, float]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    place = np.arange(len(rows))
    area, precision = Comparison(place, labels, scores).areas(place, torch.ones(len(rows), 1))
    assert area[0] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert precision[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        ([0, 1], [[0.0, np.nan], [0.0, 1.0]], "not finite: the scores of 1 of 2 notes"),
        ([0, 2], [[0.0, 1.0], [0.0, 1.0]], "between 0 and 1"),
        ([0, -1], [[0.0, 1.0], [0.0, 1.0]], "between 0 and 1"),
        ([0, 1], [[0.0, 1.0]], r"must be \[2, 2\]"),
    ],
)
def test_bad_input_is_refused(labels: list[int], logits: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(labels), np.array(logits), ["a", "b"])


def test_no_note_is_refused() -> None:
    with pytest.raises(ValueError, match="no labelled note"):
        classification_metrics(np.zeros(0, np.int64), np.zeros((0, 2)), ["a", "b"])


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]])
    assert np.isfinite(probabilities(logits, multilabel=False)).all()
    assert np.isfinite(probabilities(logits, multilabel=True)).all()


# In a process of its own, whose peak memory is then that of the metrics.
THOUSAND_LABELS = """
import json, resource, sys, time
import numpy as np
from evaluation.metrics import classification_metrics

rng = np.random.default_rng(8)
n, n_labels = 10_000, 1_266
labels = (rng.random((n, n_labels)) < rng.beta(0.5, 10, n_labels)).astype(np.int8)
logits = rng.normal(size=(n, n_labels)) + labels
names, patients = [str(c) for c in range(n_labels)], rng.integers(0, 7_000, n)
start = time.perf_counter()
found = classification_metrics(labels, logits, names, clusters=patients, resamples=1_000)
found["seconds"] = time.perf_counter() - start
found["bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_a_thousand_labels_take_less_than_a_minute() -> None:
    """1,266 labels of 10,000 notes, 1,000 resamples of patients: under 60 s, under 2 GB."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", THOUSAND_LABELS], cwd=root, capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    print(f"{found['seconds']:.1f} s, {found['bytes'] / 1e9:.2f} GB")
    assert found["seconds"] < 60
    assert found["bytes"] < 2e9
    for name in ("auroc", "auprc"):
        assert found[f"{name}_ci"][0] < found[name] < found[f"{name}_ci"][1]
