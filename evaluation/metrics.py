"""Outcome metrics with bootstrap intervals that resample whole patients.

AUROC is the share of (positive, negative) pairs that the scores order rightly, a tie counting one
half (Hanley and McNeil 1982). AUPRC is the average precision: the precision at each threshold,
weighed by the recall that it adds (no interpolation, Davis and Goadrich 2006). Several classes are
compared one against one for AUROC (Hand and Till 2001) and one against the rest for AUPRC; several
labels one by one.

Invariant: an estimate and its resamples come from one formula, and what is not defined (an AUROC of
one class) is None, never nan and never 0.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logit
from torch import Tensor
from torch.nn.functional import embedding_bag

from data.mimic import MULTILABEL_TASKS
from data.wording import counted
from evaluation.bootstrap import (
    SURE,
    Floats,
    count_dtype,
    defined,
    estimate,
    intervals,
    number_clusters,
)
from training.config import RunConfig
from training.validation import Score

Kind = Literal["binary", "multiclass", "multilabel"]
LabelScores = Literal["sigmoid", "softmax"]
HEADLINES = ("accuracy", "f1", "auroc", "auprc")


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


def ranking_scores(
    labels: NDArray[Any], logits: NDArray[Any], label_scores: LabelScores = "sigmoid"
) -> Floats:
    """Return what AUROC and AUPRC rank by: float64 [n, C].

    label_scores: with several labels a note, each label's own sigmoid, or the softmax over the
    labels of "Parameter-Efficient Fine-Tuning of LLaMA for the Clinical Domain" (arXiv 2307.03042),
    in which a note's labels compete. One label a note always has the softmax over its classes.
    """
    return probabilities(logits, multilabel=labels.ndim == 2 and label_scores == "sigmoid")


def auroc(labels: NDArray[Any], scores: NDArray[Any]) -> float | None:
    """Return the AUROC of scores [n] for labels [n] of 0 and 1; None with one class alone."""
    rows = np.arange(len(labels))
    comparison = Comparison(rows, labels.astype(bool), scores)
    counts = torch.ones(len(rows), 1, dtype=count_dtype(len(rows)))
    return defined(comparison.areas(rows, counts)[0][0])


def classification_metrics(
    labels: NDArray[Any],
    logits: NDArray[Any],
    label_names: Sequence[str],
    *,
    clusters: NDArray[Any] | None = None,
    resamples: int = 0,
    seed: int = 0,
    label_scores: LabelScores = "sigmoid",
) -> dict[str, Any]:
    """Return accuracy, F1, AUROC and AUPRC with 95% percentile intervals, ready for JSON.

    labels: int64 [n] class numbers, or [n, C] of 0 and 1 for several labels a note; logits [n, C].
    clusters: [n], equal for notes that are drawn together, those of one patient; None where every
    note stands alone. label_scores: see `ranking_scores`; accuracy and F1 take the sigmoid.
    Binary: F1, AUROC and AUPRC are those of class 1. Several classes: F1 and AUPRC are means over
    the classes, AUROC the mean over the pairs of classes, both ways round, and `per_label` has each
    class against the rest. Several labels: all three are means over the labels, and a note is
    accurate when all its labels are right. Classes, pairs and labels for which a metric is not
    defined (in the notes or in a resample) stay out of its mean.
    Raises ValueError for scores that are not finite and for labels outside the classes.
    """
    check_scored(labels, logits, label_names)
    cluster_of_row = number_clusters(clusters, len(labels))
    measures = Measures.of(labels, logits, cluster_of_row, label_scores)
    n_clusters, dtype = int(cluster_of_row.max()) + 1, count_dtype(len(labels))
    estimates = estimate(measures.statistics, n_clusters, dtype)
    ranges = intervals(
        measures.statistics,
        estimates,
        n_clusters,
        dtype,
        resamples=resamples,
        seed=seed,
        centred=measures.are_auprc(),
    )

    metrics: dict[str, Any] = {"n": len(labels), "clusters": n_clusters}
    for i, name in enumerate(HEADLINES):
        metrics[name] = defined(estimates[i])
        metrics[f"{name}_ci"] = ranges[i]
    if measures.kind == "binary":
        metrics["positives"] = int(labels.sum())
    else:
        first, n_labels = len(HEADLINES), len(label_names)
        metrics["per_label"] = {
            name: {
                "positives": int(measures.by_label[c].positive.sum()),
                "auroc": defined(estimates[first + c]),
                "auroc_ci": ranges[first + c],
                "auprc": defined(estimates[first + n_labels + c]),
                "auprc_ci": ranges[first + n_labels + c],
            }
            for c, name in enumerate(label_names)
        }
        scored = ~np.isnan(estimates[first : first + n_labels])
        metrics["labels_scored"] = int(scored.sum())
    return metrics


def default_label_scores(config: RunConfig) -> LabelScores:
    """How the labels of a run's notes are ranked unless --label-scores says so."""
    is_paper = config.task in MULTILABEL_TASKS and config.cohort == "paper"
    return "softmax" if is_paper else "sigmoid"


