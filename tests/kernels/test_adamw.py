"""The kernel of eight-bit AdamW beside its reference: many tensors, one launch."""

import pytest
import torch
from torch import Tensor

from kernels.reference import (
    AdamWStep,
    EightBitStates,
    adamw_eight_bit,
    dequantise_state,
    dynamic_code,
)
from tests.kernels.agreement import DEVICE, random, relative_error

pytestmark = pytest.mark.kernel

SHAPES = [(1,), (3, 7), (256,), (5, 257), (16, 300)]
DECAYS = [0.0, 0.1, 0.0, 0.3, 0.1]


def fresh(shape: tuple[int, ...]) -> EightBitStates:
    count = torch.Size(shape).numel()
    codes = [torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    scales = [torch.zeros(-(-count // 256), device=DEVICE) for _ in range(2)]
    return EightBitStates(codes[0], scales[0], codes[1], scales[1])


def run(operation: object, steps: int) -> tuple[list[Tensor], list[EightBitStates]]:
    parameters = [random(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(SHAPES)]
    states = [fresh(shape) for shape in SHAPES]
    for t in range(1, steps + 1):
        gradients = [
            random(*shape, dtype=torch.float32, seed=100 * t + i)
            * random(*shape, dtype=torch.float32, seed=50 + i, scale=2.0).exp()
            for i, shape in enumerate(SHAPES)
        ]
        gradients[1][0] = 0.0
        numbers = AdamWStep(t, 0.01, 0.9, 0.999, 1e-8)
        operation(parameters, gradients, states, DECAYS, numbers)  # type: ignore[operator]
    return parameters, states


def test_agrees_with_the_reference() -> None:
    from kernels import adamw

    (found, states), (expected, wanted) = run(adamw.adamw_eight_bit, 3), run(adamw_eight_bit, 3)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-6
    signed, unsigned = (
        dynamic_code(is_signed=is_signed, device=found[0].device) for is_signed in (True, False)
    )
    for state, want in zip(states, wanted, strict=True):
        # A rounding of the arithmetic may decide between two codes of which neither is nearer.
        assert (state.mean != want.mean).sum() <= len(want.mean) // 1000
        assert (state.root != want.root).sum() <= len(want.root) // 1000
        for code, name in ((signed, "mean"), (unsigned, "root")):
            one, other = (
                dequantise_state(getattr(s, name), getattr(s, f"{name}_scale"), code)
                for s in (state, want)
            )
            assert relative_error(one, other) < 1e-3


@pytest.mark.parametrize("is_signed", [True, False])
def test_every_code_is_found(is_signed: bool) -> None:
    """Values on both sides of every bound between two codes, and the codes' own."""
    from kernels import adamw

    code = dynamic_code(is_signed=is_signed, device=torch.device(DEVICE))
    bounds = (code[:-1] + code[1:]) / 2
    values = torch.cat([code, bounds * (1 + 1e-5), bounds * (1 - 1e-5)])
    values = values if is_signed else values[values > 0]
    # One value a block, beside the largest of 1. The first update turns g into 0.1 g and |g|.
    gradient = torch.zeros(len(values), 256, device=DEVICE)
    gradient[:, 0], gradient[:, 1] = 1.0, values
    found, wanted = fresh(gradient.shape), fresh(gradient.shape)
    numbers = AdamWStep(1, 0.0, 0.0, 0.0, 1e-8)
    for operation, state in ((adamw.adamw_eight_bit, found), (adamw_eight_bit, wanted)):
        operation([torch.zeros_like(gradient)], [gradient], [state], [0.0], numbers)
    pairs = (found.mean, wanted.mean) if is_signed else (found.root, wanted.root)
    one, other = (codes.view(-1, 256)[:, 1] for codes in pairs)
    assert len(other.unique()) >= 255
    assert torch.equal(one, other)


def test_the_same_bits_every_time() -> None:
    from kernels import adamw

    first, *others = (run(adamw.adamw_eight_bit, 2) for _ in range(3))
    for parameters, states in others:
        assert all(torch.equal(a, b) for a, b in zip(first[0], parameters, strict=True))
        for a, b in zip(first[1], states, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
