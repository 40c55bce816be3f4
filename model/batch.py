"""A micro-batch as the networks see it: one flat stream of tokens, cut into segments.

Letters: M tokens of the stream, n segments. There is no padding. The invariant: positions restart
and attention ends at every segment's edge, so a note's result does not depend on its neighbours.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive segments that attention handles together, padded on the right to one length.

    Causal attention never looks right, so there right padding needs no mask. `index` [count,
    length] says which token stands where (a padded place repeats the segment's last token); None
    when the segments are equally long and a view of the stream will do.
    """

    start: int  # the first token
    stop: int  # one past the last token
    count: int  # segments
    length: int  # the longest segment
    lengths: Tensor  # [count] int64 of each segment
    index: Tensor | None
    inverse: Tensor | None  # [stop - start] where each token stands in the flattened index

    def to(self, device: torch.device | str) -> Self:
        return type(self)(
            self.start,
            self.stop,
            self.count,
            self.length,
            self.lengths.to(device),
            None if self.index is None else self.index.to(device),
            None if self.inverse is None else self.inverse.to(device),
        )


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the segments of a stream begin and end.

    offsets: n + 1 host ints; segment i holds tokens offsets[i] to offsets[i + 1].
    cu_seqlens: the same [n + 1] int32 on the device.
    """

    offsets: tuple[int, ...]
    cu_seqlens: Tensor
    groups: tuple[Group, ...]

    @classmethod
    def from_offsets(cls, offsets: Sequence[int]) -> Self:
        offsets = tuple(int(offset) for offset in offsets)
        assert offsets[0] == 0 and all(a < b for a, b in itertools.pairwise(offsets))
        return cls(offsets, torch.tensor(offsets, dtype=torch.int32), _groups(offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in itertools.pairwise(self.offsets))

    def group(self, first: int, last: int) -> Group:
        """Segments `first` to `last` (not itself) as one group, however unlike their lengths."""
        return _group(self.offsets, self.lengths, first, last).to(self.cu_seqlens.device)

    def ends(self) -> "Chosen":
        """The last token of each segment."""
        return Chosen(self.cu_seqlens[1:].long() - 1, self._of_one_token())

    def beginnings(self) -> "Chosen":
        """The first token of each segment."""
        return Chosen(self.cu_seqlens[:-1].long(), self._of_one_token())

    def behind(self, count: int) -> "Behind":
        """These segments, each behind `count` further rows."""
        lengths, wide = np.asarray(self.lengths), count * np.arange(len(self) + 1)
        offsets, fronts = wide + np.asarray(self.offsets), int(wide[-1])
        tokens = np.arange(self.offsets[-1]) + np.repeat(wide[1:], lengths)
        order = np.empty(offsets[-1], np.int64)
        is_front = np.ones(len(order), bool)
        is_front[tokens] = False
        order[is_front] = np.arange(fronts)
        order[tokens] = fronts + np.arange(len(tokens))
        device = self.cu_seqlens.device
        return Behind(
            count,
            type(self).from_offsets(offsets).to(device),
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(order).to(device),
        )

    def _of_one_token(self) -> Self:
        return type(self).from_offsets(range(len(self) + 1)).to(self.cu_seqlens.device)

    def to(self, device: torch.device | str) -> Self:
        groups = tuple(group.to(device) for group in self.groups)
        return type(self)(self.offsets, self.cu_seqlens.to(device), groups)


class Chosen(NamedTuple):
    """One token of each segment: where they stand, and segments of these tokens alone."""

    rows: Tensor  # [n] int64
    segments: Segments


@dataclass(frozen=True, slots=True)
class Behind:
    """Segments that each stand behind the same `count` rows: virtual tokens, or a prefix's keys.

    The same rows, so that what a note sees does not depend on what is packed beside it.
    """

    count: int
    segments: Segments  # of rows and tokens together
    tokens: Tensor  # [M] int64, where the tokens stand in them
    order: Tensor  # [n count + M] int64, each row's place in (rows of every segment, tokens)

    def join(self, front: Tensor, x: Tensor) -> Tensor:
        """front [count, ...] before each segment of x [M, ...]: [n count + M, ...]."""
        fronts = front.expand(len(self.segments), *front.shape).flatten(0, 1)
        # A permutation, so its backward pass adds nothing up; the sum over segments is expand's.
        return torch.cat((fronts, x))[self.order]


# A group may pad this share of its tokens: less than a second pass of small operations costs.
_MAX_PADDING = 0.125


def _groups(offsets: tuple[int, ...]) -> tuple[Group, ...]:
    """Join neighbouring segments while padding them to one length stays cheap."""
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    groups: list[Group] = []
    first = 0
    for i in range(1, len(lengths) + 1):
        if i < len(lengths):
            members = lengths[first : i + 1]
            padded = max(members) * len(members)
            if padded - sum(members) <= _MAX_PADDING * padded:
                continue
        groups.append(_group(offsets, lengths, first, i))
        first = i
    return tuple(groups)


def _group(offsets: tuple[int, ...], lengths: Sequence[int], first: int, last: int) -> Group:
    members = np.asarray(lengths[first:last], np.int64)
    start, stop, length = offsets[first], offsets[last], int(members.max())
    if (members == length).all():
        return Group(start, stop, last - first, length, torch.from_numpy(members), None, None)
    begins = np.asarray(offsets[first:last])[:, None]
    index = begins + np.minimum(np.arange(length)[None], members[:, None] - 1)
    is_real = np.arange(length)[None] < members[:, None]
    inverse = np.flatnonzero(is_real)
    return Group(
        start,
        stop,
        last - first,
        length,
        torch.from_numpy(members),
        torch.from_numpy(index),
        torch.from_numpy(inverse),
    )


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One micro-batch.

    input_ids: [M] int64.
    positions: [M] int64, the place of each token in its segment.
    sample_ids: [M] int64, the stable id of the sample each token belongs to (randomness is keyed
        on it, see `kernels.row_keys`).
    """

    input_ids: Tensor
    positions: Tensor
    sample_ids: Tensor
    segments: Segments

    @classmethod
    def from_arrays(cls, input_ids: Any, offsets: Sequence[int], sample_ids: Any = None) -> Self:
        """Build on the host from numpy arrays or lists; `sample_ids` [n] default to 0, 1, ..."""
        segments = Segments.from_offsets(offsets)
        lengths = np.asarray(segments.lengths)
        begins = np.repeat(np.asarray(segments.offsets[:-1]), lengths)
        if sample_ids is None:
            sample_ids = np.arange(len(segments))
        ids = torch.as_tensor(input_ids, dtype=torch.int64)
        assert ids.shape == (segments.offsets[-1],)
        return cls(
            input_ids=ids,
            positions=torch.from_numpy(np.arange(len(ids)) - begins),
            sample_ids=torch.from_numpy(np.repeat(np.asarray(sample_ids, np.int64), lengths)),
            segments=segments,
        )

    def behind(self, count: int) -> tuple[Self, Behind]:
        """The batch with `count` virtual tokens in front of each segment; their id is -1."""
        behind = self.segments.behind(count)
        lengths = torch.tensor(behind.segments.lengths, device=self.input_ids.device)
        begins = behind.segments.cu_seqlens[:-1].long()
        total = behind.segments.offsets[-1]
        ids_n = self.sample_ids[self.segments.cu_seqlens[:-1].long()]
        batch = type(self)(
            input_ids=behind.join(self.input_ids.new_full((count,), -1), self.input_ids),
            positions=torch.arange(total, device=lengths.device)
            - begins.repeat_interleave(lengths, output_size=total),
            sample_ids=ids_n.repeat_interleave(lengths, output_size=total),
            segments=behind.segments,
        )
        return batch, behind

    def to(self, device: torch.device | str) -> Self:
        return type(self)(
            self.input_ids.to(device),
            self.positions.to(device),
            self.sample_ids.to(device),
            self.segments.to(device),
        )
