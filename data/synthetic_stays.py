"""What happens during a stay in the made-up hospital outside the notes, and the labels it gives.

The labels are known here from what was planned (a span on the ventilator, a length of stay, a list
of codes), not read back from the tables: the readers' labels are compared with them.

Invariant. The charted rows say the planned span and nothing else about ventilation: what lies
outside of it (oxygen, a single stray setting, an entry in error) is what the rules leave out.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np

from data import conditions
from data.outcomes import (
    DIED,
    EXCLUDED_DIAGNOSIS,
    NO_DIAGNOSIS,
    NO_PROCEDURE,
    NOT_VENTILATED,
    SHORTLY_VENTILATED,
    WITHOUT_STAY,
)
from data.synthetic_patients import Admission

# Codes that leave an admission out of pmv: a cancer of the mouth, and a donor.
LEFT_OUT_CODES = {"1430": "Malignant neoplasm of upper gum", "V594": "Kidney donor"}
HEART_RATE, PRESSURE, MODE, DEVICE, OLD_DEVICE = 220_045, 220_339, 223_849, 226_732, 467

Span = tuple[datetime, datetime]


class Charted(NamedTuple):
    """The rows of CHARTEVENTS and PROCEDUREEVENTS_MV of a stay, and what they say."""

    rows: list[tuple[int, datetime, str | None, int | None]]  # item, time, value, error
    extubations: list[datetime]
    span: Span | None  # first to last moment on the ventilator
    further_codes: tuple[str, ...]


class Stay(NamedTuple):
    """An admission with all that decides its labels."""

    admission: Admission
    span: Span | None
    diagnoses: tuple[str, ...]
    procedures: tuple[str, ...]


def chart_stay(rng: random.Random, admission: Admission) -> Charted:
    """The charted rows of an admission's ICU stay; none without a stay."""
    rows: list[tuple[int, datetime, str | None, int | None]] = []
    if not admission.in_icu:
        return Charted(rows, [], None, ())
    enter = admission.admitted + timedelta(minutes=60)
    rows.append((HEART_RATE, enter, str(rng.randint(60, 130)), None))
    if admission.ventilated_hours == 0:
        rows.append((DEVICE, enter, rng.choice(("Nasal cannula", "Trach mask ")), None))
        rows.append((OLD_DEVICE, enter, "Nasal Cannula", None))
        if rng.random() < 0.2:  # one setting alone is no event
            rows.append((PRESSURE, enter + timedelta(hours=1), "5", None))
        return Charted(rows, [], None, ())

    start = enter + timedelta(minutes=rng.randrange(1, 60))
    end = start + timedelta(minutes=max(2, round(60 * admission.ventilated_hours)))
    pause: Span | None = None
    if end - start > timedelta(hours=40) and rng.random() < 0.4:  # off the ventilator for a while
        off = start + timedelta(hours=rng.randrange(8, 20))
        pause = off, off + timedelta(minutes=rng.randrange(30, 14 * 60))
    extubations = [end] if rng.random() < 0.5 else []
    moments = [start]
    while (later := moments[-1] + timedelta(minutes=rng.randrange(20, 470))) < end:
        moments.append(later)
    if not extubations:
        moments.append(end)
    if pause is not None:
        # Each side of the pause is an event of its own, longer than a moment.
        off, on = pause
        moments = [at for at in moments if not off < at < on]
        moments = sorted({*moments, off, on, on + timedelta(minutes=7)})
        if rng.random() < 0.5:
            extubations.append(off)
        else:
            rows.append((OLD_DEVICE, off + timedelta(minutes=5), "Face Tent", None))
    for at in moments:
        item, value = rng.choice(
            ((PRESSURE, "8"), (MODE, "CMV/ASSIST"), (OLD_DEVICE, "Ventilator"))
        )
        rows.append((item, at, value, None))
        if rng.random() < 0.2:
            rows.append((PRESSURE, at, "8", None))
    rows.append((DEVICE, end + timedelta(minutes=45), "High flow neb", None))
    if rng.random() < 0.2:
        rows.append((PRESSURE, end + timedelta(hours=20), "5", None))  # alone: no event
    if rng.random() < 0.2:
        rows += [(PRESSURE, end + timedelta(hours=h), "5", 1) for h in (30, 31)]  # in error
    if rng.random() < 0.2:
        rows += [(PRESSURE, end + timedelta(hours=h), None, None) for h in (40, 41)]  # no value
    rng.shuffle(rows)
    further = (rng.choice(tuple(LEFT_OUT_CODES)),) if rng.random() < 0.05 else ()
    return Charted(rows, sorted(extubations), (start, end), further)


def known_outcome(
    task: str, stay: Stay, *, paper: bool = False
) -> tuple[str | list[str], str | None]:
    """The label or labels of an adult's stay in a task, and why it has none."""
    if task == "mor":
        return str(int(stay.admission.died)), None
    if task == "los":
        lasted = stay.admission.discharged - stay.admission.admitted
        days = float(np.round(lasted.total_seconds() / 86_400, 1))
        label = str(sum(days > limit for limit in (3, 7, 14)))
        return label, DIED if stay.admission.died else None
    if task == "diag":
        groups = {code[: 4 if code[0] in "VE" else 3] for code in stay.diagnoses}
        return sorted(groups), None if groups else NO_DIAGNOSIS
    if task == "proc":
        groups = {(str(int(code)) if paper else code)[:3] for code in stay.procedures}
        return sorted(groups), None if groups else NO_PROCEDURE
    assert task == "pmv"
    if not stay.admission.in_icu:
        return "", WITHOUT_STAY
    if set(LEFT_OUT_CODES) & set(stay.diagnoses):
        return "", EXCLUDED_DIAGNOSIS
    if stay.span is None:
        return "", NOT_VENTILATED
    hours = (stay.span[1] - stay.span[0]).total_seconds() / 3600 + 6
    return str(int(hours >= 7 * 24)), SHORTLY_VENTILATED if hours < 2 * 24 else None


def diagnosis_titles() -> dict[str, str]:
    """A title for every diagnosis code that the hospital uses."""
    present = (*conditions.ACUTE, *conditions.CHRONIC, *conditions.COMPLICATIONS)
    titles = {code: item.name for item in present for code in item.codes}
    titles |= {"51881": "acute respiratory failure", "V1582": "history of tobacco use"}
    return titles | LEFT_OUT_CODES
