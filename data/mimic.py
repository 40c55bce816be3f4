"""MIMIC's tables read as admission notes with outcomes, from MIMIC-III or MIMIC-IV.

A discharge summary is written at the end of a stay; an admission note is the part of it that was
known at the start. The rules are those of CORe (van Aken et al., EACL 2021, "Clinical outcome
prediction from admission notes using self-supervised knowledge integration"), which
"Parameter-Efficient Fine-Tuning of LLaMA for the Clinical Domain" (arXiv 2307.03042) uses for its
tasks: eight sections found by their headers, newborns left out, and where death is what is asked
for, notes that tell of it left out too. Every admission of the table ends in exactly one count.

Keys and outcomes are joined first (data.outcomes) and the texts last.

Invariants. No message contains a value of any row. Text waits on disk only in a file without a
name, which ends with the iteration or the process.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np

from data import demographics
from data.demographics import Demographics
from data.notes import Note
from data.outcomes import (
    LABEL_TITLES,
    MIMIC3,
    MIMIC4,
    MULTILABEL_TASKS,
    NEEDS,
    REASONS,
    TASKS,
    TITLES,
    UNTOLD_TASKS,
    Layout,
    Outcomes,
)
from data.tables import NOT_A_TIME, Table, connect, find_table, holds, import_duckdb, not_whole

__all__ = [
    "LABEL_TITLES", "MULTILABEL_TASKS", "TASKS", "TITLES", "AdmissionNotes", "open_mimic",
]  # fmt: skip

# Part of every fingerprint: raise it when a change here or in data.outcomes changes the notes.
RULES = "admission notes 3"

# ------------------------------------------------------------------------------- one admission note

# What is searched in the summary -> what is printed in the note, in the order of the note. The
# sixth heading differs from its header by more than case, as in the published notes.
SECTIONS = {
    b"chief complaint:": "CHIEF COMPLAINT",
    b"present illness:": "PRESENT ILLNESS",
    b"medical history:": "MEDICAL HISTORY",
    b"medications on admission:": "MEDICATION ON ADMISSION",
    b"allergies:": "ALLERGIES",
    b"physical exam:": "PHYSICAL EXAM",
    b"family history:": "FAMILY HISTORY",
    b"social history:": "SOCIAL HISTORY",
}
REQUIRED = (
    "CHIEF COMPLAINT",
    "PRESENT ILLNESS",
    "MEDICAL HISTORY",
)  # at least one of them is not empty
# A section ends at a blank line before something that looks like a header: text up to a colon, of
# one line or more, without a digit, full stop, bar, bracket or backslash.
SECTION_END = re.compile(rb"\n[ \t]*\n[^:0-9.|()\\]+:")

DYING = r"(?:expired|died|passed\s+away|deceased)\b"
# Cut out of the two sections that may have been written late.
DEATH_TO_CUT = re.compile(
    rf"(?:\b(?:patient|pt)\b\.?\s+)?(?:\b(?:had|has)\s+)?\b{DYING}", re.IGNORECASE
)
CUT_IN = ("MEDICATION ON ADMISSION", "PHYSICAL EXAM")
# Anywhere else it removes the whole note. A relative who died is no mention of the patient's death.
DEATH_MENTION = re.compile(
    rf"\b(?:patient|pt)\b\.?\s+(?:(?:had|has)\s+)?{DYING}"
    r"|\bs?he\s+expired\b|\bpronounced\s+expired\b|\btime\s+of\s+death\b",
    re.IGNORECASE,
)
# A mention has one of these words, and most notes none.
DEATH_WORDS = ("expired", "died", "passed", "deceased", "death")


def admission_sections(summary: str) -> dict[str, str]:
    """The eight sections of one admission's discharge summary by printed heading; "" where one is
    missing.

    The first hit of each header counts, whatever its case, and newlines inside a section become
    spaces.
    """
    text = summary.encode()
    lowered = text.lower()  # ASCII only, so that positions stay the same
    sections = {}
    for header, heading in SECTIONS.items():
        start = lowered.find(header)
        if start < 0:
            sections[heading] = ""
            continue
        start += len(header)
        end = SECTION_END.search(text, start)
        body = text[start : end.start() if end else len(text)]
        sections[heading] = body.decode().replace("\n", " ").strip()
    return sections


def admission_note(sections: dict[str, str]) -> str:
    """The sections as one text; an empty section keeps its heading."""
    return "\n\n".join(f"{heading}: {body}".rstrip() for heading, body in sections.items())


def tells_of_death(note: str) -> bool:
    """Whether a note mentions the patient's death."""
    lowered = note.lower()
    return any(word in lowered for word in DEATH_WORDS) and bool(DEATH_MENTION.search(note))


