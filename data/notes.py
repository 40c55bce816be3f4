"""Note tables: where notes come from, read one at a time, refused with one clear line when damaged.

A source is anything that yields `Note`s in the same order every time it is iterated and names its
content by a fingerprint; the token cache, the splits and the loader depend on nothing else. Tables
are read strictly: a cut last row, a missing field or a byte that is not UTF-8 raises, because a
note that silently loses its end is a wrong note.

Invariant: no message raised here contains a note's text, a label or a patient's identifier.
"""

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from data.wording import counted

LINE_LIMIT = 1 << 26  # bytes in a line, characters in a field: far above any note, far below memory
# A gzip file that unpacks to more than BOMB_BYTES and BOMB_RATIO times its size is not notes: text
# packs five times, a table of repeated templates some fifty times, and a bomb a thousand times.
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
FORMATS = ".csv, .csv.gz, .jsonl, .jsonl.gz, .parquet, .txt, a folder of .txt, or MIMIC-IV-Note"
AGE_COLUMNS = ("age", "anchor_age")  # casefolded
MIMIC_IV_NOTE = frozenset(
    ("note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "storetime", "text")
)


class Note(NamedTuple):
    """One note; a source gives every note a patient or none, and a label only where it has one.

    label: a class, or a tuple of labels, each once and possibly none, where a note has several.
    groups: what results are also told apart by, one value for each of the source's `group_names`
    (None where it is not known): a few categories such as sex or age band, never an identifier.
    """

    text: str
    patient: str | None = None
    label: str | tuple[str, ...] | None = None
    groups: tuple[str | None, ...] = ()


class NoteSource(Protocol):
    """A sequence of notes that can be read again and again, in the same order."""

    description: str  # one line for people: file, columns
    group_names: tuple[str, ...]  # of `Note.groups`, for example ("sex", "age"); often none

    def __iter__(self) -> Iterator[Note]:
        """Yields every note in order; raises ValueError for a damaged source."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the notes: the content and the columns used.

        Groups are none of it: they are read when results are told apart, never trained on.
        """
        ...


@runtime_checkable
class CohortNotes(NoteSource, Protocol):
    """A source whose notes were chosen by rules, which can say how many each rule took out."""

    counts: dict[str, int] | None  # by reason; None until one iteration has reached the end
    label_list: tuple[str, ...]  # labels that stand for a class although no note may have them


class Columns(NamedTuple):
    """The columns of a table that are read."""

    text: str
    label: str | None = None
    patient: str | None = None
    groups: tuple[str, ...] = ()

    def roles(self) -> list[tuple[str, str]]:
        """(role, column) of every column that is read."""
        single = zip(("text", "label", "patient"), self[:3], strict=True)
        roles = [(role, name) for role, name in single if name is not None]
        return roles + [("subgroup", name) for name in self.groups]

    def named(self) -> list[str]:
        return [name for _, name in self.roles()]


def open_notes(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    group_columns: Sequence[str] = (),
) -> NoteSource:
    """Opens a table or a folder of notes; the header is checked now, the rows when they are read.

    group_columns: categories that become `Note.groups`; a column named age (in either case, also
    anchor_age) holds years and becomes bands. Without a text column, `text` is read. A table with
    the columns of MIMIC-IV-Note's discharge.csv.gz and radiology.csv.gz has its patients in
    `subject_id`; a folder with such tables is read as all of them, one after the other.
    Raises ValueError for a path that does not exist, a format that is not known, a column that is
    missing or doubled, and an empty file.
    """
    path = Path(path)
    columns = Columns(text_column or "text", label_column, patient_column, tuple(group_columns))
    if path.is_dir():
        return _open_folder(path, columns, text_column)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; notes are read from {FORMATS}")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        return CsvNotes(path, columns)
    if name.endswith(".jsonl"):
        return JsonLinesNotes(path, columns)
    if path.suffix.lower() == ".parquet":
        return ParquetNotes(path, columns)
    if path.suffix.lower() == ".txt":
        _refuse_columns(path, label_column, patient_column, text_column, *group_columns)
        return TextFiles([path], str(path))
    raise ValueError(f"{path}: this format is not known; notes are read from {FORMATS}")


def table_columns(path: Path) -> list[str] | None:
    """The columns of a table of notes; None for texts and folders, which have none to name."""
    name = path.name.lower().removesuffix(".gz")
    if not path.is_file():
        return None
    if name.endswith(".csv"):
        return _csv_header(path)
    if name.endswith(".jsonl"):
        return list(_json_object(path, 1, next(read_lines(path), "{}")))
    if path.suffix.lower() == ".parquet":
        return [row[0] for row in _parquet_rows(path, "DESCRIBE SELECT *")]
    return None


class CsvNotes:
    """Notes from CSV with a header, RFC 4180: UTF-8, commas, quotes doubled inside quotes."""

    def __init__(self, path: Path, columns: Columns) -> None:
        header = _csv_header(path)
        if columns.patient is None and MIMIC_IV_NOTE.issubset(header):
            columns = columns._replace(patient="subject_id")
        _check_columns(path, header, columns)
        self._path = path
        self._columns = columns
        self._places = [None if name is None else header.index(name) for name in columns[:3]]
        self._group_places = [header.index(name) for name in columns.groups]
        self.group_names = columns.groups
        self._width = len(header)
        self.description = _describe(path, columns)

    def __iter__(self) -> Iterator[Note]:
        rows = csv_rows(self._path)
        next(rows)
        text_at, label_at, patient_at = self._places
        assert text_at is not None
        record = 0
        for record, (line, row) in enumerate(rows, 1):
            if len(row) != self._width:
                raise ValueError(
                    f"{self._path}: record {record} (it ends on line {line}) has {len(row)} "
                    f"fields, the header has {self._width}; a record must have as many fields as "
                    f"the header: the file may be cut off, or a quote in it not doubled; write it "
                    f"again"
                )
            yield _checked_note(
                self._path,
                record,
                row[text_at],
                None if label_at is None else row[label_at] or None,
                None if patient_at is None else row[patient_at],
                _group_values(
                    self._path, record, self.group_names, [row[at] for at in self._group_places]
                ),
            )
        if record == 0:
            raise _no_notes(self._path)

    def fingerprint(self) -> str:
        return _fingerprint("csv", self._columns, [_file_digest(self._path)])


class JsonLinesNotes:
    """Notes from JSON lines: one object a line, the columns are its keys."""

    def __init__(self, path: Path, columns: Columns) -> None:
        first = next(read_lines(path), None)
        if first is None:
            raise ValueError(f"{path}: the file is empty; one JSON object a line is expected")
        _check_columns(path, list(_json_object(path, 1, first)), columns)
        self._path = path
        self._columns = columns
        self.group_names = columns.groups
        self.description = _describe(path, columns)

    def __iter__(self) -> Iterator[Note]:
        text_key, label_key, patient_key, group_keys = self._columns
        record = 0
        for line, content in enumerate(read_lines(self._path), 1):
            if not content.strip():
                continue
            record += 1
            values = _json_object(self._path, line, content)
            for key in self._columns.named():
                if key not in values:
                    raise ValueError(
                        f"{self._path}: line {line} has no key {key!r}; every line must have it"
                    )
            yield _checked_note(
                self._path,
                record,
                _text_value(self._path, record, text_key, values[text_key]),
                _id_value(self._path, record, label_key, values),
                _id_value(self._path, record, patient_key, values),
                _group_values(
                    self._path,
                    record,
                    group_keys,
                    [_id_value(self._path, record, key, values) for key in group_keys],
                ),
            )
        if record == 0:
            raise _no_notes(self._path)

    def fingerprint(self) -> str:
        return _fingerprint("jsonl", self._columns, [_file_digest(self._path)])


class ParquetNotes:
    """Notes from a Parquet file, read by the optional library duckdb."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        self._columns = columns
        header = [row[0] for row in _parquet_rows(path, "DESCRIBE SELECT *")]
        _check_columns(path, header, columns)
        self.group_names = columns.groups
        self.description = _describe(path, columns)

    def __iter__(self) -> Iterator[Note]:
        names = self._columns.named()
        quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
        record = 0
        for record, row in enumerate(_parquet_rows(self._path, f"SELECT {quoted}"), 1):
            values = dict(zip(names, row, strict=True))
            yield _checked_note(
                self._path,
                record,
                _text_value(self._path, record, self._columns.text, values[self._columns.text]),
                _id_value(self._path, record, self._columns.label, values),
                _id_value(self._path, record, self._columns.patient, values),
                _group_values(
                    self._path,
                    record,
                    self.group_names,
                    [_id_value(self._path, record, name, values) for name in self.group_names],
                ),
            )
        if record == 0:
            raise _no_notes(self._path)

    def fingerprint(self) -> str:
        return _fingerprint("parquet", self._columns, [_file_digest(self._path)])


class TextFiles:
    """Notes from text files, one note a file, in the order given."""

    group_names: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[Path], description: str) -> None:
        for path in paths:
            if path.stat().st_size > LINE_LIMIT:
                raise ValueError(
                    f"{path}: more than {LINE_LIMIT >> 20} MiB, and a text file is one note; put "
                    f"the notes into files of their own, or into a table"
                )
        self._paths = paths
        self.description = description

    def __iter__(self) -> Iterator[Note]:
        for path in self._paths:
            content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, f"byte {error.start}") from None
            yield _checked_note(path, 1, text, None, None, ())

    def fingerprint(self) -> str:
        return _fingerprint("text", Columns("text"), map(_file_digest, self._paths))


class ChainedNotes:
    """The notes of several sources, one source after the other."""

    def __init__(self, sources: Sequence[NoteSource]) -> None:
        self._sources = sources
        self.group_names = sources[0].group_names
        assert all(source.group_names == self.group_names for source in sources)
        self.description = "; ".join(source.description for source in sources)

    def __iter__(self) -> Iterator[Note]:
        for source in self._sources:
            yield from source

    def fingerprint(self) -> str:
        digests = (source.fingerprint() for source in self._sources)
        return _fingerprint("chain", Columns("text"), digests)


def _open_folder(folder: Path, columns: Columns, text_column: str | None) -> NoteSource:
    """MIMIC-IV-Note's tables in the folder or in its `note` folder, else its text files."""
    tables: dict[str, Path] = {}
    for place in (folder, folder / "note"):
        for path in sorted(place.glob("*.csv*")):
            name = path.name.lower().removesuffix(".gz")
            if not name.endswith(".csv") or not MIMIC_IV_NOTE.issubset(_csv_header(path)):
                continue
            if name in tables:
                raise ValueError(
                    f"{folder}: the table {name} is there twice, in {tables[name]} and {path}; "
                    f"keep one of them"
                )
            tables[name] = path
    if tables:
        return ChainedNotes([CsvNotes(path, columns) for path in tables.values()])
    files = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    if not files:
        raise ValueError(
            f"{folder}: no table with the columns of MIMIC-IV-Note and no .txt file in this "
            f"folder; name a table itself, or a folder with notes as .txt files"
        )
    _refuse_columns(folder, columns.label, columns.patient, text_column, *columns.groups)
    return TextFiles(files, f"{folder}, {counted(len(files), 'text file')}")


def _refuse_columns(path: Path, *columns: str | None) -> None:
    for column in columns:
        if column is not None:
            raise ValueError(
                f"{path}: text files have no column {column!r}; leave the column out, or give the "
                f"notes as a table with labels and patients"
            )


def _describe(path: Path, columns: Columns) -> str:
    roles = (f"{role} {name!r}" for role, name in columns._replace(groups=()).roles())
    return f"{path}, {', '.join(roles)}"


def _check_columns(path: Path, header: list[str], columns: Columns) -> None:
    """Refuses a doubled or missing column; never lists a header, which may be a row of data."""
    if len(set(header)) != len(header):
        raise ValueError(
            f"{path}: two of the {len(header)} columns have the same name; give each its own name"
        )
    for role, name in columns.roles():
        if name in header:
            continue
        folded = {column.casefold(): column for column in header}
        near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.75)
        hint = f"; the nearest is {folded[near[0]]!r}" if near else ""
        flag = f"--{role}-column{'s' if role == 'subgroup' else ''}"
        raise ValueError(
            f"{path}: no {role} column {name!r} among its {counted(len(header), 'column')}{hint}; "
            f"name it with {flag} (the first line must be the header)"
        )
    if len(set(columns.named())) != len(columns.named()):
        raise ValueError(f"{path}: one column is named for two purposes; name a column for each")


