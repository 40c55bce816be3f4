"""A made-up hospital cohort in the file layouts of MIMIC-III v1.4 and MIMIC-IV-Note v2.2.

    python -m data.synthetic --out cohort --patients 2600 --seed 0

`OUT/mimic-iii/` holds six of MIMIC-III's tables, `OUT/mimic-iv-note/note/` the four note files (of
other patients), and `OUT/cohort.json` what only a generator can know: the true probability of
in-hospital death of every admission, the best AUROC that any model can expect, and how many
admissions the rules for admission notes must exclude, by reason.

Latent conditions (data/conditions.py) drive both the words and the outcomes. Each admission has one
acute condition, a severity, complications and the patient's chronic conditions; death follows a
logistic model of these and of age. About a quarter of the adults die, more than in life, so that a
small test split still holds enough deaths. Days of stay, ventilation, diagnosis and procedure codes
come from the same latents.

Invariants. The same arguments give the same bytes (gzip headers carry no time; every patient has a
random stream of its own). The sections that make up an admission note never tell the outcome,
except where a leak is planted on purpose. No row describes a person.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import math
import random
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data import conditions
from data.conditions import ACUTE, CHRONIC, COMPLICATIONS, SEVERITIES, Acute, Chronic, Complication
from data.mimic import (
    ADMISSIONS,
    COLUMNS,
    DEATH_TOLD,
    FATES,
    KEPT,
    NEWBORN,
    NO_REPORT,
    NO_SECTION,
    NO_SUMMARY,
    REPEATED,
)

# The law of in-hospital death: logit P = BIAS + SCALE * (sum of the log-odds of the latents). Both
# are set so that about 22% of the adults die and the best expected AUROC is about 0.864.
BIAS = -2.65
SCALE = 0.74

Value = str | int | float | datetime | date | None

MIMIC_III = {
    "ADMISSIONS": COLUMNS["ADMISSIONS"],
    "PATIENTS": "ROW_ID SUBJECT_ID GENDER DOB DOD DOD_HOSP DOD_SSN EXPIRE_FLAG",
    "ICUSTAYS": "ROW_ID SUBJECT_ID HADM_ID ICUSTAY_ID DBSOURCE FIRST_CAREUNIT LAST_CAREUNIT"
    " FIRST_WARDID LAST_WARDID INTIME OUTTIME LOS",
    "DIAGNOSES_ICD": "ROW_ID SUBJECT_ID HADM_ID SEQ_NUM ICD9_CODE",
    "PROCEDURES_ICD": "ROW_ID SUBJECT_ID HADM_ID SEQ_NUM ICD9_CODE",
    "NOTEEVENTS": COLUMNS["NOTEEVENTS"],
}
MIMIC_IV_NOTE = {
    "discharge": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "radiology": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "discharge_detail": "note_id subject_id field_name field_value field_ordinal",
    "radiology_detail": "note_id subject_id field_name field_value field_ordinal",
}


# ------------------------------------------------------------------------------------------ latents


@dataclass(frozen=True, kw_only=True)
class Admission:
    """One stay of an adult: its latents and what follows from them."""

    hadm_id: int
    age: int
    acute: Acute
    severity: int  # index into SEVERITIES
    complications: tuple[Complication, ...]
    chronic: tuple[Chronic, ...]
    risk: float  # true P(death in hospital)
    died: bool
    admitted: datetime
    discharged: datetime
    ventilated_hours: float  # 0: never
    fate: str  # one of FATES

    @property
    def in_icu(self) -> bool:
        return self.severity > 0 or self.ventilated_hours > 0


@dataclass(frozen=True, kw_only=True)
class Patient:
    subject_id: int
    sex: str  # "M" or "F"
    ethnicity: str
    admissions: tuple[Admission, ...]


def death_risk(
    age: int,
    acute: Acute,
    severity: int,
    complications: Sequence[Complication],
    chronic: Sequence[Chronic],
) -> float:
    """P(death in hospital) = sigmoid(BIAS + SCALE * sum of log-odds), a number in (0, 1)."""
    log_odds = conditions.age_risk(age) + acute.risk + SEVERITIES[severity].risk
    log_odds += sum(item.risk for item in complications) + sum(item.risk for item in chronic)
    return 1.0 / (1.0 + math.exp(-(BIAS + SCALE * log_odds)))


def _pick(rng: random.Random, weights: Sequence[float]) -> int:
    """An index drawn with probability proportional to its weight."""
    point = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1


def draw_patient(rng: random.Random, subject_id: int, hadm_ids: Iterator[int]) -> Patient:
    """One adult with one to four admissions; the last one may end in death."""
    sex = rng.choice("MF")
    ethnicity = rng.choice(
        ("WHITE", "WHITE", "WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "HISPANIC OR LATINO")
    )
    first = ACUTE[_pick(rng, [acute.frequency for acute in ACUTE])]
    low, high = first.ages
    age = low + round((high - low) * max(rng.random(), rng.random()))  # older rather than younger
    exposure = min(max((age - 15) / 60, 0.05), 1.2)
    chronic = tuple(item for item in CHRONIC if rng.random() < item.frequency * exposure)
    start = datetime(2100, 1, 1) + timedelta(
        days=rng.randrange(33_000), minutes=rng.randrange(24 * 60)
    )

    admissions: list[Admission] = []
    acute = first
    while True:
        severity = _pick(rng, [level.frequency for level in SEVERITIES])
        complications = tuple(c for c in COMPLICATIONS if rng.random() < c.frequency[severity])
        risk = death_risk(age, acute, severity, complications, chronic)
        died = rng.random() < risk
        days = acute.stay * SEVERITIES[severity].stay * math.exp(rng.gauss(0.0, 0.45))
        days = max(days * (0.6 if died else 1.0), 0.3)
        ventilated = rng.random() < acute.ventilation * (0.0, 0.25, 1.0)[severity]
        hours = (
            round(min(0.75 * days * 24, days * 24 * rng.uniform(0.1, 0.7)), 1)
            if ventilated
            else 0.0
        )
        admissions.append(
            Admission(
                hadm_id=next(hadm_ids),
                age=age,
                acute=acute,
                severity=severity,
                complications=complications,
                chronic=chronic,
                risk=round(risk, 6),
                died=died,
                admitted=start,
                discharged=start + timedelta(minutes=round(days * 24 * 60)),
                ventilated_hours=hours,
                fate=_draw_fate(rng, died),
            )
        )
        if died or len(admissions) == 4 or rng.random() > 0.22:
            break
        gap = rng.randrange(20, 500)
        start = admissions[-1].discharged + timedelta(days=gap, minutes=rng.randrange(24 * 60))
        age += (gap + 180) // 365
        fitting = [item for item in ACUTE if item.ages[0] <= age <= item.ages[1]] or [first]
        acute = fitting[_pick(rng, [item.frequency for item in fitting])]

    # A summary can only be repeated later where there is a later one that is kept.
    for i in range(len(admissions) - 1):
        if admissions[i + 1].fate == KEPT and rng.random() < 0.04:
            admissions[i] = _with_fate(admissions[i], REPEATED)
    return Patient(
        subject_id=subject_id, sex=sex, ethnicity=ethnicity, admissions=tuple(admissions)
    )


def _draw_fate(rng: random.Random, died: bool) -> str:
    point = rng.random()
    if point < 0.02:
        return NO_SUMMARY
    if point < 0.03:
        return NO_REPORT
    if point < 0.04:
        return NO_SECTION
    if died and point < 0.06:
        return DEATH_TOLD
    return KEPT


def _with_fate(admission: Admission, fate: str) -> Admission:
    return Admission(**{**admission.__dict__, "fate": fate})


def expected_auroc(risk: np.ndarray) -> float:
    """The AUROC that the true risk itself expects over draws of the outcomes: no score can expect a
    better one.

    risk: float64 [n], each the P(positive) of one row. The value is the sum over pairs i != j of
    p_i (1 - p_j) ([p_i > p_j] + [p_i = p_j] / 2), divided by the sum over the same pairs of p_i (1
    - p_j).
    """
    values, group = np.unique(risk, return_inverse=True)
    positive = np.bincount(group, weights=risk, minlength=len(values))
    negative = np.bincount(group, weights=1.0 - risk, minlength=len(values))
    below = np.cumsum(negative) - negative
    with_self = float(np.sum(positive * (below + negative / 2)))
    itself = float(np.sum(risk * (1.0 - risk)))  # pairs i = j, counted above as ties
    return (with_self - itself / 2) / (float(risk.sum()) * float((1.0 - risk).sum()) - itself)


# -------------------------------------------------------------------------------------------- words


class Marks(Protocol):
    """How a release of MIMIC masks what it has taken out of a text."""

    blank_line: str

    def day(self, when: datetime) -> str: ...

    def hospital(self) -> str: ...

    def name(self) -> str: ...

    def age(self, years: int) -> str: ...


class BracketMarks:
    """MIMIC-III: [**...**], and ages over 89 hidden."""

    blank_line = "\n"

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def day(self, when: datetime) -> str:
        return f"[**{when.year}-{when.month}-{when.day}**]"

    def hospital(self) -> str:
        return f"[**Hospital1 {self.rng.choice((18, 18, 18, 19, 112))}**]"

    def name(self) -> str:
        return f"[**Last Name (NamePattern1) {self.rng.randrange(100, 5000)}**]"

    def age(self, years: int) -> str:
        return str(years) if years < 90 else "[**Age over 90 **]"


class BlankMarks:
    """MIMIC-IV-Note: ___ for everything."""

    blank_line = " \n"

    def day(self, when: datetime) -> str:
        return "___"

    def hospital(self) -> str:
        return "___"

    def name(self) -> str:
        return "___"

    def age(self, years: int) -> str:
        return str(years) if years < 90 else "___"


def admission_sections(
    rng: random.Random, marks: Marks, patient: Patient, admission: Admission
) -> dict[str, str]:
    """What was known on arrival, in eight sections by name: every latent, never the outcome."""
    acute = admission.acute
    level = SEVERITIES[admission.severity]
    chronic = [rng.choice(item.phrase) for item in admission.chronic]

    man = patient.sex == "M"
    who = rng.choice(
        ("y/o M", "yo M", "year old man") if man else ("y/o F", "yo F", "year old woman")
    )
    parts = [f"{marks.age(admission.age)} {who}"]
    if chronic and rng.random() < 0.6:
        parts.append("with " + ", ".join(rng.sample(chronic, min(2, len(chronic)))))
    if rng.random() < 0.12:
        parts.append(f"transferred from {marks.hospital()}")
    sentences = [" ".join(parts) + " who " + rng.choice(acute.story)]
    sentences.append(rng.choice(level.phrase))
    sentences.extend(rng.choice(item.phrase) for item in admission.complications)
    denial = rng.choice(conditions.DENIALS)
    present = textwrap.fill(". ".join(sentences) + ".", 72)
    present += ("\n\n" if rng.random() < 0.2 else "\n") + denial + "."

    history = chronic + rng.sample(conditions.OLD_HISTORY, rng.choice((0, 1, 1, 2)))
    rng.shuffle(history)
    layout = rng.random()
    if not history:
        past = "None"
    elif layout < 0.4:
        past = ", ".join(history)
    elif layout < 0.7:
        past = "\n".join(f"{i}. {item}" for i, item in enumerate(history, start=1))
    else:
        past = "\n".join(f"- {item}" for item in history)

    medication = [rng.choice(item.medication) for item in admission.chronic]
    medication = rng.sample(medication, min(len(medication), 2)) or ["None"]
    low, high = level.pressure
    systolic, pulse = rng.randint(low, high), rng.randint(*level.pulse)
    exam = f"{rng.choice(level.appearance)}\nBP {systolic} HR {pulse}\n{rng.choice(acute.finding)}"
    return {
        "Allergies": rng.choice(conditions.ALLERGIES),
        "Chief Complaint": rng.choice(acute.complaint),
        "History of Present Illness": present,
        "Past Medical History": past,
        "Social History": rng.choice(conditions.SOCIAL),
        "Family History": rng.choice(conditions.FAMILY),
        "Physical Exam": exam,
        "Medications on Admission": "\n".join(medication),
    }


def discharge_summary(
    rng: random.Random,
    marks: Marks,
    patient: Patient,
    admission: Admission,
    sections: dict[str, str],
) -> str:
    """A summary around the admission sections; only later ones tell how the stay ended."""
    acute = admission.acute
    if admission.ventilated_hours > 0:
        course = [rng.choice(acute.course), "Respiratory failure: was on the ventilator"]
    else:
        course = [rng.choice(acute.course)]
    if admission.died:
        ending = rng.choice(
            (
                "Family meeting held, made CMO and the patient expired",
                "Despite maximal support the patient passed away",
                "Care was withdrawn and pt expired with family at bedside",
            )
        )
        disposition, condition = "Expired", "Expired"
        follow_up = "None"
    else:
        ending = rng.choice(
            ("Improved and was discharged", "Did well on the floor", "Tolerated diet and ambulated")
        )
        disposition = rng.choice(("Home", "Home With Service", "Extended Care"))
        condition = rng.choice(("Stable", "Good", "Mental Status: Clear and coherent."))
        follow_up = f"Please follow up with Dr. {marks.name()}"
    course.append(ending)
    medications = sections["Medications on Admission"]
    ordered = {
        "Allergies": sections["Allergies"],
        "Attending": marks.name(),
        "Chief Complaint": sections["Chief Complaint"],
        "Major Surgical or Invasive Procedure": "None"
        if admission.severity == 0
        else "central line",
        "History of Present Illness": sections["History of Present Illness"],
        "Past Medical History": sections["Past Medical History"],
        "Social History": sections["Social History"],
        "Family History": sections["Family History"],
        "Physical Exam": sections["Physical Exam"],
        "Pertinent Results": f"WBC {rng.randint(4, 22)}. {rng.choice(acute.imaging[2])}",
        "Brief Hospital Course": textwrap.fill(". ".join(course) + ".", 72),
        "Medications on Admission": medications,
        "Discharge Medications": "None" if admission.died else medications,
        "Discharge Disposition": disposition,
        "Discharge Diagnosis": acute.name,
        "Discharge Condition": condition,
        "Followup Instructions": follow_up,
    }
    head = (
        f"Admission Date:  {marks.day(admission.admitted)}       "
        f"Discharge Date:   {marks.day(admission.discharged)}\n{marks.blank_line}"
        f"Sex:   {patient.sex}\n{marks.blank_line}Service: {acute.service}\n{marks.blank_line}"
    )
    return head + marks.blank_line.join(f"{name}:\n{body}\n" for name, body in ordered.items())


def radiology_report(
    rng: random.Random, marks: Marks, patient: Patient, admission: Admission
) -> str:
    """A short imaging report of the acute condition."""
    _, exam, impressions = admission.acute.imaging
    man = "man" if patient.sex == "M" else "woman"
    return (
        f"EXAMINATION:  {exam}\n\nINDICATION:  {marks.age(admission.age)} year old {man} with "
        f"{rng.choice(admission.acute.complaint)}  // eval for acute process\n\n"
        f"COMPARISON:  {marks.day(admission.admitted)}.\n\n"
        f"IMPRESSION:\n\n{rng.choice(impressions)}"
    )


def _bedside_notes(
    rng: random.Random, marks: Marks, admission: Admission
) -> list[tuple[str, str, str]]:
    """(CATEGORY, DESCRIPTION, TEXT) of other kinds of notes; they may tell the outcome."""
    level = SEVERITIES[admission.severity]
    name = marks.name()
    told = f"Pt expired, Dr. {name} pronounced. " if admission.died else ""
    notes = [
        (
            "Nursing",
            "Nursing Progress Note",
            f'Assessment: "{level.name}" today.\nAction: vitals q4h\n{told}',
        ),
        # Two of MIMIC-III's categories end in a space.
        (
            "Physician ",
            "Physician Resident Progress Note",
            f"Chief Complaint: {admission.acute.complaint[0]}\n{told}",
        ),
        (
            "Respiratory ",
            "Respiratory Care Shift Note",
            "Ventilation Assessment\nLevel of breathing assistance: ",
        ),
        ("ECG", "Report", "Sinus rhythm. Compared to the previous tracing no diagnostic change."),
    ]
    return rng.sample(notes, rng.choice((0, 1, 1, 2)))


# ------------------------------------------------------------------------------------------- tables


class Table:
    """A gzip'd CSV file written row by row, the same bytes every time."""

    def __init__(self, path: Path, header: Sequence[str], *, quote_text: bool) -> None:
        """quote_text: quote every text cell as MIMIC-III; else, as MIMIC-IV, where it is needed."""
        self.quote_text = quote_text
        self.rows = 0
        self._file = path.open("wb")
        # No file name and no time in the gzip header.
        self._gzip = gzip.GzipFile(
            filename="", mode="wb", compresslevel=6, mtime=0, fileobj=self._file
        )
        self._out = io.TextIOWrapper(self._gzip, encoding="utf-8", newline="")
        self._write(header)

    def _write(self, row: Sequence[Value]) -> None:
        self._out.write(",".join(self._cell(value) for value in row) + "\n")

    def _cell(self, value: Value) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            if self.quote_text or any(c in value for c in ',"\r\n'):
                return '"' + value.replace('"', '""') + '"'
            return value
        return str(value)  # datetime prints as 2151-08-04 10:06:00

    def add(self, *row: Value) -> None:
        """Writes one row; MIMIC-III's tables count theirs in ROW_ID."""
        self.rows += 1
        self._write((self.rows, *row) if self.quote_text else row)

    def close(self) -> None:
        self._out.close()
        self._gzip.close()
        self._file.close()


