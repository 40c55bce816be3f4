"""RMSNorm, alone or of a sum with the residual, in Triton (arXiv 1910.07467).

Letters: M rows, D width. A program holds whole rows, so each pass reads and writes once. The
gradient of a trained weight has two stages: each program sums its own rows, then the sums are
added, in an order that the shape alone decides. The invariant: `kernels.reference.rms_norm` and
`add_rms_norm` are the contract, roundings to the activations' dtype included.
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

# Columns of one thread, by capability: 8 are one 16-byte vector of bfloat16.
_COLUMNS: Mapping[int, tuple[int, ...]] = {80: (16, 8), 90: (16, 8), 100: (16, 8)}
# Columns of a row that a program can hold without spilling; the references take wider rows.
WIDEST = 8192
# Programs among which the rows are dealt for a weight's gradient: four or so a multiprocessor.
_PARTS = 512


@triton.jit
def _norm_forward(
    x, residual, weight, out, total, rstd, x_stride, residual_stride, D, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, inside, other=0.0)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + columns, inside, other=0.0).to(
            tl.float32
        )
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * D + columns, rounded, inside)
        value = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(rstd + row, r)
    normed = (value * r).to(out.dtype.element_ty).to(tl.float32)
    scale = scale.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * D + columns, (normed * scale).to(out.dtype.element_ty), inside)


@triton.jit
def _norm_backward(
    dy, dtotal, x, weight, rstd, dx, parts, dy_stride, dtotal_stride, x_stride, M, D, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    scale = tl.load(weight + columns, inside, other=0.0)
    scale = scale.to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    first = program.to(tl.int64) * rows
    for i in range(0, tl.minimum(rows, M - program * rows)):
        row = first + i
        value = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
        d = tl.load(dy + row * dy_stride + columns, inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        normed = value * r
        g = d * scale
        result = (g - normed * (tl.sum(g * normed, 0) / D)) * r
        if dtotal is not None:
            # Rounded before the sum, as it is where the norm and the sum are two operations.
            result = result.to(dx.dtype.element_ty).to(tl.float32)
            result += tl.load(dtotal + row * dtotal_stride + columns, inside, other=0.0).to(
                tl.float32
            )
        tl.store(dx + row * D + columns, result.to(dx.dtype.element_ty), inside)
        if parts is not None:
            sums += d * normed
    if parts is not None:
        tl.store(parts + program.to(tl.int64) * D + columns, sums, inside)


def _block(width: int) -> int:
    return triton.next_power_of_2(width)


def _warps(width: int, columns: int) -> int:
    return min(32, max(1, _block(width) // (32 * columns)))


def _launch(x: Tensor) -> Mapping[str, Any]:
    """The configuration for rows as wide as x's."""
    columns, *_ = _COLUMNS[capability_of(x)]
    return {"BLOCK": _block(x.shape[1]), "num_warps": _warps(x.shape[1], columns), **OPTIONS}


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, what was normalised, and 1 / root mean square of each row, float32."""
    x, weight = as_rows(x), weight.contiguous()
    rows, width = x.shape
    out, rstd = x.new_empty(rows, width), x.new_empty(rows, dtype=torch.float32)
    total = x
    if residual is not None:
        residual, total = as_rows(residual), x.new_empty(rows, width)
    _norm_forward[(rows,)](
        x, residual, weight, out, total, rstd, x.stride(0),
        0 if residual is None else residual.stride(0), width, eps, **_launch(x),
    )  # fmt: skip
    return out, total, rstd


def _through_normalise(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    dy = as_rows(dy)
    dtotal = None if dtotal is None else as_rows(dtotal)
    count, width = x.shape
    # A frozen weight needs no sums over rows: a program for each row.
    rows = max(1, triton.cdiv(count, _PARTS)) if needs_dweight else 1
    programs = triton.cdiv(count, rows)
    dx = x.new_empty(count, width)
    parts = x.new_empty(programs, width, dtype=torch.float32) if needs_dweight else None
    _norm_backward[(programs,)](
        dy, dtotal, x, weight.contiguous(), rstd, dx, parts, dy.stride(0),
        0 if dtotal is None else dtotal.stride(0), x.stride(0), count, width, rows, **_launch(x),
    )  # fmt: skip
    return dx, None if parts is None else parts.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, x, rstd = _normalise(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dx, dweight = _through_normalise(
            dy, None, *ctx.saved_tensors, needs_dweight=ctx.needs_input_grad[1]
        )
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total, rstd = _normalise(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return out, total

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor, dtotal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
        dx, dweight = _through_normalise(
            dy, dtotal, *ctx.saved_tensors, needs_dweight=ctx.needs_input_grad[2]
        )
        return dx, dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.reference.rms_norm`, one pass forward and one backward; x [M, D], weight [D]."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.reference.add_rms_norm`, one pass forward and one backward; x, residual [M, D]."""
    return _AddRMSNorm.apply(x, residual, weight, eps)


