"""One run from config to files, top to bottom.

    config -> ranks -> notes -> model and adapters -> steps -> adapters, head, run.json

A run can be stopped at any moment, by SIGTERM or by a pulled plug, and continued from its newest
checkpoint to the same bits as if it had not been. Invariant: everything that decides a step is in
the config, in the fingerprinted inputs or in the checkpoint, never in the process.
"""

import contextlib
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from data.cache import TokenCache
from data.loader import Loader
from data.order import Share
from data.packing import ClassificationNotes
from data.wording import counted
from lora.attach import adapter_names
from lora.peft_format import save_adapter
from model.activations import recomputes_blocks
from model.checkpoint import copy_tokenizer, save_model
from model.ending import RunFailed
from model.files import describe_files, write_safetensors, write_sealed_json
from model.heads import CausalLM, Classifier, Model
from training.assemble import base_parameters, build_model, init_adapter_name, resolve
from training.checkpoint import sweep
from training.config import RunConfig
from training.estimate import TimeLeft, flops
from training.loop import Loop, steps_between_validations
from training.notes import (
    Dataset,
    Notes,
    how_cut,
    load_notes,
    make_dataset,
    source_pieces,
    validation_rows,
)
from training.objective import Classification, LanguageModelling, balanced_class_weights
from training.parallel import Ranks, held_parameters, shard, start, stop
from training.progress import Progress
from training.record import begin_peak, check_same_run, identity, make_record, peak_memory
from training.run_folder import (
    HEAD_FILE,
    RUN_FILE,
    check_out,
    clear,
    locked,
    private_files,
    read_record,
    weight_files,
)
from training.validation import (
    Score,
    validate_classifier,
    validate_language,
    validate_sources,
)

_CPU = torch.device("cpu")


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
    ranks = start(config.device, shard=config.shard)
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
    begin_peak(ranks.device)
    if ranks.is_first:
        check_out(out, resume=resume, overwrite=overwrite)
    config = resolve(config, ranks.device)
    torch.manual_seed(config.seed)  # no step draws from it, but whatever might is repeatable

    notes = load_notes_in_turn(config, ranks)
    train_set = make_dataset(config, notes, notes.splits.train, is_trained_on=True)
    loader = make_loader(config, notes, train_set, ranks)
    total_steps = count_steps(config, loader)

    # Model. The base is frozen; what trains is adapters and head, or with --adapter full all of it.
    model = build_model(config, notes, ranks.device, place=_CPU if config.shard else None)
    objective = make_objective(config, model, notes, ranks.device)
    validate = _validation(config, objective, notes, ranks, score)
    loop = Loop(
        config,
        objective,
        loader,
        validate,
        ranks,
        total_steps=total_steps,
        checkpoints=out / "checkpoints",
    )

    if config.shard:
        whole = set(model.parameters()) - base_parameters(model)
        shard(model, model.network.blocks, whole, ranks)

    # Steps. The folder is this run's alone; a resumed run goes on from its newest checkpoint.
    record = {}
    if ranks.is_first:
        epoch_tokens = int(train_set.lengths(np.arange(len(train_set))).sum())
        record = make_record(config, notes, model, ranks, total_steps, epoch_tokens)
    with (
        _told_of_full_disks(loop),
        _owned_folder(out, record, ranks, resume=resume, overwrite=overwrite),
    ):
        metrics_lines, complaints = loop.begin(identity(read_record(out)), resume=resume)
        ranks.wait()  # nobody writes before everybody has read
        progress = Progress(
            out if ranks.is_first else None,
            total_steps=total_steps,
            first_step=loop.position.step,
            metrics_lines=metrics_lines,
            time_left=_time_left(config, notes, model, train_set, loader, ranks, total_steps),
        )
        with contextlib.closing(progress):
            if ranks.is_first:
                _introduce(progress, config, record, train_set)
                if config.shard:
                    held, total = held_parameters(model), record["parameters"]["all"]
                    progress.say(
                        f"the base is spread over {ranks.count} ranks: {held:,} of {total:,} "
                        "parameters lie on the first"
                    )
            for complaint in complaints:
                progress.say(f"warning: a checkpoint was passed over: {complaint}")
            if resume:
                progress.say(f"resumed after step {loop.position.step} of {total_steps}")
            loop.run(progress, is_asked_to_stop)

            peak = peak_memory(ranks.device)  # of the steps, and of what stands before them

            # Files. The best validation's weights, or with --keep last the last step's.
            kept_step = loop.load_kept()
            if ranks.is_first:
                _write_model(config, model, notes, out)
                best = loop.position.best
                kept = {
                    "step": kept_step,
                    "last_step": loop.position.step,
                    "best": best,
                    "tokens": loop.position.tokens,
                    **({"sources": drawn} if (drawn := loader.drawn()) else {}),
                }
                files = describe_files(out, weight_files(out))
                ending = {
                    "kept": kept,
                    "peak_memory": max(peak, record["peak_memory"]),
                    "files": files,
                    "finished": True,
                }
                write_sealed_json(out / RUN_FILE, {**record, **ending})
                if loop.is_out_of_patience:
                    assert config.patience is not None
                    progress.say(
                        f"stopped after step {loop.position.step} of {total_steps}: "
                        f"{counted(config.patience, 'validation')} in a row without a better "
                        "one (--patience)"
                    )
                for name, of in drawn.items():
                    progress.say(
                        f"source {name}: {counted(int(of['tokens']), 'token')} drawn, "
                        f"{of['epochs']:.2f} epochs"
                    )
                progress.say(_farewell(out, kept_step, loop.position.step, best))
    return out


