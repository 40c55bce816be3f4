"""MedAlpaca's table by one command: each base as it is, and tuned in three ways, sits the USMLE.

    python -m evaluation.study_medalpaca --out runs/medalpaca --data meadow.json --questions usmle \
        --models llama-7b=DIR llama-13b=DIR

    rows      base; all weights trained; LoRA; LoRA over an int8 base
    columns   accuracy of steps 1, 2 and 3 with its interval and how many questions were scored;
              peak of memory and time of an epoch of the training

The tuned rows are the recipes medalpaca, medalpaca-lora and medalpaca-lora-int8; --instruct-config
is a file for --config of train.py, for all of them. Questions are asked as MedAlpaca's script does
(--prompt medalpaca: sampled, up to five tries); --prompt letter compares likelihoods, without
chance. Published figures (MedAlpaca's repository) stand in brackets. The invariant is that of every
study: whatever is finished is taken as it is, and the same command goes on where it was; the tables
are written anew after every cell.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from data.conversations import Conversations
from data.questions import read_questions
from evaluation.cells import answers_of, finished_record, footprint
from evaluation.published import FOOTPRINT, USMLE, USMLE_OTHERS
from evaluation.questions import QuestionConfig
from evaluation.strategies import STRATEGIES, StrategyName
from evaluation.tables import (
    accuracy,
    gigabytes,
    minutes,
    named_folders,
    table_head,
    table_row,
    write_tables,
)
from model.ending import CommandParser, exit_code
from training.command_line import read_command
from training.config import RunConfig
from training.run_folder import private_files

STEPS = ("step1", "step2", "step3")
BASE = "base"
# How the flags of train.py make each tuned row.
TUNED: Mapping[str, str] = {
    "full": "--preset medalpaca",
    "lora": "--preset medalpaca-lora",
    "lora-8bit": "--preset medalpaca-lora-int8",
}
ROWS = (BASE, *TUNED)
# Zero-shot, so without those that show solved questions.
PROMPTS = tuple(sorted(name for name, known in STRATEGIES.items() if not known.finds_nearest))


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the table is made of."""

    out: Path
    data: str  # instruction rows
    questions: str  # folder of the USMLE self-assessment
    models: Mapping[str, str]  # name: folder
    rows: tuple[str, ...] = ROWS
    prompt: StrategyName = "medalpaca"
    instruct_config: str | None = None
    bootstrap: int = 1000


def tuned_config(study: Study, base: str, row: str) -> RunConfig:
    """The run of one tuned row."""
    words = ["--stage", "instruct", "--model", study.models[base], "--data", study.data]
    words += [*TUNED[row].split(), "--out", str(study.out / "tuned" / base / row)]
    if study.instruct_config is not None:
        words += ["--config", study.instruct_config]
    return read_command(words).config


def run_study(study: Study) -> dict[str, Any]:
    """Make every cell that is not there yet and return the table."""
    _check(study)
    tables: dict[str, Any] = {"prompt": study.prompt, "rows": []}
    for base in study.models:
        for row in study.rows:
            tables["rows"].append(_row(study, base, row))
            write_tables(study.out, tables, _markdown(tables))
    return tables


def _check(study: Study) -> None:
    """Refuse what a later cell would refuse, before the first one takes its hours."""
    read_questions("usmle", study.questions)
    cells = [(base, row) for base in study.models for row in study.rows]
    for base, row in cells:
        question_config(study, base, row)
    tuned = [tuned_config(study, base, row) for base, row in cells if row != BASE]
    for bad_rows in {config.bad_rows for config in tuned}:
        Conversations(study.data, bad_rows=bad_rows)


def question_config(study: Study, base: str, row: str) -> QuestionConfig:
    """How the questions are put to the model of a row."""
    is_base = row == BASE
    return QuestionConfig(
        mcq="usmle",
        data=study.questions,
        run=None if is_base else tuned_config(study, base, row).out,
        model=study.models[base] if is_base else None,
        out=str(study.out / "answers" / base / BASE) if is_base else None,
        prompt=study.prompt,
        bootstrap=study.bootstrap,
    )


