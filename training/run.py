"""One run from config to files, top to bottom.

    config -> ranks -> notes -> model and adapters -> optimiser -> steps -> adapters, head, run.json

A run can be stopped at any moment, by SIGTERM or by a pulled plug, and continued from its newest
checkpoint to the same bits as if it had not been. Invariant: everything that decides a step is in
the config, in the fingerprinted inputs or in the checkpoint, never in the process.
"""

import contextlib
import dataclasses
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from data.loader import Loader
from data.packing import ClassificationNotes, LanguagePieces
from lora.attach import adapter_names
from lora.peft_format import save_adapter
from model.checkpoint import save_model
from model.files import read_json, write_json, write_safetensors
from model.heads import CausalLM, SequenceClassifier
from training.assemble import (
    CLINICAL,
    HEAD_FILE,
    Dataset,
    Model,
    Notes,
    base_dtype,
    build_model,
    check_same_base,
    count_parameters,
    fingerprints,
    load_notes,
    make_dataset,
    validation_rows,
)
from training.checkpoint import (
    load_weights,
    newest_good,
    prune,
    restore_random_state,
    save_checkpoint,
    saved_steps,
    step_folder,
    sweep,
)
from training.config import RunConfig, to_dict
from training.environment import environment
from training.objective import Classification, LanguageModelling, balanced_class_weights
from training.optim import learning_rate, load_optimiser_state, make_adamw, optimiser_state
from training.parallel import Ranks, start, stop
from training.progress import Progress
from training.run_folder import RUN_FILE, check_out, clear, locked, private_files
from training.step import NonFinite, dropout_seed_of, optimiser_step
from training.validation import Score, validate_classifier, validate_language

FORMAT = 1  # of run.json
_VALIDATIONS_IN_A_RUN = 5  # where --eval-every does not say
_BEST_FILE = "best.json"
# Settings that a resumed run may change. They say where things lie, which the fingerprints check by
# content instead, and what is kept.
_FREE_ON_RESUME = {
    "model", "data", "init_adapter", "splits", "cache_dir", "workers", "device", "out",
    "checkpoint_every", "keep_checkpoints", "keep",
}  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault in what the user typed; exit code 1."""


class Stopped(RuntimeError):
    """The run was told to end by SIGTERM and has saved a checkpoint; exit code 143."""


def run(
    config: RunConfig,
    *,
    score: Score | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train as `config` says and return the run's folder.

    score: what a validation tells of a classifier besides its loss; "auroc" decides which is best.

    Raises ValueError for the user's mistakes, RunFailed, and Stopped after SIGTERM.
    """
    ranks = start(config.device)
    try:
        with private_files(), _sigterm() as is_asked_to_stop:
            return _run(config, ranks, score, is_asked_to_stop, resume=resume, overwrite=overwrite)
    finally:
        stop(ranks)


