"""Attention over a flat stream of segments, one function for every network and device.

Letters: M tokens of the stream, N query heads, G key-value heads, H head width, B segments of a
group, T their common length in queries, S in keys, W window. The invariant: a token sees its own
segment and nothing else, and of that, where attention is causal, nothing after itself, and with a
window no key but itself and the W - 1 before it.
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
    window: int | None = None,
) -> Tensor:
    """Attention inside each segment, scaled by 1 / sqrt(H).

    Args:
        q: [M, N, H]; k, v: [M, G, H], positions already rotated in.
        segments: of the keys, and of the queries where `queries` does not say otherwise.
        queries: the queries' own segments, one for each of the keys'. Causal attention puts the
            last query of a segment beside its last key.
        causal: a query sees no key after itself.
        window: of causal attention, how many keys a query sees, its own included (as transformers
            counts; Mistral's own code counts one more). None: all.

    Returns:
        [M, N, H], a row for each query.
    """
    assert causal or window is None
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
            window_size=(-1 if window is None else window - 1, 0 if causal else -1),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)  # a pair only when more is asked for
        return out
    outputs, first = [], 0
    for keys in segments.groups:
        if queries is None and causal:
            # Padding stands on the right, where no query looks.
            outputs.append(_attend_group(q, k, v, keys, keys, None, causal=True, window=window))
        else:
            own = keys if queries is None else queries.group(first, first + keys.count)
            mask = _visible(own, keys, causal=causal, window=window)
            outputs.append(_attend_group(q, k, v, own, keys, mask))
        first += keys.count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _visible(queries: Group, keys: Group, *, causal: bool, window: int | None) -> Tensor | None:
    """Which keys each query of a group sees: [B, 1, T or 1, S] bool; None where it sees all."""
    places = torch.arange(keys.length, device=keys.lengths.device)
    lengths_B1 = keys.lengths[:, None]
    if causal and (queries.length > 1 or window is not None):
        ends_BT = (lengths_B1 - queries.lengths[:, None]) + places[: queries.length]
        # A padded query may look at padding: it is dropped, and never left without a key.
        ends_BT1 = ends_BT.clamp(max=keys.length - 1)[..., None]
        is_visible = places <= ends_BT1
        if window is not None:
            is_visible &= places > ends_BT1 - window
        return is_visible[:, None]
    return None if keys.index is None else (places < lengths_B1)[:, None, None]


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Group,
    keys: Group,
    mask: Tensor | None,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Attention of one group; `causal` and `window` are for queries that are the keys' own."""
    q_BNTH = _gather(q, queries).transpose(1, 2)
    k_BGSH, v_BGSH = (_gather(x, keys).transpose(1, 2) for x in (k, v))
    if window is not None and window < keys.length:
        out_BNTH = _windowed(q_BNTH, k_BGSH, v_BGSH, window)
    else:
        out_BNTH = scaled_dot_product_attention(
            q_BNTH,
            k_BGSH,
            v_BGSH,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    out_MNH = out_BNTH.transpose(1, 2).reshape(queries.count * queries.length, *q.shape[1:])
    return out_MNH if queries.inverse is None else out_MNH[queries.inverse]


# Queries of a block of windowed attention: its keys are W - 1 more, so longer blocks waste less,
# and shorter ones take less room for their mask.
WINDOW_BLOCK = 512


def _windowed(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, window: int) -> Tensor:
    """Causal attention with a window shorter than the keys, block by block: [B, N, T, H].

    The first W queries see all before them, without a mask. A later block of queries, of whatever
    place, stands alike to its keys, so one small mask serves all blocks.
    """
    length, enable_gqa = q_BNTH.shape[2], q_BNTH.shape[1] != k_BGTH.shape[1]
    step = min(WINDOW_BLOCK, window, length - window)
    # Query i of a block sees the block's keys i to i + W - 1.
    seen_TS = q_BNTH.new_ones(step, step + window - 1, dtype=torch.bool).tril(window - 1).triu()
    mask_TS = torch.zeros_like(seen_TS, dtype=q_BNTH.dtype).masked_fill_(~seen_TS, float("-inf"))
    blocks = [
        scaled_dot_product_attention(
            q_BNTH[:, :, :window],
            k_BGTH[:, :, :window],
            v_BGTH[:, :, :window],
            is_causal=True,
            enable_gqa=enable_gqa,
        )
    ]
    for start in range(window, length, step):
        stop = min(start + step, length)
        near = slice(start - window + 1, stop)
        blocks.append(
            scaled_dot_product_attention(
                q_BNTH[:, :, start:stop],
                k_BGTH[:, :, near],
                v_BGTH[:, :, near],
                attn_mask=mask_TS[: stop - start, : stop - near.start],
                enable_gqa=enable_gqa,
            )
        )
    return torch.cat(blocks, dim=2)


def _gather(x: Tensor, group: Group) -> Tensor:
    """[M, heads, H] -> [B, T, heads, H], padded on the right."""
    if group.index is None:
        return x[group.start : group.stop].unflatten(0, (group.count, group.length))
    return x[group.index]
