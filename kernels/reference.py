"""The contract of every operation, in plain torch with the backward passes written out.

Letters: M rows (the tokens of a micro-batch, flattened), D width, K input width, N output width or
query heads, G key-value heads, H head width, F feed-forward width, V vocabulary, R rank, E experts,
J experts of one token.

The invariant: a result is a function of its arguments alone. Randomness comes in as integer keys
(`row_keys`), so the same token of the same sample is dropped in the same places after a resume, on
any number of ranks and however samples are packed.

Parameters are cast to the activations' dtype where they are used. That is the whole of mixed
precision here: activations carry the compute dtype and parameters may be float32 masters.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.reference_int8 import dequantise, int8_linear, int8_linear_input_grad

# --- counter-based randomness -------------------------------------------------------------------

# The multipliers of the 32-bit finaliser "lowbias32" (Chris Wellons, hash-prospector), as int32.
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B - 2**32
# 2^32 over the golden ratio: consecutive counters become far apart (Knuth, TAOCP vol. 3, 6.4).
GOLDEN = 0x9E3779B9 - 2**32


def _shift_right(bits: Tensor, count: int, out: Tensor | None = None) -> Tensor:
    """Logical right shift of int32 (torch's own shift copies the sign bit)."""
    shifted = torch.bitwise_right_shift(bits, count, out=out)
    return shifted.bitwise_and_((1 << (32 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Scramble int32 counters in place, so that every output bit depends on every input bit."""
    bits.bitwise_xor_(_shift_right(bits, 16)).mul_(MIX_1)
    bits.bitwise_xor_(_shift_right(bits, 15)).mul_(MIX_2)
    return bits.bitwise_xor_(_shift_right(bits, 16))


def low_word(value: int) -> int:
    """The low 32 bits of a Python int, as the int32 that holds them."""
    return (value & 0xFFFFFFFF) - (1 << 32 if value & 0x80000000 else 0)


def row_keys(seed: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """One int32 key per token, a function of the seed, the sample and the position in it.

    Args:
        seed: any int; its low 64 bits count (one per optimiser step).
        sample_ids: [M] int64, the stable id of the sample each token belongs to.
        positions: [M] int64, the token's position in its sample.
    """
    keys = torch.full_like(sample_ids, low_word(seed), dtype=torch.int32)
    words = (low_word(seed >> 32), sample_ids, sample_ids >> 32, positions)
    for word in words:
        # int64 to int32 keeps the low word, which is what is wanted.
        word_M = word if isinstance(word, int) else word.to(torch.int32)
        keys = _mix((keys + GOLDEN).bitwise_xor_(word_M))
    return keys


# Counters hashed at a time on a CPU: the few passes of the hash then stay in a core's cache.
_HASH_BLOCK = 1 << 16


def keep_mask(keys: Tensor, width: int, p: float, site: int) -> Tensor:
    """Which of `width` columns of each row survive dropout: [M, width] bool, each with 1 - p.

    A row's key and a column's key are combined and hashed; each 32-bit hash decides two columns,
    its low half the even and its high half the odd one, so p is rounded to a multiple of 2^-16.

    Args:
        keys: [M] int32 from `row_keys`.
        site: which dropout of the network this is; different sites draw independently.
    """
    pairs = (width + 1) // 2
    row_keys_M = _mix((keys + GOLDEN).bitwise_xor_(low_word(site)))
    counters = torch.arange(pairs, dtype=torch.int32, device=keys.device)
    column_keys = _mix(counters.mul_(GOLDEN).add_(low_word(site * GOLDEN)))
    threshold = round(p * 2**16) - 2**15
    keep = torch.empty(len(keys), width, dtype=torch.bool, device=keys.device)
    block = len(keys) if keys.is_cuda else max(1, _HASH_BLOCK // pairs)
    shifted = torch.empty(min(block, len(keys)), pairs, dtype=torch.int32, device=keys.device)
    for start in range(0, len(keys), block):
        bits = row_keys_M[start : start + block, None].bitwise_xor(column_keys)
        spare = shifted[: len(bits)]
        bits.mul_(MIX_1).bitwise_xor_(_shift_right(bits, 15, spare)).mul_(MIX_2)
        bits.bitwise_xor_(_shift_right(bits, 16, spare))
        halves = bits.view(torch.int16)[:, :width]
        torch.ge(halves, threshold, out=keep[start : start + block])
    return keep


def uniform(keys: Tensor, width: int, site: int) -> Tensor:
    """Noise of each row, uniform in -1 to 1: [M, width] float32, a function of key and column.

    Args:
        keys: [M] int32 from `row_keys`.
        site: which noise of the network this is, as in `keep_mask`.
    """
    row_keys_M = _mix((keys + GOLDEN).bitwise_xor_(low_word(site)))
    counters = torch.arange(width, dtype=torch.int32, device=keys.device)
    column_keys = _mix(counters.mul_(GOLDEN).add_(low_word(site * GOLDEN)))
    return _mix(row_keys_M[:, None].bitwise_xor(column_keys)).float().mul_(2.0**-31)


def kept_scale(p: float) -> float:
    """What a surviving value is multiplied by: 1 / (1 - p) for the p that the mask really has."""
    return 1 / (1 - round(p * 2**16) / 2**16)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
        keep = keep_mask(keys, x.shape[-1], p, site)
        ctx.save_for_backward(keep)
        ctx.scale = kept_scale(p)
        return torch.where(keep, x, 0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, dy, 0).mul_(ctx.scale), None, None, None


def dropout(x: Tensor, p: float, keys: Tensor | None, site: int) -> Tensor:
    """Inverted dropout of x [M, K] (Srivastava et al. 2014); `keys` None means evaluation."""
    if keys is None or p == 0.0:
        return x
    return _Dropout.apply(x, p, keys, site)


# --- normalisation, positions, activation -------------------------------------------------------


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [M, D] over its root mean square, times weight; and 1 / that root [M, 1], float32 or wider.

    A norm and a square read x once; squaring x first would write it out as well.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype).mul_(weight.to(x.dtype)), rstd


def _through_normalise(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `_normalise`: with n = x rstd and g = dy weight,

    dx = (g - n mean(g n)) rstd and dweight = the sum of dy n over rows.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * rstd
    dx = dweight = None
    if needs_dweight:
        dweight = (dy.to(normed.dtype) * normed).sum(0).to(weight.dtype)
    if needs_dx:
        g = dy.to(normed.dtype) * weight.to(normed.dtype)
        mean = torch.linalg.vecdot(g, normed)[:, None].div_(x.shape[-1])
        dx = g.addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype)
    return dx, dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        dx, dweight = _through_normalise(
            dy, *ctx.saved_tensors, needs_dx=needs_dx, needs_dweight=needs_dweight
        )
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467).

    Statistics are float32 or wider; the quotient is rounded to x's dtype before the weight, as in
    transformers.

    Args:
        x: [M, D].
        weight: [D].
    """
    return _RMSNorm.apply(x, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        y, rstd = _normalise(total, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor, dtotal: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        needs_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx, dweight = _through_normalise(
            dy, *ctx.saved_tensors, needs_dx=needs_dx, needs_dweight=ctx.needs_input_grad[2]
        )
        if dx is not None:
            dx += dtotal
        return dx, dx, dweight, None


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, rounded to their dtype, normalised; and the sum itself.

    The same numbers as `rms_norm(x + residual, weight, eps)`, in fewer passes over memory.

    Args:
        x, residual: [M, D] of one dtype.
        weight: [D].

    Returns:
        The normalised rows and the new residual, both [M, D].
    """
    return _AddRMSNorm.apply(x, residual, weight, eps)


def _rotate(x_MNH: Tensor, cos_M1h: Tensor, sin_M1h: Tensor) -> Tensor:
    first, second = x_MNH.chunk(2, dim=-1)
    out = torch.empty_like(x_MNH)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos_M1h, out=out_first).addcmul_(second, sin_M1h, value=-1)
    torch.mul(second, cos_M1h, out=out_second).addcmul_(first, sin_M1h)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        cos, sin = cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        cos, sin = cos[:, None].to(dq.dtype), sin[:, None].to(dq.dtype).neg()
        return _rotate(dq, cos, sin), _rotate(dk, cos, sin), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head by its position's angles (Su et al., arXiv 2104.09864).

    Half-split, as Hugging Face checkpoints are: (a, b) becomes (a cos - b sin, b cos + a sin) for
    the two halves a and b of a head. The backward pass is the rotation by the opposite angle.

    Args:
        q: [M, N, H]; k: [M, G, H]. One of them may have no heads (G = 0).
        cos, sin: [M, H / 2].
    """
    return _Rope.apply(q, k, cos, sin)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dup = torch.nn.functional.silu(gate).mul_(dy)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [M, F] (Shazeer 2020, arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up)


# --- linear layers with low-rank updates --------------------------------------------------------


class LowRank(NamedTuple):
    """One adapter of one layer: adds scaling * dropout(x) A^T B^T (Hu et al., arXiv 2106.09685)."""

    A: Tensor  # [R, K]
    B: Tensor  # [N, R]
    scaling: float
    dropout: float
    site: int  # which dropout of the network this is


class LinearOperands(NamedTuple):
    """One linear layer: its weight, its bias, and the adapters that are summed on it."""

    weight: Tensor  # [N, K], floating or int8
    bias: Tensor | None  # [N]
    adapters: tuple[LowRank, ...] = ()
    scale: Tensor | None = None  # [N] float32, of an int8 weight
    is_int8_math: bool = False  # multiply int8 by int8 instead of dequantising the weight


class _Base(NamedTuple):
    """What is not a tensor of one layer's own weight."""

    is_int8_math: bool

    def product(self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Any:
        """x W^T + bias: [M, N]."""
        bias = bias if bias is None else bias.to(x.dtype)
        if scale is not None and self.is_int8_math:
            y = int8_linear(x, weight, scale)
            return y if bias is None else y.add_(bias)
        return torch.nn.functional.linear(x, _floating(weight, scale, x.dtype), bias)

    def add_input_grad(
        self, dx: Tensor | None, dy: Tensor, weight: Tensor, scale: Tensor | None
    ) -> Tensor:
        """dx + dy W: [M, K]; dx None means 0."""
        if scale is not None and self.is_int8_math:
            own = int8_linear_input_grad(dy, weight, scale)
            return own if dx is None else dx.add_(own)
        w = _floating(weight, scale, dy.dtype)
        return dy @ w if dx is None else dx.addmm_(dy, w)


def _floating(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if scale is None else dequantise(weight, scale, dtype)


class _Update(NamedTuple):
    """What is not a tensor of one low-rank update."""

    layer: int  # which layer's output it is added to
    columns: slice  # its part of S
    scaling: float  # with the factor 1 / (1 - p) of its dropout, so that masks need none
    dropout: float
    site: int


class _LoraLinear(torch.autograd.Function):
    """All layers that read one input, with all their adapters.

    Saved: x, where a weight or an A trains, the weights, S = dropout(x) A^T, which is rank-sized,
    and one byte per dropped element. Arguments after `keys` are the layers' weights, scales and
    biases, then each update's A and B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bases: tuple[_Base, ...],
        updates: tuple[_Update, ...],
        x: Tensor,
        keys: Any,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        dtype, width, first = x.dtype, x.shape[1], 3 * len(bases)
        outputs = tuple(
            base.product(x, *tensors[3 * i : 3 * i + 3]) for i, base in enumerate(bases)
        )
        masks = tuple(
            keep_mask(keys, width, update.dropout, update.site) if update.dropout else None
            for update in updates
        )
        s = None
        if updates:
            down, up = tensors[first::2], tensors[first + 1 :: 2]
            s = _down_projections(x, updates, masks, down)
            for update, b in zip(updates, up, strict=True):
                outputs[update.layer].addmm_(
                    s[:, update.columns], b.to(dtype).T, alpha=update.scaling
                )
        ctx.bases, ctx.updates = bases, updates
        needs = ctx.needs_input_grad[4:]
        is_read_again = any(needs[:first:3]) or any(needs[first::2])
        ctx.save_for_backward(x if is_read_again else None, s, *masks, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        updates: tuple[_Update, ...] = ctx.updates
        x, s, *saved = ctx.saved_tensors
        masks, tensors = saved[: len(updates)], saved[len(updates) :]
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[4:]
        dtype, first = douts[0].dtype, 3 * len(ctx.bases)
        grads: list[Tensor | None] = [None] * len(tensors)

        dx: Any = None  # a tensor from the first layer on, where x needs its gradient
        for i, (base, dy) in enumerate(zip(ctx.bases, douts, strict=True)):
            weight, scale, bias = tensors[3 * i : 3 * i + 3]
            if needs_x:
                dx = base.add_input_grad(dx, dy, weight, scale)
            if needs[3 * i]:
                grads[3 * i] = (dy.T @ x).to(weight.dtype)
            if needs[3 * i + 2]:
                grads[3 * i + 2] = dy.sum(0).to(bias.dtype)
        if not updates:
            return None, None, dx, None, *grads

        down, up = tensors[first::2], tensors[first + 1 :: 2]
        ds = torch.empty_like(s)
        for u, update in enumerate(updates):
            dy = douts[update.layer]
            torch.mm(dy, up[u].to(dtype), out=ds[:, update.columns])
            ds[:, update.columns].mul_(update.scaling)
            if needs[first + 2 * u + 1]:
                db = (dy.T @ s[:, update.columns]).mul_(update.scaling)
                grads[first + 2 * u + 1] = db.to(up[u].dtype)
        if all(mask is None for mask in masks):
            # Every update reads the same x: one product serves all of them.
            if any(needs[first::2]):
                da = ds.T @ x
                for u, update in enumerate(updates):
                    if needs[first + 2 * u]:
                        grads[first + 2 * u] = da[update.columns].to(down[u].dtype)
            if needs_x:
                dx.addmm_(ds, _stacked(down, dtype))
            return None, None, dx, None, *grads

        for u, (update, mask, a) in enumerate(zip(updates, masks, down, strict=True)):
            ds_MR = ds[:, update.columns]
            if needs[first + 2 * u]:
                dropped = x if mask is None else torch.where(mask, x, 0)
                grads[first + 2 * u] = (ds_MR.T @ dropped).to(a.dtype)
            if needs_x:
                through = ds_MR @ a.to(dtype)
                dx += through if mask is None else torch.where(mask, through, 0)
        return None, None, dx, None, *grads


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices))).to(dtype)


def _down_projections(
    x: Tensor,
    updates: Sequence[_Update],
    masks: Sequence[Tensor | None],
    down: Sequence[Tensor],
) -> Tensor:
    """S [M, sum of ranks]: each update's masked x times A^T, in its own columns."""
    if all(mask is None for mask in masks):
        return x @ _stacked(down, x.dtype).T
    s = x.new_empty(x.shape[0], updates[-1].columns.stop)
    for update, mask, a in zip(updates, masks, down, strict=True):
        dropped = x if mask is None else torch.where(mask, x, 0)
        torch.mm(dropped, a.to(x.dtype).T, out=s[:, update.columns])
    return s


def lora_linear(
    x: Tensor, layers: Sequence[LinearOperands], dropout_keys: Tensor | None = None
) -> tuple[Tensor, ...]:
    """For each layer, y = x W^T + bias + sum over its adapters of scaling * dropout(x) A^T B^T.

    Layers that share their input (q, k, v; gate, up) are given together: x is read once for all
    their adapters, and its gradient is accumulated in one buffer. Frozen tensors get no gradient.

    Args:
        x: [M, K].
        layers: each with weight [N, K], bias [N] or None, adapters A [R, K] and B [N, R]; an int8
            weight has a scale and is frozen (`kernels.reference_int8`).
        dropout_keys: [M] int32 from `row_keys`; None switches the adapters' dropout off.

    Returns:
        One [M, N] tensor per layer, in x's dtype.
    """
    tensors: list[Tensor | None] = []
    for layer in layers:
        assert (layer.scale is None) == layer.weight.is_floating_point()
        tensors += (layer.weight, layer.scale, layer.bias)
    updates: list[_Update] = []
    start = 0
    for i, layer in enumerate(layers):
        for adapter in layer.adapters:
            columns = slice(start, start + adapter.A.shape[0])
            p = 0.0 if dropout_keys is None else adapter.dropout
            scaling = adapter.scaling * kept_scale(p)
            updates.append(_Update(i, columns, scaling, p, adapter.site))
            tensors += (adapter.A, adapter.B)
            start = columns.stop
    bases = tuple(_Base(layer.is_int8_math) for layer in layers)
    return _LoraLinear.apply(bases, tuple(updates), x, dropout_keys, *tensors)


# --- experts ------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """Which of J experts each token goes to, as rows sorted by expert (J of E a token).

    A sorted row is one copy of one token. All of it lives on the device: nothing here, and no
    operation that takes it, needs a number on the host, except the reference's own loop.
    """

    order: Tensor  # [M J] int64: sorted row i is copy order[i] % J of token order[i] // J
    places: Tensor  # [M, J] int64: the sorted row of each copy, the inverse of `order`
    offsets: Tensor  # [E + 1] int64: expert e has sorted rows offsets[e] to offsets[e + 1]


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Routing]:
    """Softmax over all experts, the `top_k` largest, scaled to sum to 1 (arXiv 2401.04088).

    In float32 or wider whatever the logits are, as in transformers. Among equal experts the choice
    is that of torch.topk. Copies keep the tokens' order inside an expert.

    Args:
        logits: [M, E].

    Returns:
        weights [M, J], float32 or wider, differentiable; and where the copies go.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights, experts = logits.softmax(-1, dtype=wide).topk(top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    of_copy = experts.flatten()
    order = of_copy.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    bounds = torch.arange(logits.shape[1] + 1, device=order.device)
    offsets = torch.searchsorted(of_copy[order], bounds)
    return weights, Routing(order, places.view_as(experts), offsets)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[order // places.shape[1]]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        # Gathered, not scattered: a sum of J terms in one order, without atomics on a GPU.
        return dy[places].sum(1), None, None


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Copies of the tokens' rows, sorted by expert: [M, D] -> [M J, D]."""
    return _Dispatch.apply(x, routing.order, routing.places)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, places)
        copies_MJD = y[places].to(weights.dtype)
        return torch.bmm(weights[:, None], copies_MJD)[:, 0].to(y.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y, weights, order, places = ctx.saved_tensors
        dout = dout.to(weights.dtype)
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            dy = dout[order // places.shape[1]].mul_(weights.flatten()[order, None]).to(y.dtype)
        if ctx.needs_input_grad[1]:
            dweights = torch.bmm(y[places].to(weights.dtype), dout[..., None])[..., 0]
        return dy, dweights, None, None


def combine(y: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """out[m] = sum over j of weights[m, j] * y[places[m, j]], rounded once to y's dtype.

    Args:
        y: [M J, D], the experts' outputs for the rows that `dispatch` gave them.
        weights: [M, J], float32 or wider, in which products and sums are made.
    """
    return _Combine.apply(y, weights, routing.order, routing.places)


def grouped_lora_linear(
    x: Tensor,
    experts: Sequence[Sequence[LinearOperands]],
    offsets: Tensor,
    dropout_keys: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of each expert on its own rows: `lora_linear(x[e], experts[e], keys[e])`.

    Rows are sorted by expert. An expert may have none; its trained tensors then get gradients of
    zeros, as every expert of one stacked tensor would. Nothing but the rows' values depends on
    `offsets`, so an implementation for a GPU leaves them on the device: the grid covers all rows,
    and a block finds its expert from `offsets`.

    Args:
        x: [M, K].
        experts: of each of the E experts, its layers that read x (w1 and w3; w2), as `lora_linear`
            takes them. Layer i has one shape [N, K] and one number format in all experts; each
            expert has weight and adapters of its own, under sites of their own. Attaching by name
            may give single experts other ranks or no adapter; an implementation may leave that
            to this one.
        offsets: [E + 1] int64, from 0 to M: expert e has rows offsets[e] to offsets[e + 1].
        dropout_keys: [M] int32, the key of the token that each row is a copy of.

    Returns:
        One [M, N] tensor per layer, in x's dtype, rows in x's order.
    """
    bounds = offsets.tolist()
    parts: list[tuple[Tensor, ...]] = []
    for layers, start, stop in zip(experts, bounds[:-1], bounds[1:], strict=True):
        if start < stop or torch.is_grad_enabled():
            keys = None if dropout_keys is None else dropout_keys[start:stop]
            parts.append(lora_linear(x[start:stop], layers, keys))
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


# --- the head and its loss ----------------------------------------------------------------------

# Logits of one chunk, in elements: large enough for efficient products, small beside a model.
CHUNK_ELEMENTS = 1 << 23


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows, vocabulary = x.shape[0], weight.shape[0]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        w = weight.to(x.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        loss_sum = x.new_zeros((), dtype=wide)
        step = max(1, CHUNK_ELEMENTS // vocabulary)
        # One buffer for every chunk: fresh memory of this size costs more than the product.
        buffer = x.new_empty(min(step, rows), vocabulary)
        for start in range(0, rows, step):
            x_CD, target_C1 = x[start : start + step], targets[start : start + step, None]
            logits_CV = torch.mm(x_CD, w.T, out=buffer[: len(x_CD)]).to(wide)
            highest_C1 = logits_CV.amax(-1, keepdim=True)
            wanted_C1 = logits_CV.gather(1, target_C1)
            p_CV = torch.softmax(logits_CV, -1, out=logits_CV)
            # logsumexp from the largest probability, exp(highest - logsumexp), never below 1 / V.
            lse_C1 = highest_C1 - p_CV.amax(-1, keepdim=True).log_()
            loss_sum += (lse_C1 - wanted_C1).sum()
            # d loss / d logits = softmax(logits) - one-hot(target), written over the logits.
            p_CV.scatter_add_(1, target_C1, p_CV.new_full(target_C1.shape, -1.0))
            dlogits_CV = p_CV.to(x.dtype)
            if dx is not None:
                torch.mm(dlogits_CV, w, out=dx[start : start + step])
            if dw is not None:
                dw.addmm_(dlogits_CV.T.to(wide), x_CD.to(wide))
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *times_loss_gradient(ctx.saved_tensors, dloss), None


def times_loss_gradient(
    gradients: Sequence[Tensor | None], dloss: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that were made in the forward pass of a loss, times that of the loss: a scalar."""
    return tuple(None if one is None else one * dloss.to(one.dtype) for one in gradients)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(x W^T)[target], without ever holding all logits.

    Args:
        x: [M, D], the supervised rows only.
        weight: [V, D], the language-model head.
        targets: [M] int64 in [0, V).

    Returns:
        A scalar, float32 or wider.
    """
    return _LinearCrossEntropy.apply(x, weight, targets)


# --- AdamW with eight-bit states ----------------------------------------------------------------

# Elements that share one scale.
STATE_BLOCK = 256


@functools.cache
def dynamic_code(*, is_signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic code, ascending, float32 (Dettmers, arXiv 1511.04561).

    Seven decades up to 1; from one to the next the number of equal steps in it doubles, so what is
    large beside the block's largest value is held to 0.4%. A value is the middle of its step. Zero
    and 1 are values too; without a sign each decade has twice the steps.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade * (1 if is_signed else 2)
        middles = [10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / steps) for i in range(steps)]
        values += middles
        if is_signed:
            values += [-middle for middle in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantise_state(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code of each element over its block's largest magnitude, and those magnitudes.

    Under a code without sign, what is not zero never becomes zero: the mean beside it would be
    divided by eps alone.

    Args:
        x: [n] float32, not negative where the code has no sign.
        code: [256] from `dynamic_code`.

    Returns:
        [n] uint8 and [n / 256, rounded up] float32.
    """
    short = -len(x) % STATE_BLOCK
    blocks = torch.nn.functional.pad(x, (0, short)).view(-1, STATE_BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1.0 / largest.clamp(min=1e-38))[:, None]
    bounds = (code[:-1] + code[1:]) / 2
    codes = torch.bucketize(scaled, bounds, out_int32=True)
    if code[0] == 0:
        codes.clamp_(min=1).mul_(scaled > 0)
    return codes.to(torch.uint8).view(-1)[: len(x)], largest


def dequantise_state(codes: Tensor, largest: Tensor, code: Tensor) -> Tensor:
    """The [n] float32 that `quantise_state` rounded."""
    values = code[codes.int()]
    return values * largest.repeat_interleave(STATE_BLOCK)[: len(codes)]


class EightBitStates(NamedTuple):
    """AdamW's running means of one parameter of n elements, n / 256 (rounded up) blocks."""

    mean: Tensor  # [n] uint8: of the gradient, in the signed code
    mean_scale: Tensor  # [blocks] float32
    root: Tensor  # [n] uint8: the root of the squared gradient's, in the code without sign
    root_scale: Tensor  # [blocks] float32


class AdamWStep(NamedTuple):
    """The numbers of one update (Loshchilov and Hutter, arXiv 1711.05101)."""

    step: int  # 1 for the first
    rate: float
    beta1: float
    beta2: float
    eps: float

    @property
    def mean_correction(self) -> float:
        return 1 - self.beta1**self.step

    @property
    def root_correction(self) -> float:
        return (1 - self.beta2**self.step) ** 0.5


def adamw_eight_bit(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[EightBitStates],
    decays: Sequence[float],
    numbers: AdamWStep,
) -> None:
    """One AdamW update of float32 parameters in place; its states are eight-bit between updates.

    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; then, of these before rounding,
    p = p (1 - rate decay) - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).

    States are block-wise in the dynamic code (Dettmers et al., arXiv 2110.02861), but what is held
    of v is its root. The code spans seven decades. Gradients of one block that differ by more than
    three and a half would leave them as squares, and the smaller ones' steps would run away.

    Args:
        parameters, gradients: float32, of n elements each.
        decays: the weight decay of each parameter.
    """
    for parameter, gradient, state, decay in zip(
        parameters, gradients, states, decays, strict=True
    ):
        signed = dynamic_code(is_signed=True, device=parameter.device)
        unsigned = dynamic_code(is_signed=False, device=parameter.device)
        g = gradient.reshape(-1).float()
        m = dequantise_state(state.mean, state.mean_scale, signed)
        m.mul_(numbers.beta1).add_(g, alpha=1 - numbers.beta1)
        v = dequantise_state(state.root, state.root_scale, unsigned).square_()
        root = v.mul_(numbers.beta2).addcmul_(g, g, value=1 - numbers.beta2).sqrt_()
        step = m / (root / numbers.root_correction).add_(numbers.eps)
        parameter.mul_(1 - numbers.rate * decay)
        parameter.add_(step.view_as(parameter), alpha=-numbers.rate / numbers.mean_correction)
        for old, new in zip(
            state, (*quantise_state(m, signed), *quantise_state(root, unsigned)), strict=True
        ):
            old.copy_(new)
