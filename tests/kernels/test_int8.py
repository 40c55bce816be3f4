"""Int8 rows and products beside their reference: bit by bit where integers allow it."""

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LinearOperands, LowRank, reference, reference_int8
from kernels.reference_int8 import KEPT_COLUMNS
from tests.kernels.agreement import DEVICE, DTYPES, assert_agrees, random

pytestmark = pytest.mark.kernel

ROUTES = ["scratch", "direct"]


def weight_of(width: int, depth: int, seed: int) -> tuple[Tensor, Tensor]:
    return reference_int8.quantise_rows(
        random(width, depth, dtype=torch.float32, seed=seed, scale=0.02)
    )


def with_outliers(x: Tensor) -> Tensor:
    """Six channels at 20 to 60 times the rest."""
    columns = torch.arange(6, device=x.device) * 7 % x.shape[1]
    x[:, columns] *= torch.linspace(20, 60, 6, device=x.device).to(x.dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (13, 1031), (3, 4096)], ids=str)
def test_rows_are_the_references_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from kernels.int8 import quantise_rows

    x = random(*shape, dtype=dtype, seed=0)
    x[-1] *= 0
    for rows in (x, x * 1e-4, random(shape[1], shape[0], dtype=dtype, seed=1).T):
        q, scale = quantise_rows(rows)
        expected, expected_scale = reference_int8.quantise_rows(rows)
        assert torch.equal(q, expected) and torch.equal(scale, expected_scale)


def test_ties_denormals_and_values_that_are_not_finite() -> None:
    from kernels.int8 import quantise_rows

    ties = torch.arange(-126, 128, device=DEVICE) + 0.5
    ties[-1] = 127
    tiny = torch.full_like(ties, 1e-39)
    q, scale = quantise_rows(torch.stack((ties, tiny)))
    assert torch.equal(q[0, :-1].float(), ties[:-1].round())  # to even
    assert torch.equal(scale, torch.tensor([127 * (1 / 127), 1.0], device=DEVICE))
    assert q[1].abs().max() == 0
    ties[3] = float("nan")
    assert quantise_rows(ties[None])[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [1, 5, 33])
def test_kept_columns_are_set_apart(kept: int, dtype: torch.dtype) -> None:
    """The rest is quantised as if they were 0, whether or not a weight's scales come first."""
    from kernels.int8 import quantise

    x = with_outliers(random(37, 131, dtype=dtype, seed=2))
    scale = random(131, dtype=torch.float32, seed=3).abs()
    for factor in (None, scale):
        scaled = x if factor is None else x * factor.to(dtype)
        found = quantise(x, kept, factor)
        columns = found.columns.long()
        highest = scaled.abs().amax(0)
        assert len(columns) == kept and (columns.diff() > 0).all()
        apart = torch.zeros(131, dtype=torch.bool, device=DEVICE).index_fill(0, columns, True)
        assert highest[apart].min() >= highest[~apart].max()
        assert torch.equal(found.kept, scaled[:, columns])
        q, rows = reference_int8.quantise_rows(scaled.index_fill(1, columns, 0))
        assert torch.equal(found.q, q) and torch.equal(found.scale, rows)


def test_equal_columns_fill_what_room_there_is_from_the_left() -> None:
    from kernels.int8 import quantise

    x = torch.ones(3, 50, device=DEVICE)
    x[1, 40] = -2
    assert quantise(x, 4).columns.tolist() == [0, 1, 2, 40]
    assert quantise(torch.zeros(3, 50, device=DEVICE), 2).columns.tolist() == [0, 1]


