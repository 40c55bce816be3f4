"""Eight-bit rows and their products on int8 tensor cores, in Triton.

Letters: M rows, K input width, N output width, C kept columns, R rank. The columns of largest
magnitude stay out of the int8 rows and are multiplied unquantised in the product's epilogue, as
rank is added (LLM.int8(), Dettmers et al., arXiv 2208.07339). Three launches find and split them
(magnitudes by column, the choice, the rows), one multiplies. The invariant:
`kernels.reference_int8` is the contract; q and its scales are the same bits, sums of q are exact.

Hopper multiplies int8 only where both operands lie along the sum. For the gradient of x the sum
runs over output rows, so "scratch" turns the weight into a buffer that is dropped after the
product: 2 bytes an element and nothing kept. "direct" reads the weight as it lies and turns each
tile in shared memory, where it cannot be fetched ahead.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference_int8
from kernels.build import OPTIONS, Build, capability_of
from kernels.reference_int8 import KEPT_COLUMNS
from kernels.timing import MODELS, ROWS, Case

Route = Literal["scratch", "direct"]


class ProductTiles(NamedTuple):
    """How a product is launched: its tile, and how it is pipelined."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# The first of each list is what runs; the others are compiled and timed beside it.
_PRODUCT: Mapping[int, tuple[ProductTiles, ...]] = {
    80: (ProductTiles(128, 128, 64, 8, 4), ProductTiles(128, 128, 128, 8, 3)),
    90: (ProductTiles(128, 256, 128, 8, 3), ProductTiles(128, 128, 128, 8, 4)),
    100: (ProductTiles(128, 256, 128, 8, 3), ProductTiles(128, 128, 128, 8, 4)),
}
# Rows of tiles that neighbouring programs share, so that the L2 cache holds their weights.
GROUP_ROWS = 8
# Kept columns and ranks that the epilogue multiplies at once.
_NARROW = 32
# A row that is quantised lies in one program's registers, and so do all columns' magnitudes.
WIDEST = 32768
# Tile of the pass over columns, and how many programs it aims at. The maximum is exact in any
# order; the constant only makes the launch a function of the shape.
_MAGNITUDE_ROWS, _MAGNITUDE_COLUMNS, _PROGRAMS = 32, 128, 512
_TURN = 128  # rows and columns of a tile that is turned

_ABSOLUTE = tl.constexpr(0x7FFFFFFF)
_TINY, _STEP = tl.constexpr(reference_int8.TINY), tl.constexpr(reference_int8.STEP)
# 1.5 * 2^23: a small number added to it is rounded to a whole one, ties to even, and the low bits
# of the sum are that number.
_WHOLE, _WHOLE_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)


@triton.jit
def _magnitude(x):
    """|x| as int32 of the same order, in which NaN is larger than infinity and so survives."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & _ABSOLUTE


@triton.jit
def _scaled(x, scale):
    """x times scale, both rounded to x's type, as `int8_linear_input_grad` has it."""
    kind = x.dtype
    return (x.to(tl.float32) * scale.to(kind).to(tl.float32)).to(kind)


# --- which columns are kept ---------------------------------------------------------------------


