"""Several token caches as one: their notes, one cache after the other.

Invariant: row r of the joined cache is row r - first of one part, so what is made of rows (pieces,
sample ids, splits) needs to know nothing of parts.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from data.cache import TokenCache


class JoinedCache:
    """The notes of several caches of one tokenizer; firsts: int64 [parts + 1], rows of the first
    notes."""

    def __init__(self, parts: Sequence[TokenCache]) -> None:
        self._parts = parts
        self.firsts = np.cumsum([0, *map(len, parts)])
        self.description = "; ".join(part.description for part in parts)
        self.cohort_counts: Mapping[str, int] = {}
        self.text_digests = np.concatenate([part.text_digests for part in parts])
        self.patient_digests: np.ndarray | None = None
        if any(part.patient_digests is not None for part in parts):
            # A note without a patient is a unit of its own, known by its text.
            self.patient_digests = np.concatenate(
                [
                    part.text_digests if part.patient_digests is None else part.patient_digests
                    for part in parts
                ]
            )

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def tokens_of(self, note: int) -> np.ndarray:
        """The token ids of one note."""
        part = int(np.searchsorted(self.firsts, note, side="right")) - 1
        return self._parts[part].tokens_of(note - int(self.firsts[part]))

    def lengths(self, notes: np.ndarray) -> np.ndarray:
        """Tokens in each of the notes: int64 [n]."""
        notes = notes.astype(np.int64)
        lengths = np.zeros(len(notes), np.int64)
        for part, first, end in zip(self._parts, self.firsts, self.firsts[1:], strict=False):
            inside = (first <= notes) & (notes < end)
            lengths[inside] = part.lengths(notes[inside] - first)
        return lengths
