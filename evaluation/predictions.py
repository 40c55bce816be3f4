"""predictions.csv: what a classifier said of every note, without the note.

Invariant: a cell holds a number or a label's name. Patients are numbered in the order of their
first note, because a hash of an identifier is undone by hashing all identifiers.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.files import write_whole

# A spreadsheet takes a cell that begins with one of these for a formula and runs it.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_predictions(
    path: Path,
    rows: NDArray[Any],
    probabilities: NDArray[np.float64],
    label_names: Sequence[str],
    *,
    multilabel: bool = False,
    labels: NDArray[Any] | None = None,
    patients: NDArray[np.int64] | None = None,
) -> None:
    """Write one line for each of n notes: `row,patient,label,predicted` and the probabilities.

    rows: [n], the notes' numbers in their source, from 0. probabilities: [n, C] float64, in
    columns `p_NAME`. labels: [n] int64, or with several labels a note [n, C] of 0 and 1, in columns
    `label_NAME`; then a note has no single prediction. patients: [n], equal for one patient.
    """
    names = [_cell(name) for name in label_names]
    columns: list[tuple[str, Sequence[object]]] = [("row", rows.tolist())]
    if patients is not None:
        columns.append(("patient", _by_first_note(patients).tolist()))
    if multilabel:
        for c, name in enumerate(names if labels is not None else []):
            assert labels is not None
            columns.append((f"label_{name}", labels[:, c].astype(int).tolist()))
    else:
        if labels is not None:
            columns.append(("label", [names[label] for label in labels]))
        columns.append(("predicted", [names[c] for c in probabilities.argmax(axis=1)]))
    for c, name in enumerate(names):
        columns.append((f"p_{name}", probabilities[:, c].tolist()))

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow(name for name, _ in columns)
            writer.writerows(zip(*(cells for _, cells in columns), strict=True))

    write_whole(path, write)


def _cell(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA_STARTS) else name


def _by_first_note(patients: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the patients from 0 in the order in which they come up."""
    _, first, number = np.unique(patients, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number]