def test_products_are_exact_integers() -> None:
    from kernels.int8 import int8_linear, quantise, turned

    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-127, 128, (67, 301), generator=generator).to(DEVICE)
    x[:, 0] = 127
    w = torch.randint(-127, 128, (131, 301), generator=generator, dtype=torch.int8).to(DEVICE)
    ones = torch.ones(131, device=DEVICE)
    exact = (x.double() @ w.double().T).float()  # integers below 2^24
    rows = quantise(x.float(), 0)
    assert torch.equal(rows.q.long(), x)
    y = int8_linear(x.float(), w, ones, kept=0)
    assert torch.equal(y, exact * rows.scale[:, None])
    copy = turned(w)
    assert torch.equal(copy, w) and copy.stride() == (1, 131)


@pytest.mark.parametrize(
    ("route", "dtype"), [*(("scratch", dtype) for dtype in DTYPES), ("direct", torch.float32)]
)
@pytest.mark.parametrize(
    ("rows", "depth", "width", "kept"),
    [(1, 1, 1, 32), (3, 7, 11, 2), (131, 97, 259, 32), (17, 67, 5, 0), (40, 70, 33, 70)],
)
def test_both_directions_agree_with_the_reference(
    rows: int, depth: int, width: int, kept: int, route: str, dtype: torch.dtype
) -> None:
    from kernels import int8

    x = with_outliers(random(rows, depth, dtype=dtype, seed=5))
    dy = with_outliers(random(rows, width, dtype=dtype, seed=6))
    w, scale = weight_of(width, depth, seed=7)
    x.requires_grad_()  # the reference in float64 is judged on it as it is

    class Both(torch.autograd.Function):
        """Forward one direction, backward the other."""

        @staticmethod
        def forward(ctx, x, module, options):  # type: ignore[no-untyped-def]
            ctx.module, ctx.options = module, options
            return module.int8_linear(x.detach(), w, scale, kept)

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            dx = ctx.module.int8_linear_input_grad(dy, w, scale, kept, **ctx.options)
            return dx, None, None

    assert_agrees(
        lambda x: Both.apply(x, int8, {"route": route}),
        lambda x: Both.apply(x, reference_int8, {}),
        (x,),
        [dy],
    )