def _open_tables(
    stack: ExitStack, folder: Path, layout: dict[str, str], *, quote_text: bool
) -> dict[str, Table]:
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, columns in layout.items():
        table = Table(folder / f"{name}.csv.gz", columns.split(), quote_text=quote_text)
        stack.callback(table.close)
        tables[name] = table
    return tables


def _write_mimic3_patient(rng: random.Random, patient: Patient, tables: dict[str, Table]) -> None:
    marks = BracketMarks(rng)
    first, last = patient.admissions[0], patient.admissions[-1]
    # MIMIC shifts the birth of whoever is over 89 to 300 years before the first admission.
    years = first.age if first.age < 90 else 300
    birth = (first.admitted - timedelta(days=round(years * 365.25) + 20)).replace(hour=0, minute=0)
    death = last.discharged if last.died else None
    death_day = death.replace(hour=0, minute=0) if death else None
    tables["PATIENTS"].add(
        patient.subject_id, patient.sex, birth, death_day, death_day, None, int(last.died)
    )

    reports = []
    for admission in patient.admissions:
        sections = admission_sections(rng, marks, patient, admission)
        if admission.fate == DEATH_TOLD:
            sections["History of Present Illness"] += " Despite CPR the patient expired."
        elif admission.died and rng.random() < 0.03:
            sections["Physical Exam"] += (
                "\nOn discharge: pt expired."  # cut out, and the note is kept
            )
        if admission.fate == NO_SECTION:
            complaint = rng.choice(admission.acute.complaint)
            text = f"{marks.name()} was seen. HISTORY: {complaint}. Dictated note."
        else:
            text = discharge_summary(rng, marks, patient, admission, sections)
        reports.append(text)
    for i, admission in enumerate(patient.admissions):
        if admission.fate == REPEATED:
            reports[i] = reports[i + 1]

    for admission, report in zip(patient.admissions, reports, strict=True):
        _write_stay(rng, patient, admission, tables)
        ids = (patient.subject_id, admission.hadm_id)
        day = admission.discharged.date()
        later = day + timedelta(days=rng.randrange(1, 9))
        notes = tables["NOTEEVENTS"]
        for category, description, body in _bedside_notes(rng, marks, admission):
            at = admission.admitted + timedelta(hours=3)
            error = 1 if rng.random() < 0.05 else None
            notes.add(
                *ids,
                at.date(),
                at,
                at,
                category,
                description,
                rng.randrange(14_000, 21_000),
                error,
                body,
            )
        addendum = (
            f"Name:  {marks.name()}\n\nAddendum:\nPlease note the discharge date was corrected.\n"
        )
        addendum += f"\nDischarge Disposition:\n{'Expired' if admission.died else 'Home'}\n"
        if admission.fate == NO_REPORT or (admission.fate == KEPT and rng.random() < 0.06):
            # Written before the report in the file: the order of the text is that of the dates.
            text = f"{addendum}\nCompleted by: {marks.name()}\n"
            notes.add(*ids, later, None, None, "Discharge summary", "Addendum", None, None, text)
        if admission.fate == NO_SUMMARY:
            if rng.random() < 0.5:
                notes.add(*ids, day, None, None, "Discharge summary", "Report", None, None, None)
        elif admission.fate != NO_REPORT:
            # Now and then a report is filed twice, or once more without its admission.
            for _ in range(2 if rng.random() < 0.01 else 1):
                notes.add(*ids, day, None, None, "Discharge summary", "Report", None, None, report)
            if rng.random() < 0.005:
                text = f"{report}\nCopy for {marks.name()}\n"
                notes.add(
                    ids[0], None, day, None, None, "Discharge summary", "Report", None, None, text
                )


