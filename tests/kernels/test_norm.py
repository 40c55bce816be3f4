"""The norms' kernels beside their references, with frozen and trained weights."""

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.agreement import DTYPES, assert_agrees, random, run

pytestmark = pytest.mark.kernel

SHAPES = [(1, 1), (3, 7), (5, 257), (2, 1000), (1, 5120)]


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_agrees(shape: tuple[int, int], dtype: torch.dtype, is_frozen: bool) -> None:
    from kernels.norm import rms_norm

    x = random(*shape, dtype=dtype, seed=0).requires_grad_()
    weight = random(shape[1], dtype=dtype, seed=1).requires_grad_(not is_frozen)
    dy = random(*shape, dtype=dtype, seed=2)
    assert_agrees(rms_norm, reference.rms_norm, (x, weight, 1e-5), [dy])


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_and_its_norm_agree(
    shape: tuple[int, int], dtype: torch.dtype, is_frozen: bool
) -> None:
    from kernels.norm import add_rms_norm

    x, residual = (random(*shape, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight = random(shape[1], dtype=dtype, seed=2).requires_grad_(not is_frozen)
    douts = [random(*shape, dtype=dtype, seed=i) for i in (3, 4)]
    assert_agrees(add_rms_norm, reference.add_rms_norm, (x, residual, weight, 1e-5), douts)


def test_rows_may_stand_apart_and_the_weight_may_be_a_float32_master() -> None:
    from kernels.norm import add_rms_norm, rms_norm

    whole = random(6, 40, dtype=torch.float16, seed=0)
    x, residual = whole[:, :20].requires_grad_(), random(20, 6, dtype=torch.float16, seed=1).T
    weight = random(20, dtype=torch.float32, seed=2).requires_grad_()
    apart = random(6, 50, dtype=torch.float16, seed=3)[:, 5:25]
    assert_agrees(rms_norm, reference.rms_norm, (x, weight, 1e-5), [apart])
    arguments = (x, residual.requires_grad_(), weight, 1e-5)
    assert_agrees(add_rms_norm, reference.add_rms_norm, arguments, [apart, whole[:, 20:]])


def test_a_weights_gradient_sums_many_rows_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import norm
    from kernels.norm import rms_norm

    monkeypatch.setattr(norm, "_PARTS", 4)  # three rows a program, and two for the last
    x = random(11, 50, dtype=torch.float32, seed=0).requires_grad_()
    weight = random(50, dtype=torch.float32, seed=1).requires_grad_()
    dy = random(11, 50, dtype=torch.float32, seed=2)
    assert_agrees(rms_norm, reference.rms_norm, (x, weight, 1e-5), [dy])
    first, *others = (run(rms_norm, (x, weight, 1e-5), [dy]) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_wider_rows_are_the_references() -> None:
    x = random(1, 8193, dtype=torch.float32, seed=0).requires_grad_()
    weight = random(8193, dtype=torch.float32, seed=1)
    with kernels.force("triton"):
        y, (z, _) = kernels.rms_norm(x, weight, 1e-5), kernels.add_rms_norm(x, x, weight, 1e-5)
    assert torch.equal(y, reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(z, reference.add_rms_norm(x, x, weight, 1e-5)[0])


def test_rows_may_be_missing() -> None:
    from kernels.norm import add_rms_norm

    x, residual = (random(0, 8, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    weight = random(8, dtype=torch.float32, seed=2).requires_grad_()
    douts = [torch.empty_like(x).detach()] * 2
    assert_agrees(add_rms_norm, reference.add_rms_norm, (x, residual, weight, 1e-5), douts)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    from kernels.norm import rms_norm

    x = torch.zeros_like(random(2, 8, dtype=torch.float32, seed=0)).requires_grad_()
    weight = torch.ones_like(x[0]).detach()
    assert_agrees(rms_norm, reference.rms_norm, (x, weight, 1e-5), [torch.ones_like(x).detach()])
