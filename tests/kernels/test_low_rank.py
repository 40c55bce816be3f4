"""Linear layers with low-rank updates: every route beside the reference, masks bit by bit."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference, reference_int8
from kernels.reference import LinearOperands, LowRank
from tests.kernels.agreement import DEVICE, DTYPES, assert_agrees, random

pytestmark = pytest.mark.kernel

ROUTES = ["accumulate", "augmented", "started"]


class Update(NamedTuple):
    rank: int
    dropout: float = 0.0
    site: int = 1
    trains: tuple[bool, bool] = (True, True)  # A, B


class Layer(NamedTuple):
    width: int
    updates: tuple[Update, ...] = ()
    bias: bool = False
    trains_bias: bool = False
    int8: bool = False


# Neighbours under one mask, masks of their own, no mask, padded and split ranks, and none at all.
MIXED = (
    Layer(31, (Update(4, 0.1), Update(17, 0.0, 2), Update(3, 0.3, 3)), bias=True),
    Layer(19),
    Layer(70, (Update(40, 0.3, 3), Update(1, 0.3, 3)), bias=True, trains_bias=True),
)


def make_keys(rows: int) -> Tensor:
    tokens = torch.arange(rows, device=DEVICE)
    return reference.row_keys(11, tokens // 7, tokens % 7)


def make(
    rows: int,
    width: int,
    layers: Sequence[Layer],
    dtype: torch.dtype = torch.float32,
    *,
    x_trains: bool = True,
) -> tuple[tuple[Tensor, ...], Callable[..., list[LinearOperands]]]:
    """x and the tensors of the layers, and what makes operands of the latter."""
    x = random(rows, width, dtype=dtype, seed=0).requires_grad_(x_trains)
    tensors, seed = [x], 1
    for layer in layers:
        weight = random(layer.width, width, dtype=dtype, seed=seed, scale=width**-0.5)
        if layer.int8:
            tensors += reference_int8.quantise_rows(weight)
        else:
            tensors.append(weight)
        if layer.bias:
            bias = random(layer.width, dtype=dtype, seed=seed + 1)
            tensors.append(bias.requires_grad_(layer.trains_bias))
        for update in layer.updates:
            a = random(update.rank, width, dtype=torch.float32, seed=seed + 2, scale=width**-0.5)
            b = random(layer.width, update.rank, dtype=torch.float32, seed=seed + 3)
            tensors += (a.requires_grad_(update.trains[0]), b.requires_grad_(update.trains[1]))
            seed += 2
        seed += 4

    def operands(*tensors: Tensor) -> list[LinearOperands]:
        left = list(tensors)
        found = []
        for layer in layers:
            weight = left.pop(0)
            scale = left.pop(0) if layer.int8 else None
            bias = left.pop(0) if layer.bias else None
            adapters = tuple(
                LowRank(left.pop(0), left.pop(0), 0.7, update.dropout, update.site)
                for update in layer.updates
            )
            found.append(LinearOperands(weight, bias, adapters, scale))
        return found

    return tuple(tensors), operands


def compare(
    rows: int,
    width: int,
    layers: Sequence[Layer],
    dtype: torch.dtype = torch.float32,
    *,
    route: str | None = None,
    drops: bool = True,
    x_trains: bool = True,
    x: Tensor | None = None,
    douts: Sequence[Tensor] | None = None,
) -> None:
    from kernels.low_rank import lora_linear

    arguments, operands = make(rows, width, layers, dtype, x_trains=x_trains)
    arguments = arguments if x is None else (x, *arguments[1:])
    keys = make_keys(rows) if drops else None
    if douts is None:
        douts = [random(rows, y.width, dtype=dtype, seed=90 + i) for i, y in enumerate(layers)]
    assert_agrees(
        lambda x, *tensors: lora_linear(x, operands(*tensors), keys, route=route),
        lambda x, *tensors: reference.lora_linear(x, operands(*tensors), keys),
        arguments,
        douts,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_a_mixed_group_agrees_with_the_reference(route: str, dtype: torch.dtype) -> None:
    compare(37, 53, MIXED, dtype, route=route)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 1, 1), (3, 7, 11), (131, 67, 259)])
def test_shapes_of_one_primes_and_several_tiles(
    rows: int, width: int, out: int, route: str, dtype: torch.dtype
) -> None:
    compare(rows, width, [Layer(out, (Update(5, 0.1),), bias=True)], dtype, route=route)


@pytest.mark.parametrize("programs", [1, 4])
def test_a_program_goes_through_several_tiles_of_rows(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the sizes of models there are more tiles than programs.
    monkeypatch.setattr("kernels.down_projection._PROGRAMS", programs)
    compare(300, 20, [Layer(24, (Update(5, 0.1),)), Layer(9, (Update(3, 0.1, 2),))])


@pytest.mark.parametrize("rank", [1, 8, 16, 33, 100])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_ranks(rank: int, p: float) -> None:
    compare(20, 40, [Layer(24, (Update(rank, p),)), Layer(10, (Update(rank, p, 9),))])


def test_layers_without_adapters() -> None:
    compare(5, 12, [Layer(9, bias=True, trains_bias=True), Layer(4)])


@pytest.mark.parametrize("route", ROUTES)
def test_evaluation_drops_nothing(route: str) -> None:
    compare(9, 30, MIXED, route=route, drops=False)


@pytest.mark.parametrize(
    ("x_trains", "trains"),
    [
        (True, [(True, True), (False, False), (True, False)]),
        (False, [(True, True), (False, False), (True, False)]),
        (True, [(False, False), (False, True), (False, False)]),
        (False, [(False, False), (False, True), (False, False)]),
        (True, [(False, True), (True, False), (False, False)]),
        (False, [(False, True), (True, False), (False, False)]),
        (True, [(False, False), (False, False), (False, False)]),
    ],
    ids=str,
)
def test_frozen_and_trained_adapters_mix(trains: list[tuple[bool, bool]], x_trains: bool) -> None:
    first = (Update(4, 0.1, 1, trains[0]), Update(6, 0.1, 1, trains[1]))
    layers = [Layer(12, first), Layer(8, (Update(5, 0.2, 2, trains[2]),), True, x_trains)]
    compare(11, 18, layers, x_trains=x_trains)


@pytest.mark.parametrize("route", ROUTES)
def test_rows_and_columns_may_stand_apart(route: str) -> None:
    layers = [Layer(12, (Update(4, 0.2),)), Layer(3, (Update(2, 0.0),))]
    wide = random(14, 40, dtype=torch.float32, seed=5)[::2, :20].requires_grad_()
    turned = random(20, 7, dtype=torch.float32, seed=6).T.requires_grad_()
    one = random(1, 1, dtype=torch.float32, seed=7)
    douts = [random(12, 7, dtype=torch.float32, seed=8).T, one.expand(7, 3)]
    for x in (wide, turned):
        compare(7, 20, layers, route=route, x=x, douts=douts)


def test_masks_are_the_references_to_the_bit() -> None:
    from kernels.down_projection import Block, down_projection, input_gradient
    from kernels.hashing import threshold
    from kernels.up_projection import up_projection

    rows, width = 29, 61
    keys = make_keys(rows)
    sites = ((3, 0.05), (2**31 + 5, 0.5), (4, 0.9))
    blocks = tuple(
        Block(64 * i, 64, reference.low_word(site), threshold(p))
        for i, (site, p) in enumerate(sites)
    )
    ones = torch.ones(rows, width, device=DEVICE)
    expected = [reference.keep_mask(keys, width, p, site) for site, p in sites]
    # S = mask * x A^T with x = 1 and A = 1: the masks themselves.
    identity = torch.zeros(192, width, device=DEVICE)
    for i in range(3):
        identity[64 * i : 64 * i + width] = torch.eye(width, device=DEVICE)
    s = down_projection(ones, identity, blocks, keys)
    # dA = dS^T (mask * x) with x = 1 and dS = 1: their transposes.
    ds = torch.zeros(rows, 192, device=DEVICE)
    for i in range(3):
        ds[:, 64 * i : 64 * i + rows] = torch.eye(rows, device=DEVICE)
    da = input_gradient(ones, ds, blocks, keys)
    for i, mask in enumerate(expected):
        assert torch.equal(s[:, 64 * i : 64 * i + width], mask.float())
        assert torch.equal(da[64 * i : 64 * i + rows], mask.float())
        # mask * (dS A) with one rank of ones.
        narrower = (Block(0, 16, *blocks[i][2:]),)
        one = torch.zeros(rows, 16, device=DEVICE)
        one[:, 0] = 1
        out = up_projection(one, torch.ones(16, width, device=DEVICE), narrower, keys)
        assert torch.equal(out, mask.float())


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_bits_every_time(route: str) -> None:
    from kernels.low_rank import lora_linear

    (x, *tensors), operands = make(70, 40, MIXED, torch.float16)
    keys = make_keys(70)

    def once() -> list[Tensor]:
        outputs = lora_linear(x, operands(*tensors), keys, route=route)
        inputs = [x, *(t for t in tensors if t.requires_grad)]
        grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
        return [*outputs, *grads]

    first = once()
    for _ in range(20 if DEVICE == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_one_mask_over_neighbours_is_one_block() -> None:
    from kernels.down_projection import Block, merged

    q, k, v = (Block(16 * i, 16, 0, -(2**15)) for i in range(3))
    assert merged([q, k, v], 64) == (Block(0, 48, 0, -(2**15)),)
    assert merged([q, k, v], 32) == (Block(0, 32, 0, -(2**15)), v)
    assert merged([q, v], 64) == (q, v)
    assert merged([q, k._replace(site=5)], 64) == (q, k._replace(site=5))
    assert merged([Block(0, 80, 7, 0)], 64) == (Block(0, 64, 7, 0), Block(64, 16, 7, 0))


def test_a_trained_weight_goes_to_the_reference() -> None:
    from kernels.low_rank import lora_linear

    (x, weight, *factors), operands = make(6, 8, [Layer(5, (Update(2, 0.5),))])
    weight.requires_grad_()
    keys, grads = make_keys(6), []
    for operation in (reference.lora_linear, lora_linear):
        (y,) = operation(x, operands(weight, *factors), keys)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, *factors])])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rows_may_be_missing() -> None:
    from kernels.low_rank import lora_linear

    (x, *tensors), operands = make(0, 8, [Layer(5, (Update(2),))])
    (y,) = lora_linear(x, operands(*tensors), None)
    y.sum().backward()
    assert y.shape == (0, 5)
    assert x.grad is not None


def test_a_changed_weight_is_copied_again() -> None:
    from kernels.low_rank import lora_linear

    (x, *tensors), operands = make(4, 8, [Layer(5, (Update(2),))], x_trains=False)

    def both() -> list[Tensor]:
        layers = operands(*tensors)
        return [lora_linear(x, layers, route="augmented")[0], reference.lora_linear(x, layers)[0]]

    torch.testing.assert_close(*both())
    with torch.no_grad():
        tensors[0].mul_(2)
        tensors[2].add_(1)
    torch.testing.assert_close(*both())


# --- eight-bit weights --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 2051)], ids=str)
def test_dequantised_weights_are_the_references_to_the_bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    from kernels.dequantised import dequantise

    weight, scale = reference_int8.quantise_rows(random(*shape, dtype=torch.float32, seed=3))
    expected = reference_int8.dequantise(weight, scale, dtype)
    assert torch.equal(dequantise(weight, scale, dtype), expected)
    wide = torch.zeros(shape[0], shape[1] + 3, device=DEVICE, dtype=dtype)
    dequantise(weight, scale, dtype, out=wide[:, : shape[1]])
    assert torch.equal(wide[:, : shape[1]], expected)
    assert not wide[:, shape[1] :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", [None, *ROUTES])
def test_int8_weights_agree_with_the_reference(route: str | None, dtype: torch.dtype) -> None:
    updates = (Update(4, 0.1), Update(17, 0.0, 2))
    layers = [Layer(31, updates, bias=True, int8=True), Layer(40, (Update(8),), int8=True)]
    compare(23, 29, layers, dtype, route=route)


def test_int8_weights_without_adapters_are_dequantised_too() -> None:
    compare(5, 12, [Layer(9, bias=True, int8=True), Layer(4, int8=True)])


def test_what_is_kept() -> None:
    from kernels.low_rank import lora_linear

    def kept(*layers: Layer) -> set[tuple[int, ...]]:
        """Shapes of what autograd keeps and the caller does not hold."""
        (x, *tensors), operands = make(6, 8, layers)
        held = {tensor.data_ptr() for tensor in tensors}
        shapes = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in held and tensor.numel():
                shapes.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lora_linear(x, operands(*tensors), make_keys(6))
        return shapes

    # The keys; S; the padded A; the padded c B; and x.
    assert kept(Layer(5, (Update(2, 0.5),))) == {(6,), (6, 16), (16, 8), (5, 16), (6, 8)}
    frozen = Update(2, 0.5, trains=(False, True))
    assert kept(Layer(5, (frozen,))) == {(6,), (6, 16), (16, 8), (5, 16)}
    assert kept(Layer(5)) == {(6,)}


def test_the_route_is_a_matter_of_shape_and_type() -> None:
    from kernels.low_rank import _best

    def group(width: int, *layers: Layer) -> list[LinearOperands]:
        (_, *tensors), operands = make(1, width, layers)
        return operands(*tensors)

    adapter = (Update(2),)
    narrower, wider = Layer(16, adapter, int8=True), Layer(24, adapter, int8=True)
    assert _best(group(16, narrower)) == "accumulate"
    assert _best(group(16, narrower, wider)) == "augmented"
    assert _best(group(16, narrower, Layer(24, adapter))) == "accumulate"


def test_kernels_runs_them_where_they_are_forced() -> None:
    for layers in ([Layer(5, (Update(2, 0.5),))], [Layer(5, (Update(2, 0.5),), int8=True)]):
        (x, *tensors), operands = make(6, 8, layers)
        keys = make_keys(6)
        with kernels.force("triton"):
            (y,) = kernels.lora_linear(x, operands(*tensors), keys)
        assert type(y.grad_fn).__name__ == "_LowRankLinearBackward"
        (expected,) = kernels.lora_linear(x, operands(*tensors), keys)
        assert type(expected.grad_fn).__name__ == "_LoraLinearBackward"
        torch.testing.assert_close(y, expected)