def _write_stay(
    rng: random.Random, patient: Patient, admission: Admission, tables: dict[str, Table]
) -> None:
    """The rows of one adult stay outside NOTEEVENTS."""
    ids = (patient.subject_id, admission.hadm_id)
    acute = admission.acute
    if admission.died:
        location = "DEAD/EXPIRED"
    else:
        location = rng.choice(("HOME", "HOME HEALTH CARE", "SNF", "REHAB/DISTINCT PART HOSP"))
    arrival = admission.admitted - timedelta(minutes=rng.randrange(60, 600))
    tables["ADMISSIONS"].add(
        *ids,
        admission.admitted,
        admission.discharged,
        admission.discharged if admission.died else None,
        "ELECTIVE" if admission.severity == 0 and rng.random() < 0.1 else "EMERGENCY",
        "EMERGENCY ROOM ADMIT",
        location,
        "Medicare" if admission.age >= 65 else rng.choice(("Private", "Medicaid", "Self Pay")),
        rng.choice(("ENGL", "ENGL", "SPAN", None)),
        rng.choice(("CATHOLIC", "JEWISH", "NOT SPECIFIED", None)),
        rng.choice(("MARRIED", "SINGLE", "WIDOWED", None)),
        patient.ethnicity,
        arrival,
        admission.admitted,
        acute.headline,
        int(admission.died),
        1,
    )
    if admission.in_icu:
        stay = (admission.discharged - admission.admitted) * 0.8
        unit = rng.choice(("MICU", "SICU", "CCU"))
        days = round(stay.total_seconds() / 86_400, 4)
        enter = admission.admitted + timedelta(minutes=5)
        icustay_id = 100_000 + admission.hadm_id
        times = (enter, enter + timedelta(seconds=round(stay.total_seconds())))
        tables["ICUSTAYS"].add(
            *ids,
            icustay_id,
            rng.choice(("carevue", "metavision")),
            unit,
            unit,
            52,
            52,
            *times,
            days,
        )

    present: list[Acute | Chronic | Complication] = [
        acute,
        *admission.complications,
        *admission.chronic,
    ]
    codes = [code for item in present for code in item.codes]
    if acute.name == "sepsis" and admission.severity < 2:
        codes.remove("78552")  # septic shock
    if admission.ventilated_hours > 0:
        codes.append("51881")
    if rng.random() < 0.1:
        codes.append("V1582")
    for number, code in enumerate(dict.fromkeys(codes), start=1):
        tables["DIAGNOSES_ICD"].add(*ids, number, code)

    done = [code for code, probability in acute.procedures if rng.random() < probability]
    if admission.ventilated_hours > 0:
        done += ["9604", "9671" if admission.ventilated_hours < 96 else "9672"]
    if any(item.name == "end-stage renal disease" for item in admission.chronic):
        done.append("3995")
    for number, code in enumerate(dict.fromkeys(done), start=1):
        tables["PROCEDURES_ICD"].add(*ids, number, code)


