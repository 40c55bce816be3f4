"""Each operation against autograd of its formula in float64, and the counter-based randomness."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

import kernels
from kernels import LinearOperands, LowRank, reference


def make(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def agree(ours: Tensor, truth: Tensor, inputs: list[Tensor], tolerance: float = 1e-12) -> None:
    """The outputs and, for a random upstream gradient, the gradients of every input are equal."""
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(truth)
    got = torch.autograd.grad(ours, inputs, upstream)
    wanted = torch.autograd.grad(truth, inputs, upstream)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 64)])
def test_rms_norm_is_its_formula(shape: tuple[int, int]) -> None:
    x, weight = make(*shape), make(shape[1], seed=1)
    truth = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    agree(kernels.rms_norm(x, weight, 1e-5), truth, [x, weight])


def test_add_rms_norm_is_the_norm_of_the_sum_and_the_sum() -> None:
    x, residual, weight = make(5, 9), make(5, 9, seed=1), make(9, seed=2)
    total = x + residual
    truth = torch.cat([kernels.rms_norm(total, weight, 1e-5), total])
    agree(torch.cat(kernels.add_rms_norm(x, residual, weight, 1e-5)), truth, [x, residual, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_rms_norm_gives_the_bits_of_its_parts(dtype: torch.dtype) -> None:
    x, residual, dy, dtotal = (make(7, 33, seed=i).detach().to(dtype) for i in range(4))
    weight = make(33, seed=4).detach().to(dtype)
    found, wanted = [], []
    for results, is_fused in ((found, True), (wanted, False)):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        if is_fused:
            outputs = kernels.add_rms_norm(*leaves, 1e-5)
        else:
            total = leaves[0] + leaves[1]
            outputs = kernels.rms_norm(total, leaves[2], 1e-5), total
        torch.autograd.backward(outputs, [dy, dtotal])
        results += [*outputs, *(leaf.grad for leaf in leaves)]
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_rms_norm_of_a_zero_row_is_zero() -> None:
    x = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    y = kernels.rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-5)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 3), (4, 0)])
def test_rope_turns_pairs_of_halves(heads: tuple[int, int]) -> None:
    q, k = make(5, heads[0], 8), make(5, heads[1], 8, seed=1)
    angles = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    truth = []
    for x in (q, k):
        # The pair (first half, second half) is a complex number turned by its angle.
        pair = torch.complex(x[..., :4], x[..., 4:])
        turned = pair * torch.polar(torch.ones_like(angles), angles)[:, None]
        truth.append(torch.cat([turned.real, turned.imag], -1))
    ours = kernels.rope(q, k, angles.cos(), angles.sin())
    agree(torch.cat(ours, 1), torch.cat(truth, 1), [q, k])


def test_swiglu_is_its_formula() -> None:
    gate, up = make(7, 13), make(7, 13, seed=1)
    agree(kernels.swiglu(gate, up), F.silu(gate) * up, [gate, up])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_linear_is_the_sum_of_its_parts(p: float) -> None:
    x = make(6, 5)
    keys = kernels.row_keys(11, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    weights = [make(4, 5, seed=1), make(3, 5, seed=2)]
    bias = make(4, seed=3)
    factors = [(make(2, 5, seed=4), make(4, 2, seed=5)), (make(3, 5, seed=6), make(4, 3, seed=7))]
    only = (make(2, 5, seed=8), make(3, 2, seed=9))
    # One adapter of the first layer never drops, so dropping and plain updates stand together.
    first = (LowRank(*factors[0], 0.5, p, 1), LowRank(*factors[1], 2.0, 0.0, 2))
    layers = [
        LinearOperands(weights[0], bias, first),
        LinearOperands(weights[1], None, (LowRank(*only, 1.5, p, 3),)),
    ]

    def branch(adapter: LowRank) -> Tensor:
        kept = kernels.keep_mask(keys, 5, adapter.dropout, adapter.site).double()
        dropped = x * kept / (1 - round(adapter.dropout * 2**16) / 2**16)
        return adapter.scaling * dropped @ adapter.A.T @ adapter.B.T

    truth = [
        F.linear(x, layer.weight, layer.bias) + sum(branch(adapter) for adapter in layer.adapters)
        for layer in layers
    ]
    inputs = [x, *weights, bias, *factors[0], *factors[1], *only]
    outputs = kernels.lora_linear(x, layers, keys)
    agree(torch.cat(outputs, 1), torch.cat(truth, 1), inputs)


def test_lora_linear_gives_frozen_tensors_no_gradient() -> None:
    x = torch.randn(3, 4)
    weight, a, b = torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    trained = LowRank(a.clone().requires_grad_(), b.clone().requires_grad_(), 1.0, 0.0, 1)
    frozen = LowRank(a, b, 1.0, 0.0, 2)
    (y,) = kernels.lora_linear(x, [LinearOperands(weight, None, (trained, frozen))])
    y.sum().backward()
    assert trained.A.grad is not None
    assert trained.B.grad is not None
    assert frozen.A.grad is None
    assert weight.grad is None
    assert x.grad is None


def test_lora_linear_in_evaluation_does_not_drop() -> None:
    x = torch.randn(3, 4)
    adapter = LowRank(torch.randn(2, 4), torch.randn(5, 2), 1.0, 0.9, 1)
    weight = torch.randn(5, 4)
    (y,) = kernels.lora_linear(x, [LinearOperands(weight, None, (adapter,))], None)
    torch.testing.assert_close(y, x @ weight.T + x @ adapter.A.T @ adapter.B.T)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_linear_cross_entropy_is_torchs_over_any_number_of_chunks(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.reference, "CHUNK_ELEMENTS", 7 * 11)
    x, weight = make(rows, 6), make(11, 6, seed=1)
    targets = torch.arange(rows) % 11
    truth = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    agree(kernels.linear_cross_entropy(x, weight, targets), truth, [x, weight])


def test_linear_cross_entropy_of_a_hopeless_target_is_finite() -> None:
    x = torch.tensor([[300.0, 0.0]], requires_grad=True)
    loss = kernels.linear_cross_entropy(x, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 300.0
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, -1.0]]))


def test_dropout_gradcheck() -> None:
    keys = kernels.row_keys(3, torch.arange(4), torch.arange(4))
    assert gradcheck(lambda x: kernels.dropout(x, 0.4, keys, 7), (make(4, 9),))


def test_masks_are_a_function_of_seed_sample_position_and_site_alone() -> None:
    samples = torch.tensor([5, 5, 5, 9, 9])
    positions = torch.tensor([0, 1, 2, 0, 1])
    keys = kernels.row_keys(42, samples, positions)
    mask = kernels.keep_mask(keys, 33, 0.5, site=3)
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = kernels.row_keys(42, samples[order], positions[order])
    assert torch.equal(kernels.keep_mask(shuffled, 33, 0.5, site=3), mask[order])
    assert torch.equal(kernels.keep_mask(keys[1:2], 20, 0.5, site=3), mask[1:2, :20])
    for other in (
        kernels.keep_mask(keys, 33, 0.5, site=4),
        kernels.keep_mask(kernels.row_keys(43, samples, positions), 33, 0.5, site=3),
        kernels.keep_mask(kernels.row_keys(42 + 2**32, samples, positions), 33, 0.5, site=3),
        kernels.keep_mask(kernels.row_keys(42, samples + 2**32, positions), 33, 0.5, site=3),
    ):
        assert 0.3 < (other == mask).double().mean() < 0.7


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_keep_the_stated_share_without_visible_structure(p: float) -> None:
    rows, width = 2048, 511
    keys = kernels.row_keys(7, torch.arange(rows) // 128, torch.arange(rows) % 128)
    keep = kernels.keep_mask(keys, width, p, site=1).double() - (1 - p)
    count = rows * width
    deviation = math.sqrt(p * (1 - p))
    assert abs(keep.mean()) < 4.5 * deviation / math.sqrt(count)
    assert keep.mean(0).abs().max() < 5 * deviation / math.sqrt(rows)
    assert keep.mean(1).abs().max() < 5 * deviation / math.sqrt(width)
    other = kernels.keep_mask(keys, width, p, site=2).double() - (1 - p)
    pairs = [
        keep[:, 1:] * keep[:, :-1],  # the two halves of a hash, and neighbouring hashes
        keep[:, 2:] * keep[:, :-2],
        keep[1:] * keep[:-1],
        keep * other,
    ]
    for product in pairs:
        assert abs(product.mean()) < 4.5 * p * (1 - p) / math.sqrt(product.numel())


def test_hand_written_gradients_are_those_of_small_differences() -> None:
    """gradcheck, in float64: the backward passes owe nothing to autograd."""
    x, y, weight = make(3, 6, seed=1), make(3, 6, seed=2), make(6, seed=3)
    assert gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-5), (x, weight))
    assert gradcheck(lambda x, y, w: reference.add_rms_norm(x, y, w, 1e-5), (x, y, weight))
    assert gradcheck(reference.swiglu, (x, y))
    q, k, angles = make(3, 2, 4, seed=4), make(3, 1, 4, seed=5), make(3, 2, seed=6).detach()
    assert gradcheck(lambda q, k: reference.rope(q, k, angles.cos(), angles.sin()), (q, k))
    head, targets = make(5, 6, seed=7), torch.tensor([0, 4, 2])
    assert gradcheck(lambda x, w: reference.linear_cross_entropy(x, w, targets), (x, head))
    a, b, bias = make(2, 6, seed=8), make(4, 2, seed=9), make(4, seed=10)
    base, keys = make(4, 6, seed=11), torch.arange(3, dtype=torch.int32)

    def layer(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        adapter = LowRank(a, b, 0.5, 0.25, 3)
        return reference.lora_linear(x, [LinearOperands(w, bias, (adapter,))], keys)[0]

    assert gradcheck(layer, (x, base, bias, a, b))
    weights, routing = reference.route(make(3, 4, seed=12).detach(), 2)
    rows, weights = make(6, 6, seed=13), weights.requires_grad_()
    assert gradcheck(lambda y, w: reference.combine(y, w, routing), (rows, weights))
    assert gradcheck(lambda x: reference.dispatch(x, routing), (x,))