def age_band(years: float) -> str:
    """The band of an age in years; those of 85 and more share one, as published results do."""
    for top, band in ((18, "under 18"), (45, "18 to 44"), (65, "45 to 64"), (75, "65 to 74")):
        if years < top:
            return band
    return "75 to 84" if years < 85 else "85 and over"


def _group_values(
    path: Path, record: int, names: Sequence[str], values: Sequence[str | None]
) -> tuple[str | None, ...]:
    """The groups of a record: an age as its band, everything else as it is, "" as not known."""
    groups: list[str | None] = []
    for name, value in zip(names, values, strict=True):
        value = (value or "").strip()
        if value and name.casefold() in AGE_COLUMNS:
            try:
                years = float(value)
            except ValueError:
                years = -1.0
            if not 0 <= years < 400:  # MIMIC-III shifts ages over 89 to 300
                raise ValueError(
                    f"{path}: record {record} has no age in years in column {name!r}; correct it, "
                    f"leave the cell empty, or rename the column if it holds categories"
                )
            value = age_band(years)
        groups.append(value or None)
    return tuple(groups)


def _checked_note(
    path: Path,
    record: int,
    text: str,
    label: str | None,
    patient: str | None,
    groups: tuple[str | None, ...],
) -> Note:
    if "\0" in text or (label and "\0" in label) or (patient and "\0" in patient):
        raise ValueError(
            f"{path}: record {record} contains a NUL character, which text never does; the file "
            f"is damaged or in another encoding (UTF-8 is read): export it again"
        )
    if patient == "":
        raise ValueError(
            f"{path}: record {record} has no patient; every note needs one, or the split could "
            f"put one patient on both sides: drop the record, or leave the patient column out"
        )
    return Note(text, patient, label, groups)


