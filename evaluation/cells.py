"""Runs that a search or a study consists of: each is made once, and gone on with after a stop.

A cell is a run in a folder of its own. Asked for again, a finished one is taken as it is and an
unfinished one is resumed, so whoever asks needs no memory of how far it came. The invariant: a
folder that holds a run of other settings is refused, never taken for the one that was asked for.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.metrics import headline_metrics
from evaluation.score import ScoreConfig, score_run
from model.files import read_json
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
        run(config, score=headline_metrics)
        return read_record(out)
    record = read_record(out)
    _check_settings(record, config)
    if not record["finished"]:
        has_checkpoint = bool(saved_steps(out / "checkpoints"))
        run(config, score=headline_metrics, resume=has_checkpoint, overwrite=not has_checkpoint)
        record = read_record(out)
    return record


def scores_of(config: RunConfig, scoring: ScoreConfig) -> Mapping[str, Any]:
    """The results of the run on its test notes, scored once: what eval.py writes.

    scoring: how it is scored; the run's folder is put in.
    """
    results = Path(config.out) / _RESULTS
    if not results.is_file():
        score_run(dataclasses.replace(scoring, run=config.out))
    found: Mapping[str, Any] = read_json(results)
    return found


def _check_settings(record: Mapping[str, Any], config: RunConfig) -> None:
    resolved = resolve(config, choose_device(config.device))
    changed = changed_settings(record["config"], to_dict(resolved), free=_FREE)
    if changed:
        raise ValueError(
            f"{config.out} holds another run: {'; '.join(changed)}; choose another --out, or "
            "remove that folder"
        )
