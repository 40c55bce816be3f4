"""The groups that results are told apart by: sex, age band and the like, a value for every note.

They are read from the source when a run is scored and stand in no cache: nothing trains on them,
and other columns can be named later without tokenising again.

Invariant: a column with more values than categories have is refused or left out, because its values
are written into results, and an identifier must not be.
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


def read_groups(source: NoteSource, left_out: dict[str, str] | None = None) -> dict[str, Groups]:
    """Reads the source to its end for each note's groups: {group name: its column}.

    left_out: where nobody named the columns, takes the name of each that does not hold categories,
        and why it is none of the groups.
    Raises ValueError for such a column without `left_out`, and for a damaged source.
    """
    names = source.group_names
    if not names:
        return {}
    known: list[dict[str, int]] = [{} for _ in names]
    rows: list[list[int]] = []
    for note in source:
        row = []
        for name, codes, value in zip(names, known, note.groups, strict=True):
            if value is None or name in (left_out or ()):
                row.append(-1)
                continue
            row.append(codes.setdefault(value, len(codes)))
            if len(codes) > VALUE_LIMIT or len(value) > VALUE_CHARACTERS:
                problem = (
                    f"holds more than {VALUE_LIMIT} different values, or longer ones than "
                    f"{VALUE_CHARACTERS} characters"
                )
                if left_out is None:
                    raise ValueError(
                        f"{source.description}: the subgroup column {name!r} {problem}; name a "
                        "column of a few categories, never one of identifiers"
                    )
                left_out[name] = f"its column {problem}"
        rows.append(row)
    columns = np.array(rows, np.int32).reshape(-1, len(names)).T
    groups = {}
    for name, codes, column in zip(names, known, columns, strict=True):
        if name in (left_out or ()):
            continue
        values = sorted(codes)
        rank = np.full(len(values) + 1, -1, np.int32)  # its last entry is that of -1
        rank[[codes[value] for value in values]] = np.arange(len(values))
        groups[name] = Groups(tuple(values), rank[column])
    return groups
