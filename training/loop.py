"""The loop that every stage runs: step, validate, save, until the last step or a signal.

Invariant: a checkpoint is a complete account of the moment between two steps. What `Loop.begin`
puts back is all that the next step depends on, so a resumed run goes on to the same bits.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import Loader
from model.ending import RunFailed, Stopped
from training.checkpoint import (
    check_checkpoint,
    load_weights,
    newest_good,
    prune,
    restore_random_state,
    save_checkpoint,
    saved_steps,
    step_folder,
)
from training.config import RunConfig
from training.objective import Classification, LanguageModelling
from training.optim import learning_rate, load_optimiser_state, make_adamw, optimiser_state
from training.parallel import Ranks
from training.progress import Progress
from training.step import NonFinite, dropout_seed_of, optimiser_step

_VALIDATIONS_IN_A_RUN = 5  # where --eval-every does not say


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0  # that passed through the model, over all ranks
    best: dict[str, Any] | None = None  # step and metrics of the best validation


class Loop:
    """The steps of one run: `begin`, then `run`, then `load_kept`."""

    def __init__(
        self,
        config: RunConfig,
        objective: LanguageModelling | Classification,
        loader: Loader,
        validate: Callable[[], dict[str, float]] | None,
        ranks: Ranks,
        *,
        total_steps: int,
        checkpoints: Path,
    ) -> None:
        self.position = Position()
        self.total_steps = total_steps
        self._config = config
        self._objective = objective
        self._loader = loader
        self._validate = validate
        self._ranks = ranks
        self._checkpoints = checkpoints
        self._run = ""  # its identity, which `begin` gives
        self._parameters = {
            name: p for name, p in objective.model.named_parameters() if p.requires_grad
        }
        self._optimiser = make_adamw(self._parameters, config.optim)
        self._eval_every = steps_between_validations(config, total_steps)
        self._checkpoint_every = config.checkpoint_every or self._eval_every

    def begin(self, run: str, *, resume: bool) -> tuple[int, list[str]]:
        """Stay at the start, or with `resume` go to the newest good checkpoint if there is one.

        run: the run's identity, which its checkpoints carry (`training.record.identity`).

        Returns the lines that metrics.jsonl had then, and what was wrong with newer checkpoints.
        Raises ValueError if the best validation's weights, which the run is to keep, are damaged.
        """
        self._run = run
        if not resume:
            return 0, []
        checkpoint, complaints = newest_good(self._checkpoints, run=run)
        if checkpoint is None:
            return 0, complaints
        best = checkpoint.state["position"]["best"]
        if self._config.keep == "best" and best is not None and best["step"] != checkpoint.step:
            try:
                check_checkpoint(step_folder(self._checkpoints, best["step"]), run=run)
            except ValueError as error:
                raise ValueError(
                    f"{error}; it belongs to the weights of the best validation: put it back, or "
                    "resume with --keep last"
                ) from error
        self._load_parameters(checkpoint.weights)
        load_optimiser_state(self._optimiser, self._parameters, checkpoint.optimiser)
        restore_random_state(checkpoint.random)
        self._loader.load_state(checkpoint.state["loader"])
        self.position = Position(**checkpoint.state["position"])
        return checkpoint.state["metrics_lines"], complaints

    def run(self, progress: Progress, is_asked_to_stop: Callable[[], bool]) -> None:
        """Take all remaining steps. Raises Stopped, or RunFailed for a loss that is not finite."""
        position, config = self.position, self._config
        while position.step < self.total_steps and not self.is_out_of_patience:
            began = time.perf_counter()
            rate = learning_rate(
                position.step,
                peak=config.lr,
                settings=config.optim,
                total_steps=self.total_steps,
            )
            try:
                result = optimiser_step(
                    self._objective,
                    self._parameters,
                    self._optimiser,
                    self._loader.next_step(),
                    self._ranks,
                    dropout_seed=dropout_seed_of(config.seed, position.step),
                    rate=rate,
                    clip=config.optim.clip,
                    is_asked_to_stop=is_asked_to_stop(),
                    filler=self._loader.one_segment,
                )
            except NonFinite as error:
                raise RunFailed(
                    f"step {position.step + 1} was not taken: {error}; {self.last_good()}; a lower "
                    "--lr or a longer --optim.warmup-steps may help"
                ) from error
            position.step += 1
            position.tokens += result.tokens
            progress.step(
                position.step,
                seconds=time.perf_counter() - began,
                tokens=result.tokens,
                metrics={
                    "loss": result.loss,
                    **({"aux_loss": result.aux_loss} if result.aux_loss else {}),
                    "lr": rate,
                    "gradient_norm": result.gradient_norm,
                    "tokens": position.tokens,
                },
            )
            is_last = position.step == self.total_steps
            is_new_best = False
            if self._validate and (is_last or position.step % self._eval_every == 0):
                metrics = self._validate()
                if not math.isfinite(metrics["loss"]):
                    raise RunFailed(
                        f"the validation after step {position.step} has a loss of "
                        f"{metrics['loss']}; {self.last_good()}"
                    )
                progress.validation(position.step, metrics)
                is_new_best = is_better(metrics, position.best)
                if is_new_best:
                    position.best = {"step": position.step, "metrics": metrics}
                is_last = is_last or self.is_out_of_patience
            is_due = is_last or position.step % self._checkpoint_every == 0
            if is_due or is_new_best or result.is_asked_to_stop:
                self._save(progress)
            if result.is_asked_to_stop and not is_last:
                raise Stopped(
                    f"stopped by SIGTERM after step {position.step}, which is saved; continue with "
                    f"--resume --out {config.out}"
                )
        if self._ranks.is_first:
            self._prune()  # what a kill between the last save and its pruning has left

    @property
    def is_out_of_patience(self) -> bool:
        """Whether --patience validations have passed without a better one.

        The best validation's step and the last tell it, so a resumed run stops at the same step.
        """
        best, patience = self.position.best, self._config.patience
        if patience is None or best is None:
            return False
        return self.position.step // self._eval_every - best["step"] // self._eval_every >= patience

    def load_kept(self) -> int:
        """Put the weights that the run keeps into the model; returns the step they are of."""
        self._ranks.wait()  # until the first rank has written its last checkpoint
        best, last = self.position.best, self.position.step
        if self._config.keep == "last" or best is None or best["step"] == last:
            return last
        path = step_folder(self._checkpoints, best["step"])
        self._load_parameters(load_weights(path, run=self._run))
        return int(best["step"])

    def last_good(self) -> str:
        """Where a failed run can be taken up again, in words."""
        steps = saved_steps(self._checkpoints)
        if not steps:
            return "no checkpoint had been written yet"
        return f"the last good checkpoint is {step_folder(self._checkpoints, steps[-1])}"

    def _save(self, progress: Progress) -> None:
        """Write a checkpoint of this moment and drop old ones: the first rank's work."""
        if not self._ranks.is_first:
            return
        save_checkpoint(
            self._checkpoints,
            self.position.step,
            run=self._run,
            weights={name: p.detach() for name, p in self._parameters.items()},
            optimiser=optimiser_state(self._optimiser, self._parameters),
            state={
                "position": dataclasses.asdict(self.position),
                "loader": self._loader.state(),
                "metrics_lines": progress.sync(),
            },
        )
        self._prune()

    def _prune(self) -> None:
        prune(self._checkpoints, self.position.step, self._config.keep_checkpoints)

    def _load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {name: p.shape for name, p in self._parameters.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise ValueError("the checkpoint's weights are not those that this run trains")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])


def steps_between_validations(config: RunConfig, total_steps: int) -> int:
    """--eval-every, or so many that five validations fall into the run."""
    return config.eval_every or max(1, total_steps // _VALIDATIONS_IN_A_RUN)


def is_better(metrics: Mapping[str, float], best: Mapping[str, Any] | None) -> bool:
    """Whether a validation beats the best so far: a higher AUROC where there is one, then loss."""

    def merit(of: Mapping[str, float]) -> tuple[float, float]:
        return of.get("auroc", -math.inf), -of["loss"]

    return best is None or merit(metrics) > merit(best["metrics"])
