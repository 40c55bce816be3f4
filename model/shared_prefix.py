"""Tokens that many sequences begin with, read once: solved questions in front of each question.

Their keys and values stand in front of each segment, where prefix tuning puts its own, with their
positions already rotated in. The invariant: a segment's rows are those that it would have behind
the tokens themselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.batch import TokenBatch
from model.cache import KVCache
from model.decoder import Decoder

_NAME = "shared tokens"


class _SharedPrefix(nn.Module):
    """A `PrefixModule` of keys and values that are there already: [P, L, 2, G, H]."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self._rows = rows

    @property
    def prefix_tokens(self) -> int:
        return len(self._rows)

    def forward(self) -> Tensor:
        return self._rows


def can_share(decoder: Decoder, count: int) -> bool:
    """Whether `count` tokens can be read once.

    Not behind virtual tokens, which stand in front of each segment by themselves, and not where the
    window of attention is narrower, because a cache keeps no more.
    """
    window = decoder.config.sliding_window
    fits = window is None or decoder.prefix_tokens + count <= window
    return decoder.virtual_tokens == 0 and fits


@contextmanager
def shared_prefix(decoder: Decoder, ids: Sequence[int]) -> Iterator[None]:
    """Inside, every segment stands behind these tokens (and those behind an adapter's prefix)."""
    if not ids:
        yield
        return
    assert can_share(decoder, len(ids))
    weight, front = decoder.embed_tokens.weight, decoder.prefix_tokens
    capacity = front + len(ids)
    cache = KVCache(decoder.config, 1, capacity, dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        decoder(TokenBatch.from_arrays(list(ids), [0, len(ids)]).to(weight.device), cache=cache)
    decoder.prefixes[_NAME] = _SharedPrefix(cache.rows(front))
    try:
        yield
    finally:
        del decoder.prefixes[_NAME]
