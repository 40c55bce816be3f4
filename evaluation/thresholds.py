"""What a yes-or-no rule would have done: flag every note at or above a threshold.

Some thresholds are fixed; others are chosen on the validation notes, because one chosen on the
scored notes would look better on them than on new ones. Invariant: a share without a note to take
it of (the predictive value of a rule that flags nobody) is None.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from torch import Tensor

from evaluation.bootstrap import (
    Floats,
    count_dtype,
    defined,
    estimate,
    intervals,
    number_clusters,
)

FIXED = (0.05, 0.1, 0.2, 0.3, 0.5)
SHARES = ("flagged", "sensitivity", "specificity", "ppv", "npv")


def chosen_thresholds(labels: NDArray[Any], chances: Floats) -> dict[str, float]:
    """Return thresholds by rule, chosen on validation notes: labels [n] of 0 and 1, chances [n].

    youden: the largest sensitivity + specificity - 1 (Youden 1950); sensitivity 0.9 and
    specificity 0.9: the best of the other among those that reach it. Empty with one class alone.
    """
    if not 0 < labels.sum() < len(labels):
        return {}
    false_share, true_share, thresholds = roc_curve(labels, chances, drop_intermediate=False)
    real = np.isfinite(thresholds)  # the first flags nobody, at infinity
    false_share, true_share, thresholds = false_share[real], true_share[real], thresholds[real]
    chosen = {
        "youden": thresholds[np.argmax(true_share - false_share)],
        "sensitivity 0.9": thresholds[np.argmax(true_share >= 0.9)],
    }
    specific = np.flatnonzero(false_share <= 0.1)
    if len(specific):
        chosen["specificity 0.9"] = thresholds[specific[-1]]
    return {rule: float(threshold) for rule, threshold in chosen.items()}


def threshold_table(
    labels: NDArray[Any],
    chances: Floats,
    chosen: dict[str, float],
    *,
    clusters: NDArray[Any] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return a row for each fixed and each chosen threshold, ascending, ready for JSON.

    labels [n] of 0 and 1, chances [n]; a note is flagged when its chance is at least the threshold.
    A row has `rule`, `threshold`, the four counts, and SHARES with their intervals: flagged notes,
    sensitivity, specificity, positive and negative predictive value.
    """
    rules = [("fixed", threshold) for threshold in FIXED] + list(chosen.items())
    rules.sort(key=lambda rule: rule[1])
    limits = np.array([threshold for _, threshold in rules])
    flagged, true = chances[:, None] >= limits, labels[:, None] > 0
    cells = np.stack([flagged & true, flagged & ~true, ~flagged & true, ~flagged & ~true])
    cluster_of_row = number_clusters(clusters, len(labels))
    n_clusters, dtype = int(cluster_of_row.max()) + 1, count_dtype(len(labels))
    by_cluster = torch.zeros(n_clusters, cells[:, 0].size, dtype=dtype)
    by_cluster.index_add_(
        0,
        torch.from_numpy(cluster_of_row),
        torch.from_numpy(cells.transpose(1, 0, 2).reshape(len(labels), -1)).to(dtype),
    )

    def statistics(counts: Tensor) -> Floats:
        """SHARES of every threshold: [5 x thresholds, resamples]."""
        sums = (by_cluster.T @ counts).double().numpy().reshape(4, len(rules), -1)
        tp, fp, fn, tn = sums
        shares = [_share(tp + fp, sums.sum(axis=0)), _share(tp, tp + fn), _share(tn, tn + fp)]
        shares += [_share(tp, tp + fp), _share(tn, tn + fn)]
        return np.concatenate(shares)

    estimates = estimate(statistics, n_clusters, dtype)
    ranges = intervals(statistics, estimates, n_clusters, dtype, resamples=resamples, seed=seed)
    counted = cells.sum(axis=1).tolist()
    names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    rows = []
    for i, (rule, threshold) in enumerate(rules):
        row: dict[str, Any] = {"rule": rule, "threshold": threshold}
        row |= {name: counted[k][i] for k, name in enumerate(names)}
        for k, name in enumerate(SHARES):
            row[name] = defined(estimates[k * len(rules) + i])
            row[f"{name}_ci"] = ranges[k * len(rules) + i]
        rows.append(row)
    return rows


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)
