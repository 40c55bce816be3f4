"""Attention over a flat stream of segments, one function for every network and device.

Letters: M tokens of the stream, N query heads, G key-value heads, H head width, B segments of a
group, T their common length in queries, S in keys. The invariant: a token sees its own segment and
nothing else, and of that, where attention is causal, nothing after itself.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.batch import Group, Segments


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    queries: Segments | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention inside each segment, scaled by 1 / sqrt(H).

    Args:
        q: [M, N, H]; k, v: [M, G, H], positions already rotated in.
        segments: of the keys, and of the queries where `queries` does not say otherwise.
        queries: the queries' own segments, one for each of the keys'. Causal attention puts the
            last query of a segment beside its last key.
        causal: a query sees no key after itself.

    Returns:
        [M, N, H], a row for each query.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        # Here, not above: its import pulls in torch.compile, seconds that a CPU run never needs.
        from torch.nn.attention.varlen import varlen_attn

        asking = segments if queries is None else queries
        out = varlen_attn(
            q,
            k,
            v,
            asking.cu_seqlens,
            segments.cu_seqlens,
            max(asking.lengths),
            max(segments.lengths),
            window_size=(-1, 0 if causal else -1),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)  # a pair only when more is asked for
        return out
    outputs, first = [], 0
    for keys in segments.groups:
        own = keys if queries is None else queries.group(first, first + keys.count)
        if queries is None and causal:
            mask = None  # padding stands on the right, where no query looks
        else:
            mask = _visible(own, keys, causal=causal)
        is_causal = queries is None and causal
        outputs.append(_attend_group(q, k, v, own, keys, mask, is_causal=is_causal))
        first += keys.count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _visible(queries: Group, keys: Group, *, causal: bool) -> Tensor | None:
    """Which keys each query of a group sees: [B, 1, T or 1, S] bool; None where it sees all."""
    places = torch.arange(keys.length, device=keys.lengths.device)
    lengths_B1 = keys.lengths[:, None]
    if causal and queries.length > 1:
        ends_BT = (lengths_B1 - queries.lengths[:, None]) + places[: queries.length]
        # A padded query may look at padding: it is dropped, and never left without a key.
        return (places <= ends_BT[..., None])[:, None]
    return None if keys.index is None else (places < lengths_B1)[:, None, None]


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Group,
    keys: Group,
    mask: Tensor | None,
    *,
    is_causal: bool,
) -> Tensor:
    q_BTNH, k_BSGH, v_BSGH = _gather(q, queries), _gather(k, keys), _gather(v, keys)
    out_BNTH = scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSGH.transpose(1, 2),
        v_BSGH.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out_MNH = out_BNTH.transpose(1, 2).reshape(queries.count * queries.length, *q.shape[1:])
    return out_MNH if queries.inverse is None else out_MNH[queries.inverse]


def _gather(x: Tensor, group: Group) -> Tensor:
    """[M, heads, H] -> [B, T, heads, H], padded on the right."""
    if group.index is None:
        return x[group.start : group.stop].unflatten(0, (group.count, group.length))
    return x[group.index]
