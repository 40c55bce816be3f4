"""Two runs on the same notes: the difference of their metrics, and whether it can be chance.

Both are resampled with the same draws of patients, so what makes a note hard for both cancels, and
the interval of the difference is narrower than two intervals beside each other suggest.

Invariant: the notes and labels of both runs are the same, row by row, before anything is compared.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluation.bootstrap import (
    DEFINED_SHARE,
    FEWEST_CLUSTERS,
    Floats,
    count_dtype,
    defined,
    estimate,
    interval,
    number_clusters,
    resample,
)
from evaluation.metrics import HEADLINES, LabelScores, Measures


def paired_metrics(
    labels: NDArray[Any],
    chances: Floats,
    other_chances: Floats,
    *,
    clusters: NDArray[Any] | None = None,
    resamples: int = 0,
    seed: int = 0,
    label_scores: LabelScores = "sigmoid",
) -> dict[str, dict[str, Any]]:
    """Return `this`, `other`, `difference` (this - other), its interval `ci` and `p` by metric.

    labels: [n] or [n, C]; chances: [n, C] probabilities of either run. p: two-sided, twice the
    share of the resamples on the rarer side of 0; None where there is no interval.
    """
    cluster_of_row = number_clusters(clusters, len(labels))
    n_clusters, dtype = int(cluster_of_row.max()) + 1, count_dtype(len(labels))
    this, other = (
        Measures.of_chances(labels, each, cluster_of_row, label_scores)
        for each in (chances, other_chances)
    )

    def statistics(counts: Tensor) -> Floats:
        return np.concatenate([each.statistics(counts)[: len(HEADLINES)] for each in (this, other)])

    ours, theirs = estimate(statistics, n_clusters, dtype).reshape(2, -1)
    drawn = None
    if n_clusters >= FEWEST_CLUSTERS and resamples:
        both = resample(statistics, n_clusters, dtype, resamples=resamples, seed=seed)
        drawn = both[: len(HEADLINES)] - both[len(HEADLINES) :]
    return {
        name: {
            "this": defined(ours[i]),
            "other": defined(theirs[i]),
            "difference": defined(ours[i] - theirs[i]),
            "ci": None if drawn is None else interval(drawn[i]),
            "p": None if drawn is None else _p_value(drawn[i]),
        }
        for i, name in enumerate(HEADLINES)
    }


def _p_value(differences: Floats) -> float | None:
    """Return the two-sided p-value that the resamples give a difference of 0."""
    known = differences[~np.isnan(differences)]
    if len(known) < DEFINED_SHARE * len(differences):
        return None
    rarer = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(known) + 1))
