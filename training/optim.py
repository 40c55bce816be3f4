"""AdamW (arXiv 1711.05101) over the trainable parameters, and the learning rate as a closed form.

The invariant: the learning rate is a pure function of the step, so a resumed run needs nothing but
its step. `training.step` refuses a gradient that is not finite before it comes here to be applied.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels.reference import STATE_BLOCK
from training.config import OptimSettings


def learning_rate(step: int, *, peak: float, settings: OptimSettings, total_steps: int) -> float:
    """The rate of update `step` (0-based): a climb from peak / warm-up, then the schedule.

    With w warm-up steps, T in all, f = (step - w) / (T - w) and m the least share of the peak:
    warm-up: peak (step + 1) / w; linear: peak (m + (1 - m) (1 - f));
    cosine: peak (m + (1 - m) (1 + cos(pi f)) / 2).
    The decays reach m peak at step T, one past the last update, so with m = 0 none is wasted.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = int(settings.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total_steps - warmup)
    left = max(0.0, 1.0 - done)
    if settings.schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return peak * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * left)


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW whose running means are held in eight bits (`kernels.adamw_eight_bit`).

    Parameters of fewer than 4096 elements keep float32 means: they save nothing, and norms are
    among them.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        states: list[kernels.EightBitStates] = []
        decays: list[float] = []
        for group in self.param_groups:
            small = []
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = _fresh_state(parameter, is_eight_bit=True)
                state = self.state[parameter]
                state["step"] += 1
                if "exp_avg_sq" in state:
                    small.append(parameter)
                    continue
                parameters.append(parameter)
                gradients.append(parameter.grad)
                states.append(kernels.EightBitStates(*(state[name] for name in _EIGHT_BIT)))
                decays.append(group["weight_decay"])
                # The same for all of them: the count is on the host, so nothing waits for a device.
                step = int(state["step"])
            beta1, beta2 = group["betas"]
            rate, eps = group["lr"], group["eps"]
            for parameter in small:
                state = self.state[parameter]
                parameter.mul_(1 - rate * group["weight_decay"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(
                    parameter.grad, parameter.grad, value=1 - beta2
                )
                numbers = kernels.AdamWStep(int(state["step"]), rate, beta1, beta2, eps)
                root = (state["exp_avg_sq"].sqrt() / numbers.root_correction).add_(eps)
                parameter.addcdiv_(state["exp_avg"], root, value=-rate / numbers.mean_correction)
        if parameters:
            numbers = kernels.AdamWStep(step, rate, beta1, beta2, eps)
            kernels.adamw_eight_bit(parameters, gradients, states, decays, numbers)


_SMALLEST_EIGHT_BIT = 4096  # elements
_EIGHT_BIT = ("exp_avg", "exp_avg_scale", "exp_avg_sq_root", "exp_avg_sq_root_scale")


def _fresh_state(parameter: Tensor, *, is_eight_bit: bool) -> dict[str, Tensor]:
    """AdamW's state of one parameter before its first update."""
    count, device = parameter.numel(), parameter.device
    if not is_eight_bit or count < _SMALLEST_EIGHT_BIT:
        step = torch.zeros((), device="cpu" if is_eight_bit else device)
        means = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": step, **means}
    blocks = -(-count // STATE_BLOCK)
    state = {"step": torch.zeros(())}
    for name in _EIGHT_BIT:
        is_scale = name.endswith("scale")
        dtype = torch.float32 if is_scale else torch.uint8
        state[name] = torch.zeros(blocks if is_scale else count, dtype=dtype, device=device)
    return state


def make_adamw(
    parameters: Mapping[str, nn.Parameter], settings: OptimSettings
) -> torch.optim.Optimizer:
    """AdamW with decay on matrices alone, one fused update for all tensors of a device."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if group
    ]
    betas = (settings.beta1, settings.beta2)
    if settings.states == "int8":
        return EightBitAdamW(groups, betas, settings.eps)
    return torch.optim.AdamW(groups, betas=betas, eps=settings.eps, fused=True)


def state_bytes(parameters: Iterable[Tensor], settings: OptimSettings) -> int:
    """What AdamW holds of these parameters; they may be on the meta device."""
    is_eight_bit = settings.states == "int8"
    return sum(
        value.nbytes
        for parameter in parameters
        for value in _fresh_state(parameter.to("meta"), is_eight_bit=is_eight_bit).values()
        if value.ndim
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
    is_eight_bit = isinstance(optimiser, EightBitAdamW)
    fresh = {
        name: _fresh_state(parameter, is_eight_bit=is_eight_bit)
        for name, parameter in parameters.items()
    }
    expected = {f"{name}/{entry}" for name, state in fresh.items() for entry in state}
    if set(tensors) != expected:
        raise ValueError(
            f"the checkpoint's optimiser has {len(tensors)} tensors, this run needs "
            f"{len(expected)} of other names; it belongs to another run"
        )
    for name, state in fresh.items():
        for entry, value in state.items():
            saved = tensors[f"{name}/{entry}"]
            if saved.shape != value.shape or saved.dtype != value.dtype:
                raise ValueError(
                    f"the checkpoint's optimiser holds {name}/{entry} with shape "
                    f"{list(saved.shape)} of {saved.dtype}, this run needs {list(value.shape)} of "
                    f"{value.dtype}"
                )
            value.copy_(saved)
        optimiser.state[parameters[name]] = state
