"""A search over an adapter's settings: trials chosen by Optuna, the best refitted with seeds.

    python -m evaluation.search --space lora --trials 20 --out runs/search -- \
        --stage downstream --task mor --model DIR --data MIMIC_DIR --init-adapter runs/clinical

What stands behind `--` are flags of train.py, which every trial shares. Trials are judged by the
run's validation alone (a classifier's AUROC, a language model's loss); the test notes are scored
once, for the refits. The invariant: which settings trial k tries is a function of the seed and of
the trials before it, so an interrupted search, called again, ends as if it had not been.

The grids are those of Clinical LLaMA-LoRA (arXiv 2307.03042) as first published. A setting that
was tried before costs nothing: its value is taken from the earlier trial.
"""

import csv
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.cells import finished_record, scores_of
from evaluation.score import ScoreConfig
from model.ending import CommandParser, RunFailed, exit_code
from model.files import write_json, write_whole
from training.command_line import read_command
from training.config import RunConfig
from training.run_folder import private_files

Choices = Mapping[str, tuple[float | str | bool, ...]]  # flag of train.py -> what is tried

_VIRTUAL_TOKENS = (1, 5, 10, 15, 20)
SPACES: Mapping[str, Choices] = {
    "lora": {
        "--lora.r": (2, 4, 8, 16),
        "--lora.alpha": (4, 8, 16, 32),
        "--lora.dropout": (0.0, 0.1, 0.2),
    },
    "adaption-prompt": {
        "--adaption-prompt.adapter-len": (5, 10),
        "--adaption-prompt.adapter-layers": (10, 20, 30),
    },
    "prefix": {
        "--prefix.num-virtual-tokens": _VIRTUAL_TOKENS,
        "--prefix.projection": (True, False),
    },
    "prompt": {
        "--prompt.num-virtual-tokens": _VIRTUAL_TOKENS,
        "--prompt.init": ("text", "random"),
    },
    "p-tuning": {
        "--p-tuning.num-virtual-tokens": _VIRTUAL_TOKENS,
        "--p-tuning.encoder": ("mlp", "lstm"),
        "--p-tuning.encoder-hidden-size": (64, 128, 256, 768),
        "--p-tuning.encoder-layers": (1, 2, 4, 8, 12),
        "--p-tuning.encoder-dropout": (0.0, 0.1, 0.2),
    },
    # Full fine-tuning and encoders: the rate alone.
    "lr": {"--lr": (1e-5, 2e-5, 5e-5, 1e-4, 3e-4)},
}
TABLE, SUMMARY = "trials.csv", "search.json"


class Trial(NamedTuple):
    """One choice of settings and what came of it."""

    number: int
    settings: Mapping[str, float | str | bool]
    value: float  # of the validation: AUROC, or minus the loss; larger is better
    step: int  # of the weights that were kept
    same_as: int | None  # an earlier trial with these settings


def search(
    arguments: Sequence[str], choices: Choices, out: Path, *, trials: int, seed: int
) -> list[Trial]:
    """Try `trials` settings, each as a run in `out`/trials, and return all of them."""
    optuna = _optuna()
    study = optuna.create_study(direction="maximize")
    distributions = {
        flag: optuna.distributions.CategoricalDistribution(values)
        for flag, values in choices.items()
    }
    done: list[Trial] = []
    for number in range(trials):
        # A sampler of its own for each trial: what it draws depends on the history alone.
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + number)
        settings = dict(study.ask(distributions).params)
        trial = _try(arguments, settings, out, number, done)
        study.tell(number, trial.value)
        done.append(trial)
        _write_table(out / TABLE, done, choices)
        print(_line(trial, trials), flush=True)
    return done


