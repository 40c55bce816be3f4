"""Segments of a flat token stream: pieces of notes for language modelling, whole notes for labels.

Language modelling: BOS + note + EOS is cut into consecutive pieces of at most `max_length` tokens
that overlap by one. A piece's first token is never scored (no row stands before it), and it is the
last token of the piece before, which scores it: so every token of a note is scored exactly once.
Or the first piece alone is taken, and what stands behind it is left out.
Classification: a note is one segment, BOS + note (+ EOS for an encoder, whose [CLS] and [SEP] they
are), cut only where it is longer than `max_length`.

Invariant: a segment's tokens, labels and `sample_ids` depend on its note alone, never on the batch.
"""

from typing import NamedTuple, Protocol

import numpy as np

from data.cache import TokenCache
from data.joined import JoinedCache
from data.wording import counted

IGNORED = -100  # label of a token that is not scored
PIECES_LIMIT = 1 << 20  # of a note: sample ids are note row * 2**20 + piece
QUANTILES = {"min": 0, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "99%": 99, "max": 100}


class PackedBatch(NamedTuple):
    """One flat stream of M tokens in n segments, without padding; nothing crosses a segment."""

    input_ids: np.ndarray  # int64 [M]
    labels: np.ndarray | None  # int64 [M]: the id that token i is to be predicted as; IGNORED
    offsets: np.ndarray  # int32 [n + 1]: segment s is input_ids[offsets[s]:offsets[s + 1]]
    sample_ids: np.ndarray  # int64 [n]: note row * 2**20 + piece, unique and stable
    targets: np.ndarray | None  # int64 [n], float32 [n, C], or None: what a classifier answers
    rows: np.ndarray  # int64 [n]: the note's index in its source


