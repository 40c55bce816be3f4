"""The counter-based dropout hash inside Triton kernels, and dropout as a kernel of its own.

Letters: M rows, K width. `keep_tile` decides a tile of elements from the rows' keys and the numbers
of the pairs of columns; nothing is stored, for the backward pass hashes again. The invariant: every
bit is that of `kernels.reference.keep_mask`, so a mask is the same whichever path makes it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.build import OPTIONS, Build
from kernels.reference import GOLDEN, MIX_1, MIX_2, kept_scale, low_word
from kernels.timing import MODELS, ROWS, Case

_MIX_1 = tl.constexpr(MIX_1)
_MIX_2 = tl.constexpr(MIX_2 & 0xFFFFFFFF)
_GOLDEN = tl.constexpr(GOLDEN & 0xFFFFFFFF)

# Columns that a program drops, and its warps: two 16-byte vectors of bfloat16 a thread.
_BLOCK, _WARPS = 2048, 4


def threshold(p: float) -> int:
    """The least half of a hash, as int16, that keeps its column under dropout p."""
    return round(p * 2**16) - 2**15


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * _MIX_1
    bits = (bits ^ (bits >> 15)) * _MIX_2
    return bits ^ (bits >> 16)


@triton.jit
def row_hash(keys, site):
    """The rows' part of the hash, the same for every column.

    keys: int32 of any shape, from `kernels.row_keys`; site: int32, `reference.low_word` of it.
    """
    bits = keys.to(tl.uint32, bitcast=True) + _GOLDEN
    return _mix(bits ^ site.to(tl.uint32, bitcast=True))


@triton.jit
def keep_tile(rows, pairs, site, threshold):
    """Which elements of a tile survive: int1 of shape [..., 2 pairs].

    rows: uint32 [BM, 1] from `row_hash`; pairs: int32 [1, BP], consecutive numbers of pairs of
    columns (columns 2 j and 2 j + 1 are pair j); threshold: from `threshold(p)`.
    """
    offset = site.to(tl.uint32, bitcast=True) * _GOLDEN
    columns = _mix(pairs.to(tl.uint32, bitcast=True) * _GOLDEN + offset)
    bits = (rows ^ columns) * _MIX_1
    bits = (bits ^ (bits >> 15)) * _MIX_2
    bits = (bits ^ (bits >> 16)).to(tl.int32, bitcast=True)
    even, odd = (bits << 16) >> 16, bits >> 16
    return tl.interleave(even, odd) >= threshold


@triton.jit(do_not_specialize=["site", "threshold"])
def _dropout(x, keys, out, x_stride, K, blocks, site, threshold, scale, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    start = (program % blocks) * BLOCK
    columns = start + tl.arange(0, BLOCK)[None, :]
    pairs = start // 2 + tl.arange(0, BLOCK // 2)[None, :]
    rows = row_hash(tl.load(keys + row + tl.zeros([1, 1], tl.int32)), site)
    keep = keep_tile(rows, pairs, site, threshold)
    inside = columns < K
    value = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    value = tl.where(keep, value * scale, 0.0)
    tl.store(out + row * K + columns, value.to(out.dtype.element_ty), inside)


def _drop(x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    out = x.new_empty(rows, width)
    blocks = triton.cdiv(width, _BLOCK)
    _dropout[(rows * blocks,)](
        x, keys.contiguous(), out, x.stride(0), width, blocks, low_word(site), threshold(p),
        kept_scale(p), BLOCK=_BLOCK, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
        ctx.p, ctx.site = p, site
        ctx.save_for_backward(keys)
        return _drop(x, p, keys, site)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _drop(dy, ctx.p, keys, ctx.site), None, None, None


def dropout(x: Tensor, p: float, keys: Tensor | None, site: int) -> Tensor:
    """`kernels.reference.dropout` without a mask in memory; x [M, K], keys [M] int32."""
    if keys is None or p == 0.0:
        return x
    return _Dropout.apply(x, p, keys, site)


def builds(capability: int) -> list[Build]:
    """The kernel as it is launched, the same at every capability."""
    integers = dict.fromkeys(("x_stride", "K", "blocks", "site", "threshold"), "i32")
    return [
        Build(
            kernel=_dropout,
            signature={"x": "*bf16", "keys": "*i32", "out": "*bf16", **integers, "scale": "fp32"},
            constants={"BLOCK": _BLOCK},
            num_warps=_WARPS,
            divisible=("x_stride", "K"),
        )
    ]


def cases() -> list[Case]:
    """Dropout at the models' widths."""

    def case(model: str, width: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[object, ...]:
            rows = max(1, ROWS // shrink)
            x = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
            samples = torch.zeros(rows, dtype=torch.int64, device=device)
            keys = reference.row_keys(0, samples, torch.arange(rows, device=device))
            return x, 0.1, keys, 1

        return Case(
            operation="dropout",
            shape=f"{model}, M={ROWS}",
            make=make,
            kernel=dropout,
            reference=reference.dropout,
            plain=lambda x, p, keys, site: torch.nn.functional.dropout(x, p),
            bytes=2.0 * ROWS * width * (2 + 2),
        )

    return [case(model, width) for model, (width, _, _, _) in MODELS.items()]
