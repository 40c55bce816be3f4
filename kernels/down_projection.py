"""The side of low-rank updates that reads x, in Triton: S = dropout(x) A^T, dA = dS^T dropout(x).

Letters: M rows, K input width, R the ranks of all adapters that read one input, each padded to
`RANK_STEP`. Masks are drawn on the way (`kernels.hashing`). Adapters of one mask that stand side by
side form a `Block` of columns of S [M, R]; a table on the device lists the blocks, so no launch
depends on how many there are.

The invariant: a sum over rows or over a wide axis is made in two stages of a fixed order (float32
parts, then their sum), never by atomics, so results are the same bits in every run.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.build import OPTIONS, Build, capability_of
from kernels.hashing import keep_tile, row_hash, threshold
from kernels.timing import MODELS, ROWS, Case

# What a tensor core multiplies at once along its depth.
RANK_STEP = 16
# Columns of S that a program takes at once; wider blocks are split. Where S is the product's result
# they are few registers, where it is an operand beside a wide tile they are many.
WIDEST_RESULT, WIDEST_OPERAND = 64, 32
# Programs that a two-stage sum aims at: about the multiprocessors of the GPUs that are meant. A
# constant, so that the order of the sum is a function of the shape alone.
_PROGRAMS = 128
# Columns of a row's sum over its parts.
_SUM_BLOCK = 1024


class Block(NamedTuple):
    """Adjacent columns of S under one mask; as int32 it is a row of the kernels' table."""

    start: int
    width: int
    site: int  # `reference.low_word` of it
    threshold: int  # `hashing.threshold` of its dropout; the least int16 keeps everything


@triton.jit
def columns_of(block):
    """Where a block of the table begins and how wide it is: multiples of RANK_STEP both."""
    return tl.multiple_of(tl.load(block), 16), tl.multiple_of(tl.load(block + 1), 16)


class Tiles(NamedTuple):
    """How a kernel is launched: its tile, and how it is pipelined."""

    rows: int
    columns: int
    warps: int
    stages: int


# The first of each list is what runs; the others are compiled and timed beside it.
_DOWN: Mapping[int, list[Tiles]] = {
    80: [Tiles(64, 64, 4, 4), Tiles(64, 128, 4, 3)],
    90: [Tiles(64, 128, 4, 4), Tiles(64, 64, 4, 4)],
    100: [Tiles(128, 64, 4, 4), Tiles(64, 64, 4, 4)],
}
_INPUT: Mapping[int, list[Tiles]] = {
    80: [Tiles(64, 128, 4, 3), Tiles(64, 64, 4, 3)],
    90: [Tiles(64, 128, 4, 4), Tiles(128, 128, 8, 3)],
    100: [Tiles(64, 128, 4, 3), Tiles(128, 128, 8, 3)],
}


@functools.lru_cache(maxsize=4096)
def table(blocks: tuple[Block, ...], device: torch.device) -> Tensor:
    """The blocks on the device; copied there once, for they are the same at every step."""
    return torch.tensor(blocks, dtype=torch.int32, device=device)


def block_width(blocks: tuple[Block, ...]) -> int:
    """Columns of S that one program computes: a power of two that holds the widest block."""
    return triton.next_power_of_2(max((block.width for block in blocks), default=RANK_STEP))


def merged(blocks: list[Block], widest: int) -> tuple[Block, ...]:
    """Neighbours under one mask become one block, and no block is wider than `widest`."""
    out: list[Block] = []
    for block in blocks:
        for start in range(block.start, block.start + block.width, widest):
            width = min(widest, block.start + block.width - start)
            last = out[-1] if out else None
            if (
                last is not None
                and last.start + last.width == start
                and last.width + width <= widest
                and last[2:] == block[2:]
            ):
                out[-1] = last._replace(width=last.width + width)
            else:
                out.append(block._replace(start=start, width=width))
    return tuple(out)


def drops(blocks: tuple[Block, ...]) -> bool:
    """Whether any mask removes anything."""
    return any(block.threshold > -(2**15) for block in blocks)


# --- S = dropout(x) A^T -------------------------------------------------------------------------