def test_rows_and_columns_may_stand_apart() -> None:
    from kernels.int8 import int8_linear, int8_linear_input_grad

    whole = random(40, 200, dtype=torch.float32, seed=8)
    w, scale = weight_of(300, 100, seed=9)
    for x, weight, factor in (
        (whole[::2, :100], w, scale),
        (whole.T, w[::3, ::2][:, :40], scale[::3]),
    ):
        factor = factor.contiguous()
        for kept in (0, KEPT_COLUMNS):
            torch.testing.assert_close(
                int8_linear(x, weight, factor, kept),
                reference_int8.int8_linear(x, weight, factor, kept),
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip
    dy = random(300, 20, dtype=torch.float32, seed=10).T
    for route in ROUTES:
        torch.testing.assert_close(
            int8_linear_input_grad(dy, w[:, ::2], scale, route=route),  # type: ignore[arg-type]
            reference_int8.int8_linear_input_grad(dy, w[:, ::2], scale),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_the_epilogue_adds_an_update_a_bias_and_what_was_there() -> None:
    from kernels.int8 import product, quantise

    x = with_outliers(random(35, 90, dtype=torch.float32, seed=11))
    w, scale = weight_of(70, 90, seed=12)
    bias = random(70, dtype=torch.float32, seed=13)
    before = random(35, 80, dtype=torch.float32, seed=14)[:, 5:75]
    alone = product(quantise(x, 32), w.T, scale)
    for rank in (1, 40):
        s = random(35, rank + 2, dtype=torch.float32, seed=15)[:, :rank]
        b = random(70, rank, dtype=torch.float32, seed=16)
        out = before.clone(memory_format=torch.preserve_format)
        y = product(quantise(x, 32), w.T, scale, update=(s, b.T), bias=bias, out=out)
        assert y is out
        torch.testing.assert_close(y, alone + s @ b.T + bias + before, rtol=1e-5, atol=1e-5)


def test_outliers_kept_hold_outputs_and_gradients_to_a_percent_and_only_then() -> None:
    from kernels.int8 import int8_linear, int8_linear_input_grad

    x = with_outliers(random(64, 256, dtype=torch.float32, seed=17))
    dy = with_outliers(random(64, 192, dtype=torch.float32, seed=18))
    w, scale = weight_of(192, 256, seed=19)
    wide = reference_int8.dequantise(w, scale, torch.float64)
    y, dx = x.double() @ wide.T, dy.double() @ wide

    def error(found: Tensor, truth: Tensor) -> float:
        return float((found.double() - truth).norm() / truth.norm())

    assert error(int8_linear(x, w, scale), y) < 0.01
    assert error(int8_linear_input_grad(dy, w, scale), dx) < 0.01
    assert error(int8_linear(x, w, scale, kept=0), y) > 0.01
    assert error(int8_linear_input_grad(dy, w, scale, kept=0), dx) > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_with_adapters_in_int8_math(dtype: torch.dtype) -> None:
    """Two layers on one x: one with two adapters under masks and a bias, one without."""
    from kernels.low_rank import lora_linear

    x = with_outliers(random(37, 90, dtype=dtype, seed=25)).requires_grad_()
    first, second = weight_of(50, 90, seed=26), weight_of(33, 90, seed=27)
    bias = random(50, dtype=dtype, seed=28).requires_grad_()
    tensors = [
        random(*shape, dtype=dtype, seed=29 + i, scale=0.05).requires_grad_()
        for i, shape in enumerate(((4, 90), (50, 4), (20, 90), (50, 20)))
    ]
    keys = kernels.row_keys(1, torch.arange(37) // 9, torch.arange(37) % 9).to(DEVICE)

    def grouped(operation):  # type: ignore[no-untyped-def]
        def run(x, bias, a, b, c, d):  # type: ignore[no-untyped-def]
            adapters = (LowRank(a, b, 0.5, 0.25, 3), LowRank(c, d, 2.0, 0.0, 4))
            layers = [
                LinearOperands(first[0], bias, adapters, first[1], True),
                LinearOperands(second[0], None, (), second[1], True),
            ]
            return operation(x, layers, keys)

        return run

    douts = [random(37, 50, dtype=dtype, seed=40), random(37, 33, dtype=dtype, seed=41)]
    arguments = (x, bias, *tensors)
    assert_agrees(grouped(lora_linear), grouped(reference.lora_linear), arguments, douts)


def test_the_same_bits_every_time() -> None:
    from kernels.int8 import int8_linear, int8_linear_input_grad

    x = random(70, 150, dtype=torch.float16, seed=20)
    dy = random(70, 140, dtype=torch.float16, seed=21)
    w, scale = weight_of(140, 150, seed=22)
    first = int8_linear(x, w, scale), int8_linear_input_grad(dy, w, scale)
    for _ in range(20 if DEVICE == "cuda" else 3):
        again = int8_linear(x, w, scale), int8_linear_input_grad(dy, w, scale)
        assert all(map(torch.equal, first, again))


def test_kernels_runs_them_where_they_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import int8

    called = []
    for name in ("quantise_rows", "int8_linear", "int8_linear_input_grad"):
        original = getattr(int8, name)
        monkeypatch.setattr(int8, name, lambda *a, f=original, n=name: called.append(n) or f(*a))
    x, (w, scale) = random(3, 9, dtype=torch.float32, seed=23), weight_of(5, 9, seed=24)

    def run() -> list[Tensor]:
        q, rows = kernels.quantise_rows(x)
        y = kernels.int8_linear(x, w, scale)
        return [q, rows, y, kernels.int8_linear_input_grad(y, w, scale)]

    with kernels.force("triton"):
        found = run()
        assert kernels.int8_linear(x[:0], w, scale).shape == (0, 5)
    assert called == ["quantise_rows", "int8_linear", "int8_linear_input_grad"]
    with kernels.force("reference"):
        torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-6)
    assert len(called) == 3