def refit(
    arguments: Sequence[str], best: Trial, out: Path, *, seeds: Sequence[int], bootstrap: int
) -> dict[str, Any]:
    """Train the best settings once with each seed and score the test notes of each."""
    results = []
    for seed in seeds:
        config = _config(arguments, best.settings, out / "best" / f"seed-{seed}")
        config = replace(config, seed=seed)
        finished_record(config)
        results.append(scores_of(config, ScoreConfig(run=config.out, bootstrap=bootstrap)))
    name = "auroc" if "auroc" in results[0] else "perplexity"
    values = [result[name] for result in results]
    known = [value for value in values if value is not None]
    return {
        "metric": name,
        "values": dict(zip(map(str, seeds), values, strict=True)),
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
    }


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the largest value, the first of equals."""
    return max(trials, key=lambda trial: trial.value)


def _try(
    arguments: Sequence[str],
    settings: Mapping[str, Any],
    out: Path,
    number: int,
    done: Sequence[Trial],
) -> Trial:
    for earlier in done:
        if earlier.settings == settings:
            first = earlier.number if earlier.same_as is None else earlier.same_as
            return Trial(number, settings, earlier.value, earlier.step, first)
    config = _config(arguments, settings, out / "trials" / f"{number:03d}")
    best = finished_record(config)["kept"]["best"]
    if best is None:
        raise ValueError("a search needs validation notes, and this data has none")
    value = best["metrics"].get("auroc", -best["metrics"]["loss"])
    return Trial(number, settings, value if math.isfinite(value) else -math.inf, best["step"], None)


def _config(arguments: Sequence[str], settings: Mapping[str, Any], folder: Path) -> RunConfig:
    flags: list[str] = []
    for flag, value in settings.items():
        if isinstance(value, bool):
            group, _, name = flag.rpartition(".")
            flags.append(flag if value else f"{group}.no-{name}")
        else:
            flags += [flag, str(value)]
    return read_command([*arguments, *flags, "--out", str(folder)]).config


def _line(trial: Trial, trials: int) -> str:
    settings = "  ".join(f"{flag} {value}" for flag, value in trial.settings.items())
    again = "" if trial.same_as is None else f" (as trial {trial.same_as})"
    return f"trial {trial.number + 1} of {trials}: {settings}: {trial.value:.4f}{again}"


def _write_table(path: Path, trials: Sequence[Trial], choices: Choices) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(aside: Path) -> None:
        with open(aside, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["trial", *choices, "validation", "kept_step", "same_as"])
            for t in trials:
                rows.writerow([t.number, *t.settings.values(), t.value, t.step, t.same_as])

    write_whole(path, write)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError(
            "a search needs optuna, which is not installed: pip install 'optuna>=4.0'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def main(arguments: Sequence[str]) -> int:
    """Read the command line, search, refit, and return the exit code."""

    def work() -> None:
        own = list(arguments)
        split = own.index("--") if "--" in own else len(own)
        own, shared = own[:split], own[split + 1 :]
        parser = CommandParser(
            "python -m evaluation.search", "Search an adapter's settings; train.py's flags after --"
        )
        parser.add_argument("--space", choices=sorted(SPACES), required=True)
        parser.add_argument("--trials", type=int, default=20)
        parser.add_argument("--seeds", type=int, default=3, help="refits of the best settings")
        parser.add_argument("--seed", type=int, default=0, help="decides what is tried")
        parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of an interval")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR")
        flags = parser.read(own)
        for name, least in (("trials", 1), ("seeds", 1), ("seed", 0), ("bootstrap", 0)):
            if getattr(flags, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(flags, name)}")
        for flag in ("--out", "--seed", *SPACES[flags.space]):
            if flag in shared:
                raise ValueError(f"{flag} is chosen by the search; leave it out behind --")
        with private_files():
            trials = search(
                shared, SPACES[flags.space], flags.out, trials=flags.trials, seed=flags.seed
            )
            best = best_of(trials)
            if best.value == -math.inf:
                raise RunFailed("no trial ended in a finite validation; try smaller rates")
            seeds = range(flags.seeds)
            refits = refit(shared, best, flags.out, seeds=seeds, bootstrap=flags.bootstrap)
            write_json(
                flags.out / SUMMARY,
                {
                    "space": flags.space,
                    "arguments": shared,
                    "trials": len(trials),
                    "runs": sum(trial.same_as is None for trial in trials),
                    "best": {"trial": best.number, "settings": dict(best.settings)},
                    "best_validation": best.value,
                    "test": refits,
                },
            )
        print(f"best of {len(trials)}: trial {best.number + 1}; {json.dumps(refits)}")

    return exit_code(
        "evaluation.search",
        arguments,
        work,
        interrupted="interrupted; the same command goes on where it was",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
