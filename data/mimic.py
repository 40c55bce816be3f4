"""MIMIC-III's tables read as admission notes with outcomes.

A discharge summary is written at the end of a stay; an admission note is the part of it that was
known at the start. The rules are those of CORe (van Aken et al., EACL 2021, "Clinical outcome
prediction from admission notes using self-supervised knowledge integration"), which
"Parameter-Efficient Fine-Tuning of LLaMA for the Clinical Domain" (arXiv 2307.03042) uses for its
tasks: eight sections found by their headers, newborns left out, notes that tell of the patient's
death left out. Every admission of the table ends in exactly one count.

The tables are joined by duckdb, which is told everything (column names and types, quoting, no
sniffing) because its guesses drop rows without a word; keys are aggregated first and the text
joined last. What duckdb does not check is checked here: the header, the checksum of a gzip file, a
quote that never closes.

Invariants. No message contains a value of any row. Text waits on disk only in a file without a
name, which ends with the iteration or the process.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from data.notes import Note

# Part of every fingerprint: raise it when a change here changes the notes.
RULES = "admission notes 1"
TASKS = ("mor",)

# The columns of MIMIC-III v1.4, in their order.
COLUMNS = {
    "ADMISSIONS": (
        "ROW_ID SUBJECT_ID HADM_ID ADMITTIME DISCHTIME DEATHTIME ADMISSION_TYPE ADMISSION_LOCATION"
        " DISCHARGE_LOCATION INSURANCE LANGUAGE RELIGION MARITAL_STATUS ETHNICITY EDREGTIME"
        " EDOUTTIME DIAGNOSIS HOSPITAL_EXPIRE_FLAG HAS_CHARTEVENTS_DATA"
    ),
    "NOTEEVENTS": (
        "ROW_ID SUBJECT_ID HADM_ID CHARTDATE CHARTTIME STORETIME CATEGORY DESCRIPTION CGID ISERROR"
        " TEXT"
    ),
}
DUCKDB_OPTIONS = {
    "temp_directory": "",  # duckdb itself spills nothing
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
LONGEST_ROW = 16 * 2**20  # bytes; the longest note of MIMIC-III has well under 1 MB

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


# --------------------------------------------------------------------------------------- the tables

# Every admission ends in one of these; the keys are printed as they stand.
ADMISSIONS = "admissions"
NEWBORN = "newborn"
NO_SUMMARY = "no discharge summary"
REPEATED = "text repeated in a later summary"
NO_REPORT = "no report, addenda only"
NO_SECTION = "no admission section"
DEATH_TOLD = "death mentioned"
KEPT = "admission notes"
FATES = (NEWBORN, NO_SUMMARY, REPEATED, NO_REPORT, NO_SECTION, DEATH_TOLD, KEPT)


def open_mimic3(
    folder: str | Path, task: str = "mor", *, spill_folder: str | Path | None = None
) -> AdmissionNotes:
    """Admission notes of a MIMIC-III folder with the labels of one task; patients are SUBJECT_IDs.

    folder: holds ADMISSIONS and NOTEEVENTS as .csv or .csv.gz, file names and headers in either
    case.
    task: "mor", in-hospital death (HOSPITAL_EXPIRE_FLAG, "0" or "1").
    spill_folder: where the discharge summaries wait, in a file without a name and up to 1 GB large,
        while the notes are read; without it the system's folder for temporary files.
    Raises ValueError for a missing table, a wrong header, an unknown task, or without duckdb.
    """
    if task not in TASKS:
        raise ValueError(f"unknown MIMIC-III task {task!r}; known: {', '.join(TASKS)}")
    _import_duckdb()
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds NOTEEVENTS.csv.gz")
    tables = {name: _find_table(folder, name) for name in COLUMNS}
    for name, path in tables.items():
        _check_header(path, COLUMNS[name].split())
    return AdmissionNotes(folder, tables, task, Path(spill_folder) if spill_folder else None)


class AdmissionNotes:
    """A source of admission notes in the order of HADM_ID (see data.notes.NoteSource).

    `counts` says what became of every admission, by reason; it is None until one iteration has
    reached the end.
    """

    group_names: tuple[str, ...] = ()

    def __init__(
        self, folder: Path, tables: dict[str, Path], task: str, spill_folder: Path | None
    ) -> None:
        self.description = f"MIMIC-III admission notes of {folder}, task {task}"
        self.counts: dict[str, int] | None = None
        self._folder = folder
        self._tables = tables
        self._task = task
        self._spill_folder = spill_folder

    def __iter__(self) -> Iterator[Note]:
        """Yields every admission note; raises ValueError when a table is damaged."""
        return (note for _, note in self._read())

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of the tables, the task and the version of the rules."""
        digest = hashlib.sha256(f"{RULES}\0{self._task}".encode())
        for name, path in sorted(self._tables.items()):
            with path.open("rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def admission_ids(self) -> np.ndarray:
        """HADM_ID of every row, int64 [n], read anew; for lookups in memory, never for a report."""
        return np.fromiter((hadm_id for hadm_id, _ in self._read()), dtype=np.int64)

    def known_risk(self) -> np.ndarray | None:
        """The true probability of each row's label, float64 [n], for a synthetic cohort; else None.

        Scored against the labels of the same rows it gives the AUROC that no model can expect to
        pass. It stands in the cohort.json that data.synthetic leaves in the folder above the
        tables.
        """
        facts_file = self._folder.resolve().parent / "cohort.json"
        if not facts_file.is_file():
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
        for path in self._tables.values():
            _check_content(path)
        with (
            _import_duckdb().connect(":memory:", config=DUCKDB_OPTIONS) as connection,
            # A file without a name, which is gone whenever this process is.
            tempfile.TemporaryFile(dir=self._spill_folder) as texts,
        ):
            self._load_admissions(connection)
            ends = self._load_summaries(connection, texts)
            self._decide(connection)
            yield from self._admission_notes(connection, texts, ends)

    def _load_admissions(self, connection: Any) -> None:
        """Makes the table admissions: hadm_id, subject_id, label, newborn."""
        path = self._tables["ADMISSIONS"]
        with _refusing_damage(path):
            connection.execute(
                f"""
                CREATE TABLE raw AS
                SELECT HADM_ID, SUBJECT_ID, ADMISSION_TYPE, HOSPITAL_EXPIRE_FLAG AS label
                FROM {_csv("ADMISSIONS")}
                """,
                {"path": str(path)},
            )
        for column in ("HADM_ID", "SUBJECT_ID"):
            _refuse(connection, "raw", _not_whole(column), path, f"{column} is not a whole number")
        no_flag = "coalesce(label, '') NOT IN ('0', '1')"
        _refuse(connection, "raw", no_flag, path, "HOSPITAL_EXPIRE_FLAG is neither 0 nor 1")
        connection.execute(
            """
            CREATE TABLE admissions AS
            SELECT HADM_ID::BIGINT AS hadm_id, SUBJECT_ID::BIGINT AS subject_id, label,
                coalesce(ADMISSION_TYPE, '') = 'NEWBORN' AS newborn
            FROM raw
            """
        )
        copies = "(SELECT count(*) AS copies FROM admissions GROUP BY hadm_id)"
        _refuse(connection, copies, "copies > 1", path, "HADM_ID stands in more than one row")

    def _load_summaries(self, connection: Any, texts: IO[bytes]) -> list[int]:
        """Makes the table summaries of what is known about each discharge summary but its text.

        The texts go one after another into the file `texts`; returned are the positions where each
        of them ends, after a 0.
        """
        path = self._tables["NOTEEVENTS"]
        keys: list[tuple[str, str, str, str]] = []
        ends = [0]
        with _refusing_damage(path):
            rows = connection.execute(
                f"""
                SELECT HADM_ID, CHARTDATE, DESCRIPTION, TEXT FROM {_csv("NOTEEVENTS")}
                WHERE CATEGORY = 'Discharge summary' AND TEXT <> '' AND HADM_ID <> ''
                """,
                {"path": str(path)},
            )
            while batch := rows.fetchmany(64):
                for hadm_id, day, description, text in batch:
                    stored = text.replace("\r\n", "\n").encode()
                    texts.write(stored)
                    ends.append(ends[-1] + len(stored))
                    keys.append((hadm_id, day, description, hashlib.md5(stored).hexdigest()))
        columns = np.array(keys, dtype=object).reshape(-1, 4).T
        names = ("hadm_text", "day", "description", "text_digest")
        found = dict(zip(names, columns, strict=True)) | {"position": np.arange(len(keys))}
        connection.register("summaries", found)
        _refuse(
            connection, "summaries", _not_whole("hadm_text"), path, "HADM_ID is not a whole number"
        )
        _refuse(
            connection,
            "summaries",
            r"NOT coalesce(regexp_full_match(day, '\d{4}-\d{2}-\d{2}.*'), false)",
            path,
            "CHARTDATE is not a date like 2151-08-04, with four digits of the year",
        )
        return ends

    def _decide(self, connection: Any) -> None:
        """Makes the tables keys and fates, what becomes of every admission (NULL: still in)."""
        connection.execute(
            """
            CREATE TABLE keys AS
            SELECT position, hadm_text::BIGINT AS hadm_id, day, description = 'Report' AS report,
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
                WHEN reports IS NULL THEN '{NO_SUMMARY}'
                WHEN last_reports > 0 THEN NULL
                WHEN reports > 0 OR last_copies = 0 THEN '{REPEATED}'
                ELSE '{NO_REPORT}' END AS fate
            FROM admissions LEFT JOIN (
                SELECT hadm_id, count(*) FILTER (report) AS reports,
                    count(*) FILTER (last_copy) AS last_copies,
                    count(*) FILTER (last_copy AND report) AS last_reports
                FROM keys GROUP BY hadm_id
            ) USING (hadm_id)
            """
        )

    def _admission_notes(
        self, connection: Any, texts: IO[bytes], ends: list[int]
    ) -> Iterator[tuple[int, Note]]:
        counts = dict.fromkeys((ADMISSIONS, *FATES), 0)
        fates = connection.execute("SELECT fate, count(*) FROM fates GROUP BY fate").fetchall()
        for fate, count in fates:
            counts[fate or KEPT] += count
            counts[ADMISSIONS] += count
        rows = connection.execute(
            """
            SELECT hadm_id, subject_id, label, position
            FROM fates JOIN admissions USING (hadm_id) JOIN keys USING (hadm_id)
            WHERE fate IS NULL AND last_copy
            ORDER BY hadm_id, day, position
            """
        ).fetchall()
        for (hadm_id, subject_id, label), group in groupby(rows, key=itemgetter(0, 1, 2)):
            summaries = []
            for *_, position in group:
                texts.seek(ends[position])
                summaries.append(texts.read(ends[position + 1] - ends[position]).decode())
            sections = admission_sections("\n\n".join(summaries))
            for heading in CUT_IN:
                sections[heading] = DEATH_TO_CUT.sub("", sections[heading]).strip()
            note = admission_note(sections)
            if not any(sections[heading] for heading in REQUIRED):
                fate = NO_SECTION
            elif DEATH_MENTION.search(note):
                fate = DEATH_TOLD
            else:
                yield hadm_id, Note(note, str(subject_id), label)
                continue
            counts[fate] += 1
            counts[KEPT] -= 1
        self.counts = counts


def _csv(table: str) -> str:
    """A table as SQL with a parameter $path: all about the file is said, nothing is guessed.

    One thread reads a file: quoted text spans lines, so a second one could not know where a row
    begins.
    """
    columns = ", ".join(f"'{column}': 'VARCHAR'" for column in COLUMNS[table].split())
    return (
        "read_csv($path, auto_detect=false, header=true, delim=',', quote='\"', escape='\"', "
        f"strict_mode=true, parallel=false, max_line_size={LONGEST_ROW}, columns={{{columns}}})"
    )


@contextlib.contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turns duckdb's complaint about a row into ours: duckdb quotes the row, and no message may."""
    duckdb = _import_duckdb()
    try:
        yield
    except (duckdb.InvalidInputException, duckdb.IOException) as error:
        found = re.search(r"Error on Line: (\d+)", str(error))
        row = f", row {found[1]}" if found else ""
        raise ValueError(
            f"{path}{row}: not the CSV that MIMIC-III comes in (a field too many or too few, a "
            "stray quote, a byte that is not UTF-8, or damage); copy or export the table again"
        ) from None


def _not_whole(column: str) -> str:
    return rf"NOT coalesce(regexp_full_match({column}, '\d{{1,18}}'), false)"


def _refuse(connection: Any, table: str, condition: str, path: Path, problem: str) -> None:
    """Raises ValueError when rows of `table` meet `condition`, with their number and no value."""
    (count,) = connection.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone()
    if count:
        raise ValueError(
            f"{path}: {problem} ({count} times); export the table again, every column as text"
        )


def _import_duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise ValueError(
            "reading MIMIC-III needs duckdb, which is not installed; run: pip install -e .[mimic]"
        ) from None
    return duckdb


def _find_table(folder: Path, name: str) -> Path:
    wanted = {f"{name}.csv".lower(), f"{name}.csv.gz".lower()}
    found = sorted(path for path in folder.iterdir() if path.name.lower() in wanted)
    if not found:
        raise ValueError(f"{folder} holds no {name}.csv.gz (or .csv, in either case)")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds {name} more than once ({names}); keep one of them")
    return found[0]


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _check_header(path: Path, expected: list[str]) -> None:
    """Compares the first line with the table's columns, because duckdb skips it unread."""
    try:
        with _open(path) as file:
            line = file.readline(2**16).decode("utf-8-sig", errors="replace")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is not a whole gzip file; copy it again") from None
    if not line.strip():
        raise ValueError(f"{path} has no header line; expected {','.join(expected)}")
    found = [name.upper() for name in next(csv.reader(io.StringIO(line)))]
    if found == expected:
        return
    # A file without a header begins with a patient's row, so what was found is not repeated.
    if sorted(found) == sorted(expected):
        problem = "has its columns in another order"
    else:
        problem = "does not begin with the header of MIMIC-III v1.4"
    raise ValueError(f"{path} {problem}; expected {','.join(expected)}")


def _check_content(path: Path) -> None:
    """Reads a table to its end for what duckdb lets pass.

    Those are a wrong checksum, a quote that never closes (the last row is lost) and a zero byte.
    """
    quotes = 0
    try:
        with _open(path) as file:
            while chunk := file.read(2**20):
                quotes += chunk.count(b'"')
                if b"\0" in chunk:
                    raise ValueError(f"{path} holds a zero byte; export the table again")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is cut short or damaged; copy it again") from None
    if quotes % 2:  # a quote inside a quoted cell is doubled
        raise ValueError(f"{path} ends inside a quoted cell: it is cut short; copy it again")
