"""Recorded figures: rows of a CSV under benchmarks/results, with what they depend on."""

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append_row(name: str, row: Mapping[str, Any], columns: Sequence[str] | None = None) -> None:
    """Add a row to `results/NAME.csv`, which has these columns (of the row, where none are given).

    A column that the row does not have is left empty.
    """
    path = RESULTS / f"{name}.csv"
    is_new = not path.exists()
    RESULTS.mkdir(exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(row), restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def today() -> str:
    return datetime.date.today().isoformat()


def machine() -> dict[str, Any]:
    """The processor, its cores and how busy it is, and the commit that is checked out."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "commit": commit,
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