def _write_newborn(
    rng: random.Random, subject_id: int, hadm_id: int, tables: dict[str, Table]
) -> None:
    marks = BracketMarks(rng)
    born = datetime(2100, 1, 1) + timedelta(
        days=rng.randrange(33_000), minutes=rng.randrange(24 * 60)
    )
    home = born + timedelta(days=rng.randrange(1, 20), hours=5)
    sex = rng.choice("MF")
    tables["PATIENTS"].add(subject_id, sex, born.replace(hour=0, minute=0), None, None, None, 0)
    ids = (subject_id, hadm_id)
    tables["ADMISSIONS"].add(
        *ids, born, home, None, "NEWBORN", "PHYS REFERRAL/NORMAL DELI", "HOME", "Private", None,
        None, None, "WHITE", None, None, "NEWBORN", 0, 1,
    )  # fmt: skip
    tables["DIAGNOSES_ICD"].add(*ids, 1, "V3000")
    tables["PROCEDURES_ICD"].add(*ids, 1, "9955")
    text = (
        f"Admission Date:  {marks.day(born)}       Discharge Date:   {marks.day(home)}\n\n"
        f"Sex:   {sex}\n\nService: NEONATOLOGY\n\n"
        "History of Present Illness:\nBaby [**Known lastname **] is a term infant.\n\n"
        "Physical Exam:\nActive, pink.\n\nDischarge Disposition:\nHome\n"
    )
    tables["NOTEEVENTS"].add(
        *ids, home.date(), None, None, "Discharge summary", "Report", None, None, text
    )


