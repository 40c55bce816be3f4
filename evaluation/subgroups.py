"""The same metrics for women and men, young and old: a model may serve one group worse than others.

Invariant: of a group with fewer than ten patients nothing is told but its name, because figures of
a few patients are noise, and may tell what became of one of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.groups import Groups
from evaluation.metrics import LabelScores, classification_metrics

FEWEST_PATIENTS = 10
_SHOWN = (
    "n", "clusters", "positives", "accuracy", "accuracy_ci", "auroc", "auroc_ci", "auprc",
    "auprc_ci",
)  # fmt: skip


def subgroup_rows(
    groups: Mapping[str, Groups],
    rows: NDArray[Any],
    labels: NDArray[Any],
    logits: NDArray[Any],
    label_names: Sequence[str],
    *,
    clusters: NDArray[Any],
    resamples: int,
    seed: int,
    label_scores: LabelScores = "sigmoid",
) -> list[dict[str, Any]]:
    """Return a row for each value of each group, with `classification_metrics` of its notes.

    rows: [n], the scored notes in the source, in the order of labels, logits and clusters. Notes
    whose group is not known are in no row. A suppressed row has `group`, `value`, `suppressed`.
    """
    table = []
    for name, column in groups.items():
        codes = column.codes[rows]
        for code, value in enumerate(column.values):
            inside = np.flatnonzero(codes == code)
            is_small = len(np.unique(clusters[inside])) < FEWEST_PATIENTS
            row: dict[str, Any] = {"group": name, "value": value, "suppressed": is_small}
            if not is_small:
                metrics = classification_metrics(
                    labels[inside],
                    logits[inside],
                    label_names,
                    clusters=clusters[inside],
                    resamples=resamples,
                    seed=seed,
                    label_scores=label_scores,
                )
                row |= {key: metrics[key] for key in _SHOWN if key in metrics}
            table.append(row)
    return table
