"""`train.py --dry-run`: what a run would do and need, said without doing it.

Prints the resolved settings as YAML that --config takes, and all else in its comments, so the
output is itself a config file. The notes are tokenised into their cache, as the run would do first;
of the base only the headers are read. Invariant: the run's folder is neither made nor touched.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from data.packing import PackedBatch
from data.wording import counted
from lora.attach import adapter_names, adapter_parameters
from model.activations import recomputes_blocks
from model.heads import Classifier, Model
from training.assemble import (
    base_parameters,
    build_model,
    check_same_base,
    count_parameters,
    fingerprints,
    resolve,
)
from training.command_line import used_settings
from training.config import RunConfig
from training.estimate import (
    Memory,
    Work,
    duration,
    flops,
    measured_rate,
    memory,
    offloaded_bytes,
    program_bytes,
    spread_bytes,
)
from training.loop import steps_between_validations
from training.notes import (
    Dataset,
    Notes,
    SourceNotes,
    cache_folder,
    how_cut,
    make_dataset,
    validation_rows,
)
from training.objective import compute_dtype
from training.optim import make_adamw, state_bytes
from training.parallel import Ranks, start, stop
from training.run import count_steps, load_notes_in_turn, make_loader, make_objective
from training.run_folder import check_out, private_files

_STEPS_LOOKED_AT = 50  # for the mean step and the largest micro-batch
_META = torch.device("meta")  # shapes without memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a dry run finds out."""

    config: RunConfig
    notes: Notes
    train_set: Dataset
    model: Model  # on the meta device
    total_steps: int
    steps_per_epoch: int
    first_epoch: np.ndarray  # int64 [n]: the segments of its steps
    drawn: dict[str, dict[str, float]]  # tokens and epochs of each named source, over the run
    memory: Memory
    offloaded: int  # bytes of activations in the host's memory
    work: Work
    rate: float  # operations a second, measured

    @property
    def seconds(self) -> float:
        return self.work.seconds(self.rate)


