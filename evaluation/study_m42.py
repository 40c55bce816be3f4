"""The M42 study (arXiv 2409.14988) by one command: four techniques, each on top of those before it.

    python -m evaluation.study_m42 --out runs/m42 --models mistral-7b=DIR --tokens 1e8 1e9 \
        --texts notes=TEXTS:0.8 general=TEXTS:0.2 --data rows.json \
        --benchmarks medqa=FILE medmcqa=FILE pubmedqa=FILE mmlu=DIR --solved medqa=FILE

    base, + pretraining, + instruction, + NEFTune, + prompting     of the largest budget of tokens
    accuracy against the tokens pretrained on                      of each budget, tuned and not

A budget is a run of its own, whose rate falls to its own end: a checkpoint in the middle of a
longer run would be compared at a rate that has not fallen yet. It has as many steps as the budget
takes when all are full; they are not quite, since no piece of a text is cut to fill one. All see
the same texts in the same order, the longer ones more of them. `--pretrain-config` and
`--instruct-config` are files for --config of train.py. The paper's figures of benchmarks are not
known here; none is shown. The invariant is that of every study: whatever is finished is taken as it
is, and the same command goes on where it was; the tables are written anew after every cell.
"""

import math
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from data.conversations import Conversations
from data.questions import QuestionSetName, read_questions
from evaluation.cells import answers_of, finished_record, footprint
from evaluation.questions import QuestionConfig, check_solved
from evaluation.strategies import STRATEGIES, StrategyName
from evaluation.tables import (
    accuracy,
    gigabytes,
    minutes,
    named,
    named_folders,
    table_head,
    table_row,
    write_tables,
)
from model.ending import CommandParser, exit_code
from training.command_line import read_command
from training.config import RunConfig
from training.run_folder import private_files

