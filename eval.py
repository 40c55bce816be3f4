"""Score a finished run on notes that it has not seen, or let it predict.

    python eval.py --run runs/clinical                    # perplexity, with the adapter and without
    python eval.py --run runs/downstream                  # accuracy, F1, AUROC with their intervals
    python eval.py --run runs/downstream --split validation
    python eval.py --run runs/downstream --data OTHER.csv # other notes than the run's own
    python eval.py --run runs/downstream --data NEW.csv --predict scores.csv  # without labels
    python eval.py --run runs/instruct --mcq medqa --data medqa_test.jsonl --prompt letter
    python eval.py --model BASE --out base-scores --mcq medmcqa --data dev.jsonl  # a bare base
    python eval.py --model BASE --out base-scores --mcq usmle --data DIR --base-dtype int8

Writes `eval/results.json` (null where a metric is not defined) and for classifiers
`eval/predictions.csv` into the run's folder; `evaluation/score.py` tells how. Exit codes are those
of train.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from evaluation.questions import QuestionConfig, question_summary, score_questions
from evaluation.score import ScoreConfig, score_run, summary
from model.ending import exit_code
from training.command_line import flag_types, parse, split_flags


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalFlags(ScoreConfig):
    """Score a finished run, or let it predict; see eval.py for whole commands."""

    debug: bool = False
    """Show the traceback of a failure."""

    def __post_init__(self) -> None:
        """Nothing: the checks are those of the ScoreConfig that is made of these flags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionFlags(QuestionConfig):
    """Put multiple-choice questions to a finished run or to a base."""

    debug: bool = False
    """Show the traceback of a failure."""

    def __post_init__(self) -> None:
        """Nothing: the checks are those of the QuestionConfig that is made of these flags."""


def read_command(arguments: Sequence[str]) -> ScoreConfig | QuestionConfig:
    """What the arguments ask for; ValueError for anything wrong, SystemExit(0) after --help.

    With --mcq the flags are those of questions, and --help lists them.
    """
    if _asks_questions(arguments):
        typed = split_flags(arguments, flag_types(QuestionFlags))
        asked = parse(QuestionFlags, typed, default=QuestionFlags(mcq="medqa"), prog="eval.py")
        named = {field.name: getattr(asked, field.name) for field in fields(QuestionConfig)}
        return QuestionConfig(**named)
    typed = split_flags(arguments, flag_types(EvalFlags))
    if "--run" not in typed and "--help" not in typed:
        raise ValueError(
            "--run is missing: name the folder of a finished run, as in --run runs/mor"
        )
    flags = parse(EvalFlags, typed, default=EvalFlags(run=""), prog="eval.py")
    return ScoreConfig(**{field.name: getattr(flags, field.name) for field in fields(ScoreConfig)})


def _asks_questions(arguments: Sequence[str]) -> bool:
    return any(word == "--mcq" or word.startswith("--mcq=") for word in arguments)


def main(arguments: Sequence[str]) -> int:
    """Score the run, say the results, and return the exit code."""

    def work() -> None:
        config = read_command(arguments)
        lines = (
            question_summary(score_questions(config))
            if isinstance(config, QuestionConfig)
            else summary(score_run(config))
        )
        for line in lines:
            print(line)

    done = (
        "the same command goes on from the answers that were written"
        if _asks_questions(arguments)
        else "nothing was written"
    )
    return exit_code("eval.py", arguments, work, interrupted=f"interrupted; {done}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
