"""Note tables: every format gives the same notes; damage is refused without a word of them."""

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import notes as module
from data.notes import Note, open_notes

COLUMNS = {"text_column": "body", "label_column": "grade", "patient_column": "pid"}
NOTES = [
    Note('He said "no".\r\nThen, later:\n\n  rest', "0012", "2"),
    Note("é 漢 😀 \u202eright to left", "13", None),
    Note("", "13", "other"),
    Note("</s> [INST] NA", "p 14", "1"),
    Note("x" * 2_000_000, "15", "1"),
    Note("   \t ", "16", "1"),
]
MIMIC_HEADER = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text"


def quoted(value: str | None) -> str:
    return "" if value is None else '"' + value.replace('"', '""') + '"'


def as_csv(notes: Iterable[Note], end: str = "\n") -> bytes:
    lines = ["pid,body,unused,grade"]
    lines += [f"{quoted(n.patient)},{quoted(n.text)},,{quoted(n.label)}" for n in notes]
    return (end.join(lines) + end).encode()


def as_jsonl(notes: Iterable[Note]) -> bytes:
    rows = ({"grade": n.label, "x": [1], "body": n.text, "pid": n.patient} for n in notes)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path: Path, select: str) -> Path:
    with duckdb.connect() as connection:
        connection.execute(f"COPY ({select}) TO '{path}' (FORMAT parquet)")
    return path


def write_notes(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        source = folder / "rows.jsonl"
        source.write_bytes(as_jsonl(NOTES))
        columns = "{body: 'VARCHAR', grade: 'VARCHAR', pid: 'VARCHAR'}"
        write_parquet(folder / "weird.parquet", "SELECT 'another table' AS body")
        reader = f"read_json('{source}', columns={columns}, maximum_object_size=100000000)"
        return write_parquet(path, f"SELECT pid, 1 AS x, body, grade FROM {reader}")
    plain = (
        as_csv(NOTES, "\r\n" if "crlf" in name else "\n")
        if ".csv" in name.lower()
        else as_jsonl(NOTES)
    )
    if "bom" in name:
        plain = b"\xef\xbb\xbf" + plain
    if "no_end" in name:
        plain = plain.rstrip(b"\n")
    if "blank" in name:
        plain = plain.replace(b'"16"', b'\n\n"16"') + b"\n\n"
    path.write_bytes(gzip.compress(plain) if name.endswith(".gz") else plain)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "plain.csv", "crlf.csv", "bom.csv", "no_end.csv", "blank.csv", "table.csv.gz", "UPPER.CSV",
        "plain.jsonl", "bom.jsonl", "no_end.jsonl", "table.jsonl.gz", "table.parquet",
        "we[i]rd*.csv", "we[i]rd*.parquet",
    ],
)  # fmt: skip
def test_every_format_gives_the_same_notes_twice(tmp_path: Path, name: str) -> None:
    source = open_notes(write_notes(tmp_path, name), **COLUMNS)
    assert list(source) == NOTES
    assert list(source) == NOTES
    assert name in source.description


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)
@given(notes=st.lists(st.tuples(TEXT, TEXT.filter(bool), TEXT), min_size=1, max_size=8))
def test_any_text_survives_a_table(tmp_path: Path, notes: list[tuple[str, str, str]]) -> None:
    expected = [Note(text, patient, label or None) for text, patient, label in notes]
    for name, content in (("t.csv", as_csv(expected)), ("t.jsonl", as_jsonl(expected))):
        (tmp_path / name).write_bytes(content)
        assert list(open_notes(tmp_path / name, **COLUMNS)) == expected


def test_blocks_of_a_large_table_join_where_lines_end(tmp_path: Path) -> None:
    notes = [Note(f"{i} é\n" * (i % 50), str(i), None) for i in range(20_000)]
    (tmp_path / "t.csv").write_bytes(as_csv(notes))
    assert (tmp_path / "t.csv").stat().st_size > 3 << 20
    assert list(open_notes(tmp_path / "t.csv", **COLUMNS)) == notes


