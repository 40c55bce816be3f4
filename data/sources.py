"""Several sources of texts at once, each with its share of the training tokens: what is typed.

A word NAME=PATH:WEIGHT is one source; weights are shares of the tokens drawn, whatever their sum,
and without any each source's is what an epoch draws of it. Invariant: a path alone is no named
source, so one unnamed path means what it always did; a word alone that is the path of something
there, such as year=2020/notes.csv, is a path.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,39})=(.*)", re.DOTALL)
_FORM = "NAME=PATH:WEIGHT, for example notes=notes.csv:0.8"


class Source(NamedTuple):
    """One source as it was typed."""

    name: str
    path: str
    weight: float | None  # None where no source has one


def read_sources(data: str | Sequence[str] | None) -> tuple[Source, ...]:
    """The sources that --data names, in their order; none where it is a path alone.

    Raises ValueError for a word that is no source, a name or a path that stands twice, and a
    weight that is no number above 0 or that only some have.
    """
    words: Sequence[str]
    if data is None:
        return ()
    if isinstance(data, str):
        if not _NAMED.fullmatch(data) or os.path.exists(data):
            return ()
        words = (data,)
    else:
        words = data
    sources = tuple(map(_read, words))
    for i, source in enumerate(sources):
        for other in sources[:i]:
            if source.name == other.name:
                raise ValueError(
                    f"--data names two sources {source.name}; each needs a name of its own"
                )
            if os.path.realpath(source.path) == os.path.realpath(other.path):
                raise ValueError(
                    f"--data gives {source.path} twice, as {other.name} and as {source.name}; give "
                    "it once, with the weight of both"
                )
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(
            f"--data {without[0]} has no weight, but others have one; give every source one, as in "
            f"{_FORM}, or none"
        )
    return sources


def _read(word: str) -> Source:
    found = _NAMED.fullmatch(word)
    if found is None or not found[2]:
        raise ValueError(
            f"--data {word}: of several sources each is {_FORM}; a name has letters, digits, - and "
            "_, 40 at most"
        )
    path, colon, last = found[2].rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        return Source(found[1], found[2], None)
    if not (math.isfinite(weight) and 0 < weight <= 1e9):
        raise ValueError(
            f"--data {found[1]}: its weight must be a number above 0, up to 1e9, got {last}"
        )
    if not path:
        raise ValueError(f"--data {word} names no path; a source is {_FORM}")
    return Source(found[1], path, weight)
