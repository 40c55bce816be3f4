"""Calibration against plain loops, scikit-learn, and cohorts whose temperature is known."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from evaluation.calibration import BINS, calibration, ece, fit_temperature, log_loss
from evaluation.metrics import probabilities


def cohort(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the softmax of the logits, which are then `temperature` times too large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3))
    chances = probabilities(logits, multilabel=False)
    labels = (rng.random(n)[:, None] > chances.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    return labels, temperature * logits


def plain_ece(true: np.ndarray, chances: np.ndarray) -> float:
    total = 0.0
    for b in range(BINS):
        low, high = b / BINS, (b + 1) / BINS
        inside = (chances > low) & (chances <= high) if b else chances <= high
        if inside.any():
            total += inside.mean() * abs(chances[inside].mean() - true[inside].mean())
    return total


def test_ece_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        chances = rng.random(200)
        true = rng.random(200) < chances**2
        assert ece(true, chances) == pytest.approx(plain_ece(true, chances), abs=1e-12)
        on_edges = rng.choice([0.0, 0.45, 0.5, 0.55, 1.0], 200)  # an edge belongs to the bin below
        coin = rng.random(200) < 0.5
        assert ece(coin, on_edges) == pytest.approx(plain_ece(coin, on_edges), abs=1e-12)


def test_adaptive_bins_hold_as_many_notes_each() -> None:
    rng = np.random.default_rng(1)
    chances = rng.random(1000) ** 8  # most of them in the first of the equally wide bins
    true = rng.random(1000) < chances
    order = np.argsort(chances).reshape(BINS, -1)
    expected = np.mean([abs(chances[b].mean() - true[b].mean()) for b in order])
    assert ece(true, chances, adaptive=True) == pytest.approx(expected, abs=2e-3)
    constant = np.full(50, 0.3)
    assert ece(np.arange(50) < 25, constant, adaptive=True) == pytest.approx(0.2)


def test_brier_and_log_loss_equal_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(300, 2)), rng.integers(0, 2, 300)
    chances = probabilities(logits, multilabel=False)
    found = calibration(labels, logits)
    assert found["brier"] == pytest.approx(
        sklearn_metrics.brier_score_loss(labels, chances[:, 1]), abs=1e-12
    )
    assert found["log_loss"] == pytest.approx(sklearn_metrics.log_loss(labels, chances), abs=1e-12)
    many = (rng.random((300, 2)) < 0.2).astype(np.int64)
    each = [
        sklearn_metrics.log_loss(many[:, c], probabilities(logits, multilabel=True)[:, c])
        for c in (0, 1)
    ]
    assert log_loss(many, logits) == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_known_temperature_is_found_and_mends_other_notes(temperature: float) -> None:
    found = fit_temperature(*cohort(20_000, temperature))
    assert found == pytest.approx(temperature, rel=0.05)
    labels, logits = cohort(20_000, temperature, seed=1)
    assert calibration(labels, logits / found)["ece"] < 0.015
    if temperature != 1:
        assert calibration(labels, logits)["ece"] > 0.03


def test_the_temperature_is_a_minimum() -> None:
    labels, logits = cohort(500, 3.0)
    found = fit_temperature(labels, logits)
    assert found is not None
    best = log_loss(labels, logits / found)
    assert best <= min(log_loss(labels, logits / t) for t in np.geomspace(0.1, 50, 200)) + 1e-9


def test_notes_that_tell_no_temperature() -> None:
    labels = np.arange(40) % 2
    never_wrong = np.eye(2)[labels]
    assert fit_temperature(labels, never_wrong) is None
    assert fit_temperature(*cohort(9, 2.0)) is None


def test_extreme_logits_give_finite_errors() -> None:
    labels, logits = np.array([0, 1, 1]), np.array([[1e4, -1e4], [1e4, -1e4], [-1e4, 1e4]])
    found = calibration(labels, logits)
    assert np.isfinite([found[key] for key in ("ece", "ece_adaptive", "brier", "log_loss")]).all()
    assert sum(b["notes"] for b in found["bins"]) == 3