def test_values_of_json_and_parquet_become_text(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"text": "a", "y": true, "p": 7}\n{"text": "b", "y": null, "p": "007"}'
    )
    source = open_notes(tmp_path / "t.jsonl", label_column="y", patient_column="p")
    assert list(source) == [Note("a", "7", "true"), Note("b", "007", None)]
    path = write_parquet(tmp_path / "t.parquet", "SELECT 'a' AS text, 3::BIGINT AS y, '07' AS p")
    assert list(open_notes(path, label_column="y", patient_column="p")) == [Note("a", "07", "3")]


def test_text_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, content in (
        ("b.txt", b"two\r\n"),
        ("a.txt", b"\xef\xbb\xbfone"),
        ("deep/c.txt", b""),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "ignored.md").write_text("no note")
    assert list(open_notes(tmp_path)) == [Note("one"), Note("two\r\n"), Note("")]
    assert list(open_notes(tmp_path / "b.txt")) == [Note("two\r\n")]


def mimic_rows(kind: str, count: int) -> str:
    rows = [f'1{i}-{kind}-1,1{i},,{kind},1,2150-01-01,,"{kind} note\n{i}"' for i in range(count)]
    return "\n".join([MIMIC_HEADER, *rows]) + "\n"


@pytest.mark.parametrize("place", [".", "note"])
def test_mimic_iv_note_is_recognised_by_its_columns(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "discharge.csv.gz").write_bytes(gzip.compress(mimic_rows("DS", 2).encode()))
    (folder / "radiology.csv.gz").write_bytes(gzip.compress(mimic_rows("RR", 1).encode()))
    (folder / "discharge_detail.csv.gz").write_bytes(gzip.compress(b"note_id,subject_id\n"))
    (tmp_path / "LICENSE.txt").write_text("not a note")
    discharge = [Note("DS note\n0", "10", None), Note("DS note\n1", "11", None)]
    assert list(open_notes(tmp_path)) == [*discharge, Note("RR note\n0", "10", None)]
    (tmp_path / "renamed.csv").write_text(mimic_rows("DS", 2))
    assert list(open_notes(tmp_path / "renamed.csv")) == discharge


def test_the_real_table(real_data: Path) -> None:
    folder = real_data / "notes"
    notes = list(open_notes(folder / "medical_notes_500.csv", label_column="label"))
    assert len(notes) == 500
    assert len({note.text for note in notes}) == 491
    assert {note.label for note in notes} == {"1", "2", "3", "4"}
    source = open_notes(folder / "truncated.csv", text_column="transcription")
    with pytest.raises(ValueError, match=r"truncated.csv: record 322 \(it ends on line \d+\)"):
        list(source)


def test_fingerprint_follows_content_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    content = as_csv([Note("aaa", "1", "2")])

    def fingerprint(content: bytes, **columns: str) -> str:
        path.write_bytes(content)
        return open_notes(path, text_column="body", **columns).fingerprint()

    assert fingerprint(content) == fingerprint(content)
    prints = {
        fingerprint(content),
        fingerprint(content.replace(b"aaa", b"aab")),
        fingerprint(content, label_column="grade"),
        fingerprint(content, patient_column="grade"),
        fingerprint(content, patient_column="pid"),
    }
    assert len(prints) == 5
    for name, text in (("a.txt", "one"), ("b.txt", "two")):
        (tmp_path / name).write_text(text)
    before = open_notes(tmp_path).fingerprint()
    (tmp_path / "b.txt").write_text("twp")
    assert open_notes(tmp_path).fingerprint() != before


SECRET = "CANARYTEXT"
PERSON = "CANARYPERSON"
KIND = "CANARYLABEL"
HEADER = "body,pid,grade"
ROW = f'"{SECRET} a","{PERSON}",{KIND}\n'
LINE = json.dumps({"body": SECRET, "pid": PERSON, "grade": KIND}) + "\n"


def lines_with(key: str, value: object) -> str:
    return LINE + json.dumps({"body": SECRET, "pid": PERSON, "grade": KIND, key: value}) + "\n"


