"""The groups that results are told apart by: sex, age band and the like, a value for every note.

They are read from the source when a run is scored and stand in no cache: nothing trains on them,
and other columns can be named later without tokenising again.

Invariant: a column with more values than categories have is refused, because its values are written
into results, and an identifier must not be.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.notes import NoteSource

VALUE_LIMIT, VALUE_CHARACTERS = 40, 60


class Groups(NamedTuple):
    """One column of categories over the N notes of a source."""

    values: tuple[str, ...]  # ascending
    codes: NDArray[np.int32]  # [N], into `values`; -1 where the source does not know


def read_groups(source: NoteSource) -> dict[str, Groups]:
    """Reads the source to its end for each note's groups: {group name: its column}.

    Raises ValueError for a column that does not hold categories, and for a damaged source.
    """
    names = source.group_names
    if not names:
        return {}
    known: list[dict[str, int]] = [{} for _ in names]
    rows: list[list[int]] = []
    for note in source:
        row = []
        for name, codes, value in zip(names, known, note.groups, strict=True):
            if value is None:
                row.append(-1)
                continue
            row.append(codes.setdefault(value, len(codes)))
            if len(codes) > VALUE_LIMIT or len(value) > VALUE_CHARACTERS:
                raise ValueError(
                    f"{source.description}: the subgroup column {name!r} holds more than "
                    f"{VALUE_LIMIT} different values, or longer ones than {VALUE_CHARACTERS} "
                    f"characters; name a column of a few categories, never one of identifiers"
                )
        rows.append(row)
    columns = np.array(rows, np.int32).reshape(-1, len(names)).T
    groups = {}
    for name, codes, column in zip(names, known, columns, strict=True):
        values = sorted(codes)
        rank = np.full(len(values) + 1, -1, np.int32)  # its last entry is that of -1
        rank[[codes[value] for value in values]] = np.arange(len(values))
        groups[name] = Groups(tuple(values), rank[column])
    return groups
