"""The language-model head and its cross-entropy on a GPU, without ever holding all logits.

Letters: M supervised rows, C rows of a chunk, D width, V vocabulary. A chunk's logits are one
library product; a kernel turns them into their own gradient in place, softmax minus one-hot, and
the row's loss; a second product takes the gradient to the rows. A frozen head needs no third.
For M = 16,384, D = 4,096 and V = 32,000 the products are 8.6e12 operations and the logits pass
through memory three times, 3.1 GB: on an H200 (790 TFLOP/s, 4.3 TB/s) 10.9 ms and 0.7 ms. The
invariant: `kernels.reference.linear_cross_entropy` is the contract.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.build import OPTIONS, Build
from kernels.timing import MODELS, ROWS, Case

# Logits of one chunk, in elements: 128 MiB of bfloat16, whole waves of tiles at V = 32,000.
CHUNK_ELEMENTS = 1 << 26
_BLOCK, _WARPS = 4096, 8


@triton.jit
def _cross_entropy(logits, targets, losses, stride, V, BLOCK: tl.constexpr):
    """One row: its loss, and its logits overwritten by their gradient."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target = tl.load(targets + row)
    wanted = tl.load(start + target).to(tl.float32)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(start + columns, columns < V, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(z))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(z - above))
        highest = above
    # Logits that are not finite must show in the loss, not vanish in a maximum.
    tl.store(losses + row, tl.log(total) + highest - wanted)
    tl.debug_barrier()  # `wanted` is read before any thread overwrites it
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(start + columns, columns < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - highest) / total - tl.where(columns == target, 1.0, 0.0)
        tl.store(start + columns, gradient.to(logits.dtype.element_ty), columns < V)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows, vocabulary = x.shape[0], weight.shape[0]
        w = weight.to(x.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(weight, dtype=torch.float32)
        losses_M = x.new_empty(rows, dtype=torch.float32)
        step = max(1, min(rows, CHUNK_ELEMENTS // vocabulary))
        buffer = x.new_empty(step, vocabulary)
        for start in range(0, rows, step):
            x_CD = x[start : start + step]
            logits_CV = torch.mm(x_CD, w.T, out=buffer[: len(x_CD)])
            _cross_entropy[(len(x_CD),)](
                logits_CV, targets[start : start + step], losses_M[start : start + step],
                vocabulary, vocabulary, BLOCK=_BLOCK, num_warps=_WARPS, **OPTIONS,
            )  # fmt: skip
            if dx is not None:
                torch.mm(logits_CV, w, out=dx[start : start + step])
            if dw is not None:
                dw += _wide_product(logits_CV.T, x_CD)
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return losses_M.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *reference.times_loss_gradient(ctx.saved_tensors, dloss), None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32: half-precision products are exact, only their sum would be rounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`kernels.reference.linear_cross_entropy`; x [M, D], weight [V, D], targets [M] int64."""
    return _LinearCrossEntropy.apply(x.contiguous(), weight, targets.contiguous())


def builds(capability: int) -> list[Build]:
    """The kernel as it is launched, the same at every capability."""
    return [
        Build(
            kernel=_cross_entropy,
            signature={
                "logits": "*bf16", "targets": "*i64", "losses": "*fp32", "stride": "i32", "V": "i32"
            },
            constants={"BLOCK": _BLOCK},
            num_warps=_WARPS,
            divisible=("stride", "V"),
        )
    ]  # fmt: skip


def cases() -> list[Case]:
    """A frozen and a trainable head at the models' shapes, and a large vocabulary."""

    def case(model: str, width: int, vocabulary: int, is_frozen: bool) -> Case:
        rows = 2 * ROWS

        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[Tensor, ...]:
            count, pieces = max(1, rows // shrink), max(1, vocabulary // shrink)
            x = torch.randn(count, width, device=device, dtype=dtype)
            w = torch.randn(pieces, width, device=device, dtype=dtype) * width**-0.5
            targets = torch.randint(pieces, (count,), device=device)
            return x.requires_grad_(), w.requires_grad_(not is_frozen), targets

        def plain(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy((x @ w.T).float(), targets, reduction="sum")

        return Case(
            operation="linear_cross_entropy",
            shape=f"{model} {'frozen' if is_frozen else 'trained'} head, M={rows}",
            make=make,
            kernel=linear_cross_entropy,
            reference=reference.linear_cross_entropy,
            plain=plain,
            flops=(4.0 if is_frozen else 6.0) * rows * width * vocabulary,
        )

    return [
        *(case(model, width, v, True) for model, (width, _, v, _) in MODELS.items()),
        case("LLaMA-7B", 4096, 32000, False),
        case("LLaMA-3-8B", 4096, 128256, True),
    ]