def parquet(
    body: str = f"'{SECRET}'", pid: str = f"'{PERSON}'", more: str = ""
) -> Callable[[Path], None]:
    select = f"SELECT {body} AS body, {pid} AS pid, '{KIND}' AS grade {more}"
    return lambda path: write_parquet(path, select) and None


def cut_parquet(path: Path) -> None:
    parquet()(path)
    path.write_bytes(path.read_bytes()[:-20])


# name of the case: (file, content, what the message says)
BAD: dict[str, tuple[str, bytes | str | Callable[[Path], None], str]] = {
    "no file": (
        "absent.csv",
        lambda path: None,
        "no such file or folder; notes are read from .csv",
    ),
    "unknown format": ("t.xlsx", b"PK", "this format is not known; notes are read from .csv"),
    "csv named json": ("t.json", LINE, "this format is not known"),
    "csv: empty": ("t.csv", b"", "the file is empty"),
    "csv: empty gzip": ("t.csv.gz", gzip.compress(b""), "the file is empty"),
    "csv: header only": ("t.csv", HEADER, "no notes in it"),
    "csv: blank lines only": ("t.csv", HEADER + "\n\n\r\n", "no notes in it"),
    "csv: no header": ("t.csv", ROW * 2, "the first line must be the header"),
    "csv: text column missing": (
        "t.csv",
        "Body,pid,grade\n" + ROW,
        "no text column 'body' .* nearest is 'Body'",
    ),
    "csv: label column missing": ("t.csv", "body,pid,x\n" + ROW, "no label column 'grade'"),
    "csv: patient column missing": ("t.csv", "body,x,grade\n" + ROW, "no patient column 'pid'"),
    "csv: doubled column": ("t.csv", "body,body,pid,grade\n" + ROW, "two of the 4 columns"),
    "csv: other separator": ("t.csv", "body;pid;grade\n" + ROW, "no text column"),
    "csv: last row cut in quotes": (
        "t.csv",
        f'{HEADER}\n{ROW}"{SECRET}',
        "record 2 .* line 3.* is not valid CSV",
    ),
    "csv: last row cut in fields": (
        "t.csv",
        f"{HEADER}\n{ROW}{SECRET}",
        r"record 2 \(it ends on line 3\) has 1 fields, the header has 3",
    ),
    "csv: field too many": (
        "t.csv",
        f"{HEADER}\n{SECRET},{PERSON},{KIND},x\n{ROW}",
        "record 1 .* has 4 fields",
    ),
    "csv: quote not doubled": (
        "t.csv",
        f'{HEADER}\n"{SECRET} "x" y",{PERSON},{KIND}\n',
        "record 1 .* not valid CSV",
    ),
    "csv: quote never closed": (
        "t.csv",
        f'{HEADER}\n"{SECRET},{PERSON},{KIND}\n' + ROW,
        "not valid CSV",
    ),
    "csv: old Mac line ends": ("t.csv", (HEADER + "\n" + ROW).replace("\n", "\r"), "not valid CSV"),
    "csv: NUL in text": (
        "t.csv",
        f"{HEADER}\n{ROW}{SECRET}\0,{PERSON},{KIND}\n",
        "record 2 contains a NUL",
    ),
    "csv: NUL in patient": (
        "t.csv",
        f"{HEADER}\n{SECRET},{PERSON}\0,{KIND}\n",
        "record 1 contains a NUL",
    ),
    "csv: latin-1": (
        "t.csv",
        f"{HEADER}\n{ROW}{SECRET} é,{PERSON},{KIND}\n".encode("latin-1"),
        "line 3 is not UTF-8",
    ),
    "csv: latin-1 in gzip": (
        "t.csv.gz",
        gzip.compress(f"{HEADER}\n{SECRET} é,{PERSON},{KIND}\n".encode("latin-1")),
        "line 2 is not UTF-8",
    ),
    "csv: UTF-16": ("t.csv", (HEADER + "\n" + ROW).encode("utf-16"), "line 1 is not UTF-8"),
    "csv: character cut at the end": (
        "t.csv",
        f"{HEADER}\n{ROW}{SECRET},{PERSON},é".encode()[:-1],
        "line 3 is not UTF-8",
    ),
    "csv: gzip cut": (
        "t.csv.gz",
        gzip.compress((HEADER + "\n" + ROW * 99).encode())[:-12],
        "cut off or damaged",
    ),
    "csv: gzip checksum": (
        "t.csv.gz",
        gzip.compress((HEADER + "\n" + ROW).encode())[:-8] + bytes(8),
        "cut off or damaged",
    ),
    "csv: gzip body": (
        "t.csv.gz",
        gzip.compress(HEADER.encode())[:10] + b"\xff" * 50,
        "cut off or damaged",
    ),
    "csv: not gzip": ("t.csv.gz", HEADER + "\n" + ROW, "not a gzip file"),
    "csv: no patient": ("t.csv", f"{HEADER}\n{ROW}{SECRET},,{KIND}\n", "record 2 has no patient"),
    "csv: line too long": (
        "t.csv",
        f"{HEADER}\n{ROW}{SECRET}{'x' * 6_000_000},{PERSON},{KIND}\n",
        "4 MiB",
    ),
    "csv: field too long": (
        "t.csv",
        f'{HEADER}\n"{SECRET}{("x" * 99 + chr(10)) * 50_000}",{PERSON},{KIND}\n',
        "field larger than field limit",
    ),
    "csv: gzip bomb": ("t.csv.gz", gzip.compress(HEADER.encode() + bytes(50_000_000)), "4 MiB"),
    "jsonl: empty": ("t.jsonl", b"", "the file is empty"),
    "jsonl: blank lines only": ("t.jsonl", "\n\n", "line 1 is not valid JSON"),
    "jsonl: last line cut": ("t.jsonl", LINE * 2 + LINE[:30], "line 3 is not valid JSON"),
    "jsonl: one document": (
        "t.jsonl",
        json.dumps([json.loads(LINE)], indent=1),
        "line 1 is not valid JSON",
    ),
    "jsonl: an array a line": ("t.jsonl", f'["{SECRET}"]\n', "line 1 is a JSON list"),
    "jsonl: deep nesting": ("t.jsonl", LINE + "[" * 200_000, "line 2 is not valid JSON"),
    "jsonl: key missing at first": (
        "t.jsonl",
        f'{{"text": "{SECRET}"}}\n',
        "no text column 'body'",
    ),
    "jsonl: key missing later": (
        "t.jsonl",
        LINE + f'{{"body": "{SECRET}", "pid": "x"}}',
        "line 2 has no key 'grade'",
    ),
    "jsonl: key twice": (
        "t.jsonl",
        LINE + f'{{"body": "{SECRET}", "body": "x"}}',
        "line 2 has a key twice",
    ),
    "jsonl: text null": (
        "t.jsonl",
        lines_with("body", None),
        "record 2 has a null in column 'body'",
    ),
    "jsonl: text a number": (
        "t.jsonl",
        lines_with("body", 3),
        "record 2 has a int in column 'body'",
    ),
    "jsonl: label a fraction": (
        "t.jsonl",
        lines_with("grade", 0.5),
        "record 2 has a float in column 'grade'",
    ),
    "jsonl: label a list": (
        "t.jsonl",
        lines_with("grade", [KIND]),
        "record 2 has a list in column 'grade'",
    ),
    "jsonl: patient an object": (
        "t.jsonl",
        lines_with("pid", {"id": PERSON}),
        "record 2 has a dict",
    ),
    "jsonl: patient empty": ("t.jsonl", lines_with("pid", ""), "record 2 has no patient"),
    "jsonl: half a surrogate pair": (
        "t.jsonl",
        lines_with("body", SECRET + "\ud800"),
        "half a surrogate pair",
    ),
    "jsonl: NUL": ("t.jsonl", lines_with("body", SECRET + "\0"), "record 2 contains a NUL"),
    "jsonl: latin-1": ("t.jsonl", LINE.encode() + b'{"body": "\xe9"}', "line 2 is not UTF-8"),
    "jsonl: gzip cut": (
        "t.jsonl.gz",
        gzip.compress((LINE * 99).encode())[:-9],
        "cut off or damaged",
    ),
    "parquet: not Parquet": ("t.parquet", HEADER + "\n" + ROW, "not a Parquet file"),
    "parquet: empty": ("t.parquet", b"", "not a Parquet file"),
    "parquet: cut": ("t.parquet", cut_parquet, "not a Parquet file"),
    "parquet: no rows": ("t.parquet", parquet(more="WHERE false"), "no notes in it"),
    "parquet: column missing": (
        "t.parquet",
        lambda p: write_parquet(p, f"SELECT '{SECRET}' AS x") and None,
        "no text column 'body'",
    ),
    "parquet: text null": ("t.parquet", parquet(body="NULL::VARCHAR"), "record 1 has a null"),
    "parquet: text a number": (
        "t.parquet",
        parquet(body="7"),
        "record 1 has a int in column 'body'",
    ),
    "parquet: patient a fraction": (
        "t.parquet",
        parquet(pid="1.5::DOUBLE"),
        "record 1 has a float",
    ),
    "text: a column asked for": ("t.txt", SECRET, "text files have no column"),
}


