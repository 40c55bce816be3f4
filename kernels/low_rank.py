"""Linear layers that read one input, with the sum of their low-rank updates, on a GPU.

y = x W^T + bias + sum over adapters of c dropout(x) A^T B^T, with W frozen (LoRA, Hu et al., arXiv
2106.09685; the accumulator that begins with the update is that of LoRAFusion, Zhu et al. 2025).
Letters: M rows, K input width, N output width, R the ranks of all adapters of the group, padded.
The invariant: `kernels.reference.lora_linear` is the contract; what is kept for the backward pass
is x, where some A trains, S = dropout(x) A^T, the keys and rank-sized copies of the adapters, never
a mask.

Three routes lead to y once S is there:

- "accumulate": the update S (c B)^T + bias is written first, then the library's product is added to
  it in its own epilogue. One more write and read of y, the read beside other tiles' products.
- "augmented": [x, S] [W, c B]^T, one product of the library that is R columns deeper. It wants x
  beside S, which costs a write of x as S is computed, and W beside c B, which costs a second copy
  of W, kept while W lives, or nothing where W is written out for the product anyway (int8).
- "started": a product in Triton whose accumulator begins with S (c B)^T: nothing is written twice.

In int8 math there is one route, "int8": x is quantised once for the layers that read it, and
S (c B)^T joins the product's epilogue (`kernels.int8`).

The gradient of x has the masks of dropout inside, so it goes by "accumulate" or "started"; in int8
math by "accumulate".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakIdKeyDictionary

from kernels import dequantised, int8, reference
from kernels.build import OPTIONS, Build, as_rows, capability_of
from kernels.down_projection import (
    RANK_STEP,
    WIDEST_OPERAND,
    WIDEST_RESULT,
    Block,
    down_projection,
    drops,
    input_gradient,
    merged,
    table,
)
from kernels.hashing import threshold
from kernels.int8 import GROUP_ROWS, ProductTiles, tile_of
from kernels.reference import LinearOperands, LowRank, kept_scale, low_word
from kernels.reference_int8 import KEPT_COLUMNS, quantise_rows
from kernels.timing import MODELS, ROWS, Case
from kernels.up_projection import low_rank_sum, output_gradients, up_projection

Route = Literal["accumulate", "augmented", "started", "int8"]


class _Update(NamedTuple):
    """What is not a tensor of one low-rank update."""

    layer: int
    rank: int
    scaling: float  # with the factor 1 / (1 - p) of its dropout, so that masks need none
    block: Block  # its columns of S, padded, and its mask

    @property
    def columns(self) -> slice:
        return slice(self.block.start, self.block.start + self.rank)


class Plan(NamedTuple):
    """How the updates of a group lie in S: by layer, each padded to `RANK_STEP`."""

    bounds: tuple[int, ...]  # layer i has columns bounds[i] to bounds[i + 1]
    updates: tuple[_Update, ...]

    def blocks(self, widest: int, wanted: Sequence[bool] | None = None) -> tuple[Block, ...]:
        """The blocks of all updates, or of the wanted ones."""
        chosen = (True,) * len(self.updates) if wanted is None else wanted
        found = [u.block for u, w in zip(self.updates, chosen, strict=True) if w]
        return merged(found, widest)

    def layer_blocks(self, layer: int, widest: int) -> tuple[Block, ...]:
        """One layer's columns, counted from its first, without masks."""
        width = self.bounds[layer + 1] - self.bounds[layer]
        return merged([Block(0, width, 0, -(2**15))], widest)


def plan_of(layers: Sequence[LinearOperands], is_training: bool) -> Plan:
    bounds, updates = [0], []
    start = 0
    for i, layer in enumerate(layers):
        for adapter in layer.adapters:
            p = adapter.dropout if is_training else 0.0
            rank = adapter.A.shape[0]
            width = triton.cdiv(rank, RANK_STEP) * RANK_STEP
            # Where nothing is dropped the site says nothing either, so such blocks can merge.
            site = low_word(adapter.site) if threshold(p) > -(2**15) else 0
            block = Block(start, width, site, threshold(p))
            updates.append(_Update(i, rank, adapter.scaling * kept_scale(p), block))
            start += width
        bounds.append(start)
    return Plan(tuple(bounds), tuple(updates))


