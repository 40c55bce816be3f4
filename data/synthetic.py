"""A made-up hospital cohort in the file layouts of MIMIC-III v1.4 and MIMIC-IV-Note v2.2.

    python -m data.synthetic --out cohort --patients 2600 --seed 0

`OUT/mimic-iii/` holds nine of MIMIC-III's tables, `OUT/mimic-iv-note/note/` the four note files (of
other patients), and `OUT/cohort.json` what only a generator can know: the true probability of
in-hospital death of every admission, the best AUROC that any model can expect, the labels of all
tasks, and how many admissions the rules must exclude, by reason.

Days of stay, ventilation, diagnosis and procedure codes come from the same latents as the words
(data/synthetic_patients.py, data/synthetic_text.py, data/synthetic_stays.py).

Invariants. The same arguments give the same bytes (gzip headers carry no time; every patient has a
random stream of its own). No row describes a person.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from data import conditions, synthetic_patients, synthetic_stays, synthetic_text
from data.conditions import Acute, Chronic, Complication
from data.mimic import (
    ADMISSIONS,
    DEATH_TOLD,
    KEPT,
    NEWBORN,
    NO_REPORT,
    NO_SECTION,
    NO_SUMMARY,
    REPEATED,
    fates,
)
from data.outcomes import TASKS, UNTOLD_TASKS
from data.synthetic_patients import Admission, Patient, draw_patient, expected_auroc
from data.synthetic_stays import Stay, chart_stay, known_outcome
from data.synthetic_text import (
    BlankMarks,
    BracketMarks,
    admission_sections,
    bedside_notes,
    discharge_summary,
    radiology_report,
)
from data.tables import COLUMNS

Value = str | int | float | datetime | date | None

MIMIC_IV_NOTE = {
    "discharge": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "radiology": "note_id subject_id hadm_id note_type note_seq charttime storetime text",
    "discharge_detail": "note_id subject_id field_name field_value field_ordinal",
    "radiology_detail": "note_id subject_id field_name field_value field_ordinal",
}


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


def _write_mimic3_patient(
    rng: random.Random, seed: int, patient: Patient, tables: dict[str, Table]
) -> list[Stay]:
    """Writes all rows of an adult; returns what is known about each stay."""
    stays = []
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
        stay_rng = random.Random(f"{seed} stay {admission.hadm_id}")
        stays.append(_write_stay(rng, stay_rng, patient, admission, tables))
        ids = (patient.subject_id, admission.hadm_id)
        day = admission.discharged.date()
        later = day + timedelta(days=rng.randrange(1, 9))
        notes = tables["NOTEEVENTS"]
        for category, description, body in bedside_notes(rng, marks, admission):
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
    return stays


def _write_stay(
    rng: random.Random,
    stay_rng: random.Random,
    patient: Patient,
    admission: Admission,
    tables: dict[str, Table],
) -> Stay:
    """The rows of one adult stay outside NOTEEVENTS; what is charted has a stream of its own."""
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
    charted = chart_stay(stay_rng, admission)
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
        for item, at, value, error in charted.rows:
            tables["CHARTEVENTS"].add(
                *ids, icustay_id, item, at, at, 15_000, value, None, None, 0, error, None, None
            )
        for at in charted.extubations:
            tables["PROCEDUREEVENTS_MV"].add(
                *ids, icustay_id, at, at + timedelta(minutes=1), 227_194, 1, None, None, None, at,
                15_000, 1, 1, "Ventilation", None, "Task", 0, 0, 0, "FinishedRunning", None, None,
                None,
            )  # fmt: skip

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
    codes += charted.further_codes
    for number, code in enumerate(dict.fromkeys(codes), start=1):
        tables["DIAGNOSES_ICD"].add(*ids, number, code)

    done = [code for code, probability in acute.procedures if rng.random() < probability]
    if admission.ventilated_hours > 0:
        done += ["9604", "9671" if admission.ventilated_hours < 96 else "9672"]
    if any(item.name == "end-stage renal disease" for item in admission.chronic):
        done.append("3995")
    for number, code in enumerate(dict.fromkeys(done), start=1):
        tables["PROCEDURES_ICD"].add(*ids, number, code)
    return Stay(admission, charted.span, tuple(codes), tuple(done))


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
    modules = (conditions, synthetic_patients, synthetic_text, synthetic_stays)
    for module in (__file__, *(module.__file__ for module in modules)):
        assert module is not None
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

    stays: list[Stay] = []
    with ExitStack() as stack:
        layout = {name: COLUMNS[name] for name in sorted(COLUMNS)}
        tables = _open_tables(stack, folder / "mimic-iii", layout, quote_text=True)
        for code, title in synthetic_stays.diagnosis_titles().items():
            tables["D_ICD_DIAGNOSES"].add(code, title[:24], title)
        ids = random.Random(f"{seed} ids")
        subject_ids, hadm_ids = _stepping(ids, 1_000, 7), _stepping(ids, 100_000, 3)
        newborns = 0
        for index in range(patients):
            rng = random.Random(f"{seed} mimic-iii {index}")
            patient = draw_patient(rng, next(subject_ids), hadm_ids)
            stays.extend(_write_mimic3_patient(rng, seed, patient, tables))
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

    text = json.dumps(_facts(stays, newborns, recipe), indent=1) + "\n"
    aside = facts_file.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(facts_file)
    return folder


def _outcomes(task: str, stays: list[Stay], newborns: int) -> dict[str, Any]:
    """The labels of a task by admission, and what became of all admissions."""
    counts = {ADMISSIONS: len(stays) + newborns} | dict.fromkeys(fates(task), 0)
    counts[NEWBORN] = newborns
    kept: list[tuple[int, Any, Any]] = []
    for stay in stays:
        labels, reason = known_outcome(task, stay)
        fate = stay.admission.fate
        if fate == DEATH_TOLD and task not in UNTOLD_TASKS:
            fate = KEPT  # told or not, the note is no secret here
        counts[reason or fate] += 1
        if reason is None and fate == KEPT:
            kept.append((stay.admission.hadm_id, labels, known_outcome(task, stay, paper=True)[0]))
    kept.sort()
    names = ("hadm_id", "labels", "labels_paper")
    return {"counts": counts} | {name: [row[i] for row in kept] for i, name in enumerate(names)}


def _facts(stays: list[Stay], newborns: int, recipe: dict[str, Any]) -> dict[str, Any]:
    outcomes = {task: _outcomes(task, stays, newborns) for task in TASKS}
    adults = [stay.admission for stay in stays]
    kept = sorted((a for a in adults if a.fate == KEPT), key=lambda a: a.hadm_id)
    risk = np.array([a.risk for a in kept])
    return {
        "what": "synthetic cohort: no row describes a person",
        "recipe": recipe,
        "admissions": outcomes["mor"]["counts"],
        "mor": {
            "auroc_ceiling": round(expected_auroc(risk), 4) if len(kept) > 1 else None,
            "death_rate": round(float(np.mean([a.died for a in kept])), 4) if kept else None,
            "hadm_id": [a.hadm_id for a in kept],
            "risk": [a.risk for a in kept],
            "died": [int(a.died) for a in kept],
        },
        "outcomes": outcomes,
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
