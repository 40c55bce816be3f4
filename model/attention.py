"""Attention over a flat stream of segments, one function for every network and device.

Letters: M tokens of the stream, N query heads, G key-value heads, H head width, B segments of a
group, T their common length. The invariant: a token sees its own segment's past and nothing else.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.batch import Group, Segments


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention inside each segment, scaled by 1 / sqrt(H).

    Args:
        q: [M, N, H]; k, v: [M, G, H], positions already rotated in.

    Returns:
        [M, N, H].
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        # Here, not above: its import pulls in torch.compile, seconds that a CPU run never needs.
        from torch.nn.attention.varlen import varlen_attn

        longest = max(segments.lengths)
        cu = segments.cu_seqlens
        is_grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q, k, v, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=is_grouped
        )
        assert isinstance(out, Tensor)  # a pair only when more is asked for
        return out
    outputs = [_attend_group(q, k, v, group) for group in segments.groups]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
    q_BTNH, k_BTGH, v_BTGH = (_gather(x, group) for x in (q, k, v))
    out_BNTH = scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BTGH.transpose(1, 2),
        v_BTGH.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out_MNH = out_BNTH.transpose(1, 2).reshape(group.count * group.length, *q.shape[1:])
    return out_MNH if group.inverse is None else out_MNH[group.inverse]


def _gather(x: Tensor, group: Group) -> Tensor:
    """[M, heads, H] -> [B, T, heads, H], padded on the right."""
    if group.index is None:
        return x[group.start : group.stop].unflatten(0, (group.count, group.length))
    return x[group.index]
