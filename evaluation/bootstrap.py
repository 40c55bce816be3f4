"""The bootstrap over whole patients, and the intervals that are read off it.

Notes of one patient are not independent, so patients are drawn with replacement, as many as there
are, and every note counts as often as its patient was drawn (a cluster bootstrap; Field and Welsh
2007). Intervals are the 2.5th and 97.5th percentile (Efron 1979). A note that is drawn twice ties
with itself, which lifts every resample of an average precision; such statistics are centred, that
is the log odds of their resamples are moved by one amount until their mean is the estimate's.

Invariant: what the resamples cannot tell has no interval: with few patients, where a statistic is
seldom defined, or where it is the same in all resamples, as the accuracy of a model that was never
wrong is; an interval of width 0 would claim certainty.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit
from torch import Tensor

Floats = NDArray[np.float64]
# Counts of the draws [clusters, resamples] -> statistics [S, resamples], nan where not defined.
Statistics = Callable[[Tensor], Floats]

# An interval needs this many clusters, and a statistic that is defined in this share of resamples.
FEWEST_CLUSTERS = 10
DEFINED_SHARE = 0.95
# Elements of the table of draws (patients x resamples) held at once; 256 MB of float32.
DRAW_ELEMENTS = 1 << 26
# A share nearer to 0 or 1 has the log odds of this one.
SURE = 1e-9
# Above this many notes a count of notes may not be exact in float32.
EXACT_NOTES = 1 << 22


def number_clusters(clusters: NDArray[Any] | None, n: int) -> NDArray[np.int64]:
    """Number the clusters of n notes from 0: int64 [n]; each note its own without clusters."""
    if clusters is None:
        return np.arange(n)
    return np.unique(clusters, return_inverse=True)[1].reshape(-1)


def count_dtype(n: int) -> torch.dtype:
    """The number format in which counts of n notes are exact."""
    return torch.float32 if n <= EXACT_NOTES else torch.float64


def estimate(statistics: Statistics, n_clusters: int, dtype: torch.dtype) -> Floats:
    """Return the statistics with every cluster once: [S]."""
    with _one_thread():
        return statistics(torch.ones(n_clusters, 1, dtype=dtype))[:, 0]


def resample(
    statistics: Statistics, n_clusters: int, dtype: torch.dtype, *, resamples: int, seed: int
) -> Floats:
    """Return the statistics of every resample of the clusters: [S, resamples]."""
    generator = np.random.default_rng(seed)
    width = max(1, DRAW_ELEMENTS // n_clusters)
    drawn = []
    with _one_thread():
        for start in range(0, resamples, width):
            counts = torch.empty(n_clusters, min(width, resamples - start), dtype=dtype)
            for b in range(counts.shape[1]):
                clusters = generator.integers(0, n_clusters, n_clusters)
                counts[:, b] = torch.from_numpy(np.bincount(clusters, minlength=n_clusters))
            drawn.append(statistics(counts))
    return np.concatenate(drawn, axis=1)


def intervals(
    statistics: Statistics,
    estimates: Floats,
    n_clusters: int,
    dtype: torch.dtype,
    *,
    resamples: int,
    seed: int,
    centred: NDArray[np.bool_] | None = None,
) -> list[list[float] | None]:
    """Return the 95% interval of each statistic, None where the resamples cannot tell it.

    estimates: [S]; centred: [S], the shares whose resamples are moved to the estimate.
    """
    if n_clusters < FEWEST_CLUSTERS or resamples == 0:
        return [None] * len(estimates)
    drawn = resample(statistics, n_clusters, dtype, resamples=resamples, seed=seed)
    if centred is not None:
        drawn[centred] = centre(drawn[centred], estimates[centred])
    return [interval(values) for values in drawn]


def centre(drawn: Floats, estimates: Floats) -> Floats:
    """Return resamples [S, B] of shares, their mean log odds moved to the estimates' [S]."""
    odds = logit(drawn.clip(SURE, 1 - SURE))
    number = np.maximum((~np.isnan(odds)).sum(axis=1), 1)
    excess = np.nansum(odds, axis=1) / number - logit(estimates.clip(SURE, 1 - SURE))
    return np.asarray(expit(odds - excess[:, None]))


def interval(values: Floats) -> list[float] | None:
    """Return [2.5th, 97.5th percentile] of the resamples of one statistic, or None."""
    defined = values[~np.isnan(values)]
    if len(defined) < DEFINED_SHARE * len(values):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return None if low == high else [float(low), float(high)]


def defined(value: np.floating[Any] | float) -> float | None:
    """Return the value as JSON has it: None for nan."""
    return None if np.isnan(value) else float(value)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The sums are many and short: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