def validation_score(config: RunConfig) -> Score:
    """What a run shows while it trains: the headline metrics, ranked as its results will be."""
    return partial(headline_metrics, label_scores=default_label_scores(config))


def headline_metrics(
    labels: NDArray[Any],
    logits: NDArray[Any],
    label_names: Sequence[str],
    label_scores: LabelScores = "sigmoid",
) -> dict[str, float]:
    """Return the headline metrics that are defined."""
    metrics = classification_metrics(labels, logits, label_names, label_scores=label_scores)
    return {name: metrics[name] for name in HEADLINES if metrics[name] is not None}


class Measures(NamedTuple):
    """Everything that is resampled of one model on one set of notes."""

    kind: Kind
    cluster_of_row: NDArray[np.int64]  # [n]
    averaged: list["Comparison"]  # whose mean is the AUROC
    by_label: list["Comparison"]  # each class or label against the rest
    agreement: "_Agreement"

    @classmethod
    def of(
        cls,
        labels: NDArray[Any],
        logits: NDArray[Any],
        cluster_of_row: NDArray[np.int64],
        label_scores: LabelScores = "sigmoid",
    ) -> "Measures":
        """Prepare labels [n] or [n, C] and logits [n, C]; see `classification_metrics`."""
        scores = ranking_scores(labels, logits, label_scores)
        return cls._of(labels, scores, ranking_scores(labels, logits), cluster_of_row)

    @classmethod
    def of_chances(
        cls,
        labels: NDArray[Any],
        chances: Floats,
        cluster_of_row: NDArray[np.int64],
        label_scores: LabelScores = "sigmoid",
    ) -> "Measures":
        """Prepare from probabilities [n, C] instead of logits."""
        scores = chances
        if labels.ndim == 2 and label_scores == "softmax":
            odds = logit(chances.clip(SURE, 1 - SURE))
            scores = probabilities(odds, multilabel=False)
        return cls._of(labels, scores, chances, cluster_of_row)

    @classmethod
    def _of(
        cls,
        labels: NDArray[Any],
        scores: Floats,
        chances: Floats,
        cluster_of_row: NDArray[np.int64],
    ) -> "Measures":
        kind = kind_of(labels, scores)
        rows = np.arange(len(labels))
        if kind == "multilabel":
            positive = labels > 0
        else:
            positive = labels[:, None] == np.arange(scores.shape[1])
        classes = [1] if kind == "binary" else range(scores.shape[1])
        by_label = [Comparison(rows, positive[:, c], scores[:, c]) for c in classes]
        averaged = list(_one_against_one(labels, scores)) if kind == "multiclass" else by_label
        agreement = _Agreement.of(labels, chances, cluster_of_row)
        return cls(kind, cluster_of_row, averaged, by_label, agreement)

    def statistics(self, counts: Tensor) -> Floats:
        """Return the HEADLINES, then every label's AUROC and AUPRC (binary: only once).

        counts: [clusters, resamples], how often each cluster was drawn. float64 [S, resamples].
        """
        areas = [c.areas(self.cluster_of_row, counts) for c in self.by_label]
        aurocs, auprcs = (np.stack(column) for column in zip(*areas, strict=True))
        pairs = aurocs
        if self.averaged is not self.by_label:
            found = [c.areas(self.cluster_of_row, counts)[0] for c in self.averaged]
            pairs = np.stack(found) if found else np.full((1, counts.shape[1]), np.nan)
        f1 = self.agreement.f1(counts)
        mean_f1 = f1[1] if self.kind == "binary" else _means(f1)
        headlines = [self.agreement.accuracy(counts), mean_f1, _means(pairs), _means(auprcs)]
        return np.vstack([*headlines, aurocs, auprcs])

    def are_auprc(self) -> NDArray[np.bool_]:
        """Tell which of the statistics are AUPRCs: [S]."""
        headlines = [name == "auprc" for name in HEADLINES]
        labels = len(self.by_label)
        return np.array([*headlines, *[False] * labels, *[True] * labels])


