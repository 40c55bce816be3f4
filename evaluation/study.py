"""The tables of Clinical LLaMA-LoRA by one command, every cell a run of its own.

    python -m evaluation.study --out runs/study --data MIMIC_III --notes MIMIC_IV_NOTE \
        --models llama=DIR pmc-llama=DIR --encoders bluebert=DIR core=DIR

    table 1   notes of each task and split
    table 2   domain adaptation: each base by each of five methods, with perplexity and hours
    table 3   outcomes: each base by head, LoRA, and the clinical adapter frozen or trained, with a
              downstream adapter and without; encoders trained whole and by LoRA

A cell's figure stands with its interval (patients resampled) beside the published one. The macro
average is the plain mean of a row's tasks. `--preset paper` gives every cell the published settings
of its row; `--clinical-config` and `--downstream-config` are files for --config of train.py, for
all cells of a stage, and win over it. The invariant: whatever is finished is taken as
it is, and the same command goes on where it was; the tables are written anew after every cell.
"""

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.cells import finished_record, scores_of, seconds_per_epoch, steps_of
from evaluation.published import ADAPTATION, NOTES, OUTCOMES, TASKS
from evaluation.score import ScoreConfig
from evaluation.tables import aside, named_folders, table_head, table_row, write_tables
from model.ending import CommandParser, exit_code
from training.command_line import read_command
from training.config import RunConfig
from training.run_folder import private_files

PMC_LLAMA = "pmc-llama"  # the base with settings of its own, and the name of its special tokens
PAPER_SEED = 1234  # the first one of --preset paper
METHODS = ("lora", "adaption-prompt", "prefix", "prompt", "p-tuning")

