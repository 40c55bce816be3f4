"""Note tables: where notes come from, read one at a time, refused with one clear line when damaged.

A source is anything that yields `Note`s in the same order every time it is iterated and names its content by a
fingerprint; the token cache, the splits and the tests depend on nothing else. Tables are read strictly: a cut last
row, a missing field or a byte that is not UTF-8 raises, because a note that silently loses its end is a wrong note.

Invariant: no message raised here contains a note's text, a label or a patient's identifier.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Note(NamedTuple):
    """One note. `patient` is None for a source without patients, `label` is None for a note without a label."""

    text: str
    patient: str | None = None
    label: str | None = None


class NoteSource(Protocol):
    """A sequence of notes that can be read again and again, in the same order."""

    description: str  # one line for people: file, columns

    def __iter__(self) -> Iterator[Note]:
        """Yields every note in order; raises ValueError for a damaged source."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the notes: the content and the columns used."""
        ...
