"""What a benchmark of one operation consists of; `kernels.bench` runs it.

Each operation's file lists its cases as `cases()`, at the shapes of LLaMA-7B, 13B and Mistral-7B.
The invariant: both sides get the same random tensors, never zeros, which a GPU multiplies faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Forward pass of one side: arguments -> its outputs.
Operation = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape."""

    operation: str  # a key of `kernels.RECORDED_WINS`
    shape: str  # for the reader, such as "LLaMA-7B q, M=8192"
    # Arguments of both sides; tensors that want a gradient say so. `shrink` divides the row
    # count M (and a vocabulary), so that the same case can be tried on a CPU.
    make: Callable[[torch.device, torch.dtype, int], tuple[object, ...]]
    kernel: Operation
    reference: Operation
    # How one would write it in torch, for torch.compile; None where that is the reference.
    plain: Operation | None = None
    # What remains where the operation adds something, such as the product under an adapter.
    bare: Operation | None = None
    flops: float = 0.0  # forward and backward together; 0 where memory is the limit
    bytes: float = 0.0  # read and written at least once, forward and backward together
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True


# Rows M of a micro-batch; (D, F, V, width of keys) of the models.
ROWS = 8192
MODELS = {
    "LLaMA-7B": (4096, 11008, 32000, 4096),
    "LLaMA-13B": (5120, 13824, 32000, 5120),
    "Mistral-7B": (4096, 14336, 32000, 1024),
}
