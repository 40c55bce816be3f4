"""RoPE on queries and keys by one Triton launch (Su et al., arXiv 2104.09864).

Letters: M rows, N query heads, G key-value heads, H head width. Heads are half-split, as in Hugging
Face checkpoints, and may be views of a fused projection: any distance between rows and heads will
do. The backward pass is the same kernel with the opposite angle. The invariant:
`kernels.reference.rope` is the contract, up to its rounding of products.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.build import OPTIONS, Build, capability_of
from kernels.timing import MODELS, ROWS, Case

# Columns of the heads' halves that a program turns, and its warps, by capability: one 16-byte
# vector of bfloat16 a thread and half, or two.
_CONFIGURATIONS: Mapping[int, tuple[tuple[int, int], ...]] = {
    80: ((1024, 4), (2048, 4)),
    90: ((1024, 4), (2048, 4)),
    100: ((2048, 4), (1024, 4)),
}


@triton.jit
def _turn(
    x, out, cos, sin, row, head, row_stride, head_stride, heads, half,
    OPPOSITE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = head + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    dtype = out.dtype.element_ty
    c = tl.load(cos + row * half + column, column < half, other=0.0).to(dtype).to(tl.float32)
    s = tl.load(sin + row * half + column, column < half, other=0.0).to(dtype).to(tl.float32)
    if OPPOSITE:
        s = -s
    source = x + row * row_stride + head * head_stride + column
    first = tl.load(source, inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, inside, other=0.0).to(tl.float32)
    target = out + row * heads * (2 * half) + head * (2 * half) + column
    tl.store(target, (first * c - second * s).to(dtype), inside)
    tl.store(target + half, (second * c + first * s).to(dtype), inside)


@triton.jit
def _rope(
    q, k, q_out, k_out, cos, sin, q_row, q_head, k_row, k_head, N, G, half,
    OPPOSITE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    of_q = tl.cdiv(N, HEADS)
    blocks = of_q + tl.cdiv(G, HEADS)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    block = program % blocks
    if block < of_q:
        _turn(
            q, q_out, cos, sin, row, block * HEADS, q_row, q_head, N, half,
            OPPOSITE, HEADS, HALF,
        )  # fmt: skip
    else:
        _turn(
            k, k_out, cos, sin, row, (block - of_q) * HEADS, k_row, k_head, G, half,
            OPPOSITE, HEADS, HALF,
        )  # fmt: skip


def _tile(columns: int, half: int) -> dict[str, int]:
    """How many heads a program turns, as the kernel's constants."""
    width = triton.next_power_of_2(half)
    return {"HEADS": max(1, columns // width), "HALF": width}


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_opposite: bool
) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    rows, query_heads, width = q.shape
    key_heads = k.shape[1]
    (columns, warps), *_ = _CONFIGURATIONS[capability_of(q)]
    tile = _tile(columns, width // 2)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    blocks = triton.cdiv(query_heads, tile["HEADS"]) + triton.cdiv(key_heads, tile["HEADS"])
    _rope[(rows * blocks,)](
        q, k, q_out, k_out, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        query_heads, key_heads, width // 2,
        OPPOSITE=is_opposite, **tile, num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return q_out, k_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, is_opposite=False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_rotate(dq, dk, cos, sin, is_opposite=True), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.reference.rope` in one launch; q [M, N, H], k [M, G, H], cos and sin [M, H / 2]."""
    return _Rope.apply(q, k, cos, sin)


def builds(capability: int) -> list[Build]:
    """Both directions for heads of 128 columns, in every configuration; the first is launched."""
    strides = ("q_row", "q_head", "k_row", "k_head")
    integers = dict.fromkeys((*strides, "N", "G", "half"), "i32")
    tensors = dict.fromkeys(("q", "k", "q_out", "k_out", "cos", "sin"), "*bf16")
    return [
        Build(
            kernel=_rope,
            signature={**tensors, **integers},
            constants={"OPPOSITE": is_opposite, **_tile(columns, 64)},
            num_warps=warps,
            divisible=(*strides, "half"),
        )
        for columns, warps in _CONFIGURATIONS[capability]
        for is_opposite in (False, True)
    ]


def cases() -> list[Case]:
    """Queries and keys as views of one fused projection, at the models' shapes."""

    def case(model: str, width: int, keys: int) -> Case:
        head, heads = 128, (width + keys) // 128

        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[Tensor, ...]:
            rows = max(1, ROWS // shrink)
            fused = torch.randn(rows, heads + keys // head, head, device=device, dtype=dtype)
            q = fused[:, : width // head].requires_grad_()
            k = fused[:, width // head : heads].requires_grad_()
            angles = torch.rand(rows, head // 2, device=device) * 6.28
            return q, k, angles.cos().to(dtype), angles.sin().to(dtype)

        def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = (torch.cat([x, x], -1)[:, None] for x in (cos, sin))

            def turned(x: Tensor) -> Tensor:
                first, second = x.chunk(2, -1)
                return x * cos + torch.cat([-second, first], -1) * sin

            return turned(q), turned(k)

        return Case(
            operation="rope",
            shape=f"{model}, M={ROWS}",
            make=make,
            kernel=rope,
            reference=reference.rope,
            plain=plain,
            bytes=2 * 2.0 * ROWS * (2 * (width + keys) + head),
        )

    return [case(model, width, keys) for model, (width, _, _, keys) in MODELS.items()]
