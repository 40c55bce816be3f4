"""The experts' kernels beside their reference, for every way that rows can fall."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LinearOperands, LowRank, reference, reference_int8
from kernels.reference_int8 import quantise_rows
from tests.kernels.agreement import DEVICE, DTYPES, assert_agrees, random, run

pytestmark = pytest.mark.kernel


def keys_of(rows: int) -> Tensor:
    positions = torch.arange(rows)
    return kernels.row_keys(1, positions // 7, positions % 7).to(DEVICE)


def make(
    offsets: Sequence[int],
    width: int,
    outputs: Sequence[int],
    ranks: Sequence[tuple[int, float]],
    dtype: torch.dtype,
    *,
    is_int8: bool = False,
) -> tuple[Any, tuple[Tensor, ...], list[Tensor]]:
    """What makes operands of tensors, the tensors (x, then all A and B), and douts.

    ranks: rank and dropout of each adapter of each layer.
    """
    experts, rows = len(offsets) - 1, offsets[-1]
    x = random(rows, width, dtype=dtype, seed=0).requires_grad_()
    weights = [
        [
            random(n, width, dtype=dtype, seed=10 * e + i + 1, scale=width**-0.5)
            for e in range(experts)
        ]
        for i, n in enumerate(outputs)
    ]
    eights = [[quantise_rows(weight) for weight in layer] for layer in weights]
    adapters: list[Tensor] = []
    for e in range(experts):
        for i, n in enumerate(outputs):
            for r, (rank, _) in enumerate(ranks):
                seed = 1000 + 100 * e + 10 * i + r
                a = random(rank, width, dtype=torch.float32, seed=seed, scale=width**-0.5)
                b = random(n, rank, dtype=torch.float32, seed=seed + 50)
                adapters += (a.requires_grad_(), b.requires_grad_())

    def operands(x: Tensor, flat: Sequence[Tensor]) -> list[tuple[LinearOperands, ...]]:
        pairs = iter(zip(flat[::2], flat[1::2], strict=True))
        found = []
        for e in range(experts):
            layers = []
            for i in range(len(outputs)):
                own = tuple(
                    LowRank(*next(pairs), 0.5 + r, p, 100 * e + 10 * i + r)
                    for r, (_, p) in enumerate(ranks)
                )
                q, scale = eights[i][e]
                layers.append(
                    LinearOperands(q, None, own, scale)
                    if is_int8
                    else LinearOperands(weights[i][e].to(x.dtype), None, own)
                )
            found.append(tuple(layers))
        return found

    douts = [random(rows, n, dtype=dtype, seed=90 + i) for i, n in enumerate(outputs)]
    return operands, (x, *adapters), douts


def of(operation: Any, operands: Any, offsets: Sequence[int], keys: Tensor | None) -> Any:
    bounds = torch.tensor(offsets, device=DEVICE)
    return lambda x, *flat: operation(x, operands(x, flat), bounds, keys)


def compare(
    offsets: Sequence[int],
    width: int,
    outputs: Sequence[int],
    ranks: Sequence[tuple[int, float]],
    dtype: torch.dtype,
    *,
    is_int8: bool = False,
    is_training: bool = True,
) -> None:
    from kernels.experts import grouped_lora_linear

    operands, arguments, douts = make(offsets, width, outputs, ranks, dtype, is_int8=is_int8)
    keys = keys_of(offsets[-1]) if is_training else None
    assert_agrees(
        of(grouped_lora_linear, operands, offsets, keys),
        of(reference.grouped_lora_linear, operands, offsets, keys),
        arguments,
        douts,
    )


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of the kernels that leaves the reference to itself is no test of them."""
    from kernels import experts

    def refuse(*arguments: object) -> None:
        raise AssertionError("the reference ran in the kernels' place")

    class Shadow:
        grouped_lora_linear = staticmethod(refuse)

        def __getattr__(self, name: str) -> object:
            return getattr(reference, name)

    monkeypatch.setattr(experts, "reference", Shadow())


ONE = [(4, 0.25)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "offsets",
    [[0, 1], [0, 0, 1], [0, 3, 3, 3, 10], [0, 0, 0, 130], [0, 129, 140, 258, 331]],
    ids=str,
)
def test_rows_fall_anyhow(offsets: list[int], dtype: torch.dtype) -> None:
    compare(offsets, 33, [35, 18], ONE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "output"), [(1, 1), (7, 131), (70, 3), (131, 150)])
def test_widths_of_one_primes_and_several_tiles(
    width: int, output: int, dtype: torch.dtype
) -> None:
    compare([0, 5, 17, 17, 40], width, [output], ONE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [[], [(1, 0.0)], [(16, 0.1), (3, 0.0)], [(70, 0.5)]], ids=str)
@pytest.mark.parametrize("is_training", [True, False])
def test_adapters(ranks: list[tuple[int, float]], is_training: bool, dtype: torch.dtype) -> None:
    compare([0, 9, 20, 33], 21, [19, 12], ranks, dtype, is_training=is_training)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_weights(dtype: torch.dtype) -> None:
    compare([0, 9, 9, 33], 21, [19, 12], ONE, dtype, is_int8=True)


