"""Thresholds, groups and pairs of runs: counted by hand, and held to what they promise."""

import json

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.metrics import confusion_matrix

from data.groups import Groups
from evaluation.metrics import auroc, classification_metrics
from evaluation.paired import paired_metrics
from evaluation.subgroups import subgroup_rows
from evaluation.thresholds import chosen_thresholds, threshold_table
from tests.evaluation.test_metrics import patient_cohort


def chances_of(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(logits[:, :1] - logits[:, 1:]))[:, 0]


def test_a_row_is_a_confusion_matrix() -> None:
    labels, logits, patients = patient_cohort(np.random.default_rng(0), 80, 2)
    chances = chances_of(logits)
    chosen = chosen_thresholds(labels, chances)
    table = threshold_table(labels, chances, chosen, clusters=patients, resamples=100)
    assert [row["threshold"] for row in table] == sorted(row["threshold"] for row in table)
    assert {row["rule"] for row in table} == {"fixed", *chosen} and len(chosen) == 3
    for row in table:
        tn, fp, fn, tp = confusion_matrix(labels, chances >= row["threshold"]).ravel()
        assert row["true_positives"] == tp and row["false_negatives"] == fn
        assert row["sensitivity"] == pytest.approx(tp / (tp + fn))
        assert row["specificity"] == pytest.approx(tn / (tn + fp))
        if tp + fp:
            assert row["ppv"] == pytest.approx(tp / (tp + fp))
        if tn + fn:
            assert row["npv"] == pytest.approx(tn / (tn + fn))
        assert row["flagged"] == pytest.approx((tp + fp) / len(labels))
        if row["sensitivity_ci"] is not None:
            assert row["sensitivity_ci"][0] <= row["sensitivity"] <= row["sensitivity_ci"][1]
    json.dumps(table, allow_nan=False)


def test_chosen_thresholds_are_the_best_of_all() -> None:
    labels, logits, _ = patient_cohort(np.random.default_rng(1), 100, 1)
    chances = chances_of(logits)
    chosen = chosen_thresholds(labels, chances)

    def shares(threshold: float) -> tuple[float, float]:
        flagged = chances >= threshold
        return flagged[labels == 1].mean(), 1 - flagged[labels == 0].mean()

    every = [shares(threshold) for threshold in chances]
    assert sum(shares(chosen["youden"])) == pytest.approx(max(map(sum, every)))
    sensitivity, specificity = shares(chosen["sensitivity 0.9"])
    assert sensitivity >= 0.9
    assert specificity == max(spec for sens, spec in every if sens >= 0.9)
    sensitivity, specificity = shares(chosen["specificity 0.9"])
    assert specificity >= 0.9 - 1e-12
    assert sensitivity == max(sens for sens, spec in every if spec >= 0.9 - 1e-12)


def test_no_threshold_of_one_class_and_no_share_of_nothing() -> None:
    assert chosen_thresholds(np.zeros(5), np.linspace(0, 1, 5)) == {}
    rows = threshold_table(np.zeros(5, int), np.full(5, 0.15), {})
    assert [row["ppv"] for row in rows] == [0, 0, None, None, None]
    assert all(row["sensitivity"] is None for row in rows)


def test_groups_are_scored_alone_and_small_ones_not_at_all() -> None:
    labels, logits, patients = patient_cohort(np.random.default_rng(2), 60, 2)
    codes = np.where(patients < 9, 0, np.where(patients < 19, 1, 2)).astype(np.int32)
    codes[-2:] = -1
    rows = np.arange(len(labels))[::-1].copy()  # scored in another order than the source's
    group = {"unit": Groups(("A", "B", "C"), codes[::-1].copy())}
    table = subgroup_rows(
        group, rows, labels, logits, ["no", "yes"], clusters=patients, resamples=50, seed=0
    )
    assert table[0] == {"group": "unit", "value": "A", "suppressed": True}
    for row, code in zip(table[1:], (1, 2), strict=True):
        inside = codes == code
        alone = classification_metrics(
            labels[inside], logits[inside], ["no", "yes"], clusters=patients[inside], resamples=50
        )
        assert not row["suppressed"]
        for key in ("n", "clusters", "positives", "auroc", "auroc_ci", "auprc"):
            assert row[key] == alone[key]
    assert table[1]["clusters"] == 10
    assert sum(row["n"] for row in table[1:]) == len(labels) - 18 - 2


def both(chances: np.ndarray) -> np.ndarray:
    return np.stack([1 - chances, chances], axis=1)


def test_a_run_beside_itself_differs_by_nothing() -> None:
    labels, logits, patients = patient_cohort(np.random.default_rng(3), 60, 2)
    chances = both(chances_of(logits))
    found = paired_metrics(labels, chances, chances, clusters=patients, resamples=100)
    for row in found.values():
        assert (row["difference"], row["ci"], row["p"]) == (0.0, None, 1.0)


def test_a_better_run_is_told_and_the_interval_is_that_of_the_pairs() -> None:
    labels, logits, patients = patient_cohort(np.random.default_rng(4), 150, 2)
    noise = np.random.default_rng(5).normal(size=len(labels))
    worse = logits.copy()
    worse[:, 1] += 1.5 * noise
    ours, theirs = both(chances_of(logits)), both(chances_of(worse))
    found = paired_metrics(labels, ours, theirs, clusters=patients, resamples=300)["auroc"]
    expected = auroc(labels, ours[:, 1]) - auroc(labels, theirs[:, 1])
    assert found["difference"] == pytest.approx(expected, abs=1e-12)
    assert 0 < found["ci"][0] < found["difference"] < found["ci"][1]
    assert found["p"] < 0.01
    swapped = paired_metrics(labels, theirs, ours, clusters=patients, resamples=300)["auroc"]
    assert swapped["ci"] == pytest.approx([-found["ci"][1], -found["ci"][0]])
    assert swapped["p"] == found["p"]


def test_p_is_uniform_where_there_is_no_difference() -> None:
    """Two equally noisy looks at the same margin, in 200 cohorts."""
    values = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels, logits, patients = patient_cohort(rng, 100, 2)
        runs = []
        for _ in range(2):
            noisy = logits + rng.normal(size=logits.shape)
            runs.append(both(chances_of(noisy)))
        found = paired_metrics(labels, *runs, clusters=patients, resamples=200)
        values.append(found["auroc"]["p"])
    assert kstest(values, "uniform").pvalue > 0.01
    assert np.mean(np.array(values) < 0.05) < 0.1


def test_few_patients_have_neither_interval_nor_p() -> None:
    labels, logits, patients = patient_cohort(np.random.default_rng(6), 9, 4)
    chances = both(chances_of(logits))
    found = paired_metrics(labels, chances, chances[::-1], clusters=patients, resamples=50)
    assert all(row["ci"] is None and row["p"] is None for row in found.values())
