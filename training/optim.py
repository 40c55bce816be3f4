"""AdamW (arXiv 1711.05101) over the trainable parameters, and the learning rate as a closed form.

The invariant: the learning rate is a pure function of the step, so a resumed run needs nothing but
its step. `training.step` refuses a gradient that is not finite before it comes here to be applied.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from training.config import OptimSettings


def learning_rate(step: int, *, peak: float, settings: OptimSettings, total_steps: int) -> float:
    """The rate of update `step` (0-based): a climb from peak / warm-up, then the schedule.

    With w warm-up steps and T in all, f = (step - w) / (T - w):
    warm-up: peak (step + 1) / w; linear: peak (1 - f); cosine: peak (1 + cos(pi f)) / 2.
    The decays reach 0 at step T, one past the last update, so no update is wasted.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = total_steps // 20
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    if settings.schedule == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def make_adamw(
    parameters: Mapping[str, nn.Parameter], settings: OptimSettings
) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone, one fused update for all tensors of a device."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if group
    ]
    return torch.optim.AdamW(
        groups,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: a scalar on their device, not waited for."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))


def clip_gradients(gradients: Sequence[Tensor], norm: float, largest: float | None) -> None:
    """Scale all gradients in place so that their norm, which is known, is at most `largest`."""
    if largest is not None and norm > largest:
        torch._foreach_mul_(list(gradients), largest / norm)


def optimiser_state(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's tensors by "<parameter>/<entry>", as a checkpoint stores them."""
    return {
        f"{name}/{entry}": value.detach()
        for name, parameter in parameters.items()
        for entry, value in optimiser.state[parameter].items()
    }


def load_optimiser_state(
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimiser_state` gave; the names must match one to one."""
    entries = ("step", "exp_avg", "exp_avg_sq")
    expected = {f"{name}/{entry}" for name in parameters for entry in entries}
    if set(tensors) != expected:
        raise ValueError(
            f"the checkpoint's optimiser has {len(tensors)} tensors, this run needs "
            f"{len(expected)} of other names; it belongs to another run"
        )
    for name, parameter in parameters.items():
        state = {}
        for entry in entries:
            value = tensors[f"{name}/{entry}"]
            shape = torch.Size() if entry == "step" else parameter.shape
            if value.shape != shape:
                raise ValueError(
                    f"the checkpoint's optimiser holds {name}/{entry} with shape "
                    f"{list(value.shape)}, this run needs {list(shape)}"
                )
            state[entry] = value.to(device=parameter.device, copy=True)
        optimiser.state[parameter] = state