def _run(
    config: RunConfig,
    ranks: Ranks,
    score: Score | None,
    is_asked_to_stop: Callable[[], bool],
    *,
    resume: bool,
    overwrite: bool,
) -> Path:
    out = Path(config.out)
    if ranks.is_first:
        check_out(out, resume=resume, overwrite=overwrite)
    config = dataclasses.replace(config, base_dtype=base_dtype(config, ranks.device))

    # Notes. The first rank makes the token cache, then the others open it.
    if not ranks.is_first:
        ranks.wait()
    notes = load_notes(config)
    if ranks.is_first:
        ranks.wait()
    train_set = make_dataset(config, notes, notes.splits.train)
    loader = Loader(
        train_set,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        micro_tokens=config.micro_tokens,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.count,
    )
    total_steps = _total_steps(config, loader)
    eval_every = config.eval_every or max(1, total_steps // _VALIDATIONS_IN_A_RUN)
    checkpoint_every = config.checkpoint_every or eval_every

    # Model. The base is frozen; the optimiser holds what trains: adapters, head, or everything.
    model = build_model(config, notes, ranks.device)
    objective = _objective(config, model, notes, ranks.device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = make_adamw(parameters, config.optim)
    validate = _validation(config, objective, notes, ranks, score)
    record = _record(config, notes, model, ranks, total_steps)

    # Folder. From here on this process owns it; a resumed run goes on from its newest checkpoint.
    position = Position()
    with _owned_folder(out, record, ranks, resume=resume, overwrite=overwrite):
        checkpoints = out / "checkpoints"
        metrics_bytes = 0
        complaints: list[str] = []
        if resume:
            checkpoint, complaints = newest_good(checkpoints)
            if checkpoint is not None:
                _load_parameters(parameters, checkpoint.weights)
                load_optimiser_state(optimiser, parameters, checkpoint.optimiser)
                restore_random_state(checkpoint.random)
                loader.load_state(checkpoint.state["loader"])
                position = Position(**checkpoint.state["position"])
                metrics_bytes = checkpoint.state["metrics_bytes"]
            ranks.wait()  # nobody writes before everybody has read
        progress = Progress(
            out if ranks.is_first else None,
            total_steps=total_steps,
            first_step=position.step,
            metrics_bytes=metrics_bytes,
        )
        with contextlib.closing(progress):
            _introduce(progress, config, record, train_set, position, complaints, resume)

            def save() -> None:
                """Write a checkpoint of this moment and drop old ones; the first rank's work."""
                if ranks.is_first:
                    save_checkpoint(
                        checkpoints,
                        position.step,
                        weights={name: p.detach() for name, p in parameters.items()},
                        optimiser=optimiser_state(optimiser, parameters),
                        state={
                            "position": dataclasses.asdict(position),
                            "loader": loader.state(),
                            "metrics_bytes": progress.sync(),
                        },
                    )
                    if position.best is not None:
                        write_json(checkpoints / _BEST_FILE, position.best)
                    prune(checkpoints, config.keep_checkpoints)

            # Steps. One fenced update after the other; validation and checkpoints in between.
            while position.step < total_steps:
                rate = learning_rate(
                    position.step, peak=config.lr, settings=config.optim, total_steps=total_steps
                )
                try:
                    result = optimiser_step(
                        objective,
                        parameters,
                        optimiser,
                        loader.next_step(),
                        ranks,
                        dropout_seed=dropout_seed_of(config.seed, position.step),
                        rate=rate,
                        clip=config.optim.clip,
                        is_asked_to_stop=is_asked_to_stop(),
                    )
                except NonFinite as error:
                    raise RunFailed(
                        f"step {position.step + 1} cannot be taken: {error}; nothing was updated. "
                        f"{_last_good(checkpoints)}. A lower --lr or a longer warm-up may help"
                    ) from error
                position.step += 1
                position.tokens += result.tokens
                progress.step(
                    position.step,
                    tokens=result.tokens,
                    metrics={
                        "loss": result.loss,
                        "lr": rate,
                        "gradient_norm": result.gradient_norm,
                        "tokens": position.tokens,
                    },
                )

                is_last = position.step == total_steps
                is_new_best = False
                if validate is not None and (is_last or position.step % eval_every == 0):
                    metrics = validate()
                    progress.validation(position.step, metrics)
                    is_new_best = _is_better(metrics, position.best)
                    if is_new_best:
                        position.best = _as_best(position.step, metrics)
                is_due = is_last or position.step % checkpoint_every == 0
                if is_due or is_new_best or result.is_asked_to_stop:
                    save()
                if result.is_asked_to_stop and not is_last:
                    raise Stopped(
                        f"stopped by SIGTERM after step {position.step}, which is saved; continue "
                        f"with --resume --out {out}"
                    )

            # Files. The best weights, if a validation preferred earlier ones, else the last.
            ranks.wait()
            kept_step = total_steps
            if config.keep == "best" and position.best is not None:
                kept_step = position.best["step"]
            if kept_step != total_steps:
                _load_parameters(parameters, load_weights(step_folder(checkpoints, kept_step)))
            if ranks.is_first:
                _write_model(config, model, notes, out)
                kept = {"step": kept_step, "best": position.best, "tokens": position.tokens}
                write_json(out / RUN_FILE, {**record, "kept": kept, "finished": True})
                progress.say(_farewell(out, kept_step, total_steps, position.best))
    return out


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0  # that passed through the model, over all ranks
    best: dict[str, Any] | None = None  # step, metric and value of the best validation


def _total_steps(config: RunConfig, loader: Loader) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    total = max(1, math.ceil(config.epochs * loader.steps_per_epoch()))
    if config.optim.warmup_steps > total:
        raise ValueError(
            f"--optim.warmup-steps is {config.optim.warmup_steps}, but --epochs {config.epochs:g} "
            f"are only {total} steps"
        )
    return total


def _objective(
    config: RunConfig, model: Model, notes: Notes, device: torch.device
) -> LanguageModelling | Classification:
    if isinstance(model, CausalLM):
        return LanguageModelling(
            model, device, gradient_checkpointing=config.gradient_checkpointing
        )
    labels = notes.cache.label_codes(notes.splits.train)
    counts = np.bincount(labels, minlength=len(notes.label_names))
    return Classification(
        model,
        device,
        class_weights=balanced_class_weights(counts) if config.class_weights else None,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _validation(
    config: RunConfig,
    objective: LanguageModelling | Classification,
    notes: Notes,
    ranks: Ranks,
    score: Score | None,
) -> Callable[[], dict[str, float]] | None:
    """The run's validation, ready to be called; None where no note validates."""
    rows = validation_rows(config, notes)
    if len(rows) == 0:
        return None
    dataset = make_dataset(config, notes, rows)
    if isinstance(objective, LanguageModelling):
        assert isinstance(dataset, LanguagePieces)
        return lambda: validate_language(
            objective, dataset, ranks, micro_tokens=config.micro_tokens
        )
    assert isinstance(dataset, ClassificationNotes)
    return lambda: validate_classifier(
        objective,
        dataset,
        rows,
        ranks,
        micro_tokens=config.micro_tokens,
        label_names=notes.label_names,
        score=score,
    )


def _as_best(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    metric = "auroc" if "auroc" in metrics else "loss"
    return {"step": step, "metric": metric, "value": metrics[metric]}


def _is_better(metrics: Mapping[str, float], best: Mapping[str, Any] | None) -> bool:
    """Whether a validation beats the best one so far: a higher AUROC, else a lower loss."""
    if not math.isfinite(metrics["loss"]):
        return False
    if best is None:
        return True
    if best["metric"] == "auroc":
        return metrics.get("auroc", -math.inf) > best["value"]
    return "auroc" in metrics or metrics["loss"] < best["value"]


def _record(
    config: RunConfig, notes: Notes, model: Model, ranks: Ranks, total_steps: int
) -> dict[str, Any]:
    """run.json of a run that begins."""
    if not ranks.is_first:
        return {}
    found = fingerprints(config, notes)
    check_same_base(config, found["base"])
    trainable, total = count_parameters(model)
    return {
        "format": FORMAT,
        "finished": False,
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": to_dict(config),
        "environment": environment(ranks.device, ranks.count),
        "fingerprints": found,
        "data": notes.cache.description,
        "split": notes.splits.rule,
        "counts": notes.counts(),
        "labels": list(notes.label_names),
        "adapters": adapter_names(model),
        "parameters": {"trainable": trainable, "all": total},
        "total_steps": total_steps,
    }


@contextlib.contextmanager
def _owned_folder(
    out: Path, record: dict[str, Any], ranks: Ranks, *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Hold the run folder, begun anew with `record` or found to belong to the same run."""
    if not ranks.is_first:
        ranks.wait()
        yield
        return
    with locked(out):
        check_out(out, resume=resume, overwrite=overwrite)
        if overwrite:
            clear(out)
        if resume:
            saved = read_json(out / RUN_FILE)
            check_same_run(saved, record)
            record["began"] = saved["began"]
            sweep(out / "checkpoints")
        write_json(out / RUN_FILE, record)
        ranks.wait()
        yield


def check_same_run(saved: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose settings, notes, base or number of steps are others now."""
    if saved.get("format") != FORMAT:
        raise ValueError(f"--resume: {RUN_FILE} is of another version; start a new run")
    changed = [
        f"{name} was {before} and is {now}"
        for name, before, now in _differences(saved["config"], record["config"], "--")
        if name.removeprefix("--").replace("-", "_") not in _FREE_ON_RESUME
    ]
    changed += [
        f"the content of the {name.replace('_', ' ')} is not what it was"
        for name, before in saved["fingerprints"].items()
        if record["fingerprints"][name] != before
    ]
    if not changed:
        changed = [
            f"{name} was {saved[name]} and is {record[name]}"
            for name in ("labels", "total_steps")
            if saved[name] != record[name]
        ]
    if changed:
        raise ValueError(
            f"--resume: this is not the run that began: {'; '.join(changed)}; resume with what it "
            "began with, or start a new run in another folder"
        )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    """Flags whose values differ between two configs."""
    for name in sorted(before.keys() | now.keys()):
        flag, old, new = prefix + name.replace("_", "-"), before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{flag}.")
        elif old != new:
            yield flag, old, new


def _load_parameters(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill the trainable parameters; names and shapes must match one to one."""
    expected = {name: tuple(p.shape) for name, p in parameters.items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise ValueError("the checkpoint's weights are not those that this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _write_model(config: RunConfig, model: Model, notes: Notes, out: Path) -> None:
    """Adapters as PEFT folders or all weights in Hugging Face layout, and the head beside them."""
    head = None
    if isinstance(model, SequenceClassifier):
        head = {"score.weight": model.score.weight.detach()}
        write_safetensors(out / HEAD_FILE, head)
    names = adapter_names(model)
    for name in names:
        save_adapter(
            model,
            name,
            out / "adapter" / name,
            base_model_name=config.model,
            # PEFT looks for a classifier's head in the adapter that was trained with it.
            head=head if name == names[-1] else None,
        )
    if config.adapter == "full":
        shutil.rmtree(out / "model", ignore_errors=True)
        save_model(model, out / "model", label_names=notes.label_names)
        for name in _TOKENIZER_FILES:
            source = notes.tokenizer.path.parent / name
            if source.is_file():
                shutil.copyfile(source, out / "model" / name)


def _introduce(
    progress: Progress,
    config: RunConfig,
    record: Mapping[str, Any],
    train_set: Dataset,
    position: Position,
    complaints: list[str],
    is_resumed: bool,
) -> None:
    """Say what is about to be trained on what."""
    if not record:
        return
    counts, parameters = record["counts"], record["parameters"]
    for complaint in complaints:
        progress.say(f"warning: a checkpoint was passed over: {complaint}")
    progress.say(
        f"stage {config.stage} on {config.model}: {parameters['trainable']:,} of "
        f"{parameters['all']:,} parameters train ({parameters['trainable'] / parameters['all']:.2%})"
    )
    if config.init_adapter is not None:
        state = "frozen" if config.freeze_init_adapter else "trained further"
        progress.say(f'adapter "{CLINICAL}" comes from {config.init_adapter} and is {state}')
    progress.say(
        f"notes: {counts['train_notes']:,} train, {counts['validation_notes']:,} validate, "
        f"{counts['test_notes']:,} test ({record['split']})"
    )
    left_out = counts["validation_notes_left_out"] + counts["test_notes_left_out"]
    if left_out:
        progress.say(f"notes: {left_out:,} held-out ones left out, whose text is also in training")
    quantiles = "  ".join(f"{name} {value:,}" for name, value in counts["note_length"].items())
    cut = (
        f"{train_set.truncated:,} of {counts['train_notes']:,} truncated ({config.truncate} kept)"
        if isinstance(train_set, ClassificationNotes)
        else f"{train_set.notes_cut:,} of {counts['train_notes']:,} cut into pieces, none truncated"
    )
    progress.say(f"note length in tokens: {quantiles}; --max-length {config.max_length}: {cut}")
    if is_resumed:
        origin = f"step {position.step}" if position.step else "the start: no good checkpoint"
        progress.say(f"resumed from {origin}")


def _last_good(checkpoints: Path) -> str:
    steps = saved_steps(checkpoints)
    if not steps:
        return "No checkpoint had been written yet"
    return f"The last good checkpoint is {step_folder(checkpoints, steps[-1])}"


def _farewell(out: Path, kept_step: int, total_steps: int, best: Mapping[str, Any] | None) -> str:
    if best is None:
        why = "there was no validation"
    elif kept_step == best["step"]:
        why = f"the best validation {best['metric']}: {best['value']:.4f}"
    else:
        why = "as --keep last asks"
    which = "the last step" if kept_step == total_steps else f"of {total_steps} steps"
    return f"done: {out} holds the weights of step {kept_step}, {which} ({why})"


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into a question that the loop asks once a step."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may take over a signal
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
