"""Keys and values that a decoder has already computed, so that a new token costs one row.

Letters: n sequences, M new tokens, N query heads, G key-value heads, S stored tokens, H head width,
W window. Where attention has a window the cache rolls: position p stands in slot p mod W, so W
slots hold exactly what the newest token sees, and memory does not grow beyond them.

The invariant: a cache is an argument of the forward pass and belongs to its caller; a network
without one computes the same numbers from all tokens at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention import attend
from model.batch import Segments
from model.config import DecoderConfig


class KVCache:
    """Room for `capacity` tokens of each of `count` sequences, or for a window of them.

    The first forward pass brings the prompts, of any lengths, and what adapters put in front of
    them; each later one brings one token of every sequence. Keys are stored with their positions
    rotated in, so a slot's place tells nothing that attention needs.
    """

    def __init__(
        self,
        config: DecoderConfig,
        count: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._window = config.sliding_window
        self._slots_each = capacity if self._window is None else min(capacity, self._window)
        shape = (count, self._slots_each, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        # Zeros, not empty memory: a hidden place has weight zero, and zero times NaN is NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = [0] * count
        self.capacity = capacity
        self._is_prefill = True
        self._stored: Tensor | None = None  # rows of the batch that are kept; None: all of them
        self._slots = torch.empty(0)  # where the keys of the pass go, of all sequences' slots
        self._longest = 0  # slots that the newest tokens look at
        self._is_visible: Tensor | None = None  # which of them, [n, 1, 1, S]; None: all

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in (*self._keys, *self._values))

    @property
    def is_empty(self) -> bool:
        return not any(self.lengths)

    def extend(self, added_keys: Segments) -> Tensor:
        """Make room for new keys; returns how many each of their sequences had: [1] or [n]."""
        each, device = self._slots_each, added_keys.cu_seqlens.device
        added = added_keys.lengths
        assert len(added) == len(self.lengths)
        self._is_prefill = self.is_empty
        assert self._is_prefill or set(added) == {1}, "after the prompts, one token at a time"
        before = self.lengths
        self.lengths = [a + b for a, b in zip(before, added, strict=True)]
        assert max(self.lengths) <= self.capacity
        self._stored = None
        if self._is_prefill:
            rows = torch.arange(len(added), device=device)
            rows = rows.repeat_interleave(
                torch.tensor(added, device=device), output_size=added_keys.offsets[-1]
            )
            places = torch.arange(len(rows), device=device) - added_keys.cu_seqlens[rows]
            if max(added) > each:
                is_seen_M = places >= torch.tensor(added, device=device)[rows] - each
                self._stored = is_seen_M.nonzero().squeeze(1)
                rows, places = rows[self._stored], places[self._stored]
            self._slots = rows * each + places % each
            return torch.zeros(1, dtype=torch.int64, device=device)
        return self._point(before)

    def advance(self) -> Tensor:
        """`extend` by one token of every sequence, for `attend_newest`."""
        before = self.lengths
        self.lengths = [length + 1 for length in before]
        assert max(self.lengths) <= self.capacity
        self._is_prefill = False
        return self._point(before)

    def _point(self, before: Sequence[int]) -> Tensor:
        """Where each sequence's next token goes and what it sees; `before` as a tensor [n]."""
        device, each = self._keys[0].device, self._slots_each
        lengths = torch.tensor(before, device=device)
        rows = torch.arange(0, len(before) * each, each, device=device)
        self._slots = rows + (lengths if max(before) < each else lengths % each)
        self._longest = min(max(self.lengths), each)
        self._is_visible = None
        if min(self.lengths) < self._longest:
            stored = torch.arange(self._longest, device=device)
            self._is_visible = (stored <= lengths[:, None])[:, None, None]
        return lengths

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        *,
        queries: Segments | None = None,
    ) -> Tensor:
        """Store k and v, then let each query see its own sequence up to itself.

        Args:
            q: [M, N, H]; k, v: [M, G, H], positions already rotated in.
            segments, queries: as in `attend`; the keys' are those that `extend` made room for.

        Returns:
            [M, N, H].
        """
        keys, values = self._keys[layer], self._values[layer]
        keys.flatten(0, 1)[self._slots] = k if self._stored is None else k[self._stored]
        values.flatten(0, 1)[self._slots] = v if self._stored is None else v[self._stored]
        if self._is_prefill:
            return attend(q, k, v, segments, queries=queries, window=self._window)
        return self._look(layer, q)

    def attend_newest(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` of one token of every sequence: q [n, N, H]; k, v [n, G, H] -> [n, N, H]."""
        self._keys[layer].flatten(0, 1).index_copy_(0, self._slots, k)
        self._values[layer].flatten(0, 1).index_copy_(0, self._slots, v)
        return self._look(layer, q)

    def _look(self, layer: int, q: Tensor) -> Tensor:
        keys, values = (
            self._keys[layer][:, : self._longest],
            self._values[layer][:, : self._longest],
        )
        # The query heads of one key-value head stand where a prompt's queries would.
        out_nGQH = scaled_dot_product_attention(
            q.unflatten(1, (keys.shape[2], -1)),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._is_visible,
        )
        return out_nGQH.flatten(1, 2)

    def rows(self, start: int) -> Tensor:
        """Keys and values of a single sequence from a token on: [P, L, 2, G, H]."""
        assert len(self.lengths) == 1 and self.lengths[0] <= self._slots_each
        stored = slice(start, self.lengths[0])
        pairs = zip(self._keys, self._values, strict=True)
        return torch.stack([torch.stack((k[0, stored], v[0, stored]), 1) for k, v in pairs], 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every sequence but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._keys[0].device)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        self.lengths = [self.lengths[row] for row in rows]