def _write_mimic4_patient(rng: random.Random, patient: Patient, tables: dict[str, Table]) -> None:
    marks = BlankMarks()
    for number, admission in enumerate(patient.admissions, start=1):
        sections = admission_sections(rng, marks, patient, admission)
        text = " \nName:  ___       Unit No:   ___\n \n" + discharge_summary(
            rng, marks, patient, admission, sections
        )
        notes = [
            (
                "discharge",
                "DS",
                admission.discharged,
                text,
                [("author", f"AUTH{rng.randrange(90)}")],
            )
        ]
        if rng.random() < 0.6:
            code, exam, _ = admission.acute.imaging
            text = radiology_report(rng, marks, patient, admission)
            detail = [("exam_code", code), ("exam_name", exam)]
            notes.append(("radiology", "RR", admission.admitted + timedelta(hours=2), text, detail))
        for name, kind, at, text, detail in notes:
            note_id = f"{patient.subject_id}-{kind}-{number}"
            stored = at + timedelta(hours=rng.randrange(1, 60))
            tables[name].add(
                note_id, patient.subject_id, admission.hadm_id, kind, number, at, stored, text
            )
            for field, value in detail:
                tables[f"{name}_detail"].add(note_id, patient.subject_id, field, value, 1)


def _stepping(rng: random.Random, start: int, stride: int) -> Iterator[int]:
    """Increasing identifiers with gaps, as in a real table."""
    while True:
        yield start + rng.randrange(stride)
        start += stride