def _no_notes(path: Path) -> ValueError:
    return ValueError(
        f"{path}: no notes in it, only a header or blank lines; at least one is needed"
    )


def _not_utf8(path: Path, place: str) -> ValueError:
    return ValueError(
        f"{path}: {place} is not UTF-8, the only encoding read; convert the file, for example "
        f"from Latin-1: iconv -f latin1 -t utf-8"
    )


def read_lines(path: Path, errors: str = "strict") -> Iterator[str]:
    """Lines of a UTF-8 file, gzip or plain, with their ends (LF or CRLF) and without a BOM.

    errors: what becomes of other bytes; "strict" raises ValueError with the line.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if path.suffix.lower() == ".gz" and not packed and path.stat().st_size > 0:
            raise ValueError(f"{path}: named .gz, but not a gzip file; rename it, or pack it")
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        lines_before = 0
        for block in _whole_lines(path, file):
            try:
                text = block.decode(errors=errors)
            except UnicodeDecodeError as error:
                line = lines_before + block.count(b"\n", 0, error.start) + 1
                raise _not_utf8(path, f"line {line}") from None
            if lines_before == 0:
                text = text.removeprefix("\ufeff")
            yield from io.StringIO(text, newline="\n")
            lines_before += block.count(b"\n")


def _whole_lines(path: Path, file: io.BufferedIOBase) -> Iterator[bytes]:
    """The file in blocks of about a mebibyte that end where a line ends."""
    rest = b""
    unpacked, most = 0, max(BOMB_BYTES, BOMB_RATIO * path.stat().st_size)
    try:
        while block := file.read(1 << 20):
            unpacked += len(block)
            if unpacked > most:
                raise ValueError(
                    f"{path}: it unpacks to more than {BOMB_RATIO} times its size, which no notes "
                    f"do; if they are notes, unpack the file yourself and name the result"
                )
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                yield rest + head + newline
                rest = tail
            else:
                rest += tail
            if len(rest) > LINE_LIMIT:
                raise ValueError(
                    f"{path}: a line has more than {LINE_LIMIT >> 20} MiB, the most that is read; "
                    f"the file is damaged, or its notes must be cut"
                )
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(
            f"{path}: the gzip data are cut off or damaged; fetch the file again (gzip -t checks "
            f"it)"
        ) from None
    if rest:
        yield rest


def csv_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """Rows with the line each ends on; the header is the first, blank lines are left out.

    errors: what becomes of bytes that are no UTF-8, as in `read_lines`.
    """
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(read_lines(path, errors), strict=True)
    rows = 0
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
                rows += 1
    except csv.Error as error:  # the module's messages name the fault and never quote the row
        what = "the header" if rows == 0 else f"record {rows}"
        raise ValueError(
            f"{path}: {what} (it ends on line {reader.line_num}) is not valid CSV: {error}; the "
            f"file may be cut off, or a quote in it not doubled; write it again"
        ) from None


def _csv_header(path: Path) -> list[str]:
    for _, row in csv_rows(path):
        return row
    raise ValueError(f"{path}: the file is empty; a header line and records are expected")


def _json_object(path: Path, line: int, content: str) -> dict[str, Any]:
    try:
        value = json.loads(content, object_pairs_hook=unique_keys)
    except _DoubledKey:
        raise ValueError(f"{path}: line {line} has a key twice; each key may stand once") from None
    except (ValueError, RecursionError):  # ValueError: a number of thousands of digits, too
        raise ValueError(
            f"{path}: line {line} is not valid JSON; one object a line is expected: the file may "
            f"be cut off, or be a single JSON document"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: line {line} is a JSON {type(value).__name__}; one object a line is expected"
        )
    return value


class _DoubledKey(ValueError):
    pass


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _DoubledKey
    return values


def _text_value(path: Path, record: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(
            f"{path}: record {record} has a {kind} in column {column!r}; a note "
            f"must be a string (an empty one is allowed)"
        )
    return _encodable(path, record, value)


def _id_value(path: Path, record: int, column: str | None, values: dict[str, Any]) -> str | None:
    """A label or a patient as text: strings and whole numbers as they are, null as none."""
    if column is None:
        return None
    value = values[column]
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return None
    if not isinstance(value, str | int):
        raise ValueError(
            f"{path}: record {record} has a {type(value).__name__} in column {column!r}; a string "
            f"or a whole number is expected"
        )
    return _encodable(path, record, str(value))


def _encodable(path: Path, record: int, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{path}: record {record} contains half a surrogate pair, which is no character; "
            f"export the file again"
        ) from None
    return value


def _parquet_rows(path: Path, select: str) -> Iterator[tuple[Any, ...]]:
    """Rows of one duckdb query over a Parquet file; duckdb's own messages may quote values."""
    try:
        import duckdb
    except ImportError:
        raise ValueError(
            f"{path}: reading Parquet needs the optional library duckdb; pip install duckdb (the "
            f"extra `mimic` brings it), or convert the table to CSV"
        ) from None
    options: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": False,
        "memory_limit": "1GB",
        "threads": 1,
    }
    with duckdb.connect(config=options) as connection:
        try:
            # The path goes in as a pattern: escape what would match other files.
            query = f"{select} FROM read_parquet(?)"
            answer = connection.execute(query, [glob.escape(str(path))])
            while rows := answer.fetchmany(256):
                yield from rows
        except duckdb.Error:
            raise ValueError(
                f"{path}: not a Parquet file that can be read (cut off, damaged, or of another "
                f"format); write it again"
            ) from None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(kind: str, columns: Columns, digests: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps([kind, columns[:3], list(digests)]).encode()).hexdigest()