@contextlib.contextmanager
def _told_of_full_disks(loop: Loop) -> Iterator[None]:
    """Turn a failure to write or read a file into RunFailed, which names the last checkpoint."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"step {loop.position.step}: a file could not be written or read "
            f"({error.strerror or error}); {loop.last_good()}"
        ) from error


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
        sweep(out)
        if overwrite:
            clear(out)
        if resume:
            saved = read_record(out)
            check_same_run(saved, record)
            record |= {"began": saved["began"], "peak_memory": saved.get("peak_memory", 0)}
            sweep(out / "checkpoints")
        write_sealed_json(out / RUN_FILE, record)
        ranks.wait()
        yield


def load_notes_in_turn(config: RunConfig, ranks: Ranks) -> Notes:
    """The run's notes: the first rank makes their token cache, then the others open it."""
    if not ranks.is_first:
        ranks.wait()
    notes = load_notes(config)
    if ranks.is_first:
        ranks.wait()
    return notes


def make_loader(config: RunConfig, notes: Notes, train_set: Dataset, ranks: Ranks) -> Loader:
    """This rank's share of every step."""
    pieces = source_pieces(config, notes, notes.splits.train)
    shares = [
        Share(source.name, len(pieces[source.name]), source.share) for source in notes.sources
    ]
    return Loader(
        train_set,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        micro_tokens=config.micro_tokens,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.count,
        shares=shares,
    )