def _generator_digest() -> str:
    """Names this version of the generator: a cohort made by another is not taken for its own."""
    digest = hashlib.sha256()
    for module in (__file__, conditions.__file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()


def make_cohort(folder: str | Path, *, patients: int = 2600, seed: int = 0) -> Path:
    """Writes the cohort into `folder` and returns it; a folder that already holds this very cohort
    is left alone.

    patients: adults of the MIMIC-III half (about 1.25 admissions each); newborns come on top, and
    the MIMIC-IV-Note half has half as many patients. cohort.json is written last, so an interrupted
    run is simply made again. Raises ValueError when the folder holds anything else.
    """
    if patients < 1:
        raise ValueError(f"patients is {patients}; a cohort needs at least 1")
    folder = Path(folder)
    recipe = {"patients": patients, "seed": seed, "generator": _generator_digest()}
    facts_file = folder / "cohort.json"
    if facts_file.exists():
        if json.loads(facts_file.read_text(encoding="utf-8")).get("recipe") == recipe:
            return folder
        raise ValueError(
            f"{folder} holds another synthetic cohort; delete it or give another folder"
        )
    halves = {"mimic-iii", "mimic-iv-note"}
    if folder.exists() and {path.name for path in folder.iterdir()} - halves:
        raise ValueError(f"{folder} is not empty; give a new folder for the synthetic cohort")

    adults: list[Admission] = []
    with ExitStack() as stack:
        tables = _open_tables(stack, folder / "mimic-iii", MIMIC_III, quote_text=True)
        ids = random.Random(f"{seed} ids")
        subject_ids, hadm_ids = _stepping(ids, 1_000, 7), _stepping(ids, 100_000, 3)
        newborns = 0
        for index in range(patients):
            rng = random.Random(f"{seed} mimic-iii {index}")
            patient = draw_patient(rng, next(subject_ids), hadm_ids)
            _write_mimic3_patient(rng, patient, tables)
            adults.extend(patient.admissions)
            if rng.random() < 0.04:
                _write_newborn(rng, next(subject_ids), next(hadm_ids), tables)
                newborns += 1
    with ExitStack() as stack:
        tables = _open_tables(
            stack, folder / "mimic-iv-note" / "note", MIMIC_IV_NOTE, quote_text=False
        )
        ids = random.Random(f"{seed} ids of the note files")
        subject_ids, hadm_ids = _stepping(ids, 10_000_000, 31), _stepping(ids, 20_000_000, 11)
        for index in range((patients + 1) // 2):
            rng = random.Random(f"{seed} mimic-iv {index}")
            _write_mimic4_patient(rng, draw_patient(rng, next(subject_ids), hadm_ids), tables)

    text = json.dumps(_facts(adults, newborns, recipe), indent=1) + "\n"
    aside = facts_file.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(facts_file)
    return folder


def _facts(adults: list[Admission], newborns: int, recipe: dict[str, Any]) -> dict[str, Any]:
    counts = {ADMISSIONS: len(adults) + newborns} | dict.fromkeys(FATES, 0)
    counts[NEWBORN] = newborns
    for admission in adults:
        counts[admission.fate] += 1
    kept = sorted((a for a in adults if a.fate == KEPT), key=lambda a: a.hadm_id)
    risk = np.array([a.risk for a in kept])
    return {
        "what": "synthetic cohort: no row describes a person",
        "recipe": recipe,
        "admissions": counts,
        "mor": {
            "auroc_ceiling": round(expected_auroc(risk), 4) if len(kept) > 1 else None,
            "death_rate": round(float(np.mean([a.died for a in kept])), 4) if kept else None,
            "hadm_id": [a.hadm_id for a in kept],
            "risk": [a.risk for a in kept],
            "died": [int(a.died) for a in kept],
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.synthetic",
        description="Write a made-up cohort in MIMIC's file layouts.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--patients", type=int, default=2600, metavar="N", help="adults of the MIMIC-III half"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    arguments = parser.parse_args(argv)
    try:
        folder = make_cohort(arguments.out, patients=arguments.patients, seed=arguments.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
    for name, count in facts["admissions"].items():
        print(f"{count:8,d}  {name}")
    law = facts["mor"]
    print(f"died {law['death_rate']:.1%}; best reachable AUROC {law['auroc_ceiling']:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
