"""What a run ran on: versions, commit, device. Read once, written into run.json."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "sentencepiece", "tokenizers", "duckdb")


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """Versions of Python and packages, the commit of this repository, device and ranks."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    is_gpu = device.type == "cuda"
    return {
        "versions": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def _commit() -> str | None:
    """The commit that is checked out, marked with "+" where files differ from it; None if unknown."""
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