# --- a product whose accumulator begins with the update -----------------------------------------


# The first is what runs; the others are compiled beside it.
STARTED: Mapping[int, list[ProductTiles]] = {
    80: [ProductTiles(128, 128, 64, 8, 3), ProductTiles(128, 128, 32, 8, 4)],
    90: [ProductTiles(128, 256, 64, 8, 4), ProductTiles(256, 128, 64, 8, 3)],
    100: [ProductTiles(128, 256, 64, 8, 4), ProductTiles(128, 128, 64, 4, 4)],
}
# Masks are hashed in the accumulator's layout, so beside a wide one registers would run out.
STARTED_MASKED: Mapping[int, list[ProductTiles]] = {
    80: [ProductTiles(128, 128, 64, 8, 3), ProductTiles(128, 64, 64, 4, 3)],
    90: [ProductTiles(128, 128, 64, 8, 4), ProductTiles(64, 256, 64, 8, 3)],
    100: [ProductTiles(128, 128, 64, 8, 4), ProductTiles(128, 128, 64, 8, 3)],
}


@triton.jit
def started_tile(
    x, w, t, u, keys, blocks, bias, out, row, column, M, N, K, x_row, w_depth, w_column, t_row,
    u_rank, u_column, out_row, num_blocks,
    ADDS: tl.constexpr, UPDATES: tl.constexpr, DROPS: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile, from `row` and `column` on, of x w + the sum of mask * (t u) + bias (+ out)."""
    local, columns = tl.arange(0, BM), column + tl.arange(0, BN)
    inside_rows, inside_columns = row + local[:, None] < M, columns[None, :] < N
    place = out + row.to(tl.int64) * out_row + (local[:, None] * out_row + columns[None, :])
    if UPDATES:
        acc = low_rank_sum(
            t, u, keys, blocks, row, column, M, N, t_row, u_rank, u_column, num_blocks,
            DROPS, BM, BN, BR,
        )  # fmt: skip
    else:
        acc = tl.zeros([BM, BN], tl.float32)
    if ADDS:
        acc += tl.load(place, inside_rows & inside_columns, other=0.0).to(tl.float32)
    depth = tl.arange(0, BK)
    x_tile = x + row.to(tl.int64) * x_row + (local[:, None] * x_row + depth[None, :])
    w_tile = w + column.to(tl.int64) * w_column
    w_tile += depth[:, None] * w_depth + tl.arange(0, BN)[None, :] * w_column
    for k in range(0, K, BK):
        inside = depth < K - k
        left = tl.load(x_tile, inside_rows & inside[None, :], other=0.0)
        right = tl.load(w_tile, inside[:, None] & inside_columns, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_tile += BK
        w_tile += BK * w_depth
    if BIAS:
        acc += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), inside_rows & inside_columns)


@triton.jit
def _started_product(
    x, w, t, u, keys, blocks, bias, out, M, N, K, x_row, w_depth, w_column, t_row, u_rank, u_column,
    out_row, num_blocks,
    ADDS: tl.constexpr, UPDATES: tl.constexpr, DROPS: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM), N, BN, GROUP)
    started_tile(
        x, w, t, u, keys, blocks, bias, out, row * BM, column * BN, M, N, K, x_row, w_depth,
        w_column, t_row, u_rank, u_column, out_row, num_blocks,
        ADDS, UPDATES, DROPS, BIAS, BM, BN, BK, BR,
    )  # fmt: skip


def _product(
    x: Tensor,
    w: Tensor,
    t: Tensor,
    u: Tensor,
    blocks: tuple[Block, ...],
    keys: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """x w + the sum over blocks of mask * (t u) + bias, added to `out` where it is given.

    x: [M, K] with adjacent columns; w: [K, N] with any strides; the rest as `up_projection`.
    """
    (rows, depth), width = x.shape, w.shape[1]
    adds = out is not None
    out = x.new_empty(rows, width) if out is None else out
    masks = keys is not None and drops(blocks)
    tiles = (STARTED_MASKED if masks else STARTED)[capability_of(x)][0]
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(width, tiles.columns),)
    _started_product[grid](
        x, w, t, u, keys, table(blocks, x.device), bias, out,
        rows, width, depth, x.stride(0), w.stride(0), w.stride(1), t.stride(0), u.stride(0),
        u.stride(1), out.stride(0), len(blocks),
        ADDS=adds, UPDATES=bool(blocks), DROPS=masks, BIAS=bias is not None,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, BR=RANK_STEP, GROUP=GROUP_ROWS,
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    return out


# --- a weight with room for c B beside it -------------------------------------------------------

# Weight -> (its version, where it lies, its copy [N, K + R]). Never a parameter, never saved.
_widened: Any = WeakIdKeyDictionary()


def _beside(weight: Tensor, scale: Tensor | None, up: Tensor, columns: slice, rank: int) -> Tensor:
    """[W, c B] in the type of c B: [N, K + R], c B in the layer's columns and 0 in the others."""
    width, dtype = weight.shape[1], up.dtype
    state = (weight._version, weight.data_ptr(), dtype, rank)
    found = _widened.get(weight)
    if found is not None and found[0] == state:
        wide = found[1]
    else:
        wide = up.new_empty(len(weight), width + rank)
        if scale is not None:
            dequantised.dequantise(weight, scale, dtype, out=wide[:, :width])
        else:
            wide[:, :width] = weight
            _widened[weight] = (state, wide)
    # The adapters are written anew at every call: they are small, and trained.
    wide[:, width:].zero_()
    wide[:, width:][:, columns] = up
    return wide


# --- the operation ------------------------------------------------------------------------------


def _floating(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if scale is None else dequantised.dequantise(weight, scale, dtype)


class _LowRankLinear(torch.autograd.Function):
    """Arguments after `keys`: each layer's weight, scale and bias, then each update's A and B."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, route: Route, x: Tensor, keys: Any, *tensors: Any
    ) -> tuple[Tensor, ...]:
        num_layers, rank, width = len(plan.bounds) - 1, plan.bounds[-1], x.shape[1]
        downs, ups = tensors[3 * num_layers :: 2], tensors[3 * num_layers + 1 :: 2]
        a = _stacked_down(plan, downs, x)
        wide = x.new_empty(len(x), width + rank) if route == "augmented" else None
        s = x.new_empty(len(x), 0)
        if plan.updates:
            s = down_projection(x, a, plan.blocks(WIDEST_RESULT), keys, wide)
        eights = int8.quantise(x, KEPT_COLUMNS) if route == "int8" else None
        outputs, stacked = [], []
        for i in range(num_layers):
            weight, scale, bias = tensors[3 * i : 3 * i + 3]
            bias = None if bias is None else bias.to(x.dtype)
            columns = slice(plan.bounds[i], plan.bounds[i + 1])
            b = _stacked_up(plan, ups, i, len(weight), x)
            stacked.append(b)
            if eights is not None:
                update = (s[:, columns], b.T) if columns.start < columns.stop else None
                y = int8.product(eights, weight.T, scale, update=update, bias=bias)
            elif columns.start == columns.stop:
                y = linear(x, _floating(weight, scale, x.dtype), bias)
            elif wide is not None:
                y = linear(wide, _beside(weight, scale, b, columns, rank), bias)
            elif route == "started":
                w, own = _floating(weight, scale, x.dtype), plan.layer_blocks(i, RANK_STEP)
                y = _product(x, w.T, s[:, columns], b.T, own, None, bias)
            else:
                own = plan.layer_blocks(i, WIDEST_OPERAND)
                y = up_projection(s[:, columns], b.T, own, None, bias)
                y.addmm_(x, _floating(weight, scale, x.dtype).T)
            outputs.append(y)
        ctx.plan, ctx.route, ctx.num_layers = plan, route, num_layers
        kept = None  # x is there for dA alone
        if any(ctx.needs_input_grad[4 + 3 * num_layers :: 2]):
            kept = x if wide is None else wide[:, :width]
        ctx.save_for_backward(kept, keys, s, a, *stacked, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        plan, num_layers = ctx.plan, ctx.num_layers
        x, keys, s, a, *saved = ctx.saved_tensors
        stacked, tensors = saved[:num_layers], saved[num_layers:]
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[4:]
        first = 3 * num_layers
        needs_a, needs_b = needs[first::2], needs[first + 1 :: 2]
        grads: list[Tensor | None] = [None] * len(tensors)
        dys = [as_rows(dy) for dy in douts]

        ds = torch.empty_like(s)
        for i, dy in enumerate(dys):
            if needs[3 * i + 2]:
                grads[3 * i + 2] = dy.sum(0).to(tensors[3 * i + 2].dtype)
            columns = slice(plan.bounds[i], plan.bounds[i + 1])
            own = [u for u, update in enumerate(plan.updates) if update.layer == i]
            needs_ds = needs_x or any(needs_a[u] for u in own)
            needs_db = any(needs_b[u] for u in own)
            if not own or not (needs_ds or needs_db):
                continue
            db = output_gradients(
                dy, stacked[i], s[:, columns], ds[:, columns] if needs_ds else None, needs_db
            )
            for u in own:
                if db is not None and needs_b[u]:
                    update, b = plan.updates[u], tensors[first + 2 * u + 1]
                    part = db[:, update.block.start - columns.start :][:, : update.rank]
                    grads[first + 2 * u + 1] = (part * update.scaling).to(b.dtype)
        if any(needs_a):
            da = input_gradient(x, ds, plan.blocks(WIDEST_RESULT, needs_a), keys)
            for u, update in enumerate(plan.updates):
                if needs_a[u]:
                    grads[first + 2 * u] = da[update.columns].to(tensors[first + 2 * u].dtype)
        dx = None
        if needs_x:
            pairs = zip(tensors[:first:3], tensors[1:first:3], strict=True)
            dx = _gradient_of_x(ctx.route, plan, dys, pairs, ds, a, keys)
        return None, None, dx, None, *grads


def _gradient_of_x(
    route: Route,
    plan: Plan,
    dys: Sequence[Tensor],
    weights: Iterable[tuple[Tensor, Tensor | None]],
    ds: Tensor,
    a: Tensor,
    keys: Tensor | None,
) -> Tensor:
    """The sum over layers of dY W, and over blocks of mask * (dS A): [M, K]."""
    dx: Any = None  # a tensor from the first term on
    if plan.updates and route != "started":
        dx = up_projection(ds, a, plan.blocks(WIDEST_OPERAND), keys)
    for dy, (weight, scale) in zip(dys, weights, strict=True):
        if route == "int8":
            eights = int8.quantise(dy, KEPT_COLUMNS, scale)
            dx = int8.product(eights, int8.turned(weight), None, out=dx)
            continue
        w = _floating(weight, scale, dy.dtype)
        if plan.updates and route == "started":
            blocks = plan.blocks(RANK_STEP) if dx is None else ()
            dx = _product(dy, w, ds, a, blocks, keys, None, out=dx)
        else:
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx


def _stacked_down(plan: Plan, matrices: Sequence[Tensor], like: Tensor) -> Tensor:
    """All A in one [R, K], rows of 0 where ranks are padded."""
    a = like.new_empty(plan.bounds[-1], like.shape[1])
    for update, matrix in zip(plan.updates, matrices, strict=True):
        a[update.columns] = matrix
        a[update.columns.stop : update.block.start + update.block.width] = 0
    return a


def _stacked_up(
    plan: Plan, matrices: Sequence[Tensor], layer: int, width: int, like: Tensor
) -> Tensor:
    """All c B of one layer in one [N, R of the layer], columns of 0 where ranks are padded."""
    start = plan.bounds[layer]
    b = like.new_zeros(width, plan.bounds[layer + 1] - start)
    for update, matrix in zip(plan.updates, matrices, strict=True):
        if update.layer == layer:
            first = update.block.start - start
            torch.mul(matrix, update.scaling, out=b[:, first : first + update.rank])
    return b


def lora_linear(
    x: Tensor,
    layers: Sequence[LinearOperands],
    dropout_keys: Tensor | None = None,
    *,
    route: Route | None = None,
) -> tuple[Tensor, ...]:
    """`kernels.reference.lora_linear` for frozen weights; `route` as the module says.

    A weight that trains, an x without rows, and int8 math in some layers alone or at widths that a
    program does not hold go to the reference.
    """
    to_reference = torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in layers)
    if any(layer.is_int8_math for layer in layers):
        widths = [x.shape[1], *(len(layer.weight) for layer in layers)]
        is_all = all(layer.is_int8_math for layer in layers)
        route = "int8" if is_all and max(widths) <= int8.WIDEST else None
        to_reference |= route is None
    if to_reference or len(x) == 0:
        return reference.lora_linear(x, layers, dropout_keys)
    tensors: list[Tensor | None] = []
    for layer in layers:
        tensors += (layer.weight, layer.scale, layer.bias)
    for layer in layers:
        for adapter in layer.adapters:
            tensors += (adapter.A, adapter.B)
    keys = None if dropout_keys is None else dropout_keys.contiguous()
    plan = plan_of(layers, keys is not None)
    return _LowRankLinear.apply(plan, route or _best(layers), as_rows(x), keys, *tensors)


def _best(layers: Sequence[LinearOperands]) -> Route:
    """The route with the fewest bytes that keeps no copy of a floating weight.

    Beside the products themselves "accumulate" writes each layer's y once more, "augmented" x, so
    the latter gains where the layers' outputs together are wider than their input; it is for int8
    weights, which are written out for the product in any case.
    """
    outputs = sum(len(layer.weight) for layer in layers if layer.adapters)
    is_int8 = all(layer.scale is not None for layer in layers)
    return "augmented" if is_int8 and outputs > layers[0].weight.shape[1] else "accumulate"


def builds(capability: int) -> list[Build]:
    """The started product forward, and as the gradient of x with masks."""
    return [
        *(_started_build(tiles, False) for tiles in STARTED[capability]),
        *(_started_build(tiles, True) for tiles in STARTED_MASKED[capability]),
    ]


def _started_build(tiles: ProductTiles, is_backward: bool) -> Build:
    # Forward w and u are transposed; the gradient of x reads W and A as they lie.
    ones = ("w_column", "u_column") if is_backward else ("w_depth", "u_rank")
    strides = {"x_row", "w_depth", "w_column", "t_row", "u_rank", "u_column", "out_row"} - {*ones}
    sizes = ["M", "N", "K", *sorted(strides), "num_blocks"]
    masks = {"keys": "*i32"} if is_backward else {}
    pointers = dict.fromkeys(("x", "w", "t", "u", "out"), "*bf16")
    return Build(
        kernel=_started_product,
        signature={**pointers, **masks, "blocks": "*i32", **dict.fromkeys(sizes, "i32")},
        constants={
            "ADDS": False, "UPDATES": True, "DROPS": is_backward, "BIAS": False,
            "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "BR": RANK_STEP,
            "GROUP": GROUP_ROWS, "bias": None, **({} if is_backward else {"keys": None}),
            **dict.fromkeys(ones, 1),
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        tensor_core="bf16",
        divisible=tuple(size for size in sizes if size != "num_blocks"),
    )  # fmt: skip


def cases() -> list[Case]:
    """The groups of one layer: rank 16 on every weight, dropout 0.05, each route."""
    routes: dict[str, Route | None] = {
        "lora_linear": None,
        "lora_linear augmented": "augmented",
        "lora_linear started": "started",
    }
    found = []
    for model, (d, f, _, g) in MODELS.items():
        groups = {
            "q k v": (d, (d, g, g)),
            "o": (d, (d,)),
            "gate up": (d, (f, f)),
            "down": (f, (d,)),
        }
        for name, (width, outputs) in groups.items():
            for backward in (False, True):
                shape = f"{model} {name}, M={ROWS}, {'both passes' if backward else 'forward'}"
                for operation, route in routes.items():
                    found.append(_case(operation, shape, width, outputs, route, backward, False))
                for operation in ("lora_linear_int8", "lora_linear_int8_math"):
                    found.append(_case(operation, shape, width, outputs, None, backward, True))
    return found


def _case(
    operation: str,
    shape: str,
    width: int,
    outputs: Sequence[int],
    route: Route | None,
    backward: bool,
    is_int8: bool,
) -> Case:
    """Beside it stand the reference, plain torch compiled, and the frozen products alone.

    Beside int8 weights it is the same operation on floating ones instead.
    """

    def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[object, ...]:
        # Where even the widths are too much (a CPU) they shrink too.
        narrower = max(1, shrink // 64)
        rows, depth = max(1, ROWS // shrink), width // narrower
        x = torch.randn(rows, depth, device=device, dtype=dtype).requires_grad_(backward)
        tokens = torch.arange(rows, device=device)
        tensors: list[Tensor] = [reference.row_keys(1, tokens // 512, tokens % 512)]
        for output in outputs:
            columns = output // narrower
            weight = torch.randn(columns, depth, device=device, dtype=dtype) * depth**-0.5
            a = torch.randn(16, depth, device=device) * depth**-0.5
            b = torch.randn(columns, 16, device=device) * 0.25
            tensors += (weight, a.requires_grad_(backward), b.requires_grad_(backward))
            tensors += quantise_rows(weight)
        return x, *tensors

    def operands(tensors: Sequence[Tensor], is_int8: bool) -> list[LinearOperands]:
        layers = []
        for i in range(len(outputs)):
            weight, a, b, q, scale = tensors[5 * i : 5 * i + 5]
            adapters = (LowRank(a, b, 2.0, 0.05, i),)
            layers.append(
                LinearOperands(q, None, adapters, scale, operation == "lora_linear_int8_math")
                if is_int8
                else LinearOperands(weight, None, adapters)
            )
        return layers

    def kernel(x: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return lora_linear(x, operands(tensors, is_int8), keys, route=route)

    def floating(x: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return lora_linear(x, operands(tensors, False), keys)

    def plain(x: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ys = []
        for layer in operands(tensors, is_int8):
            weight, (adapter,) = layer.weight, layer.adapters
            if layer.scale is not None:
                weight = (weight.to(x.dtype) * layer.scale[:, None]).to(x.dtype)
            dropped = torch.nn.functional.dropout(x, adapter.dropout)
            low = linear(linear(dropped, adapter.A.to(x.dtype)), adapter.B.to(x.dtype))
            ys.append(linear(x, weight) + adapter.scaling * low)
        return tuple(ys)

    def frozen(x: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x, layer.weight) for layer in operands(tensors, False))

    def eager(x: Tensor, keys: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return reference.lora_linear(x, operands(tensors, is_int8), keys)

    return Case(
        operation=operation,
        shape=shape,
        make=make,
        kernel=kernel,
        reference=eager,
        plain=plain,
        bare=floating if is_int8 else frozen,
        flops=(4.0 if backward else 2.0) * ROWS * width * sum(outputs),
        backward=backward,
    )
