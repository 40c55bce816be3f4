"""Batches in a shuffled order that needs no memory, and a position that a resumed run continues.

Invariant: which segments make an optimiser step depends on (dataset, shares, seed, batch size,
position) alone (`data.order`). Ranks and micro-batches only divide a step, so a run gives the same
steps on any number.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.order import Epochs, Mixture, Share, StepSize
from data.packing import PackedBatch, SegmentDataset


class Loader:
    """The steps of a run, one after the other, epoch after epoch.

    A step takes segments in shuffled order: `batch_size` of them, or as many as `batch_tokens`
    holds (at least one); an epoch's last step may be smaller, and no segment is left out or taken
    twice. With `shares` the dataset holds several sources, one behind the other, which are drawn
    from as a `Mixture`. The step's segments are dealt over the ranks, balanced by tokens, and each
    rank's are cut into micro-batches of at most `micro_tokens`, neighbours in length together.
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
        shares: Sequence[Share] = (),
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
        self._micro_tokens = micro_tokens
        self._rank = rank
        self._world_size = world_size
        size = StepSize(batch_tokens or batch_size or 0, is_tokens=batch_tokens is not None)
        self._order = (
            Mixture(dataset, shares, size, seed) if shares else Epochs(dataset, size, seed)
        )

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0; of several sources, the first one's."""
        return self._order.epoch

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next step; empty if it has fewer segments than ranks."""
        indices = self._order.next_step()
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

    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; measured in tokens it differs a little between epochs."""
        return self._order.steps_per_epoch()

    def first_epoch(self) -> np.ndarray:
        """All segments that the first epoch's steps take: int64 [n]."""
        return self._order.first_epoch()

    def drawn(self, steps: int | None = None) -> dict[str, dict[str, float]]:
        """Tokens and epochs of each of several sources by now, or after `steps` from the start."""
        return self._order.drawn(steps) if isinstance(self._order, Mixture) else {}

    def state(self) -> dict[str, Any]:
        """The position as plain numbers; the same on every rank."""
        return self._order.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from a saved position; raises ValueError if it is of another order."""
        self._order.load_state(state)


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