@triton.jit
def _column_magnitudes(
    x, scale, parts, M, K, x_row, chunk, tiles,
    SCALED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    columns, local = tile * BK + tl.arange(0, BK), tl.arange(0, BM)
    inside = columns < K
    first = part * chunk
    x_tile = x + first.to(tl.int64) * x_row + (local[:, None] * x_row + columns[None, :])
    if SCALED:
        factor = tl.load(scale + columns, inside, other=0.0)[None, :]
    largest = tl.zeros([BM, BK], tl.int32)
    for m in range(first, tl.minimum(first + chunk, M), BM):
        value = tl.load(x_tile, (m + local[:, None] < M) & inside[None, :], other=0.0)
        if SCALED:
            value = _scaled(value, factor)
        largest = tl.maximum(largest, _magnitude(value))
        x_tile += BM * x_row
    tl.store(parts + part.to(tl.int64) * K + columns, tl.max(largest, 0), inside)


@triton.jit
def _choose_columns(parts, is_kept, columns, P, K, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    inside = index < K
    largest = tl.full([BLOCK], -1, tl.int32)
    for part in range(P):
        magnitudes = tl.load(parts + part * K + index, inside, other=-1)
        largest = tl.maximum(largest, magnitudes)
    # The count-th largest magnitude, bit by bit from the highest.
    least = tl.min(largest, 0) * 0
    for bit in range(31):
        trial = least | (1 << (30 - bit))
        reached = tl.sum((largest >= trial).to(tl.int32), 0)
        least = tl.where(reached >= count, trial, least)
    above, level = largest > least, largest == least
    room = count - tl.sum(above.to(tl.int32), 0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    tl.store(is_kept + index, kept.to(tl.int8), inside)
    tl.store(columns + tl.cumsum(kept.to(tl.int32), 0) - 1, index, kept)


def _kept_columns(x: Tensor, count: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference_int8.kept_columns` of x, or of x times scale: [C] int32, and [K] int8 flags."""
    rows, width = x.shape
    tiles = triton.cdiv(width, _MAGNITUDE_COLUMNS)
    chunk = triton.cdiv(rows, max(1, _PROGRAMS // tiles))
    chunk = triton.cdiv(chunk, _MAGNITUDE_ROWS) * _MAGNITUDE_ROWS
    count_parts = triton.cdiv(rows, chunk)
    parts = x.new_empty(count_parts, width, dtype=torch.int32)
    _column_magnitudes[(tiles * count_parts,)](
        x, scale, parts, rows, width, x.stride(0), chunk, tiles, SCALED=scale is not None,
        BM=_MAGNITUDE_ROWS, BK=_MAGNITUDE_COLUMNS, num_warps=4, **OPTIONS,
    )  # fmt: skip
    is_kept = x.new_empty(width, dtype=torch.int8)
    columns = x.new_empty(count, dtype=torch.int32)
    block = triton.next_power_of_2(width)
    _choose_columns[(1,)](
        parts, is_kept, columns, count_parts, width, count,
        BLOCK=block, num_warps=_warps(block), **OPTIONS,
    )  # fmt: skip
    return columns, is_kept


def _warps(block: int) -> int:
    """32 elements a thread, in 1 to 16 warps."""
    return max(1, min(16, block // 1024))


# --- rows in int8 -------------------------------------------------------------------------------


@triton.jit
def _quantise(
    x, weight_scale, is_kept, columns, q, scale, kept, K, C, x_row,
    SCALED: tl.constexpr, KEEPS: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    value = tl.load(x + row * x_row + column, inside, other=0.0)
    if SCALED:
        value = _scaled(value, tl.load(weight_scale + column, inside, other=0.0))
    value = value.to(tl.float32)
    if KEEPS:
        value = tl.where(tl.load(is_kept + column, inside, other=0) != 0, 0.0, value)
        for first in range(0, C, BC):
            narrow = first + tl.arange(0, BC)
            wanted = narrow < C
            place = tl.load(columns + narrow, wanted, other=0)
            apart = tl.load(x + row * x_row + place, wanted, other=0.0)
            if SCALED:
                apart = _scaled(apart, tl.load(weight_scale + place, wanted, other=0.0))
            tl.store(kept + row * C + narrow, apart, wanted)
    step = tl.max(_magnitude(value), 0).to(tl.float32, bitcast=True) * _STEP
    step = tl.where(step < _TINY, 1.0, step)
    # The product is rounded before it becomes whole: an addition of 0 keeps it out of the next.
    quotient = tl.fma(value, tl.zeros_like(value) + tl.div_rn(1.0, step), tl.zeros_like(value))
    whole = (quotient + _WHOLE).to(tl.int32, bitcast=True) - _WHOLE_BITS
    tl.store(q + row * K + column, whole.to(tl.int8), inside)
    tl.store(scale + row, step)


class Quantised(NamedTuple):
    """Rows in int8, with the columns that were kept apart."""

    q: Tensor  # [M, K] int8, 0 in the kept columns
    scale: Tensor  # [M] float32
    columns: Tensor  # [C] int32, ascending
    kept: Tensor  # [M, C], the values of those columns


def quantise(x: Tensor, kept: int, weight_scale: Tensor | None = None) -> Quantised:
    """x [M, K], or x times weight_scale [K], in int8 rows without its `kept` largest columns."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    count = min(kept, width)
    q = x.new_empty(rows, width, dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    apart = x.new_empty(rows, count)
    columns, is_kept = _kept_columns(x, count, weight_scale) if count else (None, None)
    block = triton.next_power_of_2(width)
    _quantise[(rows,)](
        x, weight_scale, is_kept, columns, q, scale, apart, width, count, x.stride(0),
        SCALED=weight_scale is not None, KEEPS=count > 0, BLOCK=block, BC=_NARROW,
        num_warps=_warps(block), **OPTIONS,
    )  # fmt: skip
    return Quantised(
        q, scale, q.new_empty(0, dtype=torch.int32) if columns is None else columns, apart
    )


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.reference_int8.quantise_rows`: one read of x [M, K], one write of q."""
    return quantise(x, 0)[:2]


# --- the product --------------------------------------------------------------------------------


@triton.jit
def tile_of(program, row_tiles, N, BN: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of rows and which of columns: `GROUP` tiles of rows share each weight's tile."""
    across = tl.cdiv(N, BN)
    first = program // (GROUP * across) * GROUP
    group = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * across)
    return first + within % group, within // group


@triton.jit
def _int8_product(
    q, q_scale, w, w_scale, kept, columns, t, u, bias, out,
    M, N, K, C, R, w_depth, w_column, t_row, u_rank, u_column, out_row,
    SCALED: tl.constexpr, KEEPS: tl.constexpr, UPDATES: tl.constexpr, BIAS: tl.constexpr,
    ADDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), N, BN, GROUP)
    row, column = row * BM, column * BN
    local_rows, local_columns = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns_out = row + local_rows, column + local_columns
    inside_rows, inside_columns = rows[:, None] < M, columns_out[None, :] < N
    depth = tl.arange(0, BK)
    # Where a tile begins is a 64-bit number, what lies within it takes 32: half the registers.
    q_tile = q + row.to(tl.int64) * K + (local_rows[:, None] * K + depth[None, :])
    w_first = w + column.to(tl.int64) * w_column
    w_tile = w_first + (depth[:, None] * w_depth + local_columns[None, :] * w_column)
    total = tl.zeros([BM, BN], tl.int32)
    for k in range(0, K, BK):
        inside = depth < K - k
        left = tl.load(q_tile, inside_rows & inside[None, :], other=0)
        right = tl.load(w_tile, inside[:, None] & inside_columns, other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        q_tile += BK
        w_tile += BK * w_depth
    acc = total.to(tl.float32) * tl.load(q_scale + rows, rows < M, other=0.0)[:, None]
    narrow = tl.arange(0, BR)
    if KEEPS:
        kept_tile = kept + row.to(tl.int64) * C + (local_rows[:, None] * C + narrow[None, :])
        for c in tl.range(0, C, BR, num_stages=1):
            wanted = narrow < C - c
            place = tl.load(columns + c + narrow, wanted, other=0)
            left = tl.load(kept_tile + c, inside_rows & wanted[None, :], other=0.0)
            right = tl.load(
                w_first
                + (place[:, None].to(tl.int64) * w_depth + local_columns[None, :] * w_column),
                wanted[:, None] & inside_columns,
                other=0,
            ).to(left.dtype)
            acc = tl.dot(left, right, acc, input_precision="ieee")
    if SCALED:
        acc *= tl.load(w_scale + columns_out, columns_out < N, other=0.0)[None, :]
    if UPDATES:
        t_tile = t + row.to(tl.int64) * t_row + (local_rows[:, None] * t_row + narrow[None, :])
        u_tile = u + column.to(tl.int64) * u_column
        u_tile += narrow[:, None] * u_rank + local_columns[None, :] * u_column
        for r in tl.range(0, R, BR, num_stages=1):
            wanted = narrow < R - r
            left = tl.load(t_tile + r, inside_rows & wanted[None, :], other=0.0)
            right = tl.load(u_tile + r * u_rank, wanted[:, None] & inside_columns, other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + columns_out, columns_out < N, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64) * out_row + column
    place += local_rows[:, None] * out_row + local_columns[None, :]
    if ADDS:
        acc += tl.load(place, inside_rows & inside_columns, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), inside_rows & inside_columns)


def product(
    x: Quantised,
    weight: Tensor,
    scale: Tensor | None,
    *,
    update: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The rows times the weight, its columns' scales, plus t u, the bias, and `out` if given.

    Args:
        x: from `quantise`.
        weight: [K, N] int8, with any strides; scale: [N] float32 or None for 1.
        update: t [M, R] with adjacent columns, u [R, N] with any strides, in the rows' dtype.
        bias: [N].
        out: [M, N], which is added to, in place.
    """
    (rows, depth), width = x.q.shape, weight.shape[1]
    adds = out is not None
    out = x.kept.new_empty(rows, width) if out is None else out
    t, u = update or (x.kept, x.kept)
    tiles = _PRODUCT[capability_of(x.q)][0]
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(width, tiles.columns),)
    _int8_product[grid](
        x.q, x.scale, weight, scale, x.kept, x.columns, t, u, bias, out,
        rows, width, depth, len(x.columns), t.shape[1] if update else 0,
        weight.stride(0), weight.stride(1), t.stride(0), u.stride(0), u.stride(1), out.stride(0),
        SCALED=scale is not None, KEEPS=len(x.columns) > 0, UPDATES=update is not None,
        BIAS=bias is not None, ADDS=adds,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, BR=_NARROW, GROUP=GROUP_ROWS,
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    return out


@triton.jit
def _turn(x, out, N, K, x_row, tiles, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) // tiles * BLOCK, tl.program_id(0) % tiles * BLOCK
    local = tl.arange(0, BLOCK)
    rows, columns = row + local, column + local
    x_tile = x + row.to(tl.int64) * x_row + (local[:, None] * x_row + columns[None, :])
    value = tl.load(x_tile, (rows[:, None] < N) & (columns[None, :] < K), other=0)
    place = out + column.to(tl.int64) * N + (local[:, None] * N + rows[None, :])
    tl.store(place, tl.trans(value), (columns[:, None] < K) & (rows[None, :] < N))


def turned(weight: Tensor) -> Tensor:
    """weight [N, K] int8 as a view [N, K] of a buffer in which columns lie one after another."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, width = weight.shape
    out = weight.new_empty(width, rows)
    tiles = triton.cdiv(width, _TURN)
    _turn[(triton.cdiv(rows, _TURN) * tiles,)](
        weight, out, rows, width, weight.stride(0), tiles, BLOCK=_TURN, num_warps=8, **OPTIONS
    )
    return out.T


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, kept: int = KEPT_COLUMNS) -> Tensor:
    """`kernels.reference_int8.int8_linear`: x [M, K], weight [N, K] int8, scale [N]."""
    return product(quantise(x, kept), weight.T, scale)


def int8_linear_input_grad(
    dy: Tensor,
    weight: Tensor,
    scale: Tensor,
    kept: int = KEPT_COLUMNS,
    *,
    route: Route = "scratch",
) -> Tensor:
    """`kernels.reference_int8.int8_linear_input_grad`; `route` as the module says."""
    return product(
        quantise(dy, kept, scale), turned(weight) if route == "scratch" else weight, None
    )


def builds(capability: int) -> list[Build]:
    """The product forward and for the gradient of x by both routes; the passes over rows."""
    found = []
    for tiles in _PRODUCT[capability]:
        found.append(_product_build(tiles, "w_depth", is_scaled=True))
        found += [_product_build(tiles, one, is_scaled=False) for one in ("w_depth", "w_column")]
    for scale in ({"scale": "*fp32"}, {}):
        found.append(
            Build(
                kernel=_column_magnitudes,
                signature={
                    "x": "*bf16", **scale, "parts": "*i32",
                    **dict.fromkeys(("M", "K", "x_row", "chunk", "tiles"), "i32"),
                },
                constants={
                    "SCALED": bool(scale), "BM": _MAGNITUDE_ROWS, "BK": _MAGNITUDE_COLUMNS,
                    **({} if scale else {"scale": None}),
                },
                divisible=("M", "K", "x_row", "chunk"),
            )
        )  # fmt: skip
    for width in (4096, 16384):
        found += _row_builds(width)
    sizes = ("N", "K", "x_row")
    turn = Build(
        kernel=_turn,
        signature={"x": "*i8", "out": "*i8", **dict.fromkeys((*sizes, "tiles"), "i32")},
        constants={"BLOCK": _TURN},
        num_warps=8,
        divisible=sizes,
    )
    return [*found, turn]


def _product_build(tiles: ProductTiles, one: str, *, is_scaled: bool) -> Build:
    """`one` is the stride of the weight that is 1; forward the update's u is a transpose too."""
    ones = {one, "u_rank"} if is_scaled else {one, "u_column"}
    strides = ("w_depth", "w_column", "t_row", "u_rank", "u_column", "out_row")
    sizes = ("M", "N", "K", "C", "R", *(stride for stride in strides if stride not in ones))
    scale = {"w_scale": "*fp32"} if is_scaled else {}
    return Build(
        kernel=_int8_product,
        signature={
            "q": "*i8", "q_scale": "*fp32", "w": "*i8", **scale, "kept": "*bf16",
            "columns": "*i32", "t": "*bf16", "u": "*bf16", "out": "*bf16",
            **dict.fromkeys(sizes, "i32"),
        },
        constants={
            "SCALED": is_scaled, "KEEPS": True, "UPDATES": True, "BIAS": False, "ADDS": False,
            "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "BR": _NARROW,
            "GROUP": GROUP_ROWS, "bias": None, **({} if is_scaled else {"w_scale": None}),
            **dict.fromkeys(sorted(ones), 1),
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        tensor_core="int8",
        divisible=sizes,
    )  # fmt: skip


def _row_builds(width: int) -> list[Build]:
    choose = Build(
        kernel=_choose_columns,
        signature={
            "parts": "*i32", "is_kept": "*i8", "columns": "*i32",
            **dict.fromkeys(("P", "K", "count"), "i32"),
        },
        constants={"BLOCK": width},
        num_warps=_warps(width),
        divisible=("K", "count"),
    )  # fmt: skip
    found = [choose]
    for is_scaled in (False, True):
        sizes = ("K", "C", "x_row")
        found.append(
            Build(
                kernel=_quantise,
                signature={
                    "x": "*bf16", **({"weight_scale": "*fp32"} if is_scaled else {}),
                    "is_kept": "*i8", "columns": "*i32", "q": "*i8", "scale": "*fp32",
                    "kept": "*bf16", **dict.fromkeys(sizes, "i32"),
                },
                constants={
                    "SCALED": is_scaled, "KEEPS": True, "BLOCK": width, "BC": _NARROW,
                    **({} if is_scaled else {"weight_scale": None}),
                },
                num_warps=_warps(width),
                divisible=sizes,
            )
        )  # fmt: skip
    return found


def cases() -> list[Case]:
    """Rows at the models' widths; products of 8,192 cubed and of the models' weights."""
    found = []
    for model, (d, f, _, _) in MODELS.items():
        found += [_rows_case(f"{model}, {ROWS} x {width}", width) for width in (d, f)]
        for width, output in ((d, d), (d, f), (f, d)):
            found += _product_cases(f"{model}, {ROWS} x {width} x {output}", width, output)
    return [*found, *_product_cases("8192 cubed", 8192, 8192)]


def _rows_case(shape: str, width: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[object, ...]:
        return (torch.randn(max(1, ROWS // shrink), width, device=device, dtype=dtype),)

    return Case(
        operation="quantise_rows",
        shape=shape,
        make=make,
        kernel=quantise_rows,
        reference=reference_int8.quantise_rows,
        bytes=3.0 * ROWS * width,
        backward=False,
    )


def _product_cases(shape: str, width: int, output: int) -> list[Case]:
    """Both directions beside the product in the activations' dtype; forward `_int_mm` as well."""

    def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[Tensor, ...]:
        # Where even the widths are too much (a CPU) they shrink too.
        narrower = max(1, shrink // 64)
        rows, depth, columns = max(32, ROWS // shrink), width // narrower, output // narrower
        x = torch.randn(rows, depth, device=device, dtype=dtype)
        dy = torch.randn(rows, columns, device=device, dtype=dtype)
        dense = torch.randn(columns, depth, device=device, dtype=dtype) * depth**-0.5
        return x, dy, dense, *reference_int8.quantise_rows(dense)

    def scaled_int_mm(x: Tensor, dy: Tensor, dense: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        q, rows = reference_int8.quantise_rows(x)
        return (torch._int_mm(q, w.T).float() * rows[:, None] * scale).to(x.dtype)

    def backward_of(route: Route) -> Any:
        return lambda x, dy, dense, w, scale: int8_linear_input_grad(dy, w, scale, route=route)

    def forward(x: Tensor, dy: Tensor, dense: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return int8_linear(x, w, scale)

    forwards: Sequence[tuple[str, Any, Any]] = (
        ("int8_linear", forward, scaled_int_mm),
        ("int8_linear beside floats", forward, lambda x, dy, dense, w, scale: x @ dense.T),
    )
    backwards = (
        ("int8_linear_input_grad", backward_of("scratch")),
        ("int8_linear_input_grad direct", backward_of("direct")),
    )
    shared: dict[str, Any] = {
        "shape": shape, "make": make, "flops": 2.0 * ROWS * width * output, "backward": False,
    }  # fmt: skip
    return [
        *(
            Case(
                operation=operation,
                kernel=kernel,
                reference=lambda x, dy, dense, w, s: reference_int8.int8_linear(x, w, s),
                plain=plain,
                **shared,
            )
            for operation, kernel, plain in forwards
        ),
        *(
            Case(
                operation=operation,
                kernel=kernel,
                reference=lambda x, dy, dense, w, s: reference_int8.int8_linear_input_grad(
                    dy, w, s
                ),
                plain=lambda x, dy, dense, w, s: dy @ dense,
                **shared,
            )
            for operation, kernel in backwards
        ),
    ]
