"""A kernel beside its reference: same arguments, judged against the reference in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 is wrong; a GPU's is what is trained in.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def run(operation: Operation, arguments: Sequence[object], douts: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every floating argument that asks for one."""
    inputs = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(a, Tensor) and a.requires_grad
        else a
        for a in arguments
    ]
    outputs = operation(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [d.to(o.dtype) for o, d in zip(outputs, douts, strict=True)])
    grads = [a.grad for a in inputs if isinstance(a, Tensor) and a.requires_grad]
    assert all(grad is not None for grad in grads)
    return [output.detach() for output in outputs] + grads  # type: ignore[operator]


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Relative L2 error; NaN and infinity are errors without end."""
    found, truth = found.detach().double(), truth.detach().double()
    distance, size = torch.linalg.vector_norm(found - truth), torch.linalg.vector_norm(truth)
    error = float(distance / size) if size > 0 else float(distance)
    return error if error == error else float("inf")


def assert_agrees(
    kernel: Operation,
    reference: Operation,
    arguments: Sequence[object],
    douts: Sequence[Tensor],
) -> None:
    """The kernel's outputs and gradients err at most twice as much as the reference's own.

    Errors are taken against the reference in float64. A reference that is exact by luck is granted
    one rounding of the dtype.
    """

    def wide(a: object) -> object:
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.detach().double().requires_grad_(a.requires_grad)
        return a

    truth = run(reference, [wide(a) for a in arguments], douts)
    expected = run(reference, arguments, douts)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN then, so unwritten places show
    try:
        found = run(kernel, arguments, douts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(found) == len(expected)
    for i, (f, e, t) in enumerate(zip(found, expected, truth, strict=True)):
        assert f.shape == e.shape and f.dtype == e.dtype, f"tensor {i} is another kind of tensor"
        rounding = torch.finfo(e.dtype).eps if e.is_floating_point() else 0.0
        allowed = 2 * max(relative_error(e, t), rounding)
        assert relative_error(f, t) <= allowed, (
            f"tensor {i}: relative error {relative_error(f, t):.2e}, allowed {allowed:.2e}"
        )
