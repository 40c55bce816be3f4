"""In which order segments are taken, and where optimiser steps end.

The order of an epoch is a keyed permutation of 0..n-1 that is computed, not stored: a Feistel
network over the next power of four, walked along its cycles until it lands below n (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), with the finaliser of SplitMix64
(Steele, Lea and Flood, OOPSLA 2014) as round function. It is not a cipher, only a good shuffle.

`Epochs` takes one dataset, epoch after epoch. `Mixture` takes several sources of it at once: the
next segment comes from the source that has so far been given the smallest part of its share.
Invariant: an order is a function of the segments' lengths, the shares, the seed and the step's size
alone, and a position in it is a few numbers.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from data.packing import SegmentDataset

ROUNDS = 6  # of the Feistel network
WINDOW = 4096  # segments put in order at once


class Permutation:
    """A permutation of 0..count-1 drawn by (seed, epoch), in constant memory."""

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self._count = np.uint64(count)
        self._half_bits = np.uint64(max((max(count - 1, 1).bit_length() + 1) // 2, 1))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        key = _mix(_mix(np.array([seed % (1 << 64)], np.uint64)) + np.uint64(epoch))
        self._keys = _mix(key + np.arange(1, ROUNDS + 1, dtype=np.uint64))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """What stands at each position: int64 [n] -> int64 [n]."""
        values = self._feistel(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self._count)
        while len(outside):
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self._count]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64: each uint64 to one that looks unrelated, modulo 2**64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class StepSize(NamedTuple):
    """How much a step holds: so many tokens, or so many segments; at least one segment."""

    limit: int
    is_tokens: bool

    def whole_steps(self, lengths: np.ndarray, *, is_end: bool) -> Iterator[tuple[int, int]]:
        """Begin and end of the steps that consecutive segments fill.

        lengths: int64 [n], tokens of each. Unless `is_end`, a step that might go on behind the
        last segment is left out.
        """
        spent = np.cumsum(lengths if self.is_tokens else np.ones_like(lengths))
        begin = 0
        while begin < len(lengths):
            budget = self.limit + (spent[begin - 1] if begin else 0)
            end = max(int(np.searchsorted(spent, budget, side="right")), begin + 1)
            if end == len(lengths) and not is_end:
                return
            yield begin, end
            begin = end


class Epochs:
    """The steps of one dataset: an epoch's last may be smaller, none reaches into the next."""

    def __init__(self, dataset: SegmentDataset, size: StepSize, seed: int) -> None:
        self._dataset = dataset
        self._size = size
        self._seed = seed
        self._go_to(0, 0)

    @property
    def epoch(self) -> int:
        return self._epoch

    def next_step(self) -> np.ndarray:
        """The segments of the next step: int64 [n]."""
        indices = next(self._steps)
        if self._position + len(indices) < len(self._dataset):
            self._position += len(indices)
        else:
            self._go_to(self._epoch + 1, 0)
        return indices

    def steps_per_epoch(self, epoch: int = 0) -> int:
        return sum(1 for _ in self._epoch_steps(epoch, 0))

    def first_epoch(self) -> np.ndarray:
        """The segments of the first epoch, in no order: int64 [n]."""
        return np.arange(len(self._dataset))

    def state(self) -> dict[str, Any]:
        return {
            "segments": len(self._dataset),
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        _check_same_order(state, len(self._dataset), self._seed)
        _check_position(state, len(self._dataset))
        self._go_to(state["epoch"], state["position"])

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._steps = self._epoch_steps(epoch, position)

    def _epoch_steps(self, epoch: int, position: int) -> Iterator[np.ndarray]:
        """The segments of each step of an epoch, from a position on."""
        count = len(self._dataset)
        order = Permutation(count, self._seed, epoch)
        window = WINDOW
        while position < count:
            indices = order(np.arange(position, min(position + window, count)))
            is_end = position + len(indices) == count
            taken = 0
            lengths = self._dataset.lengths(indices)
            for begin, taken in self._size.whole_steps(lengths, is_end=is_end):
                yield indices[begin:taken]
            position += taken
            if taken == 0:
                window *= 2


class Share(NamedTuple):
    """A source in a mixture: its segments stand behind those of the shares before it."""

    name: str
    segments: int
    weight: float  # its part of the tokens drawn, beside the others'


class Drawn(NamedTuple):
    """How far a source has been read."""

    epoch: int  # whole passes
    position: int  # segments of the next one
    tokens: int  # of all its segments so far


class Mixture:
    """Endless steps from several sources of one dataset, each with its share of the tokens.

    A source that has given t tokens at weight w stands at t / w; the next segment is taken from
    the one that stands lowest, the first named of equals. So at any moment the sources stand
    within one segment (over its weight) of each other. Each source has its own epochs, and begins
    the next where it is needed, in the middle of a step too. The epochs of the mixture are those
    of the source that is named first.
    """

    def __init__(
        self, dataset: SegmentDataset, shares: Sequence[Share], size: StepSize, seed: int
    ) -> None:
        assert sum(share.segments for share in shares) == len(dataset)
        for share in shares:
            if share.segments == 0:
                raise ValueError(
                    f"source {share.name}: there is nothing to train on, no note is left after the "
                    "split; leave the source out, or give it more notes"
                )
        self._dataset = dataset
        self._shares = shares
        self._firsts = np.cumsum([0, *(share.segments for share in shares)])
        self._size = size
        self._seed = seed
        self._go_to([Drawn(0, 0, 0)] * len(shares))

    @property
    def epoch(self) -> int:
        return self._drawn[0].epoch

    def next_step(self) -> np.ndarray:
        """The segments of the next step: int64 [n]."""
        indices, self._drawn = next(self._steps)
        return indices

    def steps_per_epoch(self) -> int:
        return sum(1 for _ in self._first_epoch())

    def first_epoch(self) -> np.ndarray:
        """The segments of the steps that the first epoch takes, in order: int64 [n]."""
        return np.concatenate(list(self._first_epoch()))

    def drawn(self, steps: int | None = None) -> dict[str, dict[str, float]]:
        """Tokens and epochs of each source by now, or after so many steps from the start."""
        drawn = self._drawn
        if steps is not None:
            walk = self._walk([Drawn(0, 0, 0)] * len(self._shares))
            *_, (_, drawn) = islice(walk, steps)
        return {
            share.name: {
                "tokens": of.tokens,
                "epochs": round(of.epoch + of.position / share.segments, 4),
            }
            for share, of in zip(self._shares, drawn, strict=True)
        }

    def state(self) -> dict[str, Any]:
        return {
            "segments": len(self._dataset),
            "seed": self._seed,
            "sources": {
                share.name: {"segments": share.segments, **drawn._asdict()}
                for share, drawn in zip(self._shares, self._drawn, strict=True)
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        _check_same_order(state, len(self._dataset), self._seed)
        saved = state.get("sources", {})
        if {name: of["segments"] for name, of in saved.items()} != {
            share.name: share.segments for share in self._shares
        }:
            raise ValueError(
                "the saved position is of other sources than this run's; resume with the same ones"
            )
        for share in self._shares:
            _check_position(saved[share.name], share.segments)
        self._go_to(
            [Drawn(*(saved[name][field] for field in Drawn._fields)) for name in self._names()]
        )

    def _names(self) -> list[str]:
        return [share.name for share in self._shares]

    def _go_to(self, drawn: list[Drawn]) -> None:
        self._drawn = drawn
        self._steps: Iterator[tuple[np.ndarray, list[Drawn]]] = self._walk(drawn)

    def _first_epoch(self) -> Iterator[np.ndarray]:
        for indices, drawn in self._walk([Drawn(0, 0, 0)] * len(self._shares)):
            yield indices
            if drawn[0].epoch > 0:
                return

    def _walk(self, drawn: list[Drawn]) -> Iterator[tuple[np.ndarray, list[Drawn]]]:
        """The segments of each step from a position on, and how far each source is read then."""
        window = WINDOW
        while True:
            ahead = [self._ahead(source, drawn[source], window) for source in range(len(drawn))]
            lengths = [self._dataset.lengths(indices) for indices in ahead]
            # Where a source stands before each of its segments decides when it is taken.
            stands = [
                (of.tokens + np.cumsum(length) - length) / share.weight
                for of, length, share in zip(drawn, lengths, self._shares, strict=True)
            ]
            sources = np.repeat(np.arange(len(drawn)), window)
            # The first `window` of all are certain: no source can be asked for more.
            order = np.lexsort((sources, np.concatenate(stands)))[:window]
            indices, length, source = (
                each[order] for each in (np.concatenate(ahead), np.concatenate(lengths), sources)
            )
            taken = 0
            for begin, taken in self._size.whole_steps(length, is_end=False):
                step = slice(begin, taken)
                counts = np.bincount(source[step], minlength=len(drawn))
                tokens = np.bincount(source[step], length[step], minlength=len(drawn))
                drawn = [
                    _moved(of, share.segments, int(count), int(more))
                    for of, share, count, more in zip(
                        drawn, self._shares, counts, tokens, strict=True
                    )
                ]
                yield indices[step], drawn
            if taken == 0:
                window *= 2

    def _ahead(self, source: int, drawn: Drawn, count: int) -> np.ndarray:
        """The next `count` segments of a source, over as many of its epochs as they take."""
        segments, epoch, position = self._shares[source].segments, drawn.epoch, drawn.position
        parts = []
        while count > 0:
            end = min(position + count, segments)
            parts.append(Permutation(segments, self._seed, epoch)(np.arange(position, end)))
            count -= end - position
            epoch, position = epoch + 1, 0
        return self._firsts[source] + np.concatenate(parts)


def _moved(drawn: Drawn, segments: int, count: int, tokens: int) -> Drawn:
    passes, position = divmod(drawn.position + count, segments)
    return Drawn(drawn.epoch + passes, position, drawn.tokens + tokens)


def _check_same_order(state: dict[str, Any], segments: int, seed: int) -> None:
    for name, own in (("segments", segments), ("seed", seed)):
        if state[name] != own:
            raise ValueError(
                f"the saved position is in an order with {name} {state[name]}, this run has {own}; "
                "resume with the same notes, tokenizer, max length and seed"
            )


def _check_position(saved: dict[str, Any], segments: int) -> None:
    if not 0 <= saved["position"] < segments or saved["epoch"] < 0:
        raise ValueError(
            f"the saved position {saved['position']} of epoch {saved['epoch']} is none of this "
            f"order's; the checkpoint is damaged: resume from another"
        )
