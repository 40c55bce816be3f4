"""The CSV tables of MIMIC-III and MIMIC-IV, read by duckdb, which is told everything.

Every column is declared as text, with the quoting and without sniffing, because duckdb's guesses
drop rows and leading zeros without a word. What it does not check is checked here: the header, the
checksum of a gzip file, a quote that never closes, a zero byte.

Invariant. No message contains a value of any row: duckdb's own messages quote rows and are never
let through.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import io
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.wording import counted

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
    "PATIENTS": "ROW_ID SUBJECT_ID GENDER DOB DOD DOD_HOSP DOD_SSN EXPIRE_FLAG",
    "ICUSTAYS": (
        "ROW_ID SUBJECT_ID HADM_ID ICUSTAY_ID DBSOURCE FIRST_CAREUNIT LAST_CAREUNIT FIRST_WARDID"
        " LAST_WARDID INTIME OUTTIME LOS"
    ),
    "DIAGNOSES_ICD": "ROW_ID SUBJECT_ID HADM_ID SEQ_NUM ICD9_CODE",
    "PROCEDURES_ICD": "ROW_ID SUBJECT_ID HADM_ID SEQ_NUM ICD9_CODE",
    "D_ICD_DIAGNOSES": "ROW_ID ICD9_CODE SHORT_TITLE LONG_TITLE",
    "CHARTEVENTS": (
        "ROW_ID SUBJECT_ID HADM_ID ICUSTAY_ID ITEMID CHARTTIME STORETIME CGID VALUE VALUENUM"
        " VALUEUOM WARNING ERROR RESULTSTATUS STOPPED"
    ),
    "PROCEDUREEVENTS_MV": (
        "ROW_ID SUBJECT_ID HADM_ID ICUSTAY_ID STARTTIME ENDTIME ITEMID VALUE VALUEUOM LOCATION"
        " LOCATIONCATEGORY STORETIME CGID ORDERID LINKORDERID ORDERCATEGORYNAME"
        " SECONDARYORDERCATEGORYNAME ORDERCATEGORYDESCRIPTION ISOPENBAG CONTINUEINNEXTDEPT"
        " CANCELREASON STATUSDESCRIPTION COMMENTS_EDITEDBY COMMENTS_CANCELEDBY COMMENTS_DATE"
    ),
}
# The columns of MIMIC-IV and MIMIC-IV-Note that are read; its releases differ in the others.
NEEDED = {
    "admissions": "subject_id hadm_id admittime dischtime admission_type hospital_expire_flag",
    "discharge": "subject_id hadm_id note_type note_seq charttime text",
    "patients": "subject_id anchor_age anchor_year",
    "icustays": "subject_id hadm_id stay_id intime",
    "diagnoses_icd": "hadm_id icd_code icd_version",
    "procedures_icd": "hadm_id icd_code icd_version",
    "d_icd_diagnoses": "icd_code icd_version long_title",
    "chartevents": "stay_id itemid charttime value",
    "procedureevents": "stay_id itemid starttime",
}
DUCKDB_OPTIONS = {
    "temp_directory": "",  # duckdb itself spills nothing
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
# Bytes of a row; the longest note of MIMIC-III has well under 1 MB.
LONGEST_ROW = {"NOTEEVENTS": 16 << 20, "discharge": 16 << 20}
LONGEST_SHORT_ROW = 1 << 20
PIECE_BYTES = 32 << 20
SAY_EVERY = 15.0  # seconds between two lines about long work


class Table(NamedTuple):
    """One CSV file and its columns."""

    name: str
    path: Path
    columns: tuple[str, ...]

    def csv(self) -> str:
        """The table as SQL: all about the file is said, nothing is guessed.

        One thread reads a table of notes: quoted text spans lines, so a second one could not know
        where a row begins. duckdb holds all of such a file in memory, and of others a few buffers.
        """
        columns = ", ".join(f"{_quoted(column)}: 'VARCHAR'" for column in self.columns)
        path = _quoted(glob.escape(str(self.path)))
        parallel = "false" if self.name in LONGEST_ROW else "true"
        longest = LONGEST_ROW.get(self.name, LONGEST_SHORT_ROW)
        return (
            f"read_csv({path}, auto_detect=false, header=true, delim=',', "
            f"quote='\"', escape='\"', strict_mode=true, parallel={parallel}, "
            f"max_line_size={longest}, columns={{{columns}}})"
        )

    def pieces(self) -> Iterator[Table]:
        """The table in files of whole records and some megabytes, which lie in memory.

        A record ends at a newline with an even number of quotes before it.
        """
        with self.path.open("rb") as packed, _unpacked(self.path, packed) as file:
            header = file.readline(LONGEST_SHORT_ROW)
            rest, is_last = b"", False
            while not is_last:
                chunk = file.read(PIECE_BYTES)
                is_last = not chunk
                rest += chunk
                end = len(rest) if is_last else _records_end(rest)
                if end == 0 and not is_last:
                    continue
                with os.fdopen(os.memfd_create("records"), "wb") as piece:
                    piece.write(header)
                    piece.write(rest[:end])
                    piece.flush()
                    rest = rest[end:]
                    yield self._replace(path=Path(f"/proc/self/fd/{piece.fileno()}"))

    def check_content(self) -> None:
        """Reads the file to its end for what duckdb lets pass; raises ValueError.

        Those are a wrong checksum, a quote that never closes (the last row is lost) and a zero
        byte.
        """
        quotes, size, told = 0, self.path.stat().st_size, time.monotonic()
        try:
            with self.path.open("rb") as packed, _unpacked(self.path, packed) as file:
                while chunk := file.read(1 << 20):
                    quotes += chunk.count(b'"')
                    if b"\0" in chunk:
                        raise ValueError(f"{self.path} holds a zero byte; export the table again")
                    if time.monotonic() - told > SAY_EVERY:
                        told = time.monotonic()
                        _say(f"checking {self.path.name}: {packed.tell() / size:.0%}")
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise ValueError(f"{self.path} is cut short or damaged; copy it again") from None
        if quotes % 2:  # a quote inside a quoted cell is doubled
            raise ValueError(
                f"{self.path} ends inside a quoted cell: it is cut short; copy it again"
            )

    def refuse(self, connection: Any, rows: str, condition: str, problem: str) -> None:
        """Raises ValueError when some `rows` meet `condition`: their number and no value."""
        (count,) = connection.execute(f"SELECT count(*) FROM {rows} WHERE {condition}").fetchone()
        if count:
            raise ValueError(
                f"{self.path}: {problem} ({counted(count, 'time')}); export the table again, "
                "every column as text"
            )

    @contextlib.contextmanager
    def reading(self, connection: Any, *, from_start: bool = True) -> Iterator[None]:
        """While duckdb reads the file: says how far it is, and turns its complaints into ours.

        from_start: False for a later piece, whose rows duckdb counts anew.
        """
        duckdb = import_duckdb()
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SAY_EVERY):
                share = connection.query_progress()
                _say(f"reading {self.path.name}" + (f": {share:.0f}%" if share > 0 else ""))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        except (duckdb.InvalidInputException, duckdb.IOException) as error:
            found = re.search(r"Error on Line: (\d+)", str(error))
            row = f", row {found[1]}" if found and from_start else ""
            raise ValueError(
                f"{self.path}{row}: not the CSV that MIMIC comes in (a field too many or too few, "
                "a stray quote, a byte that is not UTF-8, or damage); copy or export the table "
                "again"
            ) from None
        except duckdb.Error as error:
            raise ValueError(
                f"{self.path}: duckdb could not read it ({type(error).__name__}); export the table "
                "again, every column as text"
            ) from None
        finally:
            ended.set()
            watcher.join()


def _records_end(text: bytes) -> int:
    """Where the last whole record of a text that begins with one ends; 0 where none does."""
    end, quotes = len(text), text.count(b'"')
    while True:
        newline = text.rfind(b"\n", 0, end)
        if newline < 0:
            return 0
        quotes -= text.count(b'"', newline, end)
        if quotes % 2 == 0:
            return newline + 1
        # All newlines back to the quote before are inside the same cell.
        end = text.rfind(b'"', 0, newline) + 1


def find_table(folder: Path, name: str) -> Table:
    """A MIMIC-III table in the folder, or a MIMIC-IV table (its name is in lower case) in or below.

    File names and headers may be in either case, files plain or gzip'd. Raises ValueError for a
    table that is missing or there twice, and for a wrong header.
    """
    is_mimic3 = name in COLUMNS
    found = _named(folder, name, deep=not is_mimic3)
    if not found:
        below = "" if is_mimic3 else " and nothing below it"
        raise ValueError(f"{folder} holds no {name}.csv.gz (or .csv, in either case){below}")
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(f"{folder} holds {name} more than once ({names}); keep one of them")
    path = found[0]
    columns = _header(path, COLUMNS[name] if is_mimic3 else NEEDED[name])
    if is_mimic3:
        _check_mimic3(path, columns, COLUMNS[name].split())
        return Table(name, path, tuple(COLUMNS[name].split()))
    missing = [column for column in NEEDED[name].split() if columns.count(column) != 1]
    if missing:
        raise ValueError(
            f"{path} does not begin with the header of MIMIC-IV: it must name once each of "
            f"{', '.join(NEEDED[name].split())}, and {', '.join(missing)} is not there once"
        )
    return Table(name, path, tuple(columns))


def holds(folder: Path, name: str) -> bool:
    """Whether a table is in the folder; one of MIMIC-IV also below."""
    return bool(_named(folder, name, deep=name not in COLUMNS))


def import_duckdb() -> Any:
    """The library duckdb, or ValueError with the way to get it."""
    try:
        import duckdb
    except ImportError:
        raise ValueError(
            "reading MIMIC needs duckdb, which is not installed; run: pip install -e .[mimic]"
        ) from None
    return duckdb


def connect() -> Any:
    """A duckdb in memory, which prints nothing by itself; to be closed."""
    connection = import_duckdb().connect(":memory:", config=DUCKDB_OPTIONS)
    # `Table.reading` asks how far it is, and says so on stderr.
    connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
    return connection


def not_whole(column: str) -> str:
    """SQL that holds where a text is no whole number."""
    return rf"NOT coalesce(regexp_full_match({column}, '\d{{1,18}}'), false)"


def not_a_time(column: str) -> str:
    """SQL that holds where a text is no date or time with a year of four digits."""
    return (
        rf"NOT coalesce(regexp_full_match({column}, '\d{{4}}-\d{{2}}-\d{{2}}.*'), false)"
        f" OR TRY_CAST({column} AS TIMESTAMP) IS NULL"
    )


NOT_A_TIME = "is not a date like 2151-08-04, with four digits of the year"


def _named(folder: Path, name: str, *, deep: bool) -> list[Path]:
    wanted = {f"{name}.csv".lower(), f"{name}.csv.gz".lower()}
    paths = folder.rglob("*") if deep else folder.iterdir()
    return sorted(path for path in paths if path.name.lower() in wanted)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextlib.contextmanager
def _unpacked(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    if path.suffix.lower() != ".gz":
        yield file
        return
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield unpacked  # type: ignore[misc]


def _header(path: Path, expected: str) -> list[str]:
    """The names on the first line, because duckdb skips it unread; in the case of `expected`."""
    try:
        with path.open("rb") as packed, _unpacked(path, packed) as file:
            line = file.readline(1 << 16).decode("utf-8-sig", errors="replace")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is not a whole gzip file; copy it again") from None
    if not line.strip():
        raise ValueError(f"{path} has no header line; expected {expected.replace(' ', ',')}")
    names = next(csv.reader(io.StringIO(line)))
    return [name.upper() if expected.isupper() else name.lower() for name in names]


def _check_mimic3(path: Path, found: list[str], expected: list[str]) -> None:
    if found == expected:
        return
    # A file without a header begins with a patient's row, so what was found is not repeated.
    if sorted(found) == sorted(expected):
        problem = "has its columns in another order"
    else:
        problem = "does not begin with the header of MIMIC-III v1.4"
    raise ValueError(f"{path} {problem}; expected {','.join(expected)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