@pytest.mark.parametrize(("name", "content", "says"), BAD.values(), ids=list(BAD))
def test_damage_is_refused_in_one_line_that_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content, says: str
) -> None:
    monkeypatch.setattr(module, "LINE_LIMIT", 1 << 22)
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as caught:
        list(open_notes(path, **COLUMNS))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    for private in (SECRET, PERSON, KIND):
        assert private not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def folder_of(tmp_path: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (tmp_path / name.replace("_", ".")).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "columns", "says"),
    [
        ({}, {}, "no table with the columns of MIMIC-IV-Note and no .txt file"),
        ({"t_csv": as_csv(NOTES[:1])}, {}, "no table with the columns of MIMIC-IV-Note"),
        ({"a_txt": b"x"}, {"label_column": "y"}, "text files have no column 'y'"),
        ({"a_txt": b"x"}, {"patient_column": "y"}, "text files have no column 'y'"),
        ({"a_txt": b"x", "b_txt": b"CANARY\xe9"}, {}, "b.txt: byte 6 is not UTF-8"),
        ({"a_txt": b"CANARY\0"}, {}, "a.txt: record 1 contains a NUL"),
        (
            {
                "discharge_csv": MIMIC_HEADER.encode(),
                "discharge_csv_gz": gzip.compress(MIMIC_HEADER.encode()),
            },
            {},
            "discharge.csv is there twice",
        ),
        ({"discharge_csv": MIMIC_HEADER.encode()}, {}, "discharge.csv: no notes in it"),
        (
            {"discharge_csv": MIMIC_HEADER.encode()},
            {"text_column": "note"},
            "no text column 'note'",
        ),
    ],
)
def test_folders_without_notes_are_refused(tmp_path: Path, files, columns, says: str) -> None:
    folder = folder_of(tmp_path, **files)
    with pytest.raises(ValueError, match=says) as caught:
        list(open_notes(folder, **columns))
    assert "CANARY" not in str(caught.value)


def test_one_column_for_two_purposes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "\n" + ROW)
    with pytest.raises(ValueError, match="one column is named for two purposes"):
        open_notes(path, text_column="body", label_column="body")


def test_missing_duckdb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "t.parquet", "SELECT 'a' AS text")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ValueError, match="needs the optional library duckdb; pip install duckdb"):
        open_notes(path)


def test_a_table_is_streamed(tmp_path: Path) -> None:
    """A row that is good is given before a later one is looked at."""
    path = tmp_path / "t.csv"
    content = io.StringIO()
    content.write(HEADER + "\n")
    for _ in range(40_000):
        content.write(ROW)
    path.write_text(content.getvalue() + "cut")
    first = next(iter(open_notes(path, **COLUMNS)))
    assert first == Note(f"{SECRET} a", PERSON, KIND)
