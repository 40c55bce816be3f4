"""Outcome metrics with bootstrap intervals that resample whole patients.

AUROC is the share of (positive, negative) pairs that the scores order rightly, a tie counting one
half (Hanley and McNeil 1982). Several classes are compared one against one and averaged over the
pairs (Hand and Till 2001), several labels one by one. Notes of one patient are not independent, so
the intervals draw patients with replacement and count every note as often as its patient was drawn.

Invariant: an estimate and its resamples come from one formula, and what is not defined (an AUROC of
one class) is None, never nan and never 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

Kind = Literal["binary", "multiclass", "multilabel"]
Floats = NDArray[np.float64]

# An interval is given where the statistic is defined in this share of the resamples.
DEFINED_SHARE = 0.95
# Elements of the table of draws (patients x resamples) held at once; 256 MB of float32.
DRAW_ELEMENTS = 1 << 26
# Above this many notes a count of notes may not be exact in float32.
EXACT_NOTES = 1 << 22


def kind_of(labels: NDArray[Any], logits: NDArray[Any]) -> Kind:
    """Tell the problem from the shapes: labels [n] or [n, C], logits [n, C]."""
    if labels.ndim == 2:
        return "multilabel"
    return "binary" if logits.shape[1] == 2 else "multiclass"


def probabilities(logits: NDArray[Any], *, multilabel: bool) -> Floats:
    """Return float64 [n, C]: a sigmoid for each label, or a softmax over the classes."""
    logits = logits.astype(np.float64)
    if multilabel:
        return np.asarray(np.exp(-np.logaddexp(0.0, -logits)))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def auroc(labels: NDArray[Any], scores: NDArray[Any]) -> float | None:
    """Return the AUROC of scores [n] for labels [n] of 0 and 1; None with one class alone."""
    rows = np.arange(len(labels))
    comparison = Comparison(rows, labels.astype(bool), scores)
    return _defined(comparison.auroc(rows, torch.ones(len(rows), 1))[0])


def classification_metrics(
    labels: NDArray[Any],
    logits: NDArray[Any],
    label_names: Sequence[str],
    *,
    clusters: NDArray[Any] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Return accuracy, F1 and AUROC with 95% percentile intervals, ready for JSON.

    labels: int64 [n] class numbers, or [n, C] of 0 and 1 for several labels a note; logits [n, C].
    clusters: [n], equal for notes that are drawn together, those of one patient; None where every
    note stands alone.
    Binary: F1 and AUROC are those of class 1. Several classes: F1 is the mean over the classes,
    AUROC the mean over the pairs of classes, both ways round, and `per_label` has each class
    against the rest. Several labels: F1 and AUROC are means over the labels, and a note is accurate
    when all its labels are right. Classes, pairs and labels for which a metric is not defined (in
    the notes or in a resample) stay out of its mean.
    Raises ValueError for scores that are not finite and for labels outside the classes.
    """
    _check(labels, logits, label_names)
    kind = kind_of(labels, logits)
    scores = probabilities(logits, multilabel=kind == "multilabel")
    clusters = np.arange(len(labels)) if clusters is None else clusters
    cluster_of_row = np.unique(clusters, return_inverse=True)[1].reshape(-1)

    if kind == "binary":
        averaged, by_label = [_against_rest(labels == 1, scores[:, 1])], []
    elif kind == "multiclass":
        averaged = list(_one_against_one(labels, scores))
        by_label = [_against_rest(labels == c, scores[:, c]) for c in range(len(label_names))]
    else:
        by_label = [_against_rest(labels[:, c] > 0, scores[:, c]) for c in range(len(label_names))]
        averaged = by_label
    agreement = _Agreement.of(labels, scores, cluster_of_row)

    def statistics(counts: Tensor) -> Floats:
        """Accuracy, F1, AUROC and each label's AUROC: [3 + labels, resamples]."""
        aurocs = _stack([c.auroc(cluster_of_row, counts) for c in by_label], counts)
        pairs = aurocs
        if averaged is not by_label:
            pairs = _stack([c.auroc(cluster_of_row, counts) for c in averaged], counts)
        f1 = agreement.f1(counts)
        mean_f1 = f1[1] if kind == "binary" else _means(f1)
        return np.vstack([agreement.accuracy(counts), mean_f1, _means(pairs), aurocs])

    n_clusters = int(cluster_of_row.max()) + 1
    dtype = torch.float32 if len(labels) <= EXACT_NOTES else torch.float64
    with _one_thread():
        estimates = statistics(torch.ones(n_clusters, 1, dtype=dtype))[:, 0]
        intervals = _intervals(statistics, len(estimates), n_clusters, dtype, resamples, seed)

    metrics: dict[str, Any] = {"n": len(labels), "clusters": n_clusters}
    for i, name in enumerate(("accuracy", "f1", "auroc")):
        metrics[name] = _defined(estimates[i])
        metrics[f"{name}_ci"] = intervals[i]
    if kind == "binary":
        metrics["positives"] = int(labels.sum())
    else:
        metrics["per_label"] = {
            name: {
                "positives": int(by_label[c].positive.sum()),
                "auroc": _defined(estimates[3 + c]),
                "auroc_ci": intervals[3 + c],
            }
            for c, name in enumerate(label_names)
        }
        metrics["labels_scored"] = int((~np.isnan(estimates[3:])).sum())
    return metrics