BASE, PRETRAINED, INSTRUCTED = "base", "+ pretraining", "+ instruction"
NOISY, PROMPTED = "+ NEFTune", "+ prompting"
BENCHMARKS = typing.get_args(QuestionSetName)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the tables are made of."""

    out: Path
    models: Mapping[str, str]  # name: folder
    texts: tuple[str, ...]  # words for --data of stage pretrain
    tokens: tuple[int, ...]  # budgets of pretraining, rising
    data: str  # instruction rows
    benchmarks: Mapping[str, str]  # question set: file or folder
    solved: Mapping[str, str] = field(default_factory=dict)  # of some sets: solved questions
    prompt: StrategyName = "letter"
    prompting: StrategyName = "medprompt"
    shots: int = 5  # solved questions in front, of `prompting`
    neftune_alpha: float = 5.0
    pretrain_config: str | None = None
    instruct_config: str | None = None
    bootstrap: int = 1000


class Cell(typing.NamedTuple):
    """A row of the tables: a technique on top of so many tokens of pretraining."""

    base: str
    variant: str
    tokens: int
    config: RunConfig | None  # of the run whose model answers; None for the base itself


def cells_of(study: Study) -> Iterator[Cell]:
    """All rows, each after those that it stands on."""
    for base in study.models:
        pretrained: dict[int, RunConfig | None] = {0: None, **pretrain_configs(study, base)}
        for tokens, start in pretrained.items():
            yield Cell(base, PRETRAINED if tokens else BASE, tokens, start)
            tuned = instruct_config(study, base, start, is_noisy=False)
            yield Cell(base, INSTRUCTED, tokens, tuned)
        tuned = instruct_config(study, base, start, is_noisy=True)
        yield Cell(base, NOISY, tokens, tuned)
        yield Cell(base, PROMPTED, tokens, tuned)


def pretrain_configs(study: Study, base: str) -> dict[int, RunConfig]:
    """The run of each budget. Raises ValueError where a step has no fixed number of tokens."""
    out = study.out / "pretrain" / base
    words = ["--stage", "pretrain", "--model", study.models[base], "--out", str(out)]
    for text in study.texts:
        words += ["--data", text]
    if study.pretrain_config is not None:
        words += ["--config", study.pretrain_config]
    config = read_command(words).config
    if config.batch_tokens is None:
        raise ValueError(
            "--tokens counts tokens, so the steps of pretraining need --batch-tokens, not "
            "--batch-size: change --pretrain-config"
        )
    return {
        tokens: replace(
            config,
            steps=math.ceil(tokens / config.batch_tokens),
            epochs=None,
            keep="last",  # a row is named after the tokens that its weights have seen
            out=str(out / f"tokens-{tokens}"),
        )
        for tokens in study.tokens
    }


def instruct_config(
    study: Study, base: str, start: RunConfig | None, *, is_noisy: bool
) -> RunConfig:
    """The run that tunes the base, or what the pretraining `start` has made of it."""
    place = "tokens-0" if start is None else Path(start.out).name
    out = study.out / ("neftune" if is_noisy else "instruct") / base / place
    words = ["--stage", "instruct", "--data", study.data, "--out", str(out)]
    if start is not None and start.adapter == "full":
        words += ["--model", str(Path(start.out) / "model")]
    else:
        words += ["--model", study.models[base]]
        words += [] if start is None else ["--init-adapter", start.out]
    if is_noisy:
        words += ["--neftune-alpha", str(study.neftune_alpha)]
    if study.instruct_config is not None:
        words += ["--config", study.instruct_config]
    return read_command(words).config


def run_study(study: Study) -> dict[str, Any]:
    """Make every cell that is not there yet and return the tables."""
    cells = list(cells_of(study))
    _check(study, cells)
    tables: dict[str, Any] = {"prompt": study.prompt, "prompting": study.prompting, "rows": []}
    for cell in cells:
        trained: dict[str, Any] = {}
        if cell.config is not None:
            kept = finished_record(cell.config)["kept"]
            trained = {
                **footprint(cell.config),
                "tokens_seen": kept["tokens"],
                "sources": kept.get("sources"),  # tokens and epochs of each
            }
        answered: dict[str, Any] = {}
        place = {"base": cell.base, "variant": cell.variant, "tokens": cell.tokens}
        tables["rows"].append({**place, **trained, "benchmarks": answered})
        for name in study.benchmarks:
            if _is_asked(study, cell, name):
                answered[name] = _asked(study, cell, name)
            write_tables(study.out, tables, _markdown(study, tables))
    return tables


def _check(study: Study, cells: Sequence[Cell]) -> None:
    """Refuse what a later cell would refuse, before the first one takes its hours."""
    tuned = [cell.config for cell in cells if cell.config and cell.config.stage == "instruct"]
    for bad_rows in {config.bad_rows for config in tuned}:
        Conversations(study.data, bad_rows=bad_rows)
    found, solved = (
        {name: read_questions(cast(QuestionSetName, name), path) for name, path in sets.items()}
        for sets in (study.benchmarks, study.solved)
    )
    if study.shots and not study.solved:
        raise ValueError(
            f"--prompting {study.prompting} shows {study.shots} solved questions: name their files "
            "with --solved SET=PATH, or say --shots 0"
        )
    for cell in cells:
        if cell.variant == PRETRAINED and cell.config is not None:
            sources = [source.path for source in cell.config.sources] or [str(cell.config.data)]
            if missing := [path for path in sources if not Path(path).exists()]:
                raise ValueError(f"--texts: there is no {missing[0]}; name a table or a folder")
        for name in study.benchmarks:
            if _is_asked(study, cell, name):
                asked = question_config(study, cell, name)
                if asked.shots:
                    check_solved(asked, found[name], solved[name])


def _is_asked(study: Study, cell: Cell, name: str) -> bool:
    """Not where the last row's prompts show solved questions and there are none of the set."""
    return cell.variant != PROMPTED or study.shots == 0 or name in study.solved


def _answers(study: Study, cell: Cell) -> Path:
    name = f"{cell.variant.removeprefix('+ ')}-{cell.tokens}"
    return study.out / "answers" / cell.base / name


def question_config(study: Study, cell: Cell, name: str) -> QuestionConfig:
    """How the questions of one set are put to the model of a cell."""
    config = cell.config
    asked = QuestionConfig(
        mcq=cast(QuestionSetName, name),
        data=study.benchmarks[name],
        run=None if config is None else config.out,
        model=study.models[cell.base] if config is None else None,
        out=str(_answers(study, cell)) if config is None else None,
        prompt=study.prompt,
        bootstrap=study.bootstrap,
    )
    if cell.variant != PROMPTED:
        return asked
    solved = study.solved[name] if study.shots else None
    return replace(asked, prompt=study.prompting, shots=study.shots, shots_data=solved)


def _asked(study: Study, cell: Cell, name: str) -> dict[str, Any]:
    asked = question_config(study, cell, name)
    results = answers_of(asked, _answers(study, cell) / f"{name}.json")
    told = ("n", "accuracy", "accuracy_ci", "unanswered", "shortened_prompts", "counts")
    return {key: results[key] for key in told}


# The tables ---------------------------------------------------------------------------------------


