"""The operations of the networks, one function per operation, and the choice of what runs them.

Each function takes plain tensors and has the contract written in `kernels.reference`, which is
plain torch with the backward passes written out by hand and runs everywhere. A Triton kernel takes
its place on a GPU where a recorded benchmark shows that it is faster (`RECORDED_WINS`). The
invariant: the choice depends on device, dtype and shape alone, never on values.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from kernels import reference, reference_int8
from kernels.reference import (
    AdamWStep,
    EightBitStates,
    LinearOperands,
    LowRank,
    Routing,
    combine,
    dispatch,
    keep_mask,
    route,
    row_keys,
    uniform,
)

# transformers probes for a package called `kernels` and parses its version.
__version__ = "0.0.0"

__all__ = [
    "AdamWStep",
    "EightBitStates",
    "LinearOperands",
    "LowRank",
    "Routing",
    "adamw_eight_bit",
    "add_rms_norm",
    "combine",
    "dequantise",
    "dispatch",
    "dropout",
    "force",
    "grouped_lora_linear",
    "int8_linear",
    "int8_linear_input_grad",
    "keep_mask",
    "linear_cross_entropy",
    "lora_linear",
    "quantise_rows",
    "rms_norm",
    "rope",
    "route",
    "row_keys",
    "swiglu",
    "uniform",
]

# What kernels are configured and compiled for. A block of another GPU may have less shared memory
# (100 KB at 86, 89 and 120), so there the references run, whatever is asked for.
CAPABILITIES = (80, 90, 100)

Backend = Literal["recorded", "reference", "triton"]

# Operation: the compute capabilities at which its kernel beats torch, eager and compiled, at the
# sizes of LLaMA. An entry needs its rows in benchmarks/results/kernels.csv, which a test looks up.
RECORDED_WINS: Mapping[str, frozenset[int]] = {}

_backend: Backend = "recorded"


@contextmanager
def force(backend: Backend) -> Iterator[None]:
    """Within the block run the references, or the Triton kernels wherever they can run.

    One choice for the whole process: autograd may compute a block again in a thread of its own.
    """
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def _is_fused(operation: str, x: Tensor) -> bool:
    """Whether the Triton kernel of an operation runs on x."""
    wins = CAPABILITIES if _backend == "triton" else RECORDED_WINS.get(operation, ())
    if x.dtype == torch.float64 or _backend == "reference" or not wins:
        return False
    if not x.is_cuda:
        return _backend == "triton"
    return exact_capability(x.device) in wins


def exact_capability(device: torch.device) -> int:
    """A GPU's compute capability, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def adamw_eight_bit(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[EightBitStates],
    decays: Sequence[float],
    numbers: AdamWStep,
) -> None:
    """One AdamW update of float32 parameters in place, states held in eight bits (2110.02861)."""
    if parameters and _is_fused("adamw_eight_bit", parameters[0]):
        from kernels import adamw

        if all(x.is_contiguous() for x in (*parameters, *gradients)):
            return adamw.adamw_eight_bit(parameters, gradients, states, decays, numbers)
    return reference.adamw_eight_bit(parameters, gradients, states, decays, numbers)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: x [M, D], weight [D] (arXiv 1910.07467)."""
    if _is_fused("rms_norm", x):
        from kernels import norm

        if x.shape[-1] <= norm.WIDEST:
            return norm.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and the sum, the new residual: x, residual [M, D]."""
    if _is_fused("add_rms_norm", x):
        from kernels import norm

        if x.shape[-1] <= norm.WIDEST:
            return norm.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn q [M, N, H] and k [M, G, H] by the angles of cos and sin [M, H / 2], half-split."""
    if _is_fused("rope", q):
        from kernels import rotary

        return rotary.rope(q, k, cos, sin)
    return reference.rope(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [M, F] (Shazeer 2020, arXiv 2002.05202)."""
    if _is_fused("swiglu", gate):
        from kernels import gated

        return gated.swiglu(gate, up)
    return reference.swiglu(gate, up)


def dropout(x: Tensor, p: float, keys: Tensor | None, site: int) -> Tensor:
    """Inverted dropout of x [M, K] (Srivastava et al. 2014); `keys` None means evaluation."""
    if _is_fused("dropout", x):
        from kernels import hashing

        return hashing.dropout(x, p, keys, site)
    return reference.dropout(x, p, keys, site)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(x W^T)[target]: x [M, D], weight [V, D], targets [M] int64."""
    if _is_fused("linear_cross_entropy", x):
        from kernels import head_loss

        return head_loss.linear_cross_entropy(x, weight, targets)
    return reference.linear_cross_entropy(x, weight, targets)


def lora_linear(
    x: Tensor, layers: Sequence[LinearOperands], dropout_keys: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x W^T + bias + sum of scaling * dropout(x) A^T B^T, for the layers that read x [M, K].

    With their adapters (arXiv 2106.09685): one [M, N] tensor a layer.
    """
    operation = "lora_linear"
    if any(layer.scale is not None for layer in layers):
        is_int8_math = any(layer.is_int8_math for layer in layers)
        operation = "lora_linear_int8_math" if is_int8_math else "lora_linear_int8"
    if _is_fused(operation, x):
        from kernels import low_rank

        return low_rank.lora_linear(x, layers, dropout_keys)
    return reference.lora_linear(x, layers, dropout_keys)


def grouped_lora_linear(
    x: Tensor,
    experts: Sequence[Sequence[LinearOperands]],
    offsets: Tensor,
    dropout_keys: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of each expert on its own rows of x [M, K], offsets[e] to offsets[e + 1]."""
    is_int8 = any(layer.scale is not None for layers in experts for layer in layers)
    if _is_fused("grouped_lora_linear_int8" if is_int8 else "grouped_lora_linear", x):
        from kernels import experts as grouped

        return grouped.grouped_lora_linear(x, experts, offsets, dropout_keys)
    return reference.grouped_lora_linear(x, experts, offsets, dropout_keys)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale[:, None] * weight as floats: weight [N, K] int8, scale [N]."""
    if dtype != torch.float64 and _is_fused("dequantise", weight):
        from kernels import dequantised

        return dequantised.dequantise(weight.contiguous(), scale.contiguous(), dtype)
    return reference_int8.dequantise(weight, scale, dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as int8 rows and their scales [M]: q = round(x / scale), scale = max |x| / 127."""
    if _is_fused("quantise_rows", x):
        from kernels import int8

        if x.numel() > 0 and x.shape[1] <= int8.WIDEST:
            return int8.quantise_rows(x)
    return reference_int8.quantise_rows(x)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T in int8 but for the largest columns: x [M, K], weight [N, K] int8, scale [N]."""
    if _is_fused("int8_linear", x):
        from kernels import int8

        if x.numel() > 0 and x.shape[1] <= int8.WIDEST:
            return int8.int8_linear(x, weight, scale)
    return reference_int8.int8_linear(x, weight, scale)


def int8_linear_input_grad(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dy W in int8 but for the largest columns: dy [M, N], weight [N, K] int8, scale [N]."""
    if _is_fused("int8_linear_input_grad", dy):
        from kernels import int8

        if dy.numel() > 0 and dy.shape[1] <= int8.WIDEST:
            return int8.int8_linear_input_grad(dy, weight, scale)
    return reference_int8.int8_linear_input_grad(dy, weight, scale)
