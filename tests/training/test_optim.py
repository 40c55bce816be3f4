"""Schedules against their closed forms; clipping and AdamW against torch and a float64 account."""

import itertools
import math

import pytest
import torch
from torch import nn

from training.config import OptimSettings
from training.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    load_optimiser_state,
    make_adamw,
    optimiser_state,
    set_learning_rate,
    state_bytes,
)


def rates(
    schedule: str, *, warmup: int | None, total: int, min_lr_ratio: float = 0.0
) -> list[float]:
    settings = OptimSettings(schedule=schedule, warmup_steps=warmup, min_lr_ratio=min_lr_ratio)
    return [
        learning_rate(step, peak=2.0, settings=settings, total_steps=total)
        for step in range(total + 1)
    ]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [1, 4, 10])
def test_warm_up_climbs_in_a_line_and_starts_above_zero(schedule: str, warmup: int) -> None:
    found = rates(schedule, warmup=warmup, total=20)[:warmup]
    assert found == pytest.approx([2.0 * (i + 1) / warmup for i in range(warmup)])


def test_constant_stays() -> None:
    assert rates("constant", warmup=0, total=7) == [2.0] * 8


@pytest.mark.parametrize("warmup", [0, 5])
def test_linear_falls_in_a_line_to_zero_after_the_last_step(warmup: int) -> None:
    found = rates("linear", warmup=warmup, total=25)[warmup:]
    steps = 25 - warmup
    assert found == pytest.approx([2.0 * (steps - i) / steps for i in range(steps + 1)])
    assert found[-1] == 0.0 and found[-2] > 0.0


@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_falls_to_zero_with_its_middle_halfway(warmup: int) -> None:
    found = rates("cosine", warmup=warmup, total=25 - warmup % 2)[warmup:]
    steps = len(found) - 1
    expected = [1.0 + math.cos(math.pi * i / steps) for i in range(steps + 1)]
    assert found == pytest.approx(expected, abs=1e-15)
    assert rates("cosine", warmup=0, total=10)[5] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_least_rate_is_a_share_of_the_peak(schedule: str) -> None:
    """By hand at start, middle and end: peak 2, least 0.2, ten steps of warm-up in fifty."""
    found = rates(schedule, warmup=10, total=50, min_lr_ratio=0.1)
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(2.0)
    assert found[30] == pytest.approx(1.1)  # halfway between 2 and 0.2
    assert found[50] == pytest.approx(0.2)
    quarter = {"linear": 0.75, "cosine": (1 + math.sqrt(0.5)) / 2}[schedule]
    assert found[20] == pytest.approx(0.2 + 1.8 * quarter)
    assert all(a > b for a, b in itertools.pairwise(found[10:]))
    assert rates(schedule, warmup=0, total=9, min_lr_ratio=1.0) == [2.0] * 10