def _row(study: Study, base: str, row: str) -> dict[str, Any]:
    trained: dict[str, Any] = {}
    if row != BASE:
        config = tuned_config(study, base, row)
        finished_record(config)
        trained = footprint(config)
    asked = question_config(study, base, row)
    results = answers_of(asked, study.out / "answers" / base / f"{row}.json")
    return {
        "base": base,
        "row": row,
        "steps": {step: results["per_step"].get(step) for step in STEPS},
        "unanswered": results["unanswered"],
        "questions": results["counts"],
        **trained,
        "published": USMLE.get((base, row)),
        "published_footprint": FOOTPRINT.get((base, row)),
    }


# The table ----------------------------------------------------------------------------------------


def _markdown(tables: Mapping[str, Any]) -> Iterator[str]:
    yield "# MedAlpaca on the USMLE self-assessment"
    yield ""
    yield (
        f"Accuracy in percent, zero-shot, --prompt {tables['prompt']}, with its 95% interval and "
        "the questions scored. Published figures stand in brackets: answers were drawn there, up "
        "to five times until one could be read, of a number of questions that is not stated. "
        "Memory is the peak of the run in GB, of a GPU's tensors or on a CPU of the process."
    )
    yield ""
    yield from table_head("base", "row", *STEPS, "trained", "memory", "minutes an epoch", "rows")
    for row in tables["rows"]:
        published = row["published"] or (None,) * len(STEPS)
        memory, seconds = row["published_footprint"] or (None, None)
        yield table_row(
            row["base"],
            row["row"],
            *(
                accuracy(row["steps"][step]) + _percent(theirs)
                for step, theirs in zip(STEPS, published, strict=True)
            ),
            f"{row['trainable']:,}" if "trainable" in row else "",
            gigabytes(row.get("peak_memory")) + ("" if memory is None else f" ({memory})"),
            minutes(row.get("seconds_per_epoch"))
            + ("" if seconds is None else f" ({minutes(seconds)})"),
            f"{row['train_rows']:,}" if "train_rows" in row else "",
        )
    cells = {(row["base"], row["row"]) for row in tables["rows"]}
    others = {f"{base}, {row}": found for (base, row), found in USMLE.items()
              if (base, row) not in cells}  # fmt: skip
    yield from ("", "## Published, and no cell of this study", "")
    yield from table_head("model", *STEPS)
    for name, found in {**others, **USMLE_OTHERS}.items():
        yield table_row(name, *(f"{100 * value:.1f}" for value in found))


def _percent(published: float | None) -> str:
    return "" if published is None else f" ({100 * published:.1f})"


# The command --------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Read the command line, make the cells, and return the exit code."""

    def work() -> None:
        parser = CommandParser(
            "python -m evaluation.study_medalpaca", "MedAlpaca's table, cell by cell."
        )
        parser.add_argument("--out", type=Path, required=True, metavar="DIR")
        parser.add_argument("--data", required=True, metavar="ROWS", help="instruction rows")
        parser.add_argument("--questions", required=True, metavar="DIR", help="USMLE files")
        parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
        parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
        parser.add_argument(
            "--prompt", choices=PROMPTS, default="medalpaca", help="how it is asked"
        )
        parser.add_argument("--instruct-config", metavar="FILE", help="settings of the tuned rows")
        parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of an interval")
        flags = parser.read(arguments)
        study = Study(
            out=flags.out,
            data=flags.data,
            questions=flags.questions,
            models=named_folders(flags.models, "--models"),
            rows=tuple(dict.fromkeys(flags.rows)),
            prompt=cast(StrategyName, flags.prompt),
            instruct_config=flags.instruct_config,
            bootstrap=flags.bootstrap,
        )
        with private_files():
            run_study(study)
        print(f"{study.out}/study.md has the table, study.json its figures")

    return exit_code(
        "evaluation.study_medalpaca",
        arguments,
        work,
        interrupted="interrupted; the same command goes on where it was",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
