"""Runs that a search or a study consists of: each is made once, and gone on with after a stop.

A cell is a run in a folder of its own. Asked for again, a finished one is taken as it is and an
unfinished one is resumed, so whoever asks needs no memory of how far it came. The invariant: a
folder that holds a run of other settings is refused, never taken for the one that was asked for.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from data.questions import read_questions
from evaluation.metrics import default_label_scores, validation_score
from evaluation.questions import QuestionConfig, score_questions
from evaluation.score import ScoreConfig, score_run
from evaluation.strategies import versions_of
from model.checkpoint import base_fingerprint
from model.files import read_json, write_json
from training.assemble import resolve
from training.checkpoint import saved_steps
from training.config import RunConfig, to_dict
from training.parallel import choose_device
from training.record import changed_settings
from training.run import run
from training.run_folder import RUN_FILE, read_record

_RESULTS = Path("eval", "results.json")
# What changes nothing that a run finds; `out` is how the run was asked for.
_FREE = {"cache_dir", "workers", "device", "out"}


def finished_record(config: RunConfig) -> Mapping[str, Any]:
    """Make the run, go on with it, or take it as it is; returns its run.json.

    Raises ValueError where its folder holds something else, and what `training.run.run` raises.
    """
    out = Path(config.out)
    if not (out / RUN_FILE).is_file():
        run(config, score=validation_score(config))
        return read_record(out)
    record = read_record(out)
    _check_settings(record, config)
    if not record["finished"]:
        has_checkpoint = bool(saved_steps(out / "checkpoints"))
        run(
            config,
            score=validation_score(config),
            resume=has_checkpoint,
            overwrite=not has_checkpoint,
        )
        record = read_record(out)
    return record


def scores_of(config: RunConfig, scoring: ScoreConfig) -> Mapping[str, Any]:
    """The results of the run on its test notes, scored once: what eval.py writes.

    They are scored again where those that are there have other resamples or label scores.
    scoring: how it is scored; the run's folder is put in.
    """
    results = Path(config.out) / _RESULTS
    known = read_json(results) if results.is_file() else None
    how = {
        "bootstrap": scoring.bootstrap,
        "seed": scoring.seed,
        "label_scores": scoring.label_scores or default_label_scores(config),
    }
    # Of a language model none of these is in the results, and none decides anything.
    if known is None or any(known.get(name, value) != value for name, value in how.items()):
        score_run(dataclasses.replace(scoring, run=config.out))
    found: Mapping[str, Any] = read_json(results)
    return found


def answers_of(asked: QuestionConfig, kept: Path) -> Mapping[str, Any]:
    """The results of questions put to a run or a base; asked once, and then read from `kept`.

    They are asked again where model, questions, the way to ask or its versions are others than
    those of `kept`.
    """
    how = dataclasses.asdict(asked)
    for name in ("device", "micro_tokens", "cache_tokens"):
        del how[name]
    stamp = {
        "asked": how,
        "versions": versions_of(asked.prompt),
        "model": _model_stamp(asked),
        "questions": _questions_stamp(asked),
    }
    if kept.is_file():
        found = read_json(kept)
        if isinstance(found, dict) and {**found, **stamp} == found:
            return cast(Mapping[str, Any], found["results"])
    results = score_questions(asked)
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(kept, {**stamp, "results": results})
    return results


def _model_stamp(asked: QuestionConfig) -> Any:
    if asked.run is None:
        return base_fingerprint(Path(asked.model or ""))
    record = read_record(Path(asked.run))
    return {name: record[name] for name in ("fingerprints", "files")}


def _questions_stamp(asked: QuestionConfig) -> list[str]:
    paths = [path for path in (asked.data, asked.shots_data) if path is not None]
    return [
        read_questions(
            asked.mcq, path, bad_rows=asked.bad_rows, answers_from=asked.answers_from
        ).fingerprint
        for path in paths
    ]


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The lines of the run's steps in metrics.jsonl."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def seconds_per_epoch(record: Mapping[str, Any], out: Path) -> float | None:
    """A pass over the training data at the median speed of the steps; None where none is known."""
    speeds = [s["tokens_per_second"] for s in steps_of(out) if s.get("tokens_per_second")]
    return record["epoch_tokens"] / statistics.median(speeds) if speeds else None


def footprint(config: RunConfig) -> dict[str, Any]:
    """What a finished run trained, and what it took: bytes at its peak, seconds an epoch."""
    out = Path(config.out)
    record = read_record(out)
    return {
        "trainable": record["parameters"]["trainable"],
        "peak_memory": record.get("peak_memory") or None,
        "seconds_per_epoch": seconds_per_epoch(record, out),
        "device": record["environment"]["device"],
        "train_rows": record["counts"]["train_notes"],
    }


def _check_settings(record: Mapping[str, Any], config: RunConfig) -> None:
    resolved = resolve(config, choose_device(config.device))
    changed = changed_settings(record["config"], to_dict(resolved), free=_FREE)
    if changed:
        raise ValueError(
            f"{config.out} holds another run: {'; '.join(changed)}; choose another --out, or "
            "remove that folder"
        )
