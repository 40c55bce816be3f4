"""The contract of every operation, in plain torch with the backward passes written out.

Letters: M rows (the tokens of a micro-batch, flattened), D width, K input width, N output width or
query heads, G key-value heads, H head width, F feed-forward width, V vocabulary, R rank, B segments
of one length, T tokens of a segment.

The invariant: a result is a function of its arguments alone. Randomness comes in as integer keys
(`row_keys`), so the same token of the same sample is dropped in the same places after a resume, on
any number of ranks and however samples are packed.

Parameters are cast to the activations' dtype where they are used. That is the whole of mixed
precision here: activations carry the compute dtype and parameters may be float32 masters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# --- counter-based randomness -------------------------------------------------------------------

# The multipliers of the 32-bit finaliser "lowbias32" (Chris Wellons, hash-prospector), as int32.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - 2**32
# 2^32 over the golden ratio: consecutive counters become far apart (Knuth, TAOCP vol. 3, 6.4).
_GOLDEN = 0x9E3779B9 - 2**32


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int32 (torch's own shift copies the sign bit)."""
    return (bits >> count).bitwise_and_((1 << (32 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Scramble int32 counters in place, so that every output bit depends on every input bit."""
    bits.bitwise_xor_(_shift_right(bits, 16)).mul_(_MIX_1)
    bits.bitwise_xor_(_shift_right(bits, 15)).mul_(_MIX_2)
    return bits.bitwise_xor_(_shift_right(bits, 16))


def _low_word(value: int) -> int:
    """The low 32 bits of a Python int, as the int32 that holds them."""
    return (value & 0xFFFFFFFF) - (1 << 32 if value & 0x80000000 else 0)


def row_keys(seed: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """One int32 key per token, a function of the seed, the sample and the position in it.

    Args:
        seed: any int; its low 64 bits count (one per optimiser step).
        sample_ids: [M] int64, the stable id of the sample each token belongs to.
        positions: [M] int64, the token's position in its sample.
    """
    keys = torch.full_like(sample_ids, _low_word(seed), dtype=torch.int32)
    words = (_low_word(seed >> 32), sample_ids, sample_ids >> 32, positions)
    for word in words:
        # int64 to int32 keeps the low word, which is what is wanted.
        word_M = word if isinstance(word, int) else word.to(torch.int32)
        keys = _mix((keys + _GOLDEN).bitwise_xor_(word_M))
    return keys


def keep_mask(keys: Tensor, width: int, p: float, site: int) -> Tensor:
    """Which of `width` columns of each row survive dropout: [M, width] bool, each with 1 - p.

    Args:
        keys: [M] int32 from `row_keys`.
        site: which dropout of the network this is; different sites draw independently.
    """
    site_keys_M = _mix((keys + _GOLDEN).bitwise_xor_(_low_word(site)))
    columns = torch.arange(width, dtype=torch.int32, device=keys.device) * _GOLDEN
    bits_MK = _mix(site_keys_M[:, None].bitwise_xor(columns))
    return bits_MK >= round(p * 2**32) - 2**31


def _drop(x: Tensor, keys: Tensor, p: float, site: int) -> Tensor:
    """Zero what the mask drops and scale what it keeps by 1 / (1 - p)."""
    return x * keep_mask(keys, x.shape[-1], p, site).to(x.dtype).mul_(1 / (1 - p))


class _Dropout(torch.autograd.Function):
    """The mask is drawn again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p, ctx.site = p, site
        return _drop(x, keys, p, site)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _drop(dy, keys, ctx.p, ctx.site), None, None, None


def dropout(x: Tensor, p: float, keys: Tensor | None, site: int) -> Tensor:
    """Inverted dropout of x [M, K] (Srivastava et al. 2014); `keys` None means evaluation."""
    if keys is None or p == 0.0:
        return x
    return _Dropout.apply(x, p, keys, site)


# --- normalisation, positions, activation -------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        # A norm and a square read x once; squaring x first would write it out as well.
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * rstd
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy.to(normed.dtype) * normed).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = dy.to(normed.dtype) * weight.to(normed.dtype)
            mean = torch.linalg.vecdot(g, normed)[:, None].div_(x.shape[-1])
            dx = g.addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype)
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


def _rotate(x_MNH: Tensor, cos_M1h: Tensor, sin_M1h: Tensor) -> Tensor:
    first, second = x_MNH.chunk(2, dim=-1)
    out = torch.empty_like(x_MNH)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos_M1h, out=out_first).addcmul_(second, sin_M1h, value=-1)
    torch.mul(second, cos_M1h, out=out_second).addcmul_(first, sin_M1h)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
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
        q: [M, N, H]; k: [M, G, H].
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

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    adapters: tuple[LowRank, ...] = ()


class _Update(NamedTuple):
    """What is not a tensor of one low-rank update: its layer, its columns of S, and its numbers."""

    layer: int
    columns: slice
    scaling: float
    dropout: float
    site: int