# -------------------------------------------------------------------------------------- the cohort

# Every admission ends in one of these, or in one of the task's own reasons; they are printed as
# they stand.
ADMISSIONS = "admissions"
NEWBORN = "newborn"
NO_SUMMARY = "no discharge summary"
REPEATED = "text repeated in a later summary"
NO_REPORT = "no report, addenda only"
NO_SECTION = "no admission section"
DEATH_TOLD = "death mentioned"
KEPT = "admission notes"


def fates(task: str) -> tuple[str, ...]:
    """What can become of an admission in a task, in the order in which it is decided."""
    told = (DEATH_TOLD,) if task in UNTOLD_TASKS else ()
    return (NEWBORN, *REASONS[task], NO_SUMMARY, REPEATED, NO_REPORT, NO_SECTION, *told, KEPT)


def open_mimic(
    folder: str | Path,
    task: str = "mor",
    *,
    paper: bool = False,
    grouped: bool = False,
    spill_folder: str | Path | None = None,
) -> AdmissionNotes:
    """Admission notes of a MIMIC folder with the labels of one task; patients are SUBJECT_IDs.

    folder: holds MIMIC-III's tables, or in it and below MIMIC-IV's hosp, icu and note; all as .csv
    or .csv.gz, file names and headers in either case.
    task: one of TASKS; `diag` and `proc` give every note a tuple of labels.
    paper: rebuild the published quirks of codes and stays.
    grouped: tell the groups of every note too (data.demographics), as far as the tables do.
    spill_folder: where the discharge summaries wait, in a file without a name and up to 1 GB large,
        while the notes are read; without it the system's folder for temporary files.
    Raises ValueError for a missing table, a wrong header, an unknown task, or without duckdb.
    """
    if task not in TASKS:
        raise ValueError(f"unknown MIMIC task {task!r}; known: {', '.join(TASKS)}")
    import_duckdb()
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds NOTEEVENTS.csv.gz")
    layout = MIMIC4 if holds(folder, "discharge") else MIMIC3
    tables = {name: find_table(folder, layout.tables[name][0]) for name in NEEDS[task]}
    outcomes = Outcomes(layout, tables, task, paper=paper)
    groups = _demographics(folder, layout, tables["admissions"]) if grouped else None
    return AdmissionNotes(folder, outcomes, groups, Path(spill_folder) if spill_folder else None)


def _demographics(folder: Path, layout: Layout, admissions: Table) -> Demographics:
    name = layout.tables["patients"][0]
    patients = find_table(folder, name) if holds(folder, name) else None
    columns = demographics.MIMIC4 if layout is MIMIC4 else demographics.MIMIC3
    return Demographics(columns, admissions, patients)


