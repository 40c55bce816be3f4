"""Linear layers of experts with their low-rank updates, each on its own rows, in Triton.

Letters: M rows, sorted by expert; E experts; K input width, N output width, R the ranks of all
adapters of one expert's layers, padded as in `kernels.low_rank`, whose tiles do the work here. Only
the device knows which rows are an expert's: the grid has room for any split of the rows, a program
looks its expert up in `offsets`, and the expert's weight in a table of addresses. The invariant:
`kernels.reference.grouped_lora_linear` is the contract, and nothing waits for the device.

Int8 weights are written out as floats for the product, as `kernels.dequantised` explains.
"""

import functools
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import grouped_mm

from kernels import dequantised, reference
from kernels.build import OPTIONS, Build, capability_of
from kernels.down_projection import (
    MASKS,
    RANK_STEP,
    WIDEST_RESULT,
    Block,
    Tiles,
    block_width,
    build_of,
    down_tile,
    drops,
    gradient_tile,
    table,
)
from kernels.int8 import GROUP_ROWS, tile_of
from kernels.low_rank import STARTED, STARTED_MASKED, Plan, plan_of, started_tile
from kernels.reference import LinearOperands, LowRank
from kernels.reference_int8 import quantise_rows
from kernels.timing import ROWS, Case

# The first of each list is what runs; the others are compiled and timed beside it.
_DOWN: Mapping[int, list[Tiles]] = {
    80: [Tiles(64, 64, 4, 4)],
    90: [Tiles(64, 128, 4, 4)],
    100: [Tiles(128, 64, 4, 4)],
}
_GRADIENT: Mapping[int, list[Tiles]] = {
    80: [Tiles(64, 128, 4, 3)],
    90: [Tiles(64, 128, 4, 4), Tiles(128, 128, 8, 3)],
    100: [Tiles(64, 128, 4, 3), Tiles(128, 128, 8, 3)],
}
# Of a weight's address, in bytes: what a wide load needs. torch allocates by more.
_ALIGNMENT = 16
# Mixtral-8x7B: experts, of which a token takes so many; width and feed-forward width.
_EXPERTS, _CHOICES, _WIDTH, _FORWARD = 8, 2, 4096, 14336


# --- one program, one expert --------------------------------------------------------------------


@triton.jit
def _expert_of(offsets, tile, E, BM: tl.constexpr):
    """The tile-th tile of rows: its expert, first row, and where the expert's rows end.

    Tiles never span experts. Past the last tile first row and end are both 0.
    """
    expert, first, stop, passed = tile * 0, tile * 0, tile * 0, tile * 0
    for e in range(E):
        start = tl.load(offsets + e).to(tl.int32)
        end = tl.load(offsets + e + 1).to(tl.int32)
        count = tl.cdiv(end - start, BM)
        here = (tile >= passed) & (tile < passed + count)
        expert = tl.where(here, e, expert)
        first = tl.where(here, start + (tile - passed) * BM, first)
        stop = tl.where(here, end, stop)
        passed += count
    return expert, first, stop


