"""Eight-bit weights: the contract of quantisation and of the two ways to multiply with it.

Letters: M rows, K input width, N output width, C kept columns. A weight is int8 with one float32
scale an output row, W = scale[:, None] * weight. Either it is dequantised and multiplied as any
other ("bf16" math), or the activations are quantised too, row by row, and int8 meets int8 ("int8"
math). The invariant: int8 products are exact integers, so all error is that of quantisation.

In int8 math the columns of largest magnitude are kept apart and multiplied unquantised, as
LLM.int8() does with outliers (Dettmers et al., arXiv 2208.07339). Here their number is fixed and
there is no threshold: a shape that no value changes needs no word with the host, and taking out a
column that is no outlier does no harm. Which columns those are depends on all rows of a
micro-batch, so in int8 math, and there alone, a note's result depends slightly on its neighbours.
"""

import torch
from torch import Tensor

# Columns kept apart, of the activations forward and of their gradients backward. LLaMA-like models
# have about half a dozen outlier channels a layer; a multiple of 16 costs tensor cores nothing.
KEPT_COLUMNS = 32
# The scale of a row of largest magnitude 1. A factor, because torch divides by a number on a GPU
# with its reciprocal and on a CPU without, which is not the same bits.
STEP = 1 / 127
# The smallest normal float32: a row of less has no scale whose reciprocal is finite.
TINY = 2.0**-126


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """q = round(x * (1 / scale)), ties to even, with scale = max |x| / 127 of each row.

    Bit by bit the same on every device: each step is one rounding of float32.

    Args:
        x: [M, K], floating.

    Returns:
        q [M, K] int8 in -127 to 127, scale [M] float32 (1 for a row of zeros or denormals).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = x.abs().amax(-1).to(wide).mul_(STEP)
    scale = torch.where(scale < TINY, 1.0, scale).float()
    q = x.to(wide) * scale.to(wide).reciprocal()[:, None]
    return q.round_().clamp_(-127.0, 127.0).to(torch.int8), scale


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale[:, None] * weight, multiplied in float32 or wider and rounded once.

    Args:
        weight: [N, K] int8; scale: [N] float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return weight.to(wide).mul_(scale.to(wide)[:, None]).to(dtype)


def kept_columns(x: Tensor, count: int) -> Tensor:
    """The `count` columns of x [M, K] with the largest magnitude anywhere: [C] int64."""
    count = min(count, x.shape[1])
    if len(x) == 0:  # an expert that no token chose
        return torch.arange(count, device=x.device)
    return x.abs().amax(0).topk(count, sorted=False).indices


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, kept: int = KEPT_COLUMNS) -> Tensor:
    """y = x W^T in int8: (q_x weight^T) * scale_x * scale, plus the kept columns' own product.

    Args:
        x: [M, K]; weight: [N, K] int8; scale: [N] float32.
        kept: how many columns are multiplied unquantised.

    Returns:
        [M, N] in x's dtype.
    """
    columns = kept_columns(x, kept)
    y = _int8_product(x.index_fill(1, columns, 0), weight.T) * scale
    kept_NC = dequantise(weight[:, columns], scale, x.dtype)
    return y.to(x.dtype).addmm_(x[:, columns], kept_NC.T)


def int8_linear_input_grad(
    dy: Tensor, weight: Tensor, scale: Tensor, kept: int = KEPT_COLUMNS
) -> Tensor:
    """dx = dy W in int8. The weight's scales go into dy first: the sum runs over output rows.

    Args:
        dy: [M, N]; weight: [N, K] int8; scale: [N] float32.

    Returns:
        [M, K] in dy's dtype.
    """
    scaled = dy * scale.to(dy.dtype)
    rows = kept_columns(scaled, kept)
    dx = _int8_product(scaled.index_fill(1, rows, 0), weight)
    return dx.to(dy.dtype).addmm_(scaled[:, rows], weight[rows].to(dy.dtype))


def _int8_product(x: Tensor, weight_KN: Tensor) -> Tensor:
    """x quantised by rows, times int8: [M, N] float32 with the rows' scales multiplied in."""
    q, scale = quantise_rows(x)
    product = _cublas_int_mm if q.is_cuda else torch._int_mm
    return product(q, weight_KN).float().mul_(scale[:, None])


def _cublas_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm` on a GPU, which refuses 16 rows and fewer, and widths off a multiple of 8."""
    (rows, depth), width = a.shape, b.shape[1]
    deeper, wider = -depth % 8, -width % 8
    if deeper or rows < 32:
        a = torch.nn.functional.pad(a, (0, deeper, 0, max(0, 32 - rows)))
    if deeper or wider:  # no layer of a published model: a pad would copy its weight
        b = torch.nn.functional.pad(b, (0, wider, 0, deeper))
    return torch._int_mm(a, b)[:rows, :width]
