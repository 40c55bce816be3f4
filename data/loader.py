"""Batches in a shuffled order that needs no memory, and a position that a resumed run continues.

The order of an epoch is a keyed permutation of 0..n-1 that is computed, not stored: a Feistel
network over the next power of four, walked along its cycles until it lands below n (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), with the finaliser of SplitMix64
(Steele, Lea and Flood, OOPSLA 2014) as round function. It is not a cipher, only a good shuffle.

Invariant: which segments make an optimiser step depends on (dataset, seed, batch size, position)
alone. Ranks and micro-batches only divide a step, so a run gives the same steps on any number.
"""

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.packing import PackedBatch, SegmentDataset

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


class Loader:
    """The steps of a run, one after the other, epoch after epoch.

    A step takes segments in shuffled order: `batch_size` of them, or as many as `batch_tokens`
    holds (at least one); an epoch's last step may be smaller, and no segment is left out or taken
    twice. The step's segments are dealt over the ranks, balanced by tokens, and each rank's are cut
    into micro-batches of at most `micro_tokens`, neighbours in length together.
    """

    def __init__(
        self,
        dataset: SegmentDataset,
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        micro_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if (batch_tokens is None) == (batch_size is None):
            raise ValueError(
                "a step is measured in batch tokens or in batch size; give one of them"
            )
        for name, value in (("batch tokens", batch_tokens), ("batch size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; at least 1")
        _check_micro_tokens(dataset, micro_tokens)
        if len(dataset) == 0:
            raise ValueError("there is nothing to train on: no note is left after the split")
        assert 0 <= rank < world_size
        self._dataset = dataset
        self._by_tokens = batch_tokens is not None
        self._limit = batch_tokens or batch_size or 0
        self._micro_tokens = micro_tokens
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._go_to(0, 0)

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self._epoch

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next step; empty if it has fewer segments than ranks."""
        indices = next(self._steps)
        if self._position + len(indices) < len(self._dataset):
            self._position += len(indices)
        else:
            self._go_to(self._epoch + 1, 0)
        lengths = self._dataset.lengths(indices)
        mine = deal(lengths, self._world_size) == self._rank
        indices, lengths = indices[mine], lengths[mine]
        by_length = np.argsort(lengths, kind="stable")
        return [
            self._dataset.batch(indices[part])
            for part in _fill(by_length, lengths, self._micro_tokens)
        ]

    def one_segment(self) -> PackedBatch:
        """The first segment as a micro-batch, outside of any step."""
        return self._dataset.batch(np.zeros(1, np.int64))

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Steps of an epoch; measured in tokens it differs a little between epochs."""
        return sum(1 for _ in self._epoch_steps(epoch, 0))

    def state(self) -> dict[str, Any]:
        """The position as plain numbers; the same on every rank."""
        return {
            "segments": len(self._dataset),
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from a saved position; raises ValueError if it is of another order."""
        for name, own in (("segments", len(self._dataset)), ("seed", self._seed)):
            if state[name] != own:
                raise ValueError(
                    f"the saved position is in an order with {name} {state[name]}, this run has "
                    f"{own}; resume with the same notes, tokenizer, max length and seed"
                )
        if not 0 <= state["position"] < len(self._dataset) or state["epoch"] < 0:
            raise ValueError(
                f"the saved position {state['position']} of epoch {state['epoch']} is none of this "
                f"order's; the checkpoint is damaged: resume from another"
            )
        self._go_to(state["epoch"], state["position"])

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._steps = self._epoch_steps(epoch, position)

    def _epoch_steps(self, epoch: int, position: int) -> Iterator[np.ndarray]:
        """The segments of each step of an epoch, from a position on: int64 [n] each."""
        count = len(self._dataset)
        order = Permutation(count, self._seed, epoch)
        window = WINDOW
        while position < count:
            indices = order(np.arange(position, min(position + window, count)))
            costs = self._dataset.lengths(indices) if self._by_tokens else np.ones_like(indices)
            spent = np.cumsum(costs)
            begin = 0
            while begin < len(indices):
                budget = self._limit + (spent[begin - 1] if begin else 0)
                end = max(int(np.searchsorted(spent, budget, side="right")), begin + 1)
                if end == len(indices) and position + end < count:
                    break  # the step may go on behind the window
                yield indices[begin:end]
                begin = end
            position += begin
            if begin == 0:
                window *= 2


def iter_batches(
    dataset: SegmentDataset, *, micro_tokens: int, rank: int = 0, world_size: int = 1
) -> Iterator[PackedBatch]:
    """Every segment once, in order, in batches of at most `micro_tokens`; rank r has every
    `world_size`-th batch. For evaluation."""
    _check_micro_tokens(dataset, micro_tokens)
    position = number = 0
    while position < len(dataset):
        # One segment more than can fit: all batches but the last are known to be full.
        indices = np.arange(position, min(position + micro_tokens + 1, len(dataset)))
        parts = list(_fill(np.arange(len(indices)), dataset.lengths(indices), micro_tokens))
        if indices[-1] + 1 < len(dataset):
            parts.pop()
        for part in parts:
            if number % world_size == rank:
                yield dataset.batch(indices[part])
            number += 1
            position += len(part)


def deal(lengths: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each segment, the longest first to the rank with the fewest tokens: int64 [n]."""
    owner = np.zeros(len(lengths), np.int64)
    if ranks == 1:
        return owner
    loads = [(0, rank) for rank in range(ranks)]
    for index in np.argsort(-lengths, kind="stable"):
        tokens, rank = loads[0]
        owner[index] = rank
        heapq.heapreplace(loads, (tokens + int(lengths[index]), rank))
    return owner


def _fill(order: np.ndarray, lengths: np.ndarray, micro_tokens: int) -> Iterator[np.ndarray]:
    """Cuts an order of segments into runs of at most `micro_tokens` tokens."""
    begin = tokens = 0
    for at, length in enumerate(lengths[order].tolist()):
        if tokens + length > micro_tokens and at > begin:
            yield order[begin:at]
            begin, tokens = at, 0
        tokens += length
    if begin < len(order):
        yield order[begin:]


def _check_micro_tokens(dataset: SegmentDataset, micro_tokens: int) -> None:
    if micro_tokens < dataset.max_length:
        raise ValueError(
            f"micro tokens is {micro_tokens}; at least the max length {dataset.max_length}, since "
            f"a segment is never cut over two micro-batches"
        )
