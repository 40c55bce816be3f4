"""Run checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `checkpoints/step-000060/` of safetensors and JSON:

    weights.safetensors    the trainable parameters
    optimiser.safetensors  AdamW's moments (float32 or int8) and step counts, by parameter
    random.safetensors     the generators' states
    state.json             step, data position, best validation so far, lines of metrics.jsonl
    manifest.json          the run (`training.record.identity`), size and SHA-256 of each of them,
                           and its own SHA-256; written last

Two invariants. The folder is made aside, synced and renamed, so a name of the form step-N is always
complete; and nothing of it is used before every byte has been compared with the manifest, because
a flipped bit in a safetensors file loads without a word. The same moment of a run makes the same
bytes, so nothing in a checkpoint depends on the clock.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.files import (
    check_files,
    describe_files,
    new_folder,
    open_safetensors,
    read_json,
    read_sealed_json,
    sync,
    write_json,
    write_safetensors,
    write_sealed_json,
)

FORMAT = 2
_FILES = ("weights.safetensors", "optimiser.safetensors", "random.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    step: int
    weights: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    run: str,
    weights: Mapping[str, Tensor],
    optimiser: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write `folder`/step-N of the run of this identity, whole or not at all."""
    path = step_folder(folder, step)
    if path.exists():  # a damaged one, which a resumed run has passed over
        _delete(path)
    with new_folder(path) as aside:
        write_safetensors(aside / "weights.safetensors", weights)
        write_safetensors(aside / "optimiser.safetensors", optimiser)
        write_safetensors(aside / "random.safetensors", random_state())
        write_json(aside / "state.json", dict(state))
        files = describe_files(aside, _FILES)
        manifest = {"format": FORMAT, "run": run, "step": step, "files": files}
        write_sealed_json(aside / "manifest.json", manifest)
    return path


def load_checkpoint(path: Path, *, run: str) -> Checkpoint:
    """Read one checkpoint; ValueError names the file that is not what was written."""
    step = check_checkpoint(path, run=run)
    return Checkpoint(
        step=step,
        weights=_read_tensors(path / "weights.safetensors"),
        optimiser=_read_tensors(path / "optimiser.safetensors"),
        random=_read_tensors(path / "random.safetensors"),
        state=read_json(path / "state.json"),
    )


def load_weights(path: Path, *, run: str) -> dict[str, Tensor]:
    """Read the weights of one checkpoint, the whole of which is verified first."""
    check_checkpoint(path, run=run)
    return _read_tensors(path / "weights.safetensors")


def newest_good(folder: Path, *, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with the newer ones."""
    complaints: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            return load_checkpoint(step_folder(folder, step), run=run), complaints
        except (ValueError, OSError) as error:
            complaints.append(str(error))
    return None, complaints


def saved_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in names if match)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def prune(folder: Path, newest: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest` and those they name as best.

    Later ones go too: they are damaged, for a resumed run has passed them over.
    """
    steps = saved_steps(folder)
    kept = set([step for step in steps if step <= newest][-keep:])
    for step in sorted(kept):
        try:
            best = read_json(step_folder(folder, step) / "state.json")["position"]["best"]
        except (ValueError, LookupError, TypeError):
            continue  # damaged since; nothing will be resumed from it
        if best is not None:
            kept.add(best["step"])
    for step in steps:
        if step not in kept:
            _delete(step_folder(folder, step))


def sweep(folder: Path) -> None:
    """Clear what a killed process left half written or half deleted."""
    if folder.is_dir():
        for left in folder.glob(".*.partial"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _delete(path: Path) -> None:
    """Take the name away first, so that no moment shows a checkpoint with files missing."""
    aside = path.with_name(f".{path.name}.partial")
    os.replace(path, aside)
    sync(path.parent)
    shutil.rmtree(aside)


def check_checkpoint(path: Path, *, run: str) -> int:
    """Compare every byte of a checkpoint with its manifest; returns the step that it is of.

    Raises ValueError with the name of the file that is not what was written, or is another run's.
    """
    manifest = read_sealed_json(path / "manifest.json")
    if manifest.get("format") != FORMAT or set(manifest["files"]) != set(_FILES):
        raise ValueError(f"{path}/manifest.json is not of format {FORMAT}, the one that is read")
    if manifest["run"] != run:
        raise ValueError(f"{path}/manifest.json is of another run than the one in this folder")
    step = int(manifest["step"])
    if step_folder(path.parent, step) != path:
        raise ValueError(f"{path}/manifest.json is of step {step}, not of the step in its name")
    check_files(path, manifest["files"])
    return step


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators, though a step draws from a hash and needs none of them."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
