"""The folder of a run: who may use it, what lies in it, and how it is written.

    run.json           resolved config, versions, fingerprints of data and base, counts, outcome;
                       SHA-256 of itself and of the weights that the run wrote
    metrics.jsonl      one line per optimiser step and per validation
    tensorboard/       the same numbers, where TensorBoard is installed
    checkpoints/       see `training.checkpoint`
    adapter/NAME/      each adapter as a PEFT folder, or
    model/             all weights in Hugging Face layout
    head.safetensors   a classifier's head
    eval/              what eval.py writes

Everything in it derives from patients' notes, so the folder is 0700 and its files are 0600.
Invariant: a folder that holds something else is never written to and never deleted from.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.files import read_sealed_json

RUN_FILE, HEAD_FILE = "run.json", "head.safetensors"
FORMAT = 1  # of run.json
_CONTENTS = {
    RUN_FILE, "metrics.jsonl", "tensorboard", "checkpoints", "adapter", "model",
    HEAD_FILE, "eval",
}  # fmt: skip


def check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that cannot be used as asked, before any work is done.

    Raises ValueError for a folder that is in use, not ours, or not there to resume.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: choose one")
    if out.is_symlink():
        raise ValueError(f"--out {out} is a symbolic link; name the folder itself")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.exists() and out.stat().st_uid != os.getuid():
        raise ValueError(f"--out {out} belongs to another user; name a folder of your own")
    contents = {entry.name for entry in out.iterdir()} if out.exists() else set()
    contents = {name for name in contents if not name.endswith(".partial")}  # a killed writer's
    if resume:
        if RUN_FILE not in contents:
            raise ValueError(f"--resume: there is no run in {out}; leave --resume out to start one")
        read_record(out)
    elif contents:
        if RUN_FILE not in contents:
            raise ValueError(
                f"--out {out} is not empty and not a run's folder; name a new or an empty folder"
            )
        if not overwrite:
            raise ValueError(
                f"--out {out} already holds a run: continue it with --resume, replace it with "
                "--overwrite, or name another folder"
            )


def read_record(out: Path) -> dict[str, Any]:
    """run.json of the run in `out`; ValueError where it is missing, damaged or of another version.

    The settings in it are checked by `training.config.from_dict`.
    """
    path = out / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{out} holds no run: {RUN_FILE} is missing")
    record = read_sealed_json(path)
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} is not the record of a run, or of another version of them")
    return record


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock ends with the process, however it dies.

    Raises ValueError if another process holds it.
    """
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(out, 0o700)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {out} is in use by another run; wait for it to end") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def private_files() -> Iterator[None]:
    """Create every file and folder for its owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def weight_files(out: Path) -> list[str]:
    """What a finished run is loaded from, by path in its folder: adapters, head, whole model."""
    found = [out / HEAD_FILE, *(out / "adapter").rglob("*"), *(out / "model").rglob("*")]
    return sorted(str(path.relative_to(out)) for path in found if path.is_file())


def clear(out: Path) -> None:
    """Delete the run in `out`: its own files, nothing else."""
    # Last of all the file that says that this is a run, so a killed deletion can be repeated.
    for name in sorted(_CONTENTS, key=lambda name: name == RUN_FILE):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
