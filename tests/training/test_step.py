"""One optimiser step: the same however it is divided, and never taken with a non-finite number."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.packing import IGNORED, PackedBatch
from tests.model.oracle import CONFIGS, make_causal_lm
from training.assemble import build_model
from training.config import OptimSettings, RunConfig
from training.notes import load_notes, make_dataset
from training.objective import Classification, LanguageModelling, balanced_class_weights
from training.optim import make_adamw
from training.parallel import Ranks
from training.step import NonFinite, StepResult, dropout_seed_of, optimiser_step

ALONE = Ranks(0, 1, torch.device("cpu"))


class Bench:
    """A model of a stage in float64, ready to take one step on 8 segments."""

    def __init__(self, config: RunConfig, segments_at_once: int) -> None:
        notes = load_notes(config)
        self.model = build_model(config, notes, ALONE.device).double()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.model.named_parameters():
            if name.endswith("lora_B"):  # zero at the start, which would hide the gradient of A
                parameter.data.normal_(generator=generator)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimiser = make_adamw(self.parameters, config.optim)
        rows = notes.splits.train[:40]
        dataset = make_dataset(config, notes, rows)
        if config.stage == "downstream":
            labels = notes.cache.label_codes(rows)
            weights = balanced_class_weights(np.bincount(labels))
            self.objective: Any = Classification(self.model, ALONE.device, class_weights=weights)
        else:
            self.objective = LanguageModelling(self.model, ALONE.device)
        self.batches = [
            dataset.batch(np.arange(first, min(first + segments_at_once, 8)))
            for first in range(0, 8, segments_at_once)
        ]

    def step(self, batches: list[PackedBatch] | None = None) -> StepResult:
        return optimiser_step(
            self.objective,
            self.parameters,
            self.optimiser,
            self.batches if batches is None else batches,
            ALONE,
            dropout_seed=dropout_seed_of(3, 0),
            rate=1e-2,
            clip=1.0,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}


@pytest.mark.parametrize("stage", ["clinical", "downstream"])
def test_a_step_is_the_same_in_one_micro_batch_or_in_many(
    stage: str, make_config: Callable[..., RunConfig]
) -> None:
    """(segments at once, passes) = (8, 1), (4, 2), (1, 8), with dropout and unequal weights."""
    config = make_config(stage)
    whole = Bench(config, 8)
    result = whole.step()
    for at_once in (4, 1):
        parts = Bench(config, at_once)
        assert len(parts.batches) == 8 // at_once
        other = parts.step()
        assert other.loss == pytest.approx(result.loss, rel=1e-12)
        assert other.gradient_norm == pytest.approx(result.gradient_norm, rel=1e-10)
        assert other.tokens == result.tokens
        for name, weight in whole.weights().items():
            torch.testing.assert_close(parts.weights()[name], weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("stage", ["clinical", "downstream"])
def test_the_denominator_of_the_host_is_that_of_the_loss(
    stage: str, make_config: Callable[..., RunConfig]
) -> None:
    bench = Bench(make_config(stage), 3)
    for batch in bench.batches:
        loss = bench.objective.loss(batch, dropout_seed=None)
        assert bench.objective.denominator(batch) == pytest.approx(loss.denominator, rel=1e-12)


@pytest.mark.parametrize("stage", ["clinical", "downstream"])
def test_every_trainable_tensor_gets_a_gradient_and_moves(
    stage: str, make_config: Callable[..., RunConfig]
) -> None:
    for activations in ("save", "checkpoint"):
        bench = Bench(replace(make_config(stage), activations=activations), 4)
        before = bench.weights()
        bench.step()
        after = bench.weights()
        assert before.keys() == after.keys() and len(before) > 4
        assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_changes_when_a_number_is_not_finite(
    value: float, make_config: Callable[..., RunConfig]
) -> None:
    bench = Bench(make_config("clinical"), 4)
    bench.step()
    before = bench.weights()
    moments = {n: s["exp_avg"].clone() for n, s in _states(bench).items()}
    next(p for n, p in bench.model.named_parameters() if "down_proj.weight" in n).data[0, 0] = value
    with pytest.raises(NonFinite, match=r"nan|inf"):
        bench.step()
    assert all(torch.equal(before[name], weight) for name, weight in bench.weights().items())
    assert all(torch.equal(moments[n], s["exp_avg"]) for n, s in _states(bench).items())


def _states(bench: Bench) -> dict[str, dict[str, torch.Tensor]]:
    return {name: bench.optimiser.state[p] for name, p in bench.parameters.items()}


def test_a_rank_without_notes_takes_part_in_the_step(make_config: Callable[..., RunConfig]) -> None:
    """Its gradients are zeros that it adds to the others'."""
    bench = Bench(make_config("clinical"), 4)

    class TwoRanks(Ranks):
        def sum_floats(self, values: Any) -> list[float]:
            return [100.0, 300.0, 1.0]

    ranks = TwoRanks(0, 1, torch.device("cpu"))
    result = optimiser_step(
        bench.objective,
        bench.parameters,
        bench.optimiser,
        [],
        ranks,
        dropout_seed=0,
        rate=0.1,
        clip=None,
    )
    assert result == StepResult(0.0, 0.0, 0.0, 300, True)


def test_the_router_loss_of_a_micro_batch_weighs_as_its_scored_tokens() -> None:
    """A mean over the step; and validation is cross-entropy alone."""
    model = make_causal_lm(CONFIGS["mixtral"])
    objective = LanguageModelling(model, ALONE.device)
    batches = []
    for lengths in ([30, 12], [7]):
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        ids = np.arange(offsets[-1]) * 7 % 97
        labels = ids.copy()
        labels[offsets[:-1]] = IGNORED
        notes = np.arange(len(lengths))
        batches.append(PackedBatch(ids, labels, offsets, notes, None, notes))
    losses = [objective.loss(batch, dropout_seed=None) for batch in batches]
    scored = [loss.denominator for loss in losses]
    assert scored == [40.0, 6.0]
    aux = sum(loss.aux["router"] * n for loss, n in zip(losses, scored, strict=True)) / 46
    loss_sum = sum(loss.loss_sum for loss in losses)
    parameters = dict(model.named_parameters())
    result = optimiser_step(
        objective,
        parameters,
        make_adamw(parameters, OptimSettings()),
        batches,
        ALONE,
        dropout_seed=0,
        rate=1e-3,
        clip=None,
    )
    assert result.aux_loss == pytest.approx(float(aux), rel=1e-12)
    assert result.loss == pytest.approx(float(loss_sum / 46 + aux), rel=1e-12)
    assert result.aux_loss > 0.02  # the coefficient times the balance, which is 2 at best


def test_dropout_seeds_differ_between_steps_and_runs() -> None:
    seeds = {dropout_seed_of(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed_of(0, 1) == dropout_seed_of(0, 1)


def test_balanced_class_weights_are_those_of_the_paper() -> None:
    weights = balanced_class_weights(np.array([90, 10]))
    assert weights == pytest.approx([100 / 180, 100 / 20])
    assert (weights * [90, 10]).sum() == pytest.approx(100)
    with pytest.raises(ValueError, match="1 of 2 classes without a note"):
        balanced_class_weights(np.array([5, 0]))


def test_loader_steps_fit_the_objective(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("clinical", batch_tokens=512)
    notes = load_notes(config)
    loader = Loader(
        make_dataset(config, notes, notes.splits.train),
        batch_tokens=512,
        micro_tokens=128,
        seed=0,
    )
    bench = Bench(config, 4)
    result = bench.step(loader.next_step())
    assert 400 < result.tokens <= 512
