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


def read_predictions(
    path: Path, label_names: Sequence[str], *, multilabel: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Read what `write_predictions` wrote with labels: rows [n], labels [n] or [n, C], [n, C].

    Raises ValueError for a file that is not there or not of these labels.
    """
    names = [_cell(name) for name in label_names]
    code = {name: c for c, name in enumerate(names)}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, strict=True))
        rows = np.array([int(line["row"]) for line in lines], np.int64)
        chances = np.array([[float(line[f"p_{name}"]) for name in names] for line in lines])
        if multilabel:
            labels = np.array([[int(line[f"label_{name}"]) for name in names] for line in lines])
        else:
            labels = np.array([code[line["label"]] for line in lines], np.int64)
    except (OSError, KeyError, ValueError, TypeError, csv.Error):
        raise ValueError(
            f"{path}: missing, damaged, or predictions of other labels; score that run again"
        ) from None
    if not len(rows) or not ((chances >= 0) & (chances <= 1)).all():
        raise ValueError(f"{path}: not probabilities of notes; score that run again")
    return rows, labels, chances


def _cell(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA_STARTS) else name


def _by_first_note(patients: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the patients from 0 in the order in which they come up."""
    _, first, number = np.unique(patients, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number]
