"""Eight-bit weights written out as floating ones, in Triton: one pass, 3 bytes an element.

Letters: K input width, N output width. A library's product of the result is faster than a product
that dequantises as it goes (docs/decisions.md), so the whole weight is written, used and dropped.
The invariant: `kernels.reference_int8.dequantise` is the contract, to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference_int8
from kernels.build import OPTIONS, Build
from kernels.timing import MODELS, Case

# Columns of a program: one 16-byte load of int8 a thread.
_BLOCK, _WARPS = 2048, 4


@triton.jit
def _dequantise(weight, scale, out, K, weight_row, out_row, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    value = tl.load(weight + row * weight_row + columns, inside, other=0).to(tl.float32)
    value *= tl.load(scale + row)
    tl.store(out + row * out_row + columns, value.to(out.dtype.element_ty), inside)


def dequantise(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """`kernels.reference_int8.dequantise`; `out` [N, K] may have room between its rows."""
    (rows, width), blocks = weight.shape, triton.cdiv(weight.shape[1], _BLOCK)
    assert weight.stride(1) == 1 and scale.is_contiguous()
    if out is None:
        out = torch.empty(rows, width, device=weight.device, dtype=dtype)
    _dequantise[(rows * blocks,)](
        weight, scale, out, width, weight.stride(0), out.stride(0), blocks,
        BLOCK=_BLOCK, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    return out


def builds(capability: int) -> list[Build]:
    """The kernel as it is launched, the same at every capability."""
    sizes = ("K", "weight_row", "out_row")
    return [
        Build(
            kernel=_dequantise,
            signature={
                "weight": "*i8", "scale": "*fp32", "out": "*bf16",
                **dict.fromkeys((*sizes, "blocks"), "i32"),
            },
            constants={"BLOCK": _BLOCK},
            num_warps=_WARPS,
            divisible=sizes,
        )
    ]  # fmt: skip


def cases() -> list[Case]:
    """The models' square and widest weights."""

    def case(model: str, rows: int, width: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[object, ...]:
            shape = (max(1, rows // shrink), width)
            weight = torch.randint(-127, 128, shape, device=device, dtype=torch.int8)
            scale = torch.rand(len(weight), device=device)
            return weight, scale, dtype

        return Case(
            operation="dequantise",
            shape=f"{model}, {rows} x {width}",
            make=make,
            kernel=dequantise,
            reference=reference_int8.dequantise,
            bytes=3.0 * rows * width,
            backward=False,
        )

    shapes = [(model, d, f) for model, (d, f, _, _) in MODELS.items()]
    return [case(m, rows, d) for m, d, f in shapes for rows in (d, f)]
