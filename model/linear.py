"""The linear layer of every network: a weight, an optional bias, and an empty slot for adapters.

The invariant: attaching an adapter adds an entry to `adapters` and nothing else. The layer stays
the same object under the same name, so a checkpoint's keys never change.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

import kernels


class Adapter(Protocol):
    """What stands in a layer's slot."""

    def low_rank(self) -> kernels.LowRank: ...


class Linear(nn.Module):
    """y = x W^T + bias + what the attached adapters add.

    weight: [N, K]. bias: [N] or None. adapters: name -> module that is an `Adapter`; filled by
    `lora.attach`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.adapters = nn.ModuleDict()

    def operands(self) -> kernels.LinearOperands:
        slot = cast(Sequence[Adapter], self.adapters.values())
        adapters = tuple(adapter.low_rank() for adapter in slot)
        return kernels.LinearOperands(self.weight, self.bias, adapters)

    def forward(self, x: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """x: [M, K] -> [M, N]; dropout_keys: [M] int32, None in evaluation."""
        return linear_group((self,), x, dropout_keys)[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def linear_group(
    layers: Sequence[Linear], x: Tensor, dropout_keys: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Several layers on one input (q, k, v; gate, up): one [M, N] output each."""
    return kernels.lora_linear(x, [layer.operands() for layer in layers], dropout_keys)


def linear_group_of_experts(
    experts: Sequence[Sequence[Linear]],
    x: Tensor,
    offsets: Tensor,
    dropout_keys: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`linear_group` of each expert's layers on its own rows of x, see `kernels`."""
    operands = [[layer.operands() for layer in layers] for layers in experts]
    return kernels.grouped_lora_linear(x, operands, offsets, dropout_keys)
