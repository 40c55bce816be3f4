"""run.json: what a run is, so that evaluation can rebuild it and a resumed run can be recognised.

It holds the resolved config, versions and commit, fingerprints of data, tokenizer, base and init
adapter, counts, and at the end which step's weights were kept. Invariant: numbers and names of
columns, labels and files, never a note or a patient's id.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from lora.attach import adapter_names
from model.heads import Model
from training.assemble import check_same_base, count_parameters, fingerprints
from training.config import RunConfig, to_dict
from training.notes import Notes
from training.parallel import Ranks
from training.run_folder import FORMAT

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "sentencepiece", "tokenizers", "duckdb")
_STATUS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux
# Settings that a resumed run may change. They say where things lie, which the fingerprints check by
# content instead, and what is kept.
_FREE_ON_RESUME = {
    "model", "data", "init_adapter", "splits", "exclude", "cache_dir", "workers", "device", "out",
    "shard",
    "checkpoint_every", "keep_checkpoints", "keep",
}  # fmt: skip


def make_record(
    config: RunConfig,
    notes: Notes,
    model: Model,
    ranks: Ranks,
    total_steps: int,
    epoch_tokens: int,
) -> dict[str, Any]:
    """run.json of a run that begins; `epoch_tokens` pass through the model in an epoch."""
    found = fingerprints(config, notes)
    check_same_base(config, found["base"])
    trainable, total = count_parameters(model)
    return {
        "format": FORMAT,
        "finished": False,
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": to_dict(config),
        "environment": _environment(ranks),
        "fingerprints": found,
        "data": notes.cache.description,
        "split": notes.splits.rule,
        "counts": notes.counts(),
        "sources": [
            {
                "name": source.name,
                "share": source.share,
                "data": source.description,
                "split": source.rule,
                **notes.source_counts(source),
            }
            for source in notes.sources
        ],
        "labels": list(notes.label_names),
        "adapters": adapter_names(model),
        "parameters": {"trainable": trainable, "all": total},
        "total_steps": total_steps,
        "epoch_tokens": epoch_tokens,
        "peak_memory": 0,  # bytes, known at the end
    }


def identity(record: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a run's steps; its checkpoints carry it, so no other run takes them.

    Two runs of the same settings, notes and base are the same run, in whatever folders they are.
    """
    config = {
        name: value for name, value in record["config"].items() if name not in _FREE_ON_RESUME
    }
    # Beside the sources' fingerprints, which stand by name, their order and how much each is drawn.
    sources = _shares(record)
    steps = [config, record["fingerprints"], sources, record["labels"], record["total_steps"]]
    return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()


def check_same_run(saved: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose settings, notes, base or number of steps are others now."""
    changed = changed_settings(saved["config"], record["config"], free=_FREE_ON_RESUME)
    before, now = _shares(saved), _shares(record)
    if before != now:
        changed.append(f"the sources were {_in_words(before)} and are {_in_words(now)}")
    else:
        prints = (
            fingerprints_by_name(saved["fingerprints"]),
            fingerprints_by_name(record["fingerprints"]),
        )
        changed += [
            f"the content of the {name.replace('_', ' ')} is not what it was"
            for name, found in prints[0].items()
            if prints[1][name] != found
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


def _shares(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The sources of a run and their shares of its tokens, in their order."""
    return [(source["name"], source["share"]) for source in record["sources"]]


def _in_words(sources: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} ({share:.4g} of the tokens)" for name, share in sources) or "none"


def fingerprints_by_name(prints: Mapping[str, Any]) -> dict[str, str | None]:
    """The fingerprints of run.json, those of several sources as "source NAME"."""
    found: dict[str, str | None] = {}
    for name, of in prints.items():
        found |= {f"source {s}": d for s, d in of.items()} if isinstance(of, dict) else {name: of}
    return found


def changed_settings(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, free: Set[str]
) -> list[str]:
    """The settings that differ between two configs of run.json, in words; `free` ones may."""
    return [
        f"{flag} was {before} and is {after}"
        for flag, before, after in _differences(saved, now, "--")
        if flag.removeprefix("--").replace("-", "_") not in free
    ]


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


def begin_peak(device: torch.device) -> None:
    """Forget the highest memory use so far, so that `peak_memory` is of what comes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_PEAK.exists():
        with contextlib.suppress(OSError):  # where it may not be written the process's peak stays
            _CLEAR_PEAK.write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes held at once: of a GPU by torch's tensors there, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # getrusage would also count the process that this one came from
        lines = _STATUS.read_text().splitlines()
        line = next((line for line in lines if line.startswith("VmHWM")), None)
        if line is not None:  # some containers' kernels do not tell it
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def _environment(ranks: Ranks) -> dict[str, Any]:
    """Versions of Python and packages, the commit of this repository, device and ranks."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    is_gpu = ranks.device.type == "cuda"
    return {
        "versions": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(ranks.device) if is_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.count,
    }


def _commit() -> str | None:
    """The checked-out commit, with "+" where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return commit if commit is None or not changes else f"{commit}+"