def test_one_layer_of_the_group_may_have_no_adapter() -> None:
    from kernels.experts import grouped_lora_linear

    offsets = [0, 6, 20]
    operands, arguments, douts = make(offsets, 21, [19, 12], ONE, torch.float32)

    of_second_layer = (arguments[0], *arguments[3:5], *arguments[7:9])

    def of_second(operation: Any) -> Any:
        def run(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            unused = [flat[0], flat[1]]
            whole = [*unused, *flat[:2], *unused, *flat[2:]]
            experts = [
                (layers[0]._replace(adapters=()), layers[1]) for layers in operands(x, whole)
            ]
            bounds = torch.tensor(offsets, device=DEVICE)
            return operation(x, experts, bounds, keys_of(20))

        return run

    assert_agrees(
        of_second(grouped_lora_linear),
        of_second(reference.grouped_lora_linear),
        of_second_layer,
        douts,
    )


def test_frozen_tensors_get_no_gradient_and_the_others_the_same() -> None:
    from kernels.experts import grouped_lora_linear

    offsets = [0, 6, 20]
    operands, arguments, douts = make(offsets, 21, [19], [(4, 0.25), (2, 0.0)], torch.float32)
    for wanted in ("x", "A", "B", "first adapter"):
        chosen = []
        for i, tensor in enumerate(arguments):
            trains = {
                "x": i == 0,
                "A": i % 2 == 1,
                "B": i > 0 and i % 2 == 0,
                "first adapter": i % 4 in (1, 2),
            }[wanted]
            chosen.append(tensor.detach().requires_grad_(trains))
        keys = keys_of(20)
        assert_agrees(
            of(grouped_lora_linear, operands, offsets, keys),
            of(reference.grouped_lora_linear, operands, offsets, keys),
            chosen,
            douts,
        )


def test_rows_may_stand_apart() -> None:
    from kernels.experts import grouped_lora_linear

    offsets = [0, 6, 20]
    operands, arguments, _ = make(offsets, 21, [19], ONE, torch.float32)
    x = random(21, 40, dtype=torch.float32, seed=7)[:, ::2].T.detach().requires_grad_()
    dy = random(19, 20, dtype=torch.float32, seed=8).T
    assert x.shape == (20, 21)
    assert_agrees(
        of(grouped_lora_linear, operands, offsets, keys_of(20)),
        of(reference.grouped_lora_linear, operands, offsets, keys_of(20)),
        (x, *arguments[1:]),
        [dy],
    )


def test_the_same_bits_every_time() -> None:
    from kernels.experts import grouped_lora_linear

    offsets = [0, 70, 71, 150]
    operands, arguments, douts = make(offsets, 40, [33, 20], ONE, torch.float16)
    operation = of(grouped_lora_linear, operands, offsets, keys_of(150))
    first = run(operation, arguments, douts)
    for _ in range(20 if DEVICE == "cuda" else 2):
        assert all(map(torch.equal, first, run(operation, arguments, douts)))


def test_what_differs_between_experts_goes_to_the_reference() -> None:
    from kernels.experts import grouped_lora_linear

    offsets = torch.tensor([0, 2, 5], device=DEVICE)
    x = random(5, 8, dtype=torch.float32, seed=0)
    w = random(8, 8, dtype=torch.float32, seed=1)
    adapter = LowRank(w[:2].contiguous(), w[:, :2].contiguous(), 1.0, 0.0, 0)
    wide = LowRank(w[:3].contiguous(), w[:, :3].contiguous(), 1.0, 0.0, 0)
    q, scale = reference_int8.quantise_rows(w)
    bias = random(8, dtype=torch.float32, seed=2)
    trained = w.clone().requires_grad_()
    for layers in (
        [LinearOperands(w, None, (adapter,)), LinearOperands(w, None, (wide,))],
        [LinearOperands(w, None, (adapter,)), LinearOperands(w, None)],
        [
            LinearOperands(w, None, (adapter,)),
            LinearOperands(w, None, (adapter._replace(scaling=2.0),)),
        ],
        [LinearOperands(w, bias)] * 2,
        [LinearOperands(trained, None)] * 2,
        [LinearOperands(q, None, (), scale, True)] * 2,
    ):
        with pytest.raises(AssertionError, match="reference"):
            grouped_lora_linear(x, [(layer,) for layer in layers], offsets)
    with pytest.raises(AssertionError, match="reference"):
        grouped_lora_linear(x[:0], [(LinearOperands(w, None),)] * 2, offsets * 0)


def test_kernels_runs_them_where_they_are_forced() -> None:
    x, w = random(5, 8, dtype=torch.float32, seed=0), random(8, 8, dtype=torch.float32, seed=1)
    experts = [(LinearOperands(w, None),), (LinearOperands(w * 2, None),)]
    offsets = torch.tensor([0, 2, 5], device=DEVICE)
    with kernels.force("triton"):
        (y,) = kernels.grouped_lora_linear(x, experts, offsets)
    torch.testing.assert_close(y, torch.cat((x[:2] @ w.T, x[2:] @ w.T * 2)))