class AdmissionNotes:
    """A source of admission notes in the order of HADM_ID (see data.notes.CohortNotes).

    `counts` says what became of every admission, by reason, and `label_list` holds the labels that
    are classes although no note may have them; both are known once one iteration has reached the
    end.
    """

    def __init__(
        self,
        folder: Path,
        outcomes: Outcomes,
        groups: Demographics | None,
        spill_folder: Path | None,
    ) -> None:
        quirks = ", with the paper's quirks" if outcomes.paper else ""
        release: Layout = outcomes.layout
        self.description = (
            f"{release.name} admission notes of {folder}, task {outcomes.task}{quirks}"
        )
        self.counts: dict[str, int] | None = None
        self.label_list: tuple[str, ...] = ()
        self.group_names: tuple[str, ...] = groups.names if groups else ()
        # Group -> why it is told of no note; known once one iteration has begun.
        self.groups_left_out: dict[str, str] = groups.left_out if groups else {}
        self._groups = groups
        self._folder = folder
        self._outcomes = outcomes
        self._tables = outcomes.tables
        self._task = outcomes.task
        self._spill_folder = spill_folder

    def __iter__(self) -> Iterator[Note]:
        """Yields every admission note; raises ValueError when a table is damaged."""
        return (note for _, note in self._read())

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of the tables, the task and the version of the rules."""
        digest = hashlib.sha256(f"{RULES}\0{self._task}\0{self._outcomes.paper}".encode())
        for name, table in sorted(self._tables.items()):
            with table.path.open("rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def admission_ids(self) -> np.ndarray:
        """HADM_ID of every row, int64 [n], read anew; for lookups in memory, never for a report."""
        return np.fromiter((hadm_id for hadm_id, _ in self._read()), dtype=np.int64)

    def known_risk(self) -> np.ndarray | None:
        """The true probability of each row's label, float64 [n], for a synthetic cohort; else None.

        Scored against the labels of the same rows it gives the AUROC that no model can expect to
        pass. It stands in the cohort.json that data.synthetic leaves in the folder above the
        tables, for in-hospital death.
        """
        facts_file = self._folder.resolve().parent / "cohort.json"
        if self._task != "mor" or not facts_file.is_file():
            return None
        try:
            facts = json.loads(facts_file.read_text(encoding="utf-8"))[self._task]
            risk = dict(zip(facts["hadm_id"], facts["risk"], strict=True))
            return np.array([risk[hadm_id] for hadm_id in self.admission_ids().tolist()])
        except KeyError:
            raise ValueError(
                f"{facts_file} does not belong to the tables beside it; write the cohort again"
            ) from None

    def _read(self) -> Iterator[tuple[int, Note]]:
        """(HADM_ID, note) of every row, in the order of HADM_ID."""
        for table in self._tables.values():
            table.check_content()
        with (
            connect() as connection,
            # A file without a name, which is gone whenever this process is.
            tempfile.TemporaryFile(dir=self._spill_folder) as texts,
        ):
            label_list = self._outcomes.load(connection)
            ends = self._load_summaries(connection, texts)
            self._decide(connection)
            groups = self._groups.read(connection) if self._groups else {}
            yield from self._admission_notes(connection, texts, ends, groups)
            self.label_list = label_list

    def _load_summaries(self, connection: Any, texts: IO[bytes]) -> list[int]:
        """Makes the table summaries of what is known about each discharge summary but its text.

        The texts go one after another into the file `texts`; returned are the positions where each
        of them ends, after a 0. Only those of admissions that are still in are kept.
        """
        table = self._tables["notes"]
        keys: list[tuple[str, str, bool, str]] = []
        ends = [0]
        for number, piece in enumerate(table.pieces()):
            with table.reading(connection, from_start=number == 0):
                rows = connection.execute(
                    f"""
                    SELECT hadm_id, day, coalesce(report, false), text
                    FROM {self._outcomes.rows("notes", piece)}
                    WHERE of_discharge AND text <> '' AND hadm_id <> ''
                    """
                )
                while batch := rows.fetchmany(64):
                    for hadm_id, day, report, text in batch:
                        stored = text.replace("\r\n", "\n").encode()
                        texts.write(stored)
                        ends.append(ends[-1] + len(stored))
                        keys.append((hadm_id, day, report, hashlib.md5(stored).hexdigest()))
        columns = np.array(keys, dtype=object).reshape(-1, 4).T
        names = ("hadm_text", "day", "report", "text_digest")
        found = dict(zip(names, columns, strict=True)) | {"position": np.arange(len(keys))}
        found["report"] = columns[2].astype(bool)
        connection.register("summaries", found)
        problem = "HADM_ID is not a whole number"
        table.refuse(connection, "summaries", not_whole("hadm_text"), problem)
        table.refuse(
            connection,
            "summaries",
            r"NOT coalesce(regexp_full_match(day, '\d{4}-\d{2}-\d{2}.*'), false)",
            f"CHARTDATE {NOT_A_TIME}",
        )
        return ends

    def _decide(self, connection: Any) -> None:
        """Makes the tables keys and fates, what becomes of every admission (NULL: still in)."""
        connection.execute(
            """
            CREATE TABLE keys AS
            SELECT position, hadm_text::BIGINT AS hadm_id, day, report,
                1 = row_number() OVER (
                    PARTITION BY text_digest ORDER BY day DESC, position DESC
                ) AS last_copy
            FROM summaries
            """
        )
        connection.execute(
            f"""
            CREATE TABLE fates AS
            SELECT hadm_id, CASE
                WHEN newborn THEN '{NEWBORN}'
                WHEN reason IS NOT NULL THEN reason
                WHEN reports IS NULL THEN '{NO_SUMMARY}'
                WHEN last_reports > 0 THEN NULL
                WHEN reports > 0 OR last_copies = 0 THEN '{REPEATED}'
                ELSE '{NO_REPORT}' END AS fate
            FROM admissions JOIN outcomes USING (hadm_id) LEFT JOIN (
                SELECT hadm_id, count(*) FILTER (report) AS reports,
                    count(*) FILTER (last_copy) AS last_copies,
                    count(*) FILTER (last_copy AND report) AS last_reports
                FROM keys GROUP BY hadm_id
            ) USING (hadm_id)
            """
        )

    def _admission_notes(
        self,
        connection: Any,
        texts: IO[bytes],
        ends: list[int],
        groups: dict[int, tuple[str | None, ...]],
    ) -> Iterator[tuple[int, Note]]:
        counts = dict.fromkeys((ADMISSIONS, *fates(self._task)), 0)
        decided = connection.execute("SELECT fate, count(*) FROM fates GROUP BY fate").fetchall()
        for fate, count in decided:
            counts[fate or KEPT] += count
            counts[ADMISSIONS] += count
        rows = connection.execute(
            """
            SELECT hadm_id, subject_id, labels, position
            FROM fates JOIN admissions USING (hadm_id) JOIN outcomes USING (hadm_id)
                JOIN keys USING (hadm_id)
            WHERE fate IS NULL AND last_copy
            ORDER BY hadm_id, day, position
            """
        ).fetchall()
        is_untold = self._task in UNTOLD_TASKS
        for (hadm_id, subject_id, labels), texts_of in groupby(rows, key=itemgetter(0, 1, 2)):
            summaries = []
            for *_, position in texts_of:
                texts.seek(ends[position])
                summaries.append(texts.read(ends[position + 1] - ends[position]).decode())
            sections = admission_sections("\n\n".join(summaries))
            if is_untold:
                for heading in CUT_IN:
                    sections[heading] = DEATH_TO_CUT.sub("", sections[heading]).strip()
            note = admission_note(sections)
            if not any(sections[heading] for heading in REQUIRED):
                fate = NO_SECTION
            elif is_untold and tells_of_death(note):
                fate = DEATH_TOLD
            else:
                label = tuple(labels) if self._task in MULTILABEL_TASKS else labels[0]
                yield hadm_id, Note(note, str(subject_id), label, groups.get(hadm_id, ()))
                continue
            counts[fate] += 1
            counts[KEPT] -= 1
        self.counts = counts
