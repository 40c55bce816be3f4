"""Eight-bit weights on the reference path: exact integers, bounded errors, outliers kept."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.reference import LinearOperands, LowRank, row_keys
from kernels.reference_int8 import (
    _cublas_int_mm,
    dequantise,
    int8_linear,
    int8_linear_input_grad,
    kept_columns,
    quantise_rows,
)
from tests.kernels.agreement import relative_error

M, K, N = 96, 512, 384


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_outliers(x: Tensor, seed: int = 7) -> Tensor:
    """Six channels at 20 to 60 times the rest."""
    x = x.clone()
    chosen = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:6]
    x[:, chosen] *= torch.linspace(20, 60, 6)
    return x


def test_quantisation_is_that_of_bitsandbytes() -> None:
    import bitsandbytes.functional  # here, so that the other tests need nothing besides torch

    x = normal(33, 257, seed=0).half()
    theirs, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(x)
    ours, scale = quantise_rows(x)
    torch.testing.assert_close(scale * 127, absmax.float(), rtol=1e-6, atol=0)
    # A value that lies on a tie may fall to either side in the other's arithmetic.
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_quantisation_keeps_zeros_extremes_and_its_bound() -> None:
    x = normal(40, 65, seed=1)
    x[3] = 0
    q, scale = quantise_rows(x)
    assert q[3].abs().max() == 0 and scale[3] == 1
    live = torch.arange(40) != 3
    assert (q[live].abs().amax(-1) == 127).all()
    error = (dequantise(q, scale, torch.float32) - x).abs()
    assert (error <= scale[:, None] * 0.5 * (1 + 1e-5)).all()


def test_products_are_exact_integers() -> None:
    w, _ = quantise_rows(normal(N, K, seed=2))
    x = torch.randint(-127, 128, (M, K), generator=torch.Generator().manual_seed(3)).float()
    x[:, 0] = 127  # so that every row's scale is 1
    y = int8_linear(x.double(), w, torch.ones(N), kept=0)
    assert torch.equal(y, x.double() @ w.double().T)


@pytest.mark.parametrize("kept", [0, 1, 32, K, 2 * K])
def test_kept_columns_are_unquantised(kept: int) -> None:
    x = with_outliers(normal(M, K, seed=4))
    assert len(kept_columns(x, kept)) == min(kept, K)
    w, scale = quantise_rows(normal(N, K, seed=5, scale=0.02))
    y = int8_linear(x, w, scale, kept=kept)
    truth = x.double() @ dequantise(w, scale, torch.float64).T
    assert relative_error(y, truth) < (1e-6 if kept >= K else 0.2)


def test_outliers_kept_hold_outputs_and_gradients_to_a_percent_and_only_then() -> None:
    x = with_outliers(normal(M, K, seed=6))
    dy = with_outliers(normal(M, N, seed=8))
    w, scale = quantise_rows(normal(N, K, seed=9, scale=0.02))
    wide = dequantise(w, scale, torch.float64)
    y, dx = x.double() @ wide.T, dy.double() @ wide
    assert relative_error(int8_linear(x, w, scale), y) < 0.01
    assert relative_error(int8_linear_input_grad(dy, w, scale), dx) < 0.01
    assert relative_error(int8_linear(x, w, scale, kept=0), y) > 0.01
    assert relative_error(int8_linear_input_grad(dy, w, scale, kept=0), dx) > 0.01


@pytest.mark.parametrize("is_int8_math", [False, True])
def test_a_linear_layer_over_int8(is_int8_math: bool) -> None:
    """The base is dequantised or int8, adapters and bias are as over any other weight."""
    x = with_outliers(normal(M, K, seed=10)).requires_grad_()
    w, scale = quantise_rows(normal(N, K, seed=11, scale=0.02))
    bias = normal(N, seed=12).requires_grad_()
    a = normal(4, K, seed=13, scale=0.05).requires_grad_()
    b = normal(N, 4, seed=14).requires_grad_()
    adapter = LowRank(a, b, 0.5, 0.1, 3)
    keys = row_keys(1, torch.zeros(M, dtype=torch.int64), torch.arange(M))
    dense = dequantise(w, scale, torch.float32)
    dy = normal(M, N, seed=15)
    results = []
    for layer in (
        LinearOperands(w, bias, (adapter,), scale, is_int8_math),
        LinearOperands(dense, bias, (adapter,)),
    ):
        (y,) = reference.lora_linear(x, [layer], keys)
        results.append((y, *torch.autograd.grad(y, (x, bias, a, b), dy)))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < (0.01 if is_int8_math else 1e-6)


def test_float64_gradients_of_dequantised_math() -> None:
    w, scale = quantise_rows(normal(5, 7, seed=16))
    x = normal(3, 7, seed=17).double().requires_grad_()
    layer = LinearOperands(w, None, (), scale)
    assert torch.autograd.gradcheck(lambda x: reference.lora_linear(x, [layer])[0], (x,))


@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 7, 5), (16, 64, 24), (17, 8, 16), (33, 9, 3)])
def test_products_have_the_shapes_that_a_gpu_takes(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token at a time too: cuBLAS refuses few rows, and widths that are no multiples of 8."""
    plain = torch._int_mm

    def as_on_a_gpu(a: Tensor, b: Tensor) -> Tensor:
        assert len(a) >= 32 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", as_on_a_gpu)
    rows, depth, width = shape
    a = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
    for b in (
        torch.randint(-127, 128, (depth, width), dtype=torch.int8),
        torch.randint(-127, 128, (width, depth), dtype=torch.int8).T,
    ):
        assert torch.equal(_cublas_int_mm(a, b).long(), a.long() @ b.long())


def test_rows_may_be_missing() -> None:
    w, scale = quantise_rows(normal(5, 7, seed=18))
    assert int8_linear(torch.zeros(0, 7), w, scale).shape == (0, 5)
    assert int8_linear_input_grad(torch.zeros(0, 5), w, scale).shape == (0, 7)
