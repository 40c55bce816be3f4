"""One optimiser step, whatever the stage: the fenced heart of every run.

All micro-batches of the step are at hand before the first forward pass, so each loss is divided by
the denominator of the whole step, over micro-batches and ranks. Invariant: the update is the same
whether the step's notes pass in one micro-batch or in many, on one rank or on several.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from data.packing import PackedBatch
from training.objective import Objective
from training.optim import clip_gradients, gradient_norm, set_learning_rate
from training.parallel import Ranks


class NonFinite(ArithmeticError):
    """The loss or the gradient of a step is infinite or not a number; nothing was updated."""


class StepResult(NamedTuple):
    """What one step was, over all ranks."""

    loss: float  # mean per unit of the denominator, the network's own terms included
    aux_loss: float  # these terms: the experts' load balancing, times its coefficient
    gradient_norm: float  # before clipping
    tokens: int  # real tokens that passed through the model
    is_asked_to_stop: bool  # on any rank


def optimiser_step(
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    micro_batches: Sequence[PackedBatch],
    ranks: Ranks,
    *,
    dropout_seed: int,
    rate: float,
    clip: float | None,
    is_asked_to_stop: bool = False,
    filler: Callable[[], PackedBatch] | None = None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, sum over ranks, check, clip, update.

    filler: any micro-batch, for `Ranks.in_step`; None where the base is whole.

    Raises NonFinite, on every rank alike, before weights or optimiser state have changed.
    """
    denominator, tokens, stops = ranks.sum_floats(
        [
            sum(objective.denominator(batch) for batch in micro_batches),
            sum(len(batch.input_ids) for batch in micro_batches),
            float(is_asked_to_stop),
        ]
    )
    losses = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch, is_own in ranks.in_step(micro_batches, filler or _no_filler):
        loss = objective.loss(batch, dropout_seed=dropout_seed)
        if not is_own:
            (0.0 * loss.total).backward()
            continue
        total = loss.total / denominator
        total.backward()
        aux = total - loss.loss_sum / denominator
        losses += torch.stack((total, aux)).detach()
    for parameter in parameters.values():
        if parameter.grad is None:  # this rank had no micro-batch
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    ranks.sum_tensors(gradients)
    ranks.sum_tensors([losses])

    # The one moment of the step at which the host waits for the device.
    norm_1 = gradient_norm(gradients).double()[None]
    mean_loss, aux_loss, norm = torch.cat([losses, norm_1]).tolist()
    if not (math.isfinite(mean_loss) and math.isfinite(norm)):
        raise NonFinite(f"the loss is {mean_loss} and the gradient's norm is {norm}")
    clip_gradients(gradients, norm, clip)
    set_learning_rate(optimiser, rate)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return StepResult(mean_loss, aux_loss, norm, int(tokens), stops > 0)


def _no_filler() -> PackedBatch:
    raise AssertionError("a sharded base needs a filler")


def dropout_seed_of(seed: int, step: int) -> int:
    """The 63-bit seed of all randomness inside a step: a hash of the run's seed and the step."""
    digest = hashlib.blake2b(f"dropout {seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