def _markdown(study: Study, tables: Mapping[str, Any]) -> Iterator[str]:
    largest, rows = study.tokens[-1], tables["rows"]
    yield "# Pretraining, instruction, NEFTune and prompting"
    yield ""
    yield (
        f"Accuracy in percent with its 95% interval and the questions scored; --prompt "
        f"{study.prompt}, in the last row --prompt {study.prompting}. The paper's figures of "
        "benchmarks are not known here. Memory is the peak of the run in GB, of a GPU's tensors or "
        "on a CPU of the process."
    )
    yield from ("", f"## Each technique on top of the others, a budget of {largest:,} tokens", "")
    yield from table_head("base", "", *study.benchmarks, "trained", "memory", "minutes an epoch")
    for line in rows:
        if line["tokens"] == largest or line["variant"] == BASE:
            yield table_row(
                line["base"],
                line["variant"],
                *(accuracy(line["benchmarks"].get(name)) for name in study.benchmarks),
                f"{line['trainable']:,}" if "trainable" in line else "",
                gigabytes(line.get("peak_memory")),
                minutes(line.get("seconds_per_epoch")),
            )
    yield from ("", "## Accuracy against the tokens pretrained on", "")
    yield from table_head("base", "budget", "", *study.benchmarks)
    for line in rows:
        if line["variant"] in (BASE, PRETRAINED, INSTRUCTED):
            yield table_row(
                line["base"],
                f"{line['tokens']:,}",
                "instructed" if line["variant"] == INSTRUCTED else "as it is",
                *(accuracy(line["benchmarks"].get(name)) for name in study.benchmarks),
            )


# The command --------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Read the command line, make the cells, and return the exit code."""

    def work() -> None:
        parser = CommandParser("python -m evaluation.study_m42", "The M42 study, cell by cell.")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR")
        parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
        parser.add_argument(
            "--texts", nargs="+", required=True, metavar="TEXTS", help="--data of stage pretrain"
        )
        parser.add_argument(
            "--tokens", nargs="+", type=float, required=True, help="budgets of pretraining"
        )
        parser.add_argument("--data", required=True, metavar="ROWS", help="instruction rows")
        parser.add_argument(
            "--benchmarks", nargs="+", required=True, metavar="SET=PATH", help="question sets"
        )
        parser.add_argument(
            "--solved", nargs="+", default=[], metavar="SET=PATH", help="solved questions, to show"
        )
        parser.add_argument("--prompt", choices=sorted(STRATEGIES), default="letter")
        parser.add_argument("--prompting", choices=sorted(STRATEGIES), default="medprompt")
        parser.add_argument("--shots", type=int, default=5, help="solved questions of --prompting")
        parser.add_argument("--neftune-alpha", type=float, default=5.0)
        parser.add_argument("--pretrain-config", metavar="FILE", help="settings of stage pretrain")
        parser.add_argument("--instruct-config", metavar="FILE", help="settings of stage instruct")
        parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of an interval")
        flags = parser.read(arguments)
        study = Study(
            out=flags.out,
            models=named_folders(flags.models, "--models"),
            texts=tuple(flags.texts),
            tokens=_budgets(flags.tokens),
            data=flags.data,
            benchmarks=_question_sets(flags.benchmarks, "--benchmarks"),
            solved=_question_sets(flags.solved, "--solved"),
            prompt=cast(StrategyName, flags.prompt),
            prompting=cast(StrategyName, flags.prompting),
            shots=flags.shots,
            neftune_alpha=flags.neftune_alpha,
            pretrain_config=flags.pretrain_config,
            instruct_config=flags.instruct_config,
            bootstrap=flags.bootstrap,
        )
        with private_files():
            run_study(study)
        print(f"{study.out}/study.md has the tables, study.json their figures")

    return exit_code(
        "evaluation.study_m42",
        arguments,
        work,
        interrupted="interrupted; the same command goes on where it was",
    )


def _budgets(numbers: Sequence[float]) -> tuple[int, ...]:
    if not all(1 <= number < 1e15 and number == int(number) for number in numbers):
        raise ValueError("--tokens takes whole numbers from 1, such as 1e9")
    return tuple(sorted({int(number) for number in numbers}))


def _question_sets(words: Sequence[str], flag: str) -> dict[str, str]:
    """SET=PATH pairs, each of a question set that is known."""
    found = named(words, flag)
    for name, path in found.items():
        if name not in BENCHMARKS:
            raise ValueError(f"{flag}: {name} is no question set; one of {', '.join(BENCHMARKS)}")
        if not Path(path).exists():
            raise ValueError(f"{flag} {name}={path}: there is no {path}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