def count_steps(config: RunConfig, loader: Loader) -> int:
    """Optimiser steps of the whole run."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    total = max(1, math.ceil(config.epochs * loader.steps_per_epoch()))
    if (config.optim.warmup_steps or 0) > total:
        raise ValueError(
            f"--optim.warmup-steps is {config.optim.warmup_steps}, but --epochs {config.epochs:g} "
            f"are only {counted(total, 'step')}"
        )
    return total


def _time_left(
    config: RunConfig,
    notes: Notes,
    model: Model,
    train_set: Dataset,
    loader: Loader,
    ranks: Ranks,
    total_steps: int,
) -> TimeLeft:
    """The clock of the progress lines, which knows what a validation costs beside a step."""
    rows = validation_rows(config, notes)
    if len(rows) == 0:
        return TimeLeft(total_steps=total_steps)
    validated = make_dataset(config, notes, rows)
    step = (
        flops(
            model,
            train_set.lengths(loader.first_epoch()),
            trains=True,
            checkpointing=recomputes_blocks(config.activations),
        )
        / loader.steps_per_epoch()
    )
    validation = flops(model, validated.lengths(np.arange(len(validated))), trains=False)
    return TimeLeft(
        total_steps=total_steps,
        validate_every=steps_between_validations(config, total_steps),
        validation_in_steps=validation / step,
    )


def make_objective(
    config: RunConfig, model: Model, notes: Notes, device: torch.device
) -> LanguageModelling | Classification:
    """What the run's stage optimises."""
    if isinstance(model, CausalLM):
        return LanguageModelling(model, device, activations=config.activations)
    class_weights = None
    assert isinstance(notes.cache, TokenCache)
    if config.class_weights and not notes.cache.multilabel:
        labels = notes.cache.label_codes(notes.splits.train)
        counts = np.bincount(labels, minlength=len(notes.label_names))
        class_weights = balanced_class_weights(counts)
    return Classification(
        model,
        device,
        class_weights=class_weights,
        activations=config.activations,
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
        if config.patience is not None:
            raise ValueError("--patience counts validations, but no note validates; leave it out")
        return None
    if isinstance(objective, LanguageModelling) and notes.sources:
        of_sources = source_pieces(config, notes, rows)
        scored = {name: pieces for name, pieces in of_sources.items() if pieces.scored_tokens}
        return lambda: validate_sources(objective, scored, ranks, micro_tokens=config.micro_tokens)
    dataset = make_dataset(config, notes, rows)
    if isinstance(objective, LanguageModelling):
        assert not isinstance(dataset, ClassificationNotes)
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


def _write_model(config: RunConfig, model: Model, notes: Notes, out: Path) -> None:
    """Adapters as PEFT folders or all weights in Hugging Face layout, and the head beside them."""
    head = None
    if isinstance(model, Classifier):
        head = model.head_state()
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
        copy_tokenizer(notes.tokenizer.path.parent, out / "model")


def _introduce(
    progress: Progress, config: RunConfig, record: Mapping[str, Any], train_set: Dataset
) -> None:
    """Say what is about to be trained on what."""
    counts, parameters = record["counts"], record["parameters"]
    share = parameters["trainable"] / parameters["all"]
    progress.say(
        f"stage {config.stage} on {config.model}: {parameters['trainable']:,} of "
        f"{parameters['all']:,} parameters train ({share:.2%})"
    )
    if config.init_adapter is not None:
        state = "frozen" if config.freeze_init_adapter else "trained further"
        name = init_adapter_name(config)
        progress.say(f'adapter "{name}" comes from {config.init_adapter} and is {state}')
    progress.say(
        f"notes: {counts['train_notes']:,} train, {counts['validation_notes']:,} validate, "
        f"{counts['test_notes']:,} test ({record['split']})"
    )
    for source in record["sources"]:
        progress.say(
            f"source {source['name']}: {source['share']:.1%} of the tokens drawn; "
            f"{source['train_notes']:,} train ({counted(source['train_tokens'], 'token')}), "
            f"{source['validation_notes']:,} validate, {source['test_notes']:,} test"
        )
    for reason, count in counts["cohort"].items():
        progress.say(f"cohort: {count:,} {reason}")
    if counts["excluded_notes"]:
        progress.say(f"notes: {counts['excluded_notes']:,} left out, listed by {config.exclude}")
    left_out = counts["validation_notes_left_out"] + counts["test_notes_left_out"]
    if left_out:
        progress.say(
            f"notes: {counted(left_out, 'held-out note')} left out, the text is in training too"
        )
    quantiles = "  ".join(f"{name} {value:,}" for name, value in counts["note_length"].items())
    for why, count in counts["left_out"].items():
        progress.say(f"left out: {count:,} with {why}")
    progress.say(
        f"note length in tokens: {quantiles}; "
        f"--max-length {config.max_length}: {how_cut(config, train_set)}"
    )


def _farewell(out: Path, kept_step: int, last_step: int, best: Mapping[str, Any] | None) -> str:
    if best is None:
        why = "there was no validation"
    elif kept_step == best["step"]:
        metric = "auroc" if "auroc" in best["metrics"] else "loss"
        why = f"the best validation {metric}: {best['metrics'][metric]:.4f}"
    else:
        why = "as --keep last asks"
    which = "the last step" if kept_step == last_step else f"of {counted(last_step, 'step')}"
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