class _LoraLinear(torch.autograd.Function):
    """All layers that read one input, with all their adapters.

    Saved: x, the weights, and S = dropout(x) A^T, which is rank-sized. Dropped inputs are drawn
    again. Arguments after `keys` are the layers' weights and biases, then each update's A and B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        num_layers: int,
        updates: tuple[_Update, ...],
        x: Tensor,
        keys: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype = x.dtype
        weights = [tensors[2 * i] for i in range(num_layers)]
        biases = [tensors[2 * i + 1] for i in range(num_layers)]
        factors = tensors[2 * num_layers :]
        outputs = tuple(
            torch.nn.functional.linear(
                x, weight.to(dtype), None if bias is None else bias.to(dtype)
            )
            for weight, bias in zip(weights, biases, strict=True)
        )
        s = None
        if updates:
            s = _shared_down_projection(x, keys, updates, factors)
            for update, b in zip(updates, factors[1::2], strict=True):
                outputs[update.layer].addmm_(
                    s[:, update.columns], b.to(dtype).T, alpha=update.scaling
                )
        ctx.num_layers, ctx.updates = num_layers, updates
        # The weight is needed for dx, its dtype for its own gradient; a bias only for its dtype.
        ctx.save_for_backward(x, keys, s, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x, keys, s, *tensors = ctx.saved_tensors
        updates: tuple[_Update, ...] = ctx.updates
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[4:]
        dtype, base = x.dtype, 2 * ctx.num_layers
        grads: list[Tensor | None] = [None] * len(tensors)
        dx: Tensor | None = None
        for i, dy in enumerate(douts):
            weight, bias = tensors[2 * i], tensors[2 * i + 1]
            if needs_x:
                w = weight.to(dtype)
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
            if needs[2 * i]:
                grads[2 * i] = (dy.T @ x).to(weight.dtype)
            if needs[2 * i + 1]:
                grads[2 * i + 1] = dy.sum(0, dtype=bias.dtype)
        if not updates:
            return None, None, dx, None, *grads

        ds = torch.empty_like(s)
        for u, update in enumerate(updates):
            b, dy = tensors[base + 2 * u + 1], douts[update.layer]
            torch.mm(dy, b.to(dtype), out=ds[:, update.columns])
            if needs[base + 2 * u + 1]:
                db = dy.T @ s[:, update.columns]
                grads[base + 2 * u + 1] = db.mul_(update.scaling).to(b.dtype)
        scalings = [u.scaling for u in updates]
        if len(set(scalings)) == 1:
            ds.mul_(scalings[0])
        else:
            for update in updates:
                ds[:, update.columns].mul_(update.scaling)

        if _is_shared(updates, keys):
            a = _stacked([tensors[base + 2 * u] for u in range(len(updates))], dtype)
            if any(needs[base + 2 * u] for u in range(len(updates))):
                da = ds.T @ x
                for u, update in enumerate(updates):
                    if needs[base + 2 * u]:
                        grads[base + 2 * u] = da[update.columns].to(tensors[base + 2 * u].dtype)
            if needs_x:
                dx.addmm_(ds, a)
        else:
            for u, update in enumerate(updates):
                a, ds_u = tensors[base + 2 * u], ds[:, update.columns]
                drops = update.dropout > 0.0
                if needs[base + 2 * u]:
                    dropped = _drop(x, keys, update.dropout, update.site) if drops else x
                    grads[base + 2 * u] = (ds_u.T @ dropped).to(a.dtype)
                if needs_x:
                    through = ds_u @ a.to(dtype)
                    dx += _drop(through, keys, update.dropout, update.site) if drops else through
        return None, None, dx, None, *grads


def _is_shared(updates: Sequence[_Update], keys: Tensor | None) -> bool:
    """Whether every update reads the same x, so that one product serves all of them."""
    return keys is None or all(update.dropout == 0.0 for update in updates)


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))).to(dtype)


def _shared_down_projection(
    x: Tensor, keys: Tensor | None, updates: Sequence[_Update], factors: Sequence[Tensor]
) -> Tensor:
    """S [M, sum of ranks]: each update's dropout(x) A^T in its own columns."""
    down = factors[0::2]
    if _is_shared(updates, keys):
        return x @ _stacked(down, x.dtype).T
    s = x.new_empty(x.shape[0], updates[-1].columns.stop)
    for update, a in zip(updates, down, strict=True):
        dropped = x if update.dropout == 0.0 else _drop(x, keys, update.dropout, update.site)
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
        layers: each with weight [N, K], bias [N] or None, adapters A [R, K] and B [N, R].
        dropout_keys: [M] int32 from `row_keys`; None switches the adapters' dropout off.

    Returns:
        One [M, N] tensor per layer, in x's dtype.
    """
    tensors: list[Tensor | None] = []
    for layer in layers:
        tensors += (layer.weight, layer.bias)
    updates: list[_Update] = []
    start = 0
    for i, layer in enumerate(layers):
        for adapter in layer.adapters:
            columns = slice(start, start + adapter.A.shape[0])
            updates.append(_Update(i, columns, adapter.scaling, adapter.dropout, adapter.site))
            tensors += (adapter.A, adapter.B)
            start = columns.stop
    return _LoraLinear.apply(len(layers), tuple(updates), x, dropout_keys, *tensors)


# --- attention ----------------------------------------------------------------------------------

# Rows of queries handled at a time. A block's scores stay in a core's cache, and keys after the
# block's last query are never touched, so the work is that of the causal half.
_QUERY_BLOCK = 64


def _block_scores(q_block: Tensor, k: Tensor, start: int, stop: int, n: int) -> Tensor:
    """Scores of queries start to stop against keys 0 to stop, future keys at -inf."""
    scores = torch.bmm(q_block, k[:, :stop].mT)
    size = stop - start
    future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
    scores[:, :, start:stop].masked_fill_(future.repeat_interleave(n, 0), float("-inf"))
    return scores


class _CausalAttention(torch.autograd.Function):
    """Block by block over the queries; probabilities are computed again in the backward pass.

    Works on q [Z, T * n, H] and k, v [Z, T, H] where Z counts (segment, key-value head) pairs and
    the n query heads of a key-value head stand beside each other at every position.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length, n = k.shape[1], q.shape[1] // k.shape[1]
        q = q * scale
        out = torch.empty_like(q)
        for start in range(0, length, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, length)
            rows = slice(start * n, stop * n)
            p = _block_scores(q[:, rows], k, start, stop, n).softmax(-1)
            torch.bmm(p, v[:, :stop], out=out[:, rows])
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        length, n = k.shape[1], q.shape[1] // k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # d scores = p * (dp - sum(dout * out)), Dao et al. 2022 (arXiv 2205.14135), eq. 4.
        delta = torch.linalg.vecdot(dout, out)[..., None]
        for start in range(0, length, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, length)
            rows = slice(start * n, stop * n)
            p = _block_scores(q[:, rows], k, start, stop, n).softmax(-1)
            dv[:, :stop].baddbmm_(p.mT, dout[:, rows])
            ds = torch.bmm(dout[:, rows], v[:, :stop].mT).sub_(delta[:, rows]).mul_(p)
            torch.bmm(ds, k[:, :stop], out=dq[:, rows])
            dk[:, :stop].baddbmm_(ds.mT, q[:, rows])
        return dq.mul_(ctx.scale), dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of equally long segments: softmax(scale q k^T) v, each query on its past.

    Args:
        q: [B, T, N, H]; k, v: [B, T, G, H] with N a multiple of G (grouped queries, Ainslie et
            al., arXiv 2305.13245: query head i reads key-value head i // (N / G)).

    Returns:
        [B, T, N, H].
    """
    b, t, n, h = q.shape
    g = k.shape[2]
    q_ZTH = q.view(b, t, g, n // g, h).permute(0, 2, 1, 3, 4).reshape(b * g, -1, h)
    k_ZTH, v_ZTH = (x.transpose(1, 2).reshape(b * g, t, h) for x in (k, v))
    out = _CausalAttention.apply(q_ZTH, k_ZTH, v_ZTH, scale)
    return out.view(b, g, t, n // g, h).permute(0, 2, 1, 3, 4).reshape(b, t, n, h)


# --- the head and its loss ----------------------------------------------------------------------

# Logits of one chunk, in elements: large enough for efficient products, small beside a model.
_CHUNK_ELEMENTS = 1 << 23


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
        step = max(1, _CHUNK_ELEMENTS // vocabulary)
        for start in range(0, rows, step):
            x_CD, target_C1 = x[start : start + step], targets[start : start + step, None]
            logits_CV = (x_CD @ w.T).to(wide)
            lse_C1 = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
            loss_sum += (lse_C1 - logits_CV.gather(1, target_C1)).sum()
            if dx is None and dw is None:
                continue
            # d loss / d logits = softmax(logits) - one-hot(target), written over the logits.
            dlogits_CV = logits_CV.sub_(lse_C1).exp_()
            dlogits_CV.scatter_add_(1, target_C1, dlogits_CV.new_full(target_C1.shape, -1.0))
            dlogits_CV = dlogits_CV.to(x.dtype)
            if dx is not None:
                torch.mm(dlogits_CV, w, out=dx[start : start + step])
            if dw is not None:
                dw.addmm_(dlogits_CV.T.to(wide), x_CD.to(wide))
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx, dw = ctx.saved_tensors
        return (
            None if dx is None else dx * dloss.to(dx.dtype),
            None if dw is None else dw * dloss.to(dw.dtype),
            None,
        )


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
