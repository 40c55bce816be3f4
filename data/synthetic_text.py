"""What is written about the patients of the made-up hospital, masked as a release of MIMIC masks.

Invariant. The sections that make up an admission note hold every latent and never tell the
outcome, except where a leak is planted on purpose.
"""

from __future__ import annotations

import random
import textwrap
from datetime import datetime
from typing import Protocol

from data import conditions
from data.conditions import SEVERITIES
from data.synthetic_patients import Admission, Patient


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


def bedside_notes(
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