class Comparison(NamedTuple):
    """One class or label against others, on the notes that have either."""

    rows: NDArray[np.int64]  # [m]
    positive: NDArray[np.bool_]  # [m]
    scores: Floats  # [m]

    def areas(self, cluster_of_row: NDArray[np.int64], counts: Tensor) -> tuple[Floats, Floats]:
        """Return AUROC and AUPRC where each cluster counts as often as it was drawn: 2 x [B].

        counts: [clusters, B], how often. nan where a resample has one class alone.
        Positives of one score form a group, and negatives lie between two groups or on one, so the
        notes are summed once for all resamples, and what is left to do grows with the groups.
        """
        clusters = cluster_of_row[self.rows]
        values, group_of_positive = np.unique(self.scores[self.positive], return_inverse=True)
        negative_scores = self.scores[~self.positive]
        # A negative's place among the positives' values: 2g below value g, 2g + 1 on it.
        place_of_negative = np.searchsorted(values, negative_scores, "left")
        place_of_negative += np.searchsorted(values, negative_scores, "right")

        positives = _sum_in_bags(clusters[self.positive], group_of_positive, len(values), counts)
        negatives = _sum_in_bags(
            clusters[~self.positive], place_of_negative, 2 * len(values) + 1, counts
        )
        for bag in range(1, len(negatives)):  # running sums, in place
            np.add(negatives[bag], negatives[bag - 1], out=negatives[bag])
        below, up_to, n_negatives = negatives[0:-1:2], negatives[1::2], negatives[-1]
        n_positives = positives.sum(0, dtype=np.float64)
        pairs = n_positives * n_negatives
        # Each positive wins against the negatives below it, and half against those on it.
        won = 0.5 * sum(
            np.einsum("gb,gb->b", positives, part, dtype=np.float64) for part in (below, up_to)
        )
        # At the threshold of group g it and all above are found: so many true, so many false.
        found = np.cumsum(positives[::-1], axis=0)[::-1]
        false = n_negatives - below
        precision = found / np.maximum(found + false, 1, dtype=np.float64)
        gained = np.einsum("gb,gb->b", positives, precision)
        auroc, auprc = (
            np.divide(part, whole, out=np.full(len(pairs), np.nan), where=pairs > 0)
            for part, whole in ((won, pairs), (gained, n_positives))
        )
        return auroc, auprc


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
        dtype = count_dtype(len(labels))

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


def _means(values: Floats) -> Floats:
    """Return the mean of each column [S, B] -> [B] over what is defined in it, else nan."""
    number = (~np.isnan(values)).sum(axis=0)
    total = np.nansum(values, axis=0)
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def check_scored(labels: NDArray[Any], logits: NDArray[Any], label_names: Sequence[str]) -> None:
    """Raise ValueError for what cannot be scored; see `classification_metrics`."""
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] != len(label_names):
        raise ValueError(
            f"scores must be [{len(labels)}, {len(label_names)}] (notes, labels), "
            f"found {list(logits.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("there is no labelled note to score: name other data or another split")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        raise ValueError(f"not finite: the scores of {bad} of {counted(len(logits), 'note')}")
    highest = 1 if labels.ndim == 2 else logits.shape[1] - 1
    if labels.min() < 0 or labels.max() > highest:
        raise ValueError(
            f"labels must lie between 0 and {highest}, found {labels.min()} to {labels.max()}"
        )
