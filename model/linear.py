"""The linear layer of every network: a weight, an optional bias, and an empty slot for adapters.

The invariant: attaching an adapter adds an entry to `adapters` and nothing else. The layer stays
the same object under the same name, so a checkpoint's keys never change.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

import kernels

# How an int8 weight is multiplied: dequantised, or by activations that are quantised too.
Int8Compute = Literal["bf16", "int8"]


class Adapter(Protocol):
    """What stands in a layer's slot."""

    def low_rank(self) -> kernels.LowRank: ...


class Linear(nn.Module):
    """y = x W^T + bias + what the attached adapters add.

    weight: [N, K], floating, or int8 with weight_scale [N] float32 (`kernels.reference_int8`).
    bias: [N] or None. adapters: name -> module that is an `Adapter`; filled by `lora.attach`.
    """

    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        stays_floating: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`stays_floating` for a layer too small and too sensitive to be held in int8."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.stays_floating = stays_floating
        self.is_int8_math = False
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("weight_scale", None)
        self.adapters = nn.ModuleDict()

    def operands(self) -> kernels.LinearOperands:
        slot = cast(Sequence[Adapter], self.adapters.values())
        adapters = tuple(adapter.low_rank() for adapter in slot)
        return kernels.LinearOperands(
            self.weight, self.bias, adapters, self.weight_scale, self.is_int8_math
        )

    def forward(self, x: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """x: [M, K] -> [M, N]; dropout_keys: [M] int32, None in evaluation."""
        return linear_group((self,), x, dropout_keys)[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def hold_int8(model: nn.Module, compute: Int8Compute) -> None:
    """Give every linear layer of a model without data an int8 weight, frozen, and its scale."""
    for layer in model.modules():
        if isinstance(layer, Linear) and not layer.stays_floating:
            assert layer.weight.is_meta
            weight = torch.empty_like(layer.weight, dtype=torch.int8)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.weight_scale = torch.empty(layer.out_features, device="meta")
            layer.is_int8_math = compute == "int8"


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