def dry_run(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> None:
    """Print the plan of a run. Raises ValueError for whatever the run would refuse at its start.

    Of the weights only headers are read, so a NaN among them is found by the run alone.
    """
    ranks = start(config.device, shard=config.shard)
    try:
        with private_files():
            check_out(Path(config.out), resume=resume, overwrite=overwrite)
            plan = make_plan(config, ranks)
        if ranks.is_first:
            print(describe(plan, ranks), flush=True)
    finally:
        stop(ranks)


def make_plan(config: RunConfig, ranks: Ranks) -> Plan:
    """Everything that a run decides before its first step, and what its steps will need."""
    config = resolve(config, ranks.device)
    notes = load_notes_in_turn(config, ranks)
    train_set = make_dataset(config, notes, notes.splits.train, is_trained_on=True)
    loader = make_loader(config, notes, train_set, ranks)
    total_steps, steps_per_epoch = count_steps(config, loader), loader.steps_per_epoch()
    model = build_model(config, notes, _META)
    check_same_base(config, fingerprints(config, notes)["base"])
    make_objective(config, model, notes, _META)  # refuses a class without notes

    # An optimiser loads much of torch that nothing has needed so far: 130 MiB.
    make_adamw({"": torch.nn.Parameter(torch.zeros(1))}, config.optim)
    program = program_bytes() if ranks.device.type == "cpu" else 0

    looked_at = min(total_steps, _STEPS_LOOKED_AT)
    steps = [step for step in (loader.next_step() for _ in range(looked_at)) if step]
    if not steps:
        raise ValueError(
            "a step has fewer segments than there are ranks; raise --batch-tokens or --batch-size, "
            "or start fewer ranks"
        )
    largest = max(itertools.chain(*steps), key=lambda batch: len(batch.input_ids))
    checkpointing = recomputes_blocks(config.activations)
    dtype = compute_dtype(model, ranks.device)
    need = memory(
        model,
        largest,
        compute_dtype=dtype,
        on_gpu=ranks.device.type == "cuda",
        activations=config.activations,
        micro_batches=max(len(step) for step in steps),
        optimiser=state_bytes((p for p in model.parameters() if p.requires_grad), config.optim),
        program=program,
    )
    if config.shard:
        weights = spread_bytes(model, base_parameters(model), ranks.count)
        need = need._replace(weights=weights)
    step_flops = np.mean(
        [
            sum(
                flops(model, _lengths(batch), trains=True, checkpointing=checkpointing)
                for batch in step
            )
            for step in steps
        ]
    )
    rows = validation_rows(config, notes)
    validated = make_dataset(config, notes, rows) if len(rows) else None
    every = steps_between_validations(config, total_steps)
    work = Work(
        steps=total_steps,
        step=float(step_flops),
        validations=-(-total_steps // every) if validated is not None else 0,
        validation=0.0
        if validated is None
        else flops(model, validated.lengths(np.arange(len(validated))), trains=False) / ranks.count,
    )
    rate = measured_rate(
        model,
        lambda probe: make_objective(config, probe, notes, ranks.device),
        largest,
        ranks.device,
        checkpointing=checkpointing,
    )
    return Plan(
        config=config,
        notes=notes,
        train_set=train_set,
        model=model,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        first_epoch=loader.first_epoch(),
        drawn=loader.drawn(total_steps),
        memory=need,
        offloaded=offloaded_bytes(model, largest, dtype) if config.activations == "offload" else 0,
        work=work,
        rate=rate,
    )


def describe(plan: Plan, ranks: Ranks) -> str:
    """The plan as YAML whose comments say what no setting says."""
    config, counts = plan.config, plan.notes.counts()
    trainable, total = count_parameters(plan.model)
    left_out = counts["validation_notes_left_out"] + counts["test_notes_left_out"]
    quantiles = "  ".join(f"{name} {value:,}" for name, value in counts["note_length"].items())
    need, work, device = plan.memory, plan.work, ranks.device
    each = " on each rank" if ranks.count > 1 else ""
    lines = [
        f"dry run: nothing is trained, and {config.out} is not touched",
        f"the notes' token cache is in {cache_folder(config)}, where the run will find it",
        "",
        f"trains: {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        *(f"        {line}" for line in _trained_parts(plan.model)),
        f"notes:  {counts['train_notes']:,} train, {counts['validation_notes']:,} validate, "
        f"{counts['test_notes']:,} test ({plan.notes.splits.rule})",
        f"        {counted(left_out, 'held-out note')} left out, the text is in training too",
        f"length: of a note in tokens: {quantiles}",
        f"        --max-length {config.max_length}: {how_cut(config, plan.train_set)}",
        *(f"        left out: {count:,} with {why}" for why, count in counts["left_out"].items()),
        *(line for source in plan.notes.sources for line in _of_source(plan, source)),
        f"epoch:  {_one_epoch(plan)}"
        f"{counted(int(plan.train_set.lengths(plan.first_epoch).sum()), 'token')} in "
        f"{counted(len(plan.first_epoch), 'segment')}, {counted(plan.steps_per_epoch, 'step')}",
        f"run:    {counted(plan.total_steps, 'step')}, "
        f"{plan.total_steps / plan.steps_per_epoch:.2f} epochs; "
        f"{counted(work.validations, 'validation')}"
        + ("" if config.patience is None else f", fewer if {config.patience} are not better"),
        f"memory: {_bytes(need.total)} at the peak{each}; {_available(device)}",
        f"        program {_bytes(need.program)}, weights {_bytes(need.weights)}, optimiser "
        f"{_bytes(need.optimiser)}, activations {_bytes(need.activations)}, working "
        f"{_bytes(need.working)}",
        *([f"        offloaded {_bytes(plan.offloaded)} to the host"] if plan.offloaded else []),
        f"time:   about {duration(plan.seconds)}, of which validations "
        f"{duration(work.validations * work.validation / plan.rate)}",
        f"        from {plan.rate / 1e9:,.0f} GFLOP/s, measured just now on one block: expect it "
        "within a third, and less",
        "        exact where other programs share the machine; the run corrects it as it goes",
    ]
    comments = "\n".join(f"# {line}".rstrip() for line in lines)
    settings = yaml.safe_dump(used_settings(config), sort_keys=False, allow_unicode=True)
    return f"{comments}\n\n{settings}".rstrip()


def _one_epoch(plan: Plan) -> str:
    sources = plan.notes.sources
    return f"once through {sources[0].name}, " if len(sources) > 1 else ""


def _of_source(plan: Plan, source: SourceNotes) -> Iterator[str]:
    """What a named source has, and what is drawn from it."""
    counts, drawn = plan.notes.source_counts(source), plan.drawn[source.name]
    yield (
        f"source: {source.name}, {source.share:.1%} of the tokens drawn; "
        f"{counts['train_notes']:,} train ({counted(counts['train_tokens'], 'token')}), "
        f"{counts['validation_notes']:,} validate, {counts['test_notes']:,} test"
    )
    tokens = counted(int(drawn["tokens"]), "token")
    yield f"        the run draws {tokens} of it, {drawn['epochs']:.2f} epochs"


def _trained_parts(model: Model) -> list[str]:
    """What trains: adapters by name, the head, the base."""
    found: dict[str, int] = {}
    owners = {
        parameter: name
        for name in adapter_names(model)
        for parameter in adapter_parameters(model, name)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in owners:
            part = f'adapter "{owners[parameter]}"'
        elif isinstance(model, Classifier) and name in model.head_state():
            part = "the classifier's head"
        else:
            part = "the base"
        found[part] = found.get(part, 0) + parameter.numel()
    return [f"{part}: {count:,}" for part, count in found.items()]


def _lengths(batch: PackedBatch) -> np.ndarray:
    return np.diff(batch.offsets)


def _available(device: torch.device) -> str:
    """What the device has, in words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"the GPU has {_bytes(free)} free of {_bytes(total)}"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"this machine has {_bytes(total)}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
