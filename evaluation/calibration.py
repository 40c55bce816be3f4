"""How far a classifier's probabilities can be taken at their word, before and after scaling.

Temperature scaling (Guo et al. 2017) divides all logits by one number, fitted on the validation
notes; the order of the notes, and so every AUROC of one label, stays as it is. The calibration
error is the mean distance between predicted and observed, bin by bin: of equal width, and adaptive,
with as many notes in each (Nixon et al. 2019). Brier score: the mean squared distance.

Invariant: the temperature has never seen the notes that are scored.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from evaluation.bootstrap import Floats
from evaluation.metrics import probabilities

BINS = 10
FEWEST_NOTES = 10  # that a temperature is fitted on
LOWEST, HIGHEST = 0.02, 100.0  # temperatures; beyond them the notes do not tell one


def fit_temperature(labels: NDArray[Any], logits: NDArray[Any]) -> float | None:
    """Return the temperature under which the labels [n] or [n, C] are likeliest.

    None where the notes do not tell one: too few, or without an error between them.
    """
    if len(labels) < FEWEST_NOTES:
        return None

    def loss(log_temperature: float) -> float:
        return log_loss(labels, logits / math.exp(log_temperature))

    ends = math.log(LOWEST), math.log(HIGHEST)
    found = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-6})
    # Without an error between them the notes are likelier the colder it gets.
    is_told = all(loss(end) > found.fun + 1e-9 for end in ends)
    return math.exp(found.x) if is_told else None


def log_loss(labels: NDArray[Any], logits: NDArray[Any]) -> float:
    """Return the mean negative log-likelihood: of a note's class, or of each label of each note."""
    if labels.ndim == 2:
        return float(np.mean(np.logaddexp(0.0, np.where(labels > 0, -logits, logits))))
    highest = logits.max(axis=1)
    partition = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return float(np.mean(partition - logits[np.arange(len(labels)), labels]))


def calibration(labels: NDArray[Any], logits: NDArray[Any]) -> dict[str, Any]:
    """Return the errors of the probabilities and what a reliability diagram shows, ready for JSON.

    labels: int64 [n] class numbers, or [n, C] of 0 and 1; logits [n, C]. Binary: of class 1. With
    more classes or labels `ece`, `ece_adaptive` and `brier` are means over them, and `bins` pools
    all pairs of a note and a label: notes in the bin, mean prediction, share that was true.
    """
    logits = logits.astype(np.float64)
    chances = probabilities(logits, multilabel=labels.ndim == 2)
    if labels.ndim == 2:
        true = labels > 0
    else:
        true = labels[:, None] == np.arange(chances.shape[1])
    if labels.ndim == 1 and chances.shape[1] == 2:
        chances, true = chances[:, 1:], true[:, 1:]
    columns = range(chances.shape[1])
    pooled = _bins(true.ravel(), chances.ravel(), np.linspace(0, 1, BINS + 1))
    return {
        "ece": _mean([ece(true[:, c], chances[:, c]) for c in columns]),
        "ece_adaptive": _mean([ece(true[:, c], chances[:, c], adaptive=True) for c in columns]),
        "brier": float(np.mean((chances - true) ** 2)),
        "log_loss": log_loss(labels, logits),
        "bins": [
            {"notes": int(count), "predicted": float(p / count), "observed": float(o / count)}
            for count, p, o in zip(*pooled, strict=True)
            if count
        ],
    }


def ece(true: NDArray[np.bool_], chances: Floats, *, adaptive: bool = False) -> float:
    """Return the expected calibration error of one label: true [n], chances [n].

    The sum over the bins of (share of the notes) x |mean prediction - share that was true|.
    adaptive: bins with as many notes in each, as far as equal predictions allow.
    """
    edges = np.linspace(0, 1, BINS + 1)
    if adaptive:
        edges = np.unique(np.quantile(chances, edges))
    _, predicted, observed = _bins(true, chances, edges)
    return float(np.abs(predicted - observed).sum() / len(true))


def _bins(true: NDArray[np.bool_], chances: Floats, edges: Floats) -> tuple[Floats, Floats, Floats]:
    """Return of each bin (below, above] the notes, the sum of their chances, and the true ones."""
    bins = np.searchsorted(edges[1:-1], chances, side="left")
    sums = np.zeros((3, max(1, len(edges) - 1)))
    for row, weights in zip(sums, (np.ones(len(chances)), chances, true), strict=True):
        row += np.bincount(bins, weights=weights, minlength=len(row))
    return sums[0], sums[1], sums[2]


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