@triton.jit
def _expert_product(
    x, addresses, t, u, keys, blocks, offsets, out, row_tiles, N, K, E,
    x_row, w_depth, w_column, t_row, u_expert, out_row, num_blocks,
    ADDS: tl.constexpr, UPDATES: tl.constexpr, DROPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, column = tile_of(tl.program_id(0), row_tiles, N, BN, GROUP)
    expert, row, stop = _expert_of(offsets, tile, E, BM)
    if row >= stop:
        return
    w = tl.load(addresses + expert).to(tl.pointer_type(x.dtype.element_ty))
    w = tl.multiple_of(w, 16)
    started_tile(
        x, w, t, u + expert.to(tl.int64) * u_expert, keys, blocks + expert * num_blocks * 4, None,
        out, row, column * BN, stop, N, K, x_row, w_depth, w_column, t_row, N, 1, out_row,
        num_blocks, ADDS, UPDATES, DROPS, False, BM, BN, BK, BR,
    )  # fmt: skip


@triton.jit
def _expert_down(
    x, a, keys, blocks, offsets, s, K, E, x_row, a_expert, s_row, num_blocks,
    DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    expert, row, stop = _expert_of(offsets, program // num_blocks, E, BM)
    if row >= stop:
        return
    block = blocks + (expert * num_blocks + program % num_blocks) * 4
    down_tile(
        x, a + expert.to(tl.int64) * a_expert, keys, block, s, None, row, stop, 0, K, x_row, s_row,
        DROPS, False, BM, BK, BR,
    )  # fmt: skip


@triton.jit
def _expert_gradient(
    x, ds, keys, blocks, offsets, out, R, K, x_row, ds_row, num_blocks,
    DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # All of an expert's rows in one program: E tiles of columns are enough of them, and there is
    # nothing left to add up.
    program, expert = tl.program_id(0), tl.program_id(1)
    block = blocks + (expert * num_blocks + program % num_blocks) * 4
    first = tl.load(offsets + expert).to(tl.int32)
    stop = tl.load(offsets + expert + 1).to(tl.int32)
    gradient_tile(
        x, ds, keys, block, out + expert.to(tl.int64) * R * K, program // num_blocks, first, stop,
        K, x_row, ds_row, DROPS, BM, BK, BR,
    )  # fmt: skip


# --- launches -----------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """The blocks of S of every expert: as many and as wide in each, under sites of its own."""

    of_first: tuple[Block, ...]
    flat: tuple[Block, ...]

    @classmethod
    def of(cls, experts: Sequence[tuple[Block, ...]]) -> "_Blocks":
        assert len({tuple(block[:2] for block in blocks) for blocks in experts}) == 1
        return cls(experts[0], tuple(chain.from_iterable(experts)))


def _down(x: Tensor, a: Tensor, s: Tensor, blocks: _Blocks, offsets: Tensor, keys: Any) -> None:
    """s = dropout(x) A^T of each row's expert: x [M, K], a [E, R, K], s [M, R]."""
    (rows, width), experts = x.shape, len(a)
    tiles, num_blocks = _DOWN[capability_of(x)][0], len(blocks.of_first)
    _expert_down[((rows // tiles.rows + experts) * num_blocks,)](
        x, a, keys, table(blocks.flat, x.device), offsets, s,
        width, experts, x.stride(0), a.stride(0), s.stride(0), num_blocks,
        DROPS=keys is not None and drops(blocks.flat),
        BM=tiles.rows, BK=tiles.columns, BR=block_width(blocks.of_first),
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip


def _gradient(x: Tensor, ds: Tensor, blocks: _Blocks, offsets: Tensor, keys: Any) -> Tensor:
    """dS^T dropout(x) of each expert, [E, R, K] float32: x [M, K], ds [M, R]."""
    experts, width, rank = len(offsets) - 1, x.shape[1], ds.shape[1]
    tiles, num_blocks = _GRADIENT[capability_of(x)][0], len(blocks.of_first)
    out = x.new_empty(experts, rank, width, dtype=torch.float32)
    _expert_gradient[(triton.cdiv(width, tiles.columns) * num_blocks, experts)](
        x, ds, keys, table(blocks.flat, x.device), offsets, out,
        rank, width, x.stride(0), ds.stride(0), num_blocks,
        DROPS=keys is not None and drops(blocks.flat),
        BM=tiles.rows, BK=tiles.columns, BR=block_width(blocks.of_first),
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    return out


def _product(
    x: Tensor,
    weights: "_Weights",
    is_turned: bool,
    t: Tensor,
    u: Tensor,
    blocks: _Blocks | None,
    offsets: Tensor,
    keys: Any,
    out: Tensor | None = None,
) -> Tensor:
    """x W_e, or x W_e^T where it is turned, + the sum over blocks of mask * (t u_e), + out.

    t: [M, R], adjacent columns; u: [E, R, columns of the result], contiguous.
    """
    (width, depth) = weights.shape if is_turned else weights.shape[::-1]
    row, experts, rows, adds = weights.shape[1], len(offsets) - 1, len(x), out is not None
    out = x.new_empty(rows, width) if out is None else out
    is_masked = blocks is not None and keys is not None and drops(blocks.flat)
    tiles = (STARTED_MASKED if is_masked else STARTED)[capability_of(x)][0]
    row_tiles = rows // tiles.rows + experts
    _expert_product[(row_tiles * triton.cdiv(width, tiles.columns),)](
        x, weights.addresses, t, u, keys, table(blocks.flat if blocks else (), x.device), offsets,
        out, row_tiles, width, depth, experts, x.stride(0), 1 if is_turned else row,
        row if is_turned else 1, t.stride(0), u.stride(0), out.stride(0),
        len(blocks.of_first) if blocks else 0,
        ADDS=adds, UPDATES=blocks is not None, DROPS=is_masked,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, BR=RANK_STEP, GROUP=GROUP_ROWS,
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    return out


class _Weights(NamedTuple):
    """One layer's weights in all experts, each [N, K] and contiguous, and where they lie."""

    addresses: Tensor  # [E] int64
    shape: torch.Size
    held: Sequence[Tensor]  # so that they live until the product is launched


@functools.lru_cache(maxsize=4096)
def _table_of_addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on the device; copied there once, for weights stay where they are."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _floating(weights: Sequence[Tensor], scales: Sequence[Any], dtype: torch.dtype) -> _Weights:
    first = weights[0]
    if scales[0] is None:
        addresses = tuple(weight.data_ptr() for weight in weights)
        return _Weights(_table_of_addresses(addresses, first.device), first.shape, weights)
    written = first.new_empty(len(weights), *first.shape, dtype=dtype)
    for weight, scale, out in zip(weights, scales, written, strict=True):
        dequantised.dequantise(weight, scale, dtype, out=out)
    # Made on the device: a buffer lies somewhere else at every call.
    steps = torch.arange(len(weights), device=first.device)
    addresses_E = steps.mul_(written.stride(0) * written.element_size()).add_(written.data_ptr())
    return _Weights(addresses_E, first.shape, (written,))


# --- the operation ------------------------------------------------------------------------------


class _ExpertLinear(torch.autograd.Function):
    """Arguments after `keys`: for each layer all experts' weights, then all their scales; for each
    update all experts' A, then all their B."""

    @staticmethod
    def forward(
        ctx: Any, plans: Sequence[Plan], x: Tensor, offsets: Tensor, keys: Any, *tensors: Any
    ) -> tuple[Tensor, ...]:
        plan, experts = plans[0], len(plans)
        num_layers, rank = len(plan.bounds) - 1, plan.bounds[-1]
        parts = _split(tensors, experts)
        layers, updates = parts[: 2 * num_layers], parts[2 * num_layers :]
        a = x.new_zeros(experts, rank, x.shape[1])
        ups = [
            x.new_zeros(experts, plan.bounds[i + 1] - plan.bounds[i], len(layers[2 * i][0]))
            for i in range(num_layers)
        ]
        for u, update in enumerate(plan.updates):
            a[:, update.columns] = torch.stack(updates[2 * u])
            start = update.block.start - plan.bounds[update.layer]
            place = ups[update.layer][:, start : start + update.rank]
            torch.mul(torch.stack(updates[2 * u + 1]).mT, update.scaling, out=place)
        s = x.new_empty(len(x), rank)
        if plan.updates:
            _down(x, a, s, _blocks(plans, WIDEST_RESULT), offsets, keys)
        outputs = []
        for i in range(num_layers):
            weights = _floating(layers[2 * i], layers[2 * i + 1], x.dtype)
            own = _layer_blocks(plan, i, RANK_STEP, experts)
            s_i = s[:, plan.bounds[i] : plan.bounds[i + 1]]
            outputs.append(_product(x, weights, True, s_i, ups[i], own, offsets, None))
        ctx.plans = plans
        needs_a = any(
            any(needs) for needs in _split(ctx.needs_input_grad[4:], experts)[2 * num_layers :: 2]
        )
        ctx.save_for_backward(x if needs_a else None, offsets, keys, s, a, *ups, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Any, ...]:
        plans, plan, experts = ctx.plans, ctx.plans[0], len(ctx.plans)
        num_layers = len(plan.bounds) - 1
        x, offsets, keys, s, a, *saved = ctx.saved_tensors
        ups, parts = saved[:num_layers], _split(tuple(saved[num_layers:]), experts)
        layers, updates = parts[: 2 * num_layers], parts[2 * num_layers :]
        needs_x = ctx.needs_input_grad[1]
        needs = [any(n) for n in _split(ctx.needs_input_grad[4:], experts)[2 * num_layers :]]
        needs_a, needs_b = needs[::2], needs[1::2]
        grads: list[Sequence[Tensor | None]] = [[None] * experts for _ in parts]
        dys = [dy if dy.stride(1) == 1 else dy.contiguous() for dy in douts]
        ds = torch.empty_like(s)
        for i, dy in enumerate(dys):
            columns = slice(plan.bounds[i], plan.bounds[i + 1])
            own = [u for u, update in enumerate(plan.updates) if update.layer == i]
            if own and (needs_x or any(needs_a[u] for u in own)):
                wide = _layer_blocks(plan, i, WIDEST_RESULT, experts)
                assert wide is not None
                _down(dy, ups[i], ds[:, columns], wide, offsets, None)
            if any(needs_b[u] for u in own):
                wide = _layer_blocks(plan, i, WIDEST_RESULT, experts)
                assert wide is not None
                db = _gradient(dy, s[:, columns], wide, offsets, None)
                for u in own:
                    if needs_b[u]:
                        update, b = plan.updates[u], updates[2 * u + 1][0]
                        part = db[:, update.block.start - columns.start :][:, : update.rank]
                        part = (part.mT * update.scaling).to(b.dtype)
                        grads[2 * num_layers + 2 * u + 1] = part.unbind()
        if any(needs_a):
            da = _gradient(x, ds, _blocks(plans, WIDEST_RESULT, needs_a), offsets, keys)
            for u, update in enumerate(plan.updates):
                if needs_a[u]:
                    part = da[:, update.columns].to(updates[2 * u][0].dtype)
                    grads[2 * num_layers + 2 * u] = part.unbind()
        dx: Any = None
        if needs_x:
            for i, dy in enumerate(dys):
                weights = _floating(layers[2 * i], layers[2 * i + 1], s.dtype)
                # The first product begins with the updates of all layers.
                begins = dx is None and plan.updates
                blocks = _blocks(plans, RANK_STEP) if begins else None
                dx = _product(dy, weights, False, ds, a, blocks, offsets, keys, out=dx)
        return None, dx, None, None, *chain.from_iterable(grads)


def _split(tensors: tuple[Any, ...], experts: int) -> list[tuple[Any, ...]]:
    """Runs of one tensor an expert."""
    return [tensors[i : i + experts] for i in range(0, len(tensors), experts)]


def _blocks(plans: Sequence[Plan], widest: int, wanted: Sequence[bool] | None = None) -> _Blocks:
    return _Blocks.of([plan.blocks(widest, wanted) for plan in plans])


def _layer_blocks(plan: Plan, layer: int, widest: int, experts: int) -> _Blocks | None:
    """One layer's columns without masks; None where it has no adapter."""
    if plan.bounds[layer] == plan.bounds[layer + 1]:
        return None
    return _Blocks.of([plan.layer_blocks(layer, widest)] * experts)


def _plans(
    x: Tensor, experts: Sequence[Sequence[LinearOperands]], is_training: bool
) -> list[Plan] | None:
    """The updates of each expert, or None for what is left to the reference."""
    plans = [plan_of(layers, is_training) for layers in experts]

    def kind(plan: Plan) -> object:
        """All that must not differ between experts: everything but the site of the mask."""
        return plan.bounds, [
            (update.layer, update.rank, update.scaling, update.block.threshold)
            for update in plan.updates
        ]

    every = list(chain.from_iterable(experts))
    for layer in every:
        dtype = x.dtype if layer.scale is None else torch.int8
        if (
            (torch.is_grad_enabled() and layer.weight.requires_grad)
            or layer.bias is not None
            or layer.is_int8_math
            or layer.weight.dtype != dtype
            or not layer.weight.is_contiguous()
            or layer.weight.data_ptr() % _ALIGNMENT
        ):
            return None
    is_uniform = all(kind(plan) == kind(plans[0]) for plan in plans)
    return plans if is_uniform and len(x) > 0 else None


def grouped_lora_linear(
    x: Tensor,
    experts: Sequence[Sequence[LinearOperands]],
    offsets: Tensor,
    dropout_keys: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`kernels.reference.grouped_lora_linear` for frozen weights in x's dtype or int8.

    Weights that train, biases, int8 math, and adapters that differ between experts in rank, scaling
    or dropout go to the reference.
    """
    plans = _plans(x, experts, dropout_keys is not None)
    if plans is None:
        return reference.grouped_lora_linear(x, experts, offsets, dropout_keys)
    tensors: list[Tensor | None] = []
    for same in zip(*experts, strict=True):
        tensors += (layer.weight for layer in same)
        tensors += (layer.scale for layer in same)
    for same in zip(*experts, strict=True):
        for adapters in zip(*(layer.adapters for layer in same), strict=True):
            tensors += (adapter.A for adapter in adapters)
            tensors += (adapter.B for adapter in adapters)
    keys = None if dropout_keys is None else dropout_keys.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    return _ExpertLinear.apply(plans, x, offsets.contiguous(), keys, *tensors)


def builds(capability: int) -> list[Build]:
    """The product forward and, with masks, for the gradient of x; the narrow products."""
    found = [_product_build(tiles, is_backward=False) for tiles in STARTED[capability]]
    found += [_product_build(tiles, is_backward=True) for tiles in STARTED_MASKED[capability]]
    for masks in (True, False):
        table = MASKS if masks else {"blocks": "*i32"}
        absent: dict[str, Any] = {} if masks else {"keys": None}
        for tiles in _DOWN[capability]:
            found.append(
                build_of(
                    _expert_down,
                    tiles,
                    {"x": "*bf16", "a": "*bf16", **table, "offsets": "*i64", "s": "*bf16"},
                    ("K", "E", "x_row", "a_expert", "s_row", "num_blocks"),
                    {
                        "DROPS": masks, "BM": tiles.rows, "BK": tiles.columns,
                        "BR": RANK_STEP, **absent,
                    },
                )
            )  # fmt: skip
        for tiles in _GRADIENT[capability]:
            found.append(
                build_of(
                    _expert_gradient,
                    tiles,
                    {"x": "*bf16", "ds": "*bf16", **table, "offsets": "*i64", "out": "*fp32"},
                    ("R", "K", "x_row", "ds_row", "num_blocks"),
                    {
                        "DROPS": masks, "BM": tiles.rows, "BK": tiles.columns, "BR": RANK_STEP,
                        **absent,
                    },
                )
            )  # fmt: skip
    return found


def _product_build(tiles: Any, *, is_backward: bool) -> Build:
    # Forward the weight is transposed; the gradient of x reads it as it lies, and draws masks.
    one, stride = ("w_column", "w_depth") if is_backward else ("w_depth", "w_column")
    table = MASKS if is_backward else {"blocks": "*i32"}
    return build_of(
        _expert_product,
        Tiles(tiles.rows, tiles.columns, tiles.warps, tiles.stages),
        {
            "x": "*bf16", "addresses": "*i64", "t": "*bf16", "u": "*bf16", **table,
            "offsets": "*i64", "out": "*bf16",
        },
        ("row_tiles", "N", "K", "E", "x_row", stride, "t_row", "u_expert", "out_row", "num_blocks"),
        {
            "ADDS": False, "UPDATES": True, "DROPS": is_backward,
            "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "BR": RANK_STEP,
            "GROUP": GROUP_ROWS, one: 1, **({} if is_backward else {"keys": None}),
        },
    )  # fmt: skip


def cases() -> list[Case]:
    """Mixtral's experts, w1 and w3 together and w2, with adapters of rank 16, dropout 0.05."""
    shapes = (("w1 w3", _WIDTH, (_FORWARD, _FORWARD)), ("w2", _FORWARD, (_WIDTH,)))
    return [
        _case(name, width, outputs, backward, is_int8)
        for name, width, outputs in shapes
        for backward in (False, True)
        for is_int8 in (False, True)
    ]


def _case(name: str, width: int, outputs: Sequence[int], backward: bool, is_int8: bool) -> Case:
    """Beside it stand the reference, torch's grouped product, and a loop over frozen products."""

    def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[object, ...]:
        # Where even the widths are too much (a CPU) they shrink too.
        narrower = max(1, shrink // 64)
        tokens, depth = max(8, ROWS // shrink), width // narrower
        rows = tokens * _CHOICES
        x = torch.randn(rows, depth, device=device, dtype=dtype).requires_grad_(backward)
        chosen = torch.randint(_EXPERTS, (rows,), device=device).sort().values
        offsets = torch.searchsorted(chosen, torch.arange(_EXPERTS + 1, device=device))
        places = torch.arange(rows, device=device)
        arguments: list[object] = [x, offsets, reference.row_keys(1, places // 512, places % 512)]
        for output in outputs:
            columns = output // narrower
            weight = torch.randn(_EXPERTS, columns, depth, device=device, dtype=dtype)
            a = torch.randn(_EXPERTS, 16, depth, device=device) * depth**-0.5
            b = torch.randn(_EXPERTS, columns, 16, device=device) * 0.25
            weight *= depth**-0.5
            arguments += (weight, a.requires_grad_(backward), b.requires_grad_(backward))
            q, scale = quantise_rows(weight.flatten(0, 1))
            arguments += (q.view(weight.shape), scale.view(_EXPERTS, columns))
        return tuple(arguments)

    def operands(tensors: Sequence[Tensor]) -> list[list[LinearOperands]]:
        experts: list[list[LinearOperands]] = [[] for _ in range(_EXPERTS)]
        for i in range(len(outputs)):
            weight, a, b, q, scale = tensors[5 * i : 5 * i + 5]
            for e, layers in enumerate(experts):
                adapters = (LowRank(a[e], b[e], 2.0, 0.05, 100 * i + e),)
                layers.append(
                    LinearOperands(q[e], None, adapters, scale[e])
                    if is_int8
                    else LinearOperands(weight[e], None, adapters)
                )
        return experts

    def kernel(x: Tensor, offsets: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return grouped_lora_linear(x, operands(tensors), offsets, keys)

    def eager(x: Tensor, offsets: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return reference.grouped_lora_linear(x, operands(tensors), offsets, keys)

    def plain(x: Tensor, offsets: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ends, ys = offsets[1:].to(torch.int32), []
        dropped = torch.nn.functional.dropout(x, 0.05)
        for i in range(len(outputs)):
            weight, a, b, q, scale = tensors[5 * i : 5 * i + 5]
            if is_int8:
                weight = (q.to(x.dtype) * scale[..., None]).to(x.dtype)
            low = grouped_mm(dropped, a.to(x.dtype).mT, offs=ends)
            low = grouped_mm(low, b.to(x.dtype).mT, offs=ends)
            ys.append(grouped_mm(x, weight.mT, offs=ends) + 2.0 * low)
        return tuple(ys)

    def frozen(x: Tensor, offsets: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # As many rows for each, known to the host: the loop at its best.
        parts = x.chunk(_EXPERTS)
        weights = (tensors[5 * i] for i in range(len(outputs)))
        return tuple(torch.cat([p @ w.T for p, w in zip(parts, ws, strict=True)]) for ws in weights)

    passes = "both passes" if backward else "forward"
    return Case(
        operation="grouped_lora_linear_int8" if is_int8 else "grouped_lora_linear",
        shape=f"Mixtral-8x7B {name}, M={ROWS} x {_CHOICES}, {passes}",
        make=make,
        kernel=kernel,
        reference=eager,
        plain=plain,
        bare=frozen,
        flops=(4.0 if backward else 2.0) * ROWS * _CHOICES * width * sum(outputs),
        backward=backward,
    )