# How the flags of train.py make each row of table 3; {clinical} is the base's clinical run.
DECODER_ROWS: Mapping[str, str] = {
    "head": "--adapter none",
    "lora": "--adapter lora",
    "frozen": "--adapter none --init-adapter {clinical} --freeze-init-adapter",
    "frozen+downstream": "--adapter lora --init-adapter {clinical} --freeze-init-adapter",
    "trainable": "--adapter none --init-adapter {clinical}",
    "trainable+downstream": "--adapter lora --init-adapter {clinical}",
}
ENCODER_ROWS: Mapping[str, str] = {"full": "--adapter full", "lora": "--adapter lora"}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the tables are made of."""

    out: Path
    data: str  # MIMIC folder of the outcomes
    notes: str | None  # texts of the domain adaptation; None leaves table 2 and its rows out
    models: Mapping[str, str]  # name: folder of a decoder
    encoders: Mapping[str, str]
    tasks: tuple[str, ...] = TASKS
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0,)
    is_paper: bool = False  # every cell takes the published settings of its row
    clinical_config: str | None = None
    downstream_config: str | None = None
    bootstrap: int = 1000


def adaptation_config(study: Study, base: str, method: str) -> RunConfig:
    """The run of one cell of table 2."""
    assert study.notes is not None
    words = ["--stage", "clinical", "--adapter", method, "--model", study.models[base]]
    words += ["--data", study.notes, "--out", str(study.out / "clinical" / base / method)]
    if study.is_paper:
        words += ["--preset", "paper-pmc-llama" if base == PMC_LLAMA else "paper-llama"]
    if study.clinical_config is not None:
        words += ["--config", study.clinical_config]
    return read_command(words).config


def outcome_configs(study: Study, base: str, row: str, task: str) -> list[RunConfig]:
    """The runs of one cell of table 3, one a seed."""
    is_decoder = base in study.models
    clinical = study.out / "clinical" / base / "lora"
    flags = (DECODER_ROWS if is_decoder else ENCODER_ROWS)[row].split()
    words = ["--stage", "downstream", "--task", task, "--data", study.data]
    words += ["--model", (study.models if is_decoder else study.encoders)[base]]
    words += [flag.format(clinical=clinical) for flag in flags]
    if study.is_paper:
        words += ["--preset", outcome_preset(study, base, row, task)]
        words += ["--tokenizer-preset", PMC_LLAMA] if base == PMC_LLAMA else []
    if study.downstream_config is not None:
        words += ["--config", study.downstream_config]
    folder = study.out / "outcomes" / base / row / task
    return [
        read_command([*words, "--seed", str(seed), "--out", str(folder / f"seed-{seed}")]).config
        for seed in study.seeds
    ]


def outcome_preset(study: Study, base: str, row: str, task: str) -> str:
    """The published settings of a cell of table 3."""
    if base in study.encoders:
        return "paper-encoder"
    if (base, row, task) == ("llama", "lora", "mor"):
        return "paper-lora-mor"
    return f"paper-outcome-{task}" if row == "trainable+downstream" else "paper-outcome"


def outcome_rows(study: Study) -> Iterator[tuple[str, str]]:
    """(base, row) of table 3, in its order."""
    for base in study.encoders:
        yield from ((base, row) for row in ENCODER_ROWS)
    for base in study.models:
        for row, flags in DECODER_ROWS.items():
            if study.notes is not None or "{clinical}" not in flags:
                yield base, row


def run_study(study: Study) -> dict[str, Any]:
    """Make every cell that is not there yet and return the tables."""
    _check_cells(study)
    tables: dict[str, Any] = {"notes": {}, "adaptation": [], "outcomes": []}
    if study.notes is not None:
        # LoRA first: the outcomes need it, whatever else table 2 is asked to compare.
        methods = list(dict.fromkeys(["lora", *study.methods]))
        for base in study.models:
            for method in methods:
                tables["adaptation"].append(_adapted(study, base, method))
                _mark_chosen(tables["adaptation"])
                write_tables(study.out, tables, _markdown(study, tables))
    for base, row in outcome_rows(study):
        cells: dict[str, Any] = {}
        line: dict[str, Any] = {"base": base, "variant": row, "tasks": cells}
        tables["outcomes"].append(line)
        for task in study.tasks:
            cells[task] = _outcome(study, base, row, task, tables["notes"])
            line["auroc_macro"] = _macro(cells, study.tasks)
            write_tables(study.out, tables, _markdown(study, tables))
    return tables


def _check_cells(study: Study) -> None:
    """Raises ValueError for settings of any cell, before the first one trains for hours."""
    for base in study.models if study.notes is not None else ():
        for method in {"lora", *study.methods}:
            adaptation_config(study, base, method)
    for base, row in outcome_rows(study):
        for task in study.tasks:
            outcome_configs(study, base, row, task)


def train_perplexity(steps: Sequence[Mapping[str, Any]]) -> float:
    """Of the last tenth of the steps (lines of `metrics.jsonl`) together, not of a single one."""
    late = steps[-max(1, len(steps) // 10) :]
    return math.exp(statistics.fmean(step["loss"] for step in late))


def _adapted(study: Study, base: str, method: str) -> dict[str, Any]:
    config = adaptation_config(study, base, method)
    record = finished_record(config)
    results = scores_of(config, ScoreConfig(run=config.out, bootstrap=study.bootstrap))
    steps, seconds = steps_of(Path(config.out)), seconds_per_epoch(record, Path(config.out))
    parameters = record["parameters"]
    best = record["kept"]["best"]
    return {
        "base": base,
        "method": method,
        "trainable": parameters["trainable"],
        "share": parameters["trainable"] / parameters["all"],
        "train_perplexity": train_perplexity(steps),
        "validation_loss": None if best is None else best["metrics"]["loss"],
        "perplexity": results["perplexity"],
        "hours_per_epoch": None if seconds is None else seconds / 3600,
        "chosen": False,
        "published": ADAPTATION.get((base, method)),
    }


def _mark_chosen(rows: Sequence[dict[str, Any]]) -> None:
    """Of each base the method with the lowest validation loss; the test decides nothing."""
    for row in rows:
        rivals = [r["validation_loss"] for r in rows if r["base"] == row["base"]]
        known = [loss for loss in rivals if loss is not None]
        row["chosen"] = bool(known) and row["validation_loss"] == min(known)


def _outcome(study: Study, base: str, row: str, task: str, notes: dict[str, Any]) -> dict[str, Any]:
    found = []
    for config in outcome_configs(study, base, row, task):
        counts = finished_record(config)["counts"]
        notes[task] = [counts[f"{part}_notes"] for part in ("train", "validation", "test")]
        found.append(scores_of(config, ScoreConfig(run=config.out, bootstrap=study.bootstrap)))
    values = [result["auroc"] for result in found]
    known = [value for value in values if value is not None]
    place = TASKS.index(task) if task in TASKS else None
    published = OUTCOMES.get((base, row))
    return {
        "auroc": statistics.fmean(known) if len(known) == len(values) else None,
        "auroc_sd": statistics.stdev(known) if len(known) > 1 else None,  # over the seeds
        "auroc_ci": found[0]["auroc_ci"],  # over the patients, of the first seed
        "auroc_by_seed": dict(zip(map(str, study.seeds), values, strict=True)),
        "published": None if published is None or place is None else published[place],
    }


def _macro(cells: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> float | None:
    """The plain mean over the tasks; None until all of them are there and defined."""
    values = [cells[task]["auroc"] for task in tasks if task in cells]
    if len(values) < len(tasks) or any(value is None for value in values):
        return None
    return statistics.fmean(values)


# Tables -------------------------------------------------------------------------------------------


def _markdown(study: Study, tables: Mapping[str, Any]) -> Iterator[str]:
    yield "# Study"
    yield ""
    yield "Published figures (arXiv 2307.03042, notes of 128 tokens) stand in brackets."
    if tables["notes"]:
        yield from ("", "## Notes", "", *table_head("task", "train", "validation", "test"))
        for task, ours in tables["notes"].items():
            theirs = NOTES.get(task, (None,) * 3)
            yield table_row(
                task, *(f"{a:,}{aside(b, ',')}" for a, b in zip(ours, theirs, strict=True))
            )
    if tables["adaptation"]:
        names = ("base", "method", "trainable", "share", "train perplexity", "test perplexity")
        yield from ("", "## Domain adaptation", "", *table_head(*names, "hours an epoch", "chosen"))
        for row in tables["adaptation"]:
            count, train, test, published_hours = row["published"] or (None,) * 4
            hours = row["hours_per_epoch"]
            yield table_row(
                row["base"],
                row["method"],
                f"{row['trainable']:,}{aside(count, ',')}",
                f"{row['share']:.4%}",
                f"{row['train_perplexity']:.3f}{aside(train)}",
                f"{row['perplexity']:.3f}{aside(test)}",
                ("" if hours is None else f"{hours:.2f}") + aside(published_hours),
                "yes" if row["chosen"] else "",
            )
    if tables["outcomes"]:
        yield from ("", "## Outcomes, AUROC in percent", "")
        yield from table_head("base", "variant", *study.tasks, "macro")
        for line in tables["outcomes"]:
            cells = [_cell(line["tasks"].get(task)) for task in study.tasks]
            macro = line.get("auroc_macro")
            last = "" if macro is None else f"{100 * macro:.2f}"
            yield table_row(line["base"], line["variant"], *cells, last)


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["auroc"] is None:
        return "not defined"
    text = f"{100 * cell['auroc']:.2f}"
    if cell["auroc_sd"] is not None:
        text += f" ± {100 * cell['auroc_sd']:.2f}"
    elif cell["auroc_ci"] is not None:  # of one seed, so not beside a mean over several
        low, high = cell["auroc_ci"]
        text += f" [{100 * low:.2f}, {100 * high:.2f}]"
    return text + aside(cell["published"])


# The command --------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Read the command line, make the cells, and return the exit code."""

    def work() -> None:
        parser = CommandParser("python -m evaluation.study", "The paper's tables, cell by cell.")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR")
        parser.add_argument("--data", required=True, metavar="DIR", help="MIMIC folder of outcomes")
        parser.add_argument("--notes", metavar="TEXTS", help="notes of the domain adaptation")
        parser.add_argument("--models", nargs="+", default=[], metavar="NAME=DIR", help="decoders")
        parser.add_argument("--encoders", nargs="+", default=[], metavar="NAME=DIR")
        parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
        parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
        parser.add_argument("--seeds", type=int, default=1, help="runs of each outcome cell")
        parser.add_argument("--preset", choices=("paper",), help="every row's published settings")
        parser.add_argument("--clinical-config", metavar="FILE", help="settings of stage clinical")
        parser.add_argument("--downstream-config", metavar="FILE", help="of stage downstream")
        parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of an interval")
        flags = parser.read(arguments)
        first_seed = PAPER_SEED if flags.preset else 0
        study = Study(
            out=flags.out,
            data=flags.data,
            notes=flags.notes,
            models=named_folders(flags.models, "--models"),
            encoders=named_folders(flags.encoders, "--encoders"),
            tasks=tuple(dict.fromkeys(flags.tasks)),
            methods=tuple(dict.fromkeys(flags.methods)),
            seeds=tuple(range(first_seed, first_seed + flags.seeds)),
            is_paper=flags.preset is not None,
            clinical_config=flags.clinical_config,
            downstream_config=flags.downstream_config,
            bootstrap=flags.bootstrap,
        )
        if not study.models and not study.encoders:
            raise ValueError("give --models or --encoders, as in --models llama=DIR")
        if both := study.models.keys() & study.encoders.keys():
            raise ValueError(f"{min(both)} is the name of a model and of an encoder")
        if flags.seeds < 1 or flags.bootstrap < 0:
            raise ValueError("--seeds must be at least 1 and --bootstrap at least 0")
        with private_files():
            run_study(study)
        print(f"{study.out}/study.md has the tables, study.json their figures")

    return exit_code(
        "evaluation.study",
        arguments,
        work,
        interrupted="interrupted; the same command goes on where it was",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