def headline_metrics(
    labels: NDArray[Any], logits: NDArray[Any], label_names: Sequence[str]
) -> dict[str, float]:
    """Return accuracy, F1 and AUROC, those that are defined: what a run shows while it trains."""
    metrics = classification_metrics(labels, logits, label_names)
    names = ("accuracy", "f1", "auroc")
    return {name: metrics[name] for name in names if metrics[name] is not None}


class Comparison(NamedTuple):
    """One class or label against others, on the notes that have either."""

    rows: NDArray[np.int64]  # [m]
    positive: NDArray[np.bool_]  # [m]
    scores: Floats  # [m]

    def auroc(self, cluster_of_row: NDArray[np.int64], counts: Tensor) -> Floats:
        """Return [resamples]: the AUROC where each cluster counts as often as it was drawn.

        counts: [clusters, resamples], how often. nan where a resample has one class alone.
        Positives between the same two negatives form one group, so the notes are summed once for
        all resamples, and what is left to do grows with the number of groups.
        """
        clusters = cluster_of_row[self.rows]
        positive_scores, negative_scores = self.scores[self.positive], self.scores[~self.positive]
        # A positive's place among the negatives' values: 2k between two values, 2k + 1 on one.
        values, value_of_negative = np.unique(negative_scores, return_inverse=True)
        places, group_of_positive = np.unique(_place(values, positive_scores), return_inverse=True)
        place_of_negative = _place(places, 2 * value_of_negative + 1)

        positives = _sum_in_bags(clusters[self.positive], group_of_positive, len(places), counts)
        negatives = _sum_in_bags(
            clusters[~self.positive], place_of_negative, 2 * len(places) + 1, counts
        )
        for bag in range(1, len(negatives)):  # running sums, in place
            np.add(negatives[bag], negatives[bag - 1], out=negatives[bag])
        # Below group g lie the bags up to 2g; bag 2g + 1 ties with it and counts one half.
        won = 0.5 * sum(
            np.einsum("gb,gb->b", positives, part, dtype=np.float64)
            for part in (negatives[0:-1:2], negatives[1::2])
        )
        pairs = positives.sum(0, dtype=np.float64) * negatives[-1]
        return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def _place(values: NDArray[Any], points: NDArray[Any]) -> NDArray[np.int64]:
    """Return for each point 2k between values[k - 1] and values[k], and 2k + 1 on values[k]."""
    return np.searchsorted(values, points, "left") + np.searchsorted(values, points, "right")


def _sum_in_bags(
    clusters: NDArray[np.int64], bags: NDArray[np.int64], n_bags: int, counts: Tensor
) -> NDArray[Any]:
    """Return [n_bags, resamples]: the counts of the clusters in each bag."""
    if not len(clusters):
        return np.zeros((n_bags, counts.shape[1]), dtype=counts.numpy().dtype)
    order = np.argsort(bags, kind="stable")
    starts = np.searchsorted(bags[order], np.arange(n_bags))
    return embedding_bag(
        torch.from_numpy(clusters[order]), counts, torch.from_numpy(starts), mode="sum"
    ).numpy()


def _against_rest(positive: NDArray[np.bool_], scores: Floats) -> Comparison:
    return Comparison(np.arange(len(positive)), positive, scores)