def builds(capability: int) -> list[Build]:
    """Every kernel at the widths of models, in every configuration; the first ones are launched."""
    return [
        build
        for columns in _COLUMNS[capability]
        for width in (4096, WIDEST)
        for build in _builds_of(_block(width), _warps(width, columns))
    ]


def _builds_of(block: int, warps: int) -> list[Build]:
    made = []
    for adds in (False, True):
        integers = dict.fromkeys(("x_stride", "residual_stride", "D"), "i32")
        tensors = dict.fromkeys(("x", "weight", "out", "total"), "*bf16")
        made.append(
            Build(
                kernel=_norm_forward,
                signature={
                    **tensors, **({"residual": "*bf16"} if adds else {}), "rstd": "*fp32",
                    **integers, "eps": "fp32",
                },
                constants={"BLOCK": block, **({} if adds else {"residual": None})},
                num_warps=warps,
                divisible=tuple(integers),
            )
        )  # fmt: skip
        for sums in (False, True):
            integers = dict.fromkeys(("dy_stride", "dtotal_stride", "x_stride", "M", "D"), "i32")
            tensors = dict.fromkeys(("dy", "x", "weight", "dx"), "*bf16")
            optional = {
                **({"dtotal": "*bf16"} if adds else {}),
                **({"parts": "*fp32"} if sums else {}),
            }
            absent = {name: None for name in ("dtotal", "parts") if name not in optional}
            made.append(
                Build(
                    kernel=_norm_backward,
                    signature={**tensors, **optional, "rstd": "*fp32", **integers, "rows": "i32"},
                    constants={"BLOCK": block, **absent},
                    num_warps=warps,
                    divisible=tuple(integers),
                )
            )  # fmt: skip
    return made


def cases() -> list[Case]:
    """Alone and with the residual, under a frozen weight and a trained one."""

    def case(model: str, width: int, adds: bool, is_frozen: bool) -> Case:
        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[object, ...]:
            rows = max(1, ROWS // shrink)
            inputs = [
                torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
                for _ in range(1 + adds)
            ]
            weight = torch.rand(width, device=device, dtype=dtype).requires_grad_(not is_frozen)
            return *inputs, weight, 1e-5

        def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

        def plain_sum(
            x: Tensor, residual: Tensor, weight: Tensor, eps: float
        ) -> tuple[Tensor, Tensor]:
            total = x + residual
            return plain(total, weight, eps), total

        name = "add_rms_norm" if adds else "rms_norm"
        return Case(
            operation=name,
            shape=f"{model} {'frozen' if is_frozen else 'trained'} weight, M={ROWS}",
            make=make,
            kernel=add_rms_norm if adds else rms_norm,
            reference=getattr(reference, name),
            plain=plain_sum if adds else plain,
            # Alone x, y; dy, x, dx. With the residual that and the sum, and their gradients.
            bytes=2.0 * ROWS * width * (8 if adds else 5),
        )

    return [
        case(model, width, adds, is_frozen)
        for model, (width, _, _, _) in MODELS.items()
        for adds in (False, True)
        for is_frozen in (True, False)
    ]