class SegmentDataset(Protocol):
    """What the loader asks of a dataset: n segments, numbered from 0."""

    max_length: int

    def __len__(self) -> int: ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each segment: int64 [n], each from 1 to `max_length`."""
        ...

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """The segments, one after the other."""
        ...


class LanguagePieces:
    """Pieces of notes for next-token prediction; `notes` are rows of the cache (uint32 [n]).

    `bos_id` or `eos_id` None leaves that token out (without BOS a note's first token is not
    scored). `first_only` takes the first piece of each note and leaves out the others.
    `notes_cut` counts the notes that are longer than a piece.
    """

    def __init__(
        self,
        cache: TokenCache | JoinedCache,
        notes: np.ndarray,
        *,
        max_length: int,
        bos_id: int | None,
        eos_id: int | None,
        first_only: bool = False,
    ) -> None:
        if max_length < 2:
            raise ValueError(
                f"max length is {max_length}; at least 2 (one token predicts the next)"
            )
        self.max_length = max_length
        self._cache = cache
        self._notes = notes
        self._bos = np.array([] if bos_id is None else [bos_id], np.int64)
        self._eos = np.array([] if eos_id is None else [eos_id], np.int64)
        pieces = self._pieces(self._note_lengths(notes))
        if len(pieces) and pieces.max() > PIECES_LIMIT:
            raise ValueError(
                f"max length {max_length} cuts a note into {pieces.max()} pieces; at most "
                f"{PIECES_LIMIT} are allowed: raise the max length"
            )
        self.notes_cut = int((pieces > 1).sum())
        self.first_only = first_only
        if first_only:
            pieces = np.minimum(pieces, 1)
        self._ends = np.cumsum(pieces)  # after the last piece of each note

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def scored_tokens(self) -> int:
        """Tokens of all pieces but the first of each."""
        return int(self.lengths(np.arange(len(self))).sum()) - len(self)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each piece, BOS, EOS and the overlap included: int64 [n]."""
        at, piece = self._locate(indices)
        begin = piece * (self.max_length - 1)
        return np.minimum(self._note_lengths(self._notes[at]) - begin, self.max_length)

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """The pieces as one stream, each token labelled with its own id, first ones IGNORED."""
        at, piece = self._locate(indices)
        rows = self._notes[at].astype(np.int64)
        begins = piece * (self.max_length - 1)
        segments = [self._piece(row, begin) for row, begin in zip(rows, begins, strict=True)]
        input_ids, offsets = join_segments(segments)
        labels = input_ids.copy()
        labels[offsets[:-1]] = IGNORED
        return PackedBatch(input_ids, labels, offsets, rows * PIECES_LIMIT + piece, None, rows)

    def _piece(self, row: int, begin: int) -> np.ndarray:
        """Tokens `begin` to `begin + max_length` of BOS + note + EOS."""
        note = self._cache.tokens_of(row)
        begin -= len(self._bos)  # now in tokens of the note: -1 is BOS
        end = begin + self.max_length
        bos = self._bos if begin < 0 else self._bos[:0]
        eos = self._eos if end > len(note) else self._eos[:0]
        return np.concatenate((bos, note[max(begin, 0) : end], eos))

    def _note_lengths(self, notes: np.ndarray) -> np.ndarray:
        return self._cache.lengths(notes) + (len(self._bos) + len(self._eos))

    def _pieces(self, note_lengths: np.ndarray) -> np.ndarray:
        """Pieces of each note: ceil((length - 1) / (max_length - 1)), at least 1, 0 if empty."""
        pieces = -((1 - note_lengths) // (self.max_length - 1))
        return np.maximum(pieces, note_lengths > 0)

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each piece's place in `notes`, and its number in the note."""
        at = np.searchsorted(self._ends, indices, side="right")
        before = np.where(at > 0, self._ends[at - 1], 0)
        return at, indices.astype(np.int64) - before


class ClassificationNotes:
    """Whole notes as segments: BOS + note + EOS, at most `max_length` tokens in all.

    `bos_id` or `eos_id` None leaves that token out; where they are, they survive the cut. Of a
    longer note, `truncate` keeps the head, the tail, or both (half of each). `targets` stand
    beside `notes`: int64 [n] classes, float32 [n, C] labels, or None where there are none.
    `truncated` counts the notes that were cut.
    """

    def __init__(
        self,
        cache: TokenCache,
        notes: np.ndarray,
        *,
        max_length: int,
        bos_id: int | None,
        eos_id: int | None = None,
        truncate: str = "head",
        targets: np.ndarray | None = None,
    ) -> None:
        if truncate not in ("head", "tail", "both"):
            raise ValueError(f"truncate is {truncate!r}; allowed: head, tail, both")
        least = 2 + (eos_id is not None)
        if max_length < least:
            framed = "BOS, a token" + (" and EOS" if eos_id is not None else "")
            raise ValueError(f"max length is {max_length}; at least {least} ({framed})")
        if targets is not None and len(targets) != len(notes):
            raise ValueError(f"{len(targets)} targets for {len(notes)} notes; one each is needed")
        self.max_length = max_length
        self._cache = cache
        self._notes = notes
        self._targets = targets
        self._bos = np.array([] if bos_id is None else [bos_id], np.int64)
        self._eos = np.array([] if eos_id is None else [eos_id], np.int64)
        room = max_length - len(self._bos) - len(self._eos)
        self._head = {"head": room, "tail": 0, "both": (room + 1) // 2}[truncate]
        self._tail = room - self._head
        lengths = cache.lengths(notes)
        self.truncated = int((lengths > room).sum())
        if bos_id is None and len(notes) and lengths.min() == 0:
            raise ValueError(
                f"{counted(int((lengths == 0).sum()), 'note is', 'notes are')} empty, and this "
                "tokenizer has no BOS to stand in such a place; drop empty notes"
            )

    def __len__(self) -> int:
        return len(self._notes)

    @property
    def multilabel(self) -> bool:
        """Whether a note may have several of the labels."""
        return self._targets is not None and self._targets.ndim == 2

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each segment, BOS and EOS included: int64 [n]."""
        framing = len(self._bos) + len(self._eos)
        whole = self._cache.lengths(self._notes[indices]) + framing
        return np.minimum(whole, self.max_length)

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """The notes as one stream, with their targets."""
        rows = self._notes[indices].astype(np.int64)
        segments = [np.concatenate((self._bos, self._cut(row), self._eos)) for row in rows]
        input_ids, offsets = join_segments(segments)
        targets = None if self._targets is None else self._targets[indices]
        return PackedBatch(input_ids, None, offsets, rows * PIECES_LIMIT, targets, rows)

    def _cut(self, row: int) -> np.ndarray:
        tokens = self._cache.tokens_of(row)
        if len(tokens) <= self._head + self._tail:
            return tokens
        return np.concatenate((tokens[: self._head], tokens[len(tokens) - self._tail :]))


def length_quantiles(cache: TokenCache | JoinedCache, notes: np.ndarray) -> dict[str, int]:
    """Tokens of whole notes (no BOS or EOS) at the quantiles that a run prints; {} for no notes."""
    if not len(notes):
        return {}
    values = np.percentile(cache.lengths(notes), list(QUANTILES.values()), method="nearest")
    return {name: int(value) for name, value in zip(QUANTILES, values, strict=True)}


def join_segments(segments: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Segments end to end: int64 [M] and their offsets int32 [n + 1]."""
    offsets = np.zeros(len(segments) + 1, np.int32)
    np.cumsum([len(segment) for segment in segments], out=offsets[1:])
    stream = np.concatenate(segments) if segments else np.zeros(0, np.int64)
    return stream.astype(np.int64, copy=False), offsets
