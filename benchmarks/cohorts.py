"""How fast, and in how much memory, MIMIC's large tables become a cohort.

    python -m benchmarks.cohorts notes --megabytes 1000
    python -m benchmarks.cohorts charts --megabytes 2000

`notes` writes a NOTEEVENTS of that size whose every row is a discharge summary of ten kilobytes,
and reads it as admission notes with the outcome mor; `charts` writes a CHARTEVENTS of which one row
in twenty speaks of ventilation, as in MIMIC-III, and reads it as the outcome pmv. The tables lie in
a temporary folder and are deleted; the reader runs in a process of its own, whose largest memory is
told. Rows are appended to benchmarks/results/cohorts.csv.
"""

import argparse
import csv
import functools
import itertools
import json
import multiprocessing
import platform
import random
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.record import append_row, machine, today
from data.mimic import open_mimic
from data.outcomes import MIMIC3, NEEDS
from data.tables import COLUMNS

SUMMARY_BYTES = 10_000
HOURLY_ITEMS = 20  # charted rows of a patient's hour, one of them of the ventilator
STAY_HOURS = 240
LINES = 10_000  # that notes are made of
EPOCH = datetime(2150, 1, 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cohorts", allow_abbrev=False)
    parser.add_argument("what", choices=("notes", "charts"))
    parser.add_argument("--megabytes", type=int, default=100, metavar="N")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the tables lie meanwhile")
    arguments = parser.parse_args(argv)
    task = {"notes": "mor", "charts": "pmv"}[arguments.what]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_tables(folder, task, arguments.megabytes * 10**6)
        table = {"notes": "NOTEEVENTS", "charts": "CHARTEVENTS"}[arguments.what]
        size = (folder / f"{table}.csv").stat().st_size
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (str(folder), task))
    row = {
        "date": today(),
        "table": table,
        "task": task,
        "table_mb": round(size / 1e6, 1),
        "mb_s": round(size / 1e6 / found["s"], 1),
        **{name: round(value, 1) for name, value in found.items()},
        "python": platform.python_version(),
        "duckdb": version("duckdb"),
        **machine(),
    }
    append_row("cohorts", row)
    print(json.dumps(row, indent=1))


def measure(folder: str, task: str) -> dict[str, Any]:
    """Reads the cohort to its end: its size in notes and MB, seconds, seconds of CPU, MB of RAM."""
    began, notes, text = time.perf_counter(), 0, 0
    source = open_mimic(folder, task, spill_folder=folder)
    for note in source:
        notes += 1
        text += len(note.text)
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "notes": notes,
        "note_mb": text / 1e6,
        "s": seconds,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1e3,
    }


def write_tables(folder: Path, task: str, size: int) -> None:
    """The tables of a task in MIMIC-III's layout, the large one of `size` bytes."""
    rng = random.Random(0)
    if task == "mor":
        stays = size // SUMMARY_BYTES
    else:
        # A row has 83 bytes.
        stays = max(1, size // (83 * HOURLY_ITEMS * STAY_HOURS))
    for name in NEEDS[task]:
        table = MIMIC3.tables[name][0]
        with (folder / f"{table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(
                file, COLUMNS[table].split(), "", extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            for stay in range(1, stays + 1):
                if table == "CHARTEVENTS":
                    file.writelines(_charted(rng, stay))
                else:
                    writer.writerows(_rows(rng, table, stay))


def _rows(rng: random.Random, table: str, stay: int) -> Iterator[dict[str, Any]]:
    """The rows of one patient's only stay in a table."""
    ids = {"ROW_ID": stay, "SUBJECT_ID": stay, "HADM_ID": stay}
    if table == "ADMISSIONS":
        left = EPOCH + timedelta(hours=STAY_HOURS)
        yield ids | {"ADMITTIME": EPOCH, "DISCHTIME": left, "HOSPITAL_EXPIRE_FLAG": stay % 2}
    elif table == "NOTEEVENTS":
        note = {"CHARTDATE": EPOCH.date(), "CATEGORY": "Discharge summary", "DESCRIPTION": "Report"}
        yield ids | note | {"TEXT": _summary(rng, stay)}
    elif table == "PATIENTS":
        yield ids | {"DOB": EPOCH - timedelta(days=20_000)}
    elif table == "ICUSTAYS":
        yield ids | {"ICUSTAY_ID": stay}
    elif table == "DIAGNOSES_ICD":
        yield ids | {"ICD9_CODE": "0389"}


@functools.cache
def _moments() -> list[tuple[int, int, str]]:
    """Hour, item and time of every charted row of a stay."""
    return [
        (hour, item, str(EPOCH + timedelta(hours=hour, minutes=item)))
        for hour, item in itertools.product(range(STAY_HOURS), range(HOURLY_ITEMS))
    ]


def _charted(rng: random.Random, stay: int) -> Iterator[str]:
    """The lines of CHARTEVENTS of one patient's only stay."""
    ventilated = rng.randrange(STAY_HOURS)
    ids, value = f"{stay},{stay},{stay},{stay}", rng.randrange(200)
    for hour, item, at in _moments():
        number = 220_339 if item == 0 and hour < ventilated else 220_045 + item
        yield f"{ids},{number},{at},{at},15,{(value + 7 * item) % 200},,,0,0,,\n"


def _summary(rng: random.Random, stay: int) -> str:
    """A summary of ten kilobytes, a third of it in sections that were known on arrival.

    No two are the same, because a summary that is filed twice is kept once.
    """
    known = (
        "Chief Complaint",
        "History of Present Illness",
        "Past Medical History",
        "Social History",
    )
    later = ("Pertinent Results", "Brief Hospital Course", "Discharge Condition")
    parts = []
    for header in (*known, *later):
        count = SUMMARY_BYTES // 8 // (12 if header in known else 4)
        begin = rng.randrange(LINES)
        parts.append(f"{header}:\n" + "\n".join(_lines()[begin : begin + count // 10]))
    return f"Stay {stay}\n\n" + "\n\n".join(parts)


@functools.cache
def _lines() -> list[str]:
    """Lines of ten words of a vocabulary of 500, and after them the first thousand again."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    lines = [" ".join(rng.choices(words, k=10)) for _ in range(LINES)]
    return lines + lines[:1000]


if __name__ == "__main__":
    main()
