"""Initial values of adapters: functions of (seed, adapter name, place) and of nothing else.

The invariant: neither the order of attaching nor other adapters change what is drawn.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

Fill = Callable[[Tensor, torch.Generator], Tensor]


def stable_hash(*words: str) -> int:
    """64 bits of SHA-256 of the words, the same in every process (Python's `hash` is not)."""
    text = "\0".join(words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Draws:
    """Float32 values of one adapter, drawn on the CPU and moved to the device."""

    def __init__(self, seed: int, adapter: str, device: torch.device) -> None:
        self.adapter, self._seed, self._device = adapter, seed, device

    def normal(self, place: str, *shape: int) -> nn.Parameter:
        """Standard normal values."""
        return self._parameter(place, shape, lambda x, generator: x.normal_(generator=generator))

    def uniform(self, place: str, *shape: int, bound: float) -> nn.Parameter:
        """Uniform values from -bound to bound."""
        return self._parameter(
            place, shape, lambda x, generator: x.uniform_(-bound, bound, generator=generator)
        )

    def linear(self, place: str, in_features: int, out_features: int) -> nn.Linear:
        """A linear layer with a bias, both uniform in +-1/sqrt(in_features), as in torch."""
        layer = nn.Linear(in_features, out_features, device="meta")
        bound = in_features**-0.5
        layer.weight = self.uniform(f"{place}.weight", out_features, in_features, bound=bound)
        layer.bias = self.uniform(f"{place}.bias", out_features, bound=bound)
        return layer

    def _parameter(self, place: str, shape: tuple[int, ...], fill: Fill) -> nn.Parameter:
        if self._device.type == "meta":  # a dry run, whose encoder may be larger than this machine
            return nn.Parameter(torch.empty(shape, device=self._device))
        words = (str(self._seed), self.adapter, place)
        generator = torch.Generator().manual_seed(stable_hash(*words) % 2**63)
        return nn.Parameter(fill(torch.empty(shape), generator).to(self._device))