def test_the_cosine_is_that_of_transformers() -> None:
    """`get_cosine_with_min_lr_schedule_with_warmup` behind the warm-up, which there begins at 0."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimiser, 6, 40, min_lr_rate=0.25)
    theirs = []
    for _ in range(41):
        theirs.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    ours = rates("cosine", warmup=6, total=40, min_lr_ratio=0.25)
    assert ours[6:] == pytest.approx(theirs[6:])


def test_warm_up_is_a_twentieth_by_default() -> None:
    found = rates("linear", warmup=None, total=100)
    assert found[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.03, 1218, 36), (0.0, 50, 0), (0.5, 5, 2)])
def test_warm_up_by_ratio_is_that_share_of_the_steps_rounded_down(
    ratio: float, total: int, steps: int
) -> None:
    settings = OptimSettings(schedule="cosine", warmup_ratio=ratio)
    found = [
        learning_rate(step, peak=2.0, settings=settings, total_steps=total) for step in range(total)
    ]
    assert found == rates("cosine", warmup=steps, total=total)[:total]


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 3), "vector": (4,), "large": (70, 60)}
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def test_norm_and_clipping_agree_with_torch() -> None:
    parameters = make_parameters()
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, 3.0 + i)
    expected = {n: p.grad.clone() for n, p in parameters.items()}
    twins = [nn.Parameter(p.detach().clone()) for p in parameters.values()]
    for twin, grad in zip(twins, expected.values(), strict=True):
        twin.grad = grad.clone()
    total = nn.utils.clip_grad_norm_(twins, 1.0)
    gradients = [p.grad for p in parameters.values()]
    norm = gradient_norm(gradients).item()
    assert norm == pytest.approx(float(total))
    clip_gradients(gradients, norm, None)
    clip_gradients(gradients, norm, 2 * norm)
    assert all(torch.equal(p.grad, expected[n]) for n, p in parameters.items())
    clip_gradients(gradients, norm, 1.0)
    for gradient, twin in zip(gradients, twins, strict=True):
        torch.testing.assert_close(gradient, twin.grad)


def test_adamw_follows_the_paper_and_decays_matrices_only() -> None:
    """Three updates by hand in float64: arXiv 1711.05101, algorithm 2, with bias correction."""
    settings = OptimSettings(weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    parameters = make_parameters()
    optimiser = make_adamw(parameters, settings)
    by_hand = {n: p.detach().double() for n, p in parameters.items()}
    first = {n: torch.zeros_like(v) for n, v in by_hand.items()}
    second = {n: torch.zeros_like(v) for n, v in by_hand.items()}
    for t in range(1, 4):
        rate = 0.05 * t
        set_learning_rate(optimiser, rate)
        for i, (name, parameter) in enumerate(parameters.items()):
            grad = torch.sin(torch.arange(parameter.numel()) + float(t + i)).view_as(parameter)
            parameter.grad = grad
            wide = grad.double()
            decay = settings.weight_decay if parameter.ndim == 2 else 0.0
            first[name] = 0.8 * first[name] + 0.2 * wide
            second[name] = 0.9 * second[name] + 0.1 * wide**2
            step = first[name] / (1 - 0.8**t)
            step = step / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            by_hand[name] = by_hand[name] * (1 - rate * decay) - rate * step
        optimiser.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.double(), by_hand[name], rtol=1e-5, atol=1e-6)


def stepped(
    parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    set_learning_rate(optimiser, 0.01)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimiser.step()


def test_eight_bit_states_are_those_of_large_tensors_and_decay_matrices_only() -> None:
    settings = OptimSettings(states="int8", weight_decay=0.1)
    parameters = make_parameters()
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    optimiser, plain = (
        make_adamw(parameters, settings),
        make_adamw(twins, OptimSettings(weight_decay=0.1)),
    )
    for seed in range(5):
        stepped(parameters, optimiser, seed)
        stepped(twins, plain, seed)
    state = optimiser_state(optimiser, parameters)
    assert {name for name, value in state.items() if value.dtype == torch.uint8} == {
        "large/exp_avg",
        "large/exp_avg_sq_root",
    }
    held = sum(value.nbytes for value in state.values() if value.ndim)
    assert held == state_bytes(parameters.values(), settings)
    assert held < 0.3 * state_bytes(parameters.values(), OptimSettings())
    start = make_parameters()
    for name, twin in twins.items():
        way, error = twin - start[name], parameters[name] - twin
        assert error.norm() <= (0.02 if name == "large" else 1e-5) * way.norm(), name


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_optimiser_state_goes_out_and_in_exactly(states: str) -> None:
    settings = OptimSettings(states=states)
    one = make_parameters()
    optimiser = make_adamw(one, settings)
    stepped(one, optimiser, seed=1)
    saved = {name: value.clone() for name, value in optimiser_state(optimiser, one).items()}
    two = {name: nn.Parameter(p.detach().clone()) for name, p in one.items()}
    other = make_adamw(two, settings)
    load_optimiser_state(other, two, saved)
    stepped(one, optimiser, seed=2)
    stepped(two, other, seed=2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_optimiser_state_of_another_run_is_refused() -> None:
    parameters = make_parameters()
    optimiser = make_adamw(parameters, OptimSettings())
    stepped(parameters, optimiser, seed=1)
    saved = optimiser_state(optimiser, parameters)
    with pytest.raises(ValueError, match="belongs to another run"):
        load_optimiser_state(optimiser, parameters, dict(list(saved.items())[1:]))
    saved["matrix/exp_avg"] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"matrix/exp_avg with shape \[3, 5\]"):
        load_optimiser_state(optimiser, parameters, saved)
    saved["matrix/exp_avg"] = torch.zeros(5, 3, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"of torch.uint8, this run needs \[5, 3\] of torch.float32"
    ):
        load_optimiser_state(optimiser, parameters, saved)
    eight_bit = make_adamw(parameters, OptimSettings(states="int8"))
    with pytest.raises(ValueError, match="belongs to another run"):
        load_optimiser_state(eight_bit, parameters, saved)
