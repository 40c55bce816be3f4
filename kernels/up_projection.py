"""The side of low-rank updates that meets y: S (c B)^T, dS = dY (c B) and dB = dY^T S, in Triton.

Letters: M rows, N output width, R ranks, in the blocks of `kernels.down_projection`. The sum of the
updates' gradients of x, mask * (dS A), has the form of S (c B)^T with masks, and is made here too.
The invariant is that of `kernels.down_projection`: sums in two stages of a fixed order.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.build import OPTIONS, Build, capability_of
from kernels.down_projection import (
    MASKS,
    RANK_STEP,
    WIDEST_OPERAND,
    Block,
    Tiles,
    block_width,
    build_of,
    chunks,
    columns_of,
    drops,
    sum_into,
    table,
)
from kernels.hashing import keep_tile, row_hash
from kernels.timing import MODELS, ROWS, Case

# The first of each list is what runs; the others are compiled and timed beside it.
_UP: Mapping[int, list[Tiles]] = {
    80: [Tiles(64, 64, 4, 1), Tiles(64, 128, 8, 1)],
    90: [Tiles(64, 128, 4, 1), Tiles(128, 128, 8, 1)],
    100: [Tiles(128, 128, 8, 1), Tiles(128, 64, 4, 1)],
}
_OUTPUT: Mapping[int, list[Tiles]] = {
    80: [Tiles(64, 256, 8, 3), Tiles(64, 128, 4, 3)],
    90: [Tiles(64, 256, 4, 3), Tiles(128, 256, 8, 2), Tiles(64, 128, 4, 4)],
    100: [Tiles(128, 256, 8, 2), Tiles(128, 128, 8, 3)],
}


# --- the update alone: S (c B)^T + bias, or the sum of mask * (dS A) ----------------------------


@triton.jit
def low_rank_sum(
    t, u, keys, blocks, row, column, M, N, t_row, u_rank, u_column, num_blocks,
    DROPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The float32 tile, from `row` and `column` on, of the sum over blocks of mask * (t u).

    t: [M, R]; u: element (rank, column) at rank * u_rank + column * u_column, 32-bit numbers.
    """
    ranks, local = tl.arange(0, BR), tl.arange(0, BM)
    rows, columns = row + local, column + tl.arange(0, BN)
    t_tile = t + row.to(tl.int64) * t_row + (local[:, None] * t_row + ranks[None, :])
    u_tile = u + (ranks[:, None] * u_rank + columns[None, :] * u_column)
    acc = tl.zeros([BM, BN], tl.float32)
    for i in tl.range(0, num_blocks, num_stages=1):
        block = blocks + i * 4
        first, width = columns_of(block)
        wanted = ranks < width
        left = tl.load(t_tile + first, (rows[:, None] < M) & wanted[None, :], other=0.0)
        inside = wanted[:, None] & (columns[None, :] < N)
        right = tl.load(u_tile + first * u_rank, inside, other=0.0)
        if DROPS:
            part = tl.dot(left, right, input_precision="ieee")
            site, threshold = tl.load(block + 2), tl.load(block + 3)
            hashed = row_hash(tl.load(keys + rows, rows < M, other=0)[:, None], site)
            pairs = column // 2 + tl.arange(0, BN // 2)[None, :]
            acc += tl.where(keep_tile(hashed, pairs, site, threshold), part, 0.0)
        else:
            acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _up_projection(
    t, u, keys, blocks, bias, out, M, N, t_row, u_rank, u_column, out_row, num_blocks,
    DROPS: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BN)
    row, column = (tl.program_id(0) // tiles) * BM, (tl.program_id(0) % tiles) * BN
    local, columns = tl.arange(0, BM), column + tl.arange(0, BN)
    acc = low_rank_sum(
        t, u, keys, blocks, row, column, M, N, t_row, u_rank, u_column, num_blocks,
        DROPS, BM, BN, BR,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64) * out_row + (local[:, None] * out_row + columns[None, :])
    inside = (row + local[:, None] < M) & (columns[None, :] < N)
    tl.store(place, acc.to(out.dtype.element_ty), inside)


def up_projection(
    t: Tensor,
    u: Tensor,
    blocks: tuple[Block, ...],
    keys: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """[M, N]: the sum over blocks of mask * (t u), plus the bias.

    Args:
        t: [M, R], S or its gradient, adjacent columns.
        u: [R, N], with any strides.
        keys: [M] int32; None draws no masks, whatever the blocks say.
        bias: [N].
    """
    rows, width = len(t), u.shape[1]
    out = t.new_empty(rows, width)
    tiles = _UP[capability_of(t)][0]
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(width, tiles.columns),)
    _up_projection[grid](
        t, u, keys, table(blocks, t.device), bias, out,
        rows, width, t.stride(0), u.stride(0), u.stride(1), out.stride(0), len(blocks),
        DROPS=keys is not None and drops(blocks), BIAS=bias is not None,
        BM=tiles.rows, BN=tiles.columns, BR=block_width(blocks),
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    return out


# --- dS = dY (c B) and dB = dY^T S, one pass over dY --------------------------------------------


@triton.jit
def _output_gradients(
    dy, b, s, ds_parts, db_parts, M, N, R, chunk, dy_row, s_row,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BN)
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    columns = tile * BN + tl.arange(0, BN)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    inside_columns, wanted = columns < N, ranks[None, :] < R
    narrow = columns[:, None] * R + ranks[None, :]
    local = tl.arange(0, BM)
    if NEEDS_DS:
        up = tl.load(b + narrow, inside_columns[:, None] & wanted, other=0.0)
    db = tl.zeros([BN, BR], tl.float32)
    dy_tile = dy + (part * chunk).to(tl.int64) * dy_row
    dy_tile += local[:, None] * dy_row + columns[None, :]
    s_tile = s + (part * chunk).to(tl.int64) * s_row
    s_tile += local[:, None] * s_row + ranks[None, :]
    if NEEDS_DS:
        ds_tile = ds_parts + (tile.to(tl.int64) * M + part * chunk) * R
        ds_tile += local[:, None] * R + ranks[None, :]
    for m in range(part * chunk, tl.minimum((part + 1) * chunk, M), BM):
        inside = m + local[:, None] < M
        value = tl.load(dy_tile, inside & inside_columns[None, :], other=0.0)
        if NEEDS_DS:
            ds = tl.dot(value, up, input_precision="ieee")
            tl.store(ds_tile, ds, inside & wanted)
            ds_tile += BM * R
        if NEEDS_DB:
            low = tl.load(s_tile, inside & wanted, other=0.0)
            db = tl.dot(tl.trans(value), low, db, input_precision="ieee")
            s_tile += BM * s_row
        dy_tile += BM * dy_row
    if NEEDS_DB:
        tl.store(
            db_parts + part.to(tl.int64) * N * R + narrow, db, inside_columns[:, None] & wanted
        )


def output_gradients(
    dy: Tensor, b: Tensor, s: Tensor, ds: Tensor | None, needs_db: bool
) -> Tensor | None:
    """Writes dY (c B) into ds and returns dY^T S [N, R] in float32, whichever is wanted.

    Args:
        dy: [M, N], adjacent columns.
        b: [N, R], c B in dy's dtype, contiguous.
        s, ds: [M, R], adjacent columns.
    """
    (rows, width), rank = dy.shape, b.shape[1]
    tiles = _OUTPUT[capability_of(dy)][0]
    across = triton.cdiv(width, tiles.columns)
    count, chunk = chunks(rows, across, tiles.rows)
    narrow = min(WIDEST_OPERAND, triton.next_power_of_2(rank))
    ds_parts = dy.new_empty(across, rows, rank, dtype=torch.float32) if ds is not None else None
    db_parts = dy.new_empty(count, width, rank, dtype=torch.float32) if needs_db else None
    _output_gradients[(across * count, triton.cdiv(rank, narrow))](
        dy, b, s, ds_parts, db_parts,
        rows, width, rank, chunk, dy.stride(0), s.stride(0),
        NEEDS_DS=ds is not None, NEEDS_DB=needs_db,
        BM=tiles.rows, BN=tiles.columns, BR=narrow,
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    if ds is not None and ds_parts is not None:
        sum_into(ds, ds_parts)
    if db_parts is None:
        return None
    db = dy.new_empty(width, rank, dtype=torch.float32)
    sum_into(db, db_parts)
    return db


def builds(capability: int) -> list[Build]:
    """Every kernel in every configuration, for one adapter's rank and for the widest block."""
    found = []
    for ranks in (RANK_STEP, WIDEST_OPERAND):
        for tiles in _UP[capability]:
            found += [_up_build(tiles, ranks, masks) for masks in (False, True)]
        found += [_output_build(tiles, ranks) for tiles in _OUTPUT[capability]]
    return found


def _up_build(tiles: Tiles, ranks: int, masks: bool) -> Build:
    # Forward u is the transpose of c B and nothing is masked, backward it is A.
    stride, one = ("u_rank", "u_column") if masks else ("u_column", "u_rank")
    table = MASKS if masks else {"blocks": "*i32"}
    constants = {"DROPS": masks, "BIAS": False, "BM": tiles.rows, "BN": tiles.columns}
    return build_of(
        _up_projection,
        tiles,
        {"t": "*bf16", "u": "*bf16", **table, "out": "*bf16"},
        ("M", "N", "t_row", stride, "out_row", "num_blocks"),
        {**constants, "BR": ranks, "bias": None, one: 1, **({} if masks else {"keys": None})},
    )


def _output_build(tiles: Tiles, ranks: int) -> Build:
    constants = {"NEEDS_DS": True, "NEEDS_DB": True, "BM": tiles.rows, "BN": tiles.columns}
    parts = {"ds_parts": "*fp32", "db_parts": "*fp32"}
    return build_of(
        _output_gradients,
        tiles,
        {"dy": "*bf16", "b": "*bf16", "s": "*bf16", **parts},
        ("M", "N", "R", "chunk", "dy_row", "s_row"),
        {**constants, "BR": ranks},
    )


def cases() -> list[Case]:
    """One adapter of rank 16 at the models' widths; the rate is that of writing y or reading dy."""
    blocks = (Block(0, 16, 0, -(2**15)),)

    def case(operation: str, model: str, width: int) -> Case:
        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[Tensor, ...]:
            rows = max(1, ROWS // shrink)
            shapes = ((rows, width), (width, 16), (rows, 16))
            return tuple(torch.randn(shape, device=device, dtype=dtype) for shape in shapes)

        def gradients(dy: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            ds = torch.empty_like(s)
            db = output_gradients(dy, b, s, ds, True)
            assert db is not None
            return ds, db

        is_up = operation == "up_projection"
        return Case(
            operation=operation,
            shape=f"{model}, {width} wide, M={ROWS}",
            make=make,
            kernel=(lambda dy, b, s: up_projection(s, b.T, blocks, None)) if is_up else gradients,
            reference=(lambda dy, b, s: s @ b.T)
            if is_up
            else (lambda dy, b, s: (dy @ b, (dy.T @ s).float())),
            bytes=2.0 * ROWS * width,
            backward=False,
        )

    widths = [(model, w) for model, (d, f, _, _) in MODELS.items() for w in (d, f)]
    names = ("up_projection", "output_gradients")
    return [case(name, model, width) for name in names for model, width in widths]