@triton.jit
def down_tile(
    x, a, keys, block, s, copy, first, stop, copied_stop, K, x_row, s_row,
    DROPS: tl.constexpr, COPIES: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One block's columns of S for the rows from `first` on, before `stop`."""
    start, width = columns_of(block)
    local = tl.arange(0, BM)
    rows = first + local
    inside_rows = rows[:, None] < stop
    columns, ranks = tl.arange(0, BK), tl.arange(0, BR)
    wanted = ranks[None, :] < width
    # Where a tile begins is a 64-bit number, what lies within it takes 32: half the registers.
    x_tile = x + first.to(tl.int64) * x_row + (local[:, None] * x_row + columns[None, :])
    a_tile = a + start.to(tl.int64) * K + (ranks[None, :] * K + columns[:, None])
    s_tile = s + first.to(tl.int64) * s_row + local[:, None] * s_row
    if COPIES:
        copied = copy + first.to(tl.int64) * s_row + (local[:, None] * s_row + columns[None, :])
    if DROPS:
        site, threshold = tl.load(block + 2), tl.load(block + 3)
        hashed = row_hash(tl.load(keys + rows, rows < stop, other=0)[:, None], site)
    acc = tl.zeros([BM, BR], tl.float32)
    for k in range(0, K, BK):
        inside = columns < K - k
        value = tl.load(x_tile, inside_rows & inside[None, :], other=0.0)
        if COPIES:
            tl.store(copied, value, (rows[:, None] < copied_stop) & inside[None, :])
            copied += BK
        if DROPS:
            pairs = k // 2 + tl.arange(0, BK // 2)[None, :]
            keep = keep_tile(hashed, pairs, site, threshold)
            value = tl.where(keep, value, 0.0)
        down = tl.load(a_tile, inside[:, None] & wanted, other=0.0)
        acc = tl.dot(value, down, acc, input_precision="ieee")
        x_tile += BK
        a_tile += BK
    tl.store(s_tile + (start + ranks)[None, :], acc.to(s.dtype.element_ty), inside_rows & wanted)


@triton.jit
def _down_projection(
    x, a, keys, blocks, s, copy, M, K, x_row, s_row, num_blocks,
    DROPS: tl.constexpr, COPIES: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # Programs of one tile of x stand side by side: all but the first find it in the L2 cache.
    program = tl.program_id(0)
    block = blocks + (program % num_blocks) * 4
    copied_stop = tl.where(program % num_blocks == 0, M, 0)
    down_tile(
        x, a, keys, block, s, copy, (program // num_blocks) * BM, M, copied_stop, K, x_row, s_row,
        DROPS, COPIES, BM, BK, BR,
    )  # fmt: skip


def down_projection(
    x: Tensor,
    a: Tensor,
    blocks: tuple[Block, ...],
    keys: Tensor | None,
    copy: Tensor | None = None,
) -> Tensor:
    """S [M, R]: each block's masked x times its rows of A^T, without the masks' 1 / (1 - p).

    Args:
        x: [M, K], adjacent columns.
        a: [R, K] in x's dtype, contiguous.
        copy: [M, K + R], receives x in its first columns and S, a view of it, in the others.
    """
    rows, width = x.shape
    if copy is None:
        s = x.new_empty(rows, len(a))
    else:
        s = copy[:, width:]
    tiles, num_blocks = _DOWN[capability_of(x)][0], len(blocks)
    _down_projection[(triton.cdiv(rows, tiles.rows) * num_blocks,)](
        x, a, keys, table(blocks, x.device), s, copy,
        rows, width, x.stride(0), s.stride(0), num_blocks,
        DROPS=drops(blocks), COPIES=copy is not None,
        BM=tiles.rows, BK=tiles.columns, BR=block_width(blocks),
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    return s


# --- dA = dS^T dropout(x) -----------------------------------------------------------------------


@triton.jit
def gradient_tile(
    x, ds, keys, block, out, tile, first, stop, K, x_row, ds_row,
    DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One block's ranks of dS^T dropout(x), in float32: BK columns, the rows first to stop."""
    start, width = columns_of(block)
    columns, ranks = tile * BK + tl.arange(0, BK), tl.arange(0, BR)
    inside_columns, wanted = columns < K, ranks[None, :] < width
    if DROPS:
        site, threshold = tl.load(block + 2), tl.load(block + 3)
        pairs = tile * (BK // 2) + tl.arange(0, BK // 2)[None, :]
    da = tl.zeros([BK, BR], tl.float32)
    local = tl.arange(0, BM)
    x_tile = x + first.to(tl.int64) * x_row
    x_tile += local[:, None] * x_row + columns[None, :]
    ds_tile = ds + first.to(tl.int64) * ds_row
    ds_tile += local[:, None] * ds_row + (start + ranks)[None, :]
    for m in range(first, stop, BM):
        rows = m + local
        inside = rows[:, None] < stop
        value = tl.load(x_tile, inside & inside_columns[None, :], other=0.0)
        if DROPS:
            hashed = row_hash(tl.load(keys + rows, rows < stop, other=0)[:, None], site)
            value = tl.where(keep_tile(hashed, pairs, site, threshold), value, 0.0)
        low = tl.load(ds_tile, inside & wanted, other=0.0)
        da = tl.dot(tl.trans(value), low, da, input_precision="ieee")
        x_tile += BM * x_row
        ds_tile += BM * ds_row
    place = out + start.to(tl.int64) * K
    tl.store(place + (ranks[None, :] * K + columns[:, None]), da, inside_columns[:, None] & wanted)


@triton.jit
def _input_gradient(
    x, ds, keys, blocks, parts, M, K, R, chunk, x_row, ds_row, num_blocks,
    DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = blocks + (program % num_blocks) * 4
    program //= num_blocks
    tiles = tl.cdiv(K, BK)
    tile, part = program % tiles, program // tiles
    stop = tl.minimum((part + 1) * chunk, M)
    gradient_tile(
        x, ds, keys, block, parts + part.to(tl.int64) * R * K, tile, part * chunk, stop, K, x_row,
        ds_row, DROPS, BM, BK, BR,
    )  # fmt: skip


def input_gradient(x: Tensor, ds: Tensor, blocks: tuple[Block, ...], keys: Tensor | None) -> Tensor:
    """dS^T dropout(x): [R, K] in float32; rows that no block names are not written.

    Args:
        x: [M, K], adjacent columns; ds: [M, R], adjacent columns.
    """
    (rows, width), rank = x.shape, ds.shape[1]
    tiles = _INPUT[capability_of(x)][0]
    across = triton.cdiv(width, tiles.columns)
    count, chunk = chunks(rows, across * len(blocks), tiles.rows)
    parts = x.new_empty(count, rank, width, dtype=torch.float32)
    _input_gradient[(across * count * len(blocks),)](
        x, ds, keys, table(blocks, x.device), parts,
        rows, width, rank, chunk, x.stride(0), ds.stride(0), len(blocks),
        DROPS=drops(blocks), BM=tiles.rows, BK=tiles.columns, BR=block_width(blocks),
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    if count == 1:
        return parts[0]
    da = x.new_empty(rank, width, dtype=torch.float32)
    sum_into(da, parts)
    return da


# --- sums in two stages ---------------------------------------------------------------------------


@triton.jit
def _sum_parts(parts, out, P, size, width, out_row, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    acc = tl.zeros([BLOCK], tl.float32)
    part = parts + index
    for _ in range(P):
        acc += tl.load(part, inside, other=0.0)
        part += size
    place = out + (index // width) * out_row + index % width
    tl.store(place, acc.to(out.dtype.element_ty), inside)


def sum_into(out: Tensor, parts: Tensor) -> None:
    """out [rows, width] = the sum of parts [P, rows, width], float32, in their order."""
    size = out.numel()
    _sum_parts[(triton.cdiv(size, _SUM_BLOCK),)](
        parts, out, len(parts), size, out.shape[1], out.stride(0), BLOCK=_SUM_BLOCK, **OPTIONS
    )


def chunks(rows: int, programs: int, step: int) -> tuple[int, int]:
    """How many parts the rows are summed in, and the rows of each, a multiple of the tile."""
    count = max(1, min(triton.cdiv(rows, step), _PROGRAMS // programs))
    chunk = triton.cdiv(triton.cdiv(rows, count), step) * step
    return triton.cdiv(rows, chunk), chunk


def builds(capability: int) -> list[Build]:
    """Every kernel in every configuration, for one adapter's rank and for the widest block."""
    found = []
    for ranks in (RANK_STEP, WIDEST_RESULT):
        for tiles in _DOWN[capability]:
            found += [_down_build(tiles, ranks, copies) for copies in (False, True)]
        found += [_input_build(tiles, ranks) for tiles in _INPUT[capability]]
    sizes = ("size", "width", "out_row")
    parts = Build(
        kernel=_sum_parts,
        signature={"parts": "*fp32", "out": "*bf16", "P": "i32", **dict.fromkeys(sizes, "i32")},
        constants={"BLOCK": _SUM_BLOCK},
        divisible=sizes,
    )
    return [*found, parts]


MASKS = {"keys": "*i32", "blocks": "*i32"}


def build_of(
    kernel: Any,
    tiles: Tiles,
    pointers: Mapping[str, str],
    sizes: Sequence[str],
    constants: Mapping[str, Any],
) -> Build:
    """One launch; its sizes are multiples of 16, but for counts of blocks, experts and tiles."""
    return Build(
        kernel=kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32")},
        constants=constants,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        tensor_core="bf16",
        divisible=tuple(size for size in sizes if size not in ("num_blocks", "E", "row_tiles")),
    )


def _down_build(tiles: Tiles, ranks: int, copies: bool) -> Build:
    copy: dict[str, Any] = {"copy": "*bf16"} if copies else {}
    constants = {"DROPS": True, "COPIES": copies, "BM": tiles.rows, "BK": tiles.columns}
    return build_of(
        _down_projection,
        tiles,
        {"x": "*bf16", "a": "*bf16", **MASKS, "s": "*bf16", **copy},
        ("M", "K", "x_row", "s_row", "num_blocks"),
        {**constants, "BR": ranks, **({} if copies else {"copy": None})},
    )


def _input_build(tiles: Tiles, ranks: int) -> Build:
    return build_of(
        _input_gradient,
        tiles,
        {"x": "*bf16", "ds": "*bf16", **MASKS, "parts": "*fp32"},
        ("M", "K", "R", "chunk", "x_row", "ds_row", "num_blocks"),
        {"DROPS": True, "BM": tiles.rows, "BK": tiles.columns, "BR": ranks},
    )


def cases() -> list[Case]:
    """One adapter of rank 16 with dropout, at the models' widths; the rate is that of reading x."""
    blocks = (Block(0, 16, 3, threshold(0.05)),)

    def kept(x: Tensor, keys: Tensor) -> Tensor:
        return torch.where(reference.keep_mask(keys, x.shape[1], 0.05, 3), x, 0)

    def case(operation: str, model: str, width: int) -> Case:
        is_down = operation == "down_projection"

        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[Tensor, ...]:
            rows = max(1, ROWS // shrink)
            x = torch.randn(rows, width, device=device, dtype=dtype)
            shape = (16, width) if is_down else (rows, 16)
            narrow = torch.randn(shape, device=device, dtype=dtype)
            tokens = torch.arange(rows, device=device)
            return x, narrow, reference.row_keys(1, tokens // 512, tokens % 512)

        return Case(
            operation=operation,
            shape=f"{model}, {width} wide, M={ROWS}",
            make=make,
            kernel=lambda x, narrow, keys: (
                down_projection(x, narrow, blocks, keys)
                if is_down
                else input_gradient(x, narrow, blocks, keys)
            ),
            reference=lambda x, narrow, keys: (
                kept(x, keys) @ narrow.T if is_down else (narrow.T @ kept(x, keys)).float()
            ),
            bytes=2.0 * ROWS * width,
            backward=False,
        )

    widths = [(model, w) for model, (d, f, _, _) in MODELS.items() for w in (d, f)]
    names = ("down_projection", "input_gradient")
    return [case(name, model, width) for name in names for model, width in widths]
