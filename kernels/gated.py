"""SwiGLU, silu(gate) * up, in Triton (Shazeer 2020, arXiv 2002.05202).

Letters: M rows, F feed-forward width. Forward and backward each read their inputs once and write
once. The invariant: `kernels.reference.swiglu` is the contract.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.build import OPTIONS, Build, as_rows, capability_of
from kernels.timing import MODELS, ROWS, Case

# Columns of a program and its warps, by capability: one 16-byte vector of bfloat16 a thread and
# tensor, or two. Neighbouring programs take neighbouring columns.
_CONFIGURATIONS: Mapping[int, tuple[tuple[int, int], ...]] = {
    80: ((1024, 4), (2048, 8), (2048, 4)),
    90: ((1024, 4), (2048, 8), (2048, 4)),
    100: ((2048, 4), (1024, 4), (2048, 8)),
}


@triton.jit
def _swiglu_forward(gate, up, out, gate_stride, up_stride, F, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    g = tl.load(gate + row * gate_stride + columns, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, inside, other=0.0).to(tl.float32)
    y = g * tl.sigmoid(g) * u
    tl.store(out + row * F + columns, y.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(
    dy, gate, up, dgate, dup, dy_stride, gate_stride, up_stride, F, blocks, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    d = tl.load(dy + row * dy_stride + columns, inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    dg = d * u * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dgate + row * F + columns, dg.to(dgate.dtype.element_ty), inside)
    tl.store(dup + row * F + columns, (d * silu).to(dup.dtype.element_ty), inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = as_rows(gate), as_rows(up)
        ctx.save_for_backward(gate, up)
        rows, width = gate.shape
        out = gate.new_empty(rows, width)
        (block, warps), *_ = _CONFIGURATIONS[capability_of(gate)]
        blocks = triton.cdiv(width, block)
        _swiglu_forward[(rows * blocks,)](
            gate, up, out, gate.stride(0), up.stride(0), width, blocks,
            BLOCK=block, num_warps=warps, **OPTIONS,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = as_rows(dy)
        rows, width = gate.shape
        dgate, dup = gate.new_empty(rows, width), up.new_empty(rows, width)
        (block, warps), *_ = _CONFIGURATIONS[capability_of(gate)]
        blocks = triton.cdiv(width, block)
        _swiglu_backward[(rows * blocks,)](
            dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), width, blocks,
            BLOCK=block, num_warps=warps, **OPTIONS,
        )  # fmt: skip
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`kernels.reference.swiglu` in one pass forward and one backward; both [M, F]."""
    return _SwiGLU.apply(gate, up)


def builds(capability: int) -> list[Build]:
    """Both kernels in every configuration; the first is launched."""
    strides = dict.fromkeys(("gate_stride", "up_stride", "F"), "i32")
    inputs = {"gate": "*bf16", "up": "*bf16"}
    forward = {**inputs, "out": "*bf16", **strides}
    backward = {
        **dict.fromkeys(("dy", "dgate", "dup"), "*bf16"), **inputs, "dy_stride": "i32", **strides,
    }  # fmt: skip
    return [
        Build(
            kernel=kernel,
            signature={**signature, "blocks": "i32"},
            constants={"BLOCK": block},
            num_warps=warps,
            divisible=("dy_stride", *strides) if "dy_stride" in signature else tuple(strides),
        )
        for block, warps in _CONFIGURATIONS[capability]
        for kernel, signature in ((_swiglu_forward, forward), (_swiglu_backward, backward))
    ]


def cases() -> list[Case]:
    """SwiGLU at the models' feed-forward widths."""

    def case(model: str, width: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[Tensor, ...]:
            shape = (max(1, ROWS // shrink), width)
            gate, up = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
            return gate.requires_grad_(), up.requires_grad_()

        return Case(
            operation="swiglu",
            shape=f"{model}, M={ROWS}",
            make=make,
            kernel=swiglu,
            reference=reference.swiglu,
            plain=lambda gate, up: torch.nn.functional.silu(gate) * up,
            bytes=2.0 * ROWS * width * (3 + 5),
        )

    return [case(model, feed_forward) for model, (_, feed_forward, _, _) in MODELS.items()]