def _one_against_one(labels: NDArray[Any], scores: Floats) -> Iterator[Comparison]:
    """Yield every ordered pair of classes that occur, scored by the first one's probability."""
    classes = np.unique(labels)
    for a in classes:
        for b in classes[classes != a]:
            rows = np.flatnonzero((labels == a) | (labels == b))
            yield Comparison(rows, labels[rows] == a, scores[rows, a])


class _Agreement(NamedTuple):
    """What accuracy and F1 are made of, summed for each cluster."""

    notes: Tensor  # [clusters]
    right: Tensor  # [clusters]
    hits: Tensor  # [clusters, C]: predicted and true
    predicted_and_true: Tensor  # [clusters, C]: number predicted plus number true

    @classmethod
    def of(
        cls, labels: NDArray[Any], scores: Floats, cluster_of_row: NDArray[np.int64]
    ) -> "_Agreement":
        if labels.ndim == 2:
            true, predicted = labels > 0, scores >= 0.5
        else:
            classes = np.arange(scores.shape[1])
            true = labels[:, None] == classes
            predicted = scores.argmax(axis=1)[:, None] == classes
        index = torch.from_numpy(cluster_of_row)
        dtype = torch.float32 if len(labels) <= EXACT_NOTES else torch.float64

        def summed(values: NDArray[Any]) -> Tensor:
            source = torch.from_numpy(values).to(dtype)
            shape = (int(cluster_of_row.max()) + 1, *source.shape[1:])
            return torch.zeros(shape, dtype=dtype).index_add_(0, index, source)

        return cls(
            notes=summed(np.ones(len(labels))),
            right=summed((true == predicted).all(axis=1)),
            hits=summed(true & predicted),
            predicted_and_true=summed(true.astype(np.int8) + predicted),
        )

    def accuracy(self, counts: Tensor) -> Floats:
        """Return [resamples]."""
        return ((self.right @ counts).double() / (self.notes @ counts)).numpy()

    def f1(self, counts: Tensor) -> Floats:
        """Return [C, resamples]; nan for a class that neither occurs nor is predicted."""
        hits = (self.hits.T @ counts).double()
        return (2 * hits / (self.predicted_and_true.T @ counts)).numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The sums are many and short: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _intervals(
    statistics: Callable[[Tensor], Floats],
    n_statistics: int,
    n_clusters: int,
    dtype: torch.dtype,
    resamples: int,
    seed: int,
) -> list[list[float] | None]:
    """Return the 2.5th and 97.5th percentile of each statistic over resamples of the clusters."""
    if n_clusters < 2 or resamples == 0:
        return [None] * n_statistics
    generator = np.random.default_rng(seed)
    width = max(1, DRAW_ELEMENTS // n_clusters)
    drawn = []
    for start in range(0, resamples, width):
        counts = torch.empty(n_clusters, min(width, resamples - start), dtype=dtype)
        for b in range(counts.shape[1]):
            clusters = generator.integers(0, n_clusters, n_clusters)
            counts[:, b] = torch.from_numpy(np.bincount(clusters, minlength=n_clusters))
        drawn.append(statistics(counts))
    return [_interval(values) for values in np.concatenate(drawn, axis=1)]


def _interval(values: Floats) -> list[float] | None:
    defined = values[~np.isnan(values)]
    if len(defined) < DEFINED_SHARE * len(values):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return [float(low), float(high)]


def _stack(rows: list[Floats], counts: Tensor) -> Floats:
    return np.stack(rows) if rows else np.empty((0, counts.shape[1]))


def _means(values: Floats) -> Floats:
    """Return the mean of each column [S, B] -> [B] over what is defined in it, else nan."""
    number = (~np.isnan(values)).sum(axis=0)
    total = np.nansum(values, axis=0)
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def _defined(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


def _check(labels: NDArray[Any], logits: NDArray[Any], label_names: Sequence[str]) -> None:
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] != len(label_names):
        raise ValueError(
            f"scores must be [{len(labels)}, {len(label_names)}] (notes, labels), "
            f"found {list(logits.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("there is no labelled note to score: name other data or another split")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise ValueError(f"the scores of {bad} of {len(logits)} notes are not finite")
    highest = 1 if labels.ndim == 2 else logits.shape[1] - 1
    if labels.min() < 0 or labels.max() > highest:
        raise ValueError(
            f"labels must lie between 0 and {highest}, found {labels.min()} to {labels.max()}"
        )
