"""Groups of notes: read from every kind of table, and never an identifier."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.groups import read_groups
from data.notes import Note, NoteSource, age_band, open_notes


def as_table(folder: Path, kind: str, rows: list[dict[str, str]]) -> Path:
    path = folder / f"notes.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    if kind == "parquet":
        duckdb = pytest.importorskip("duckdb", reason="the optional library duckdb is absent")
        table = f"(SELECT * FROM read_csv('{path}', all_varchar=true))"
        duckdb.sql(f"COPY {table} TO '{path}.done' (FORMAT parquet)")
        path.with_name(f"{path.name}.done").rename(path)
    return path


def opened(path: Path, *columns: str) -> NoteSource:
    return open_notes(path, patient_column="who", group_columns=columns)


ROWS = [
    {"text": "a", "who": "1", "sex": "M", "Age": "64.9"},
    {"text": "b", "who": "2", "sex": "F", "Age": "300"},
    {"text": "c", "who": "3", "sex": " M ", "Age": "17"},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_has_groups_and_ages_in_bands(tmp_path: Path, kind: str) -> None:
    source = opened(as_table(tmp_path, kind, ROWS), "Age", "sex")
    assert next(iter(source)) == Note("a", "1", None, ("45 to 64", "M"))
    groups = read_groups(source)
    assert groups["sex"].values == ("F", "M")
    assert groups["sex"].codes.tolist() == [1, 0, 1]
    assert groups["Age"].values == ("45 to 64", "85 and over", "under 18")
    assert groups["Age"].codes.tolist() == [0, 1, 2]


def test_groups_do_not_change_what_the_notes_are(tmp_path: Path) -> None:
    """A finished run's fingerprint and cache hold whichever groups are asked for later."""
    path = as_table(tmp_path, "csv", ROWS)
    assert opened(path).fingerprint() == opened(path, "sex").fingerprint()
    assert opened(path).description == opened(path, "sex").description
    assert read_groups(opened(path)) == {}


def test_an_unknown_value_is_in_no_group(tmp_path: Path) -> None:
    path = as_table(tmp_path, "csv", [*ROWS, {"text": "d", "who": "4", "sex": "", "Age": ""}])
    groups = read_groups(opened(path, "sex", "Age"))
    assert (groups["sex"].codes[3], groups["Age"].codes[3]) == (-1, -1)


def test_identifiers_are_refused_without_being_told(tmp_path: Path) -> None:
    rows = [{"text": "a", "who": "1", "mrn": f"MRN-{i}"} for i in range(41)]
    with pytest.raises(ValueError, match="never one of identifiers") as refusal:
        read_groups(opened(as_table(tmp_path, "csv", rows), "mrn"))
    assert "MRN-" not in str(refusal.value)
    # Where nobody named the columns, the others are still told.
    rows = [row | {"sex": "FM"[i % 2]} for i, row in enumerate(rows)]
    left_out: dict[str, str] = {}
    groups = read_groups(opened(as_table(tmp_path, "csv", rows), "mrn", "sex"), left_out)
    assert list(groups) == ["sex"] and groups["sex"].codes.tolist() == [i % 2 for i in range(41)]
    assert list(left_out) == ["mrn"] and "more than 40 different values" in left_out["mrn"]
    assert "MRN-" not in left_out["mrn"]
    with pytest.raises(ValueError, match="one column is named for two purposes"):
        opened(as_table(tmp_path, "csv", rows), "who")


def test_what_is_no_column_and_no_age_is_refused(tmp_path: Path) -> None:
    path = as_table(tmp_path, "csv", [{"text": "a", "who": "1", "age": "secretvalue"}])
    with pytest.raises(ValueError, match="name it with --subgroup-columns"):
        opened(path, "sex")
    with pytest.raises(ValueError, match="no age in years") as refusal:
        read_groups(opened(path, "age"))
    assert "secretvalue" not in str(refusal.value)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note.txt").write_text("a")
    with pytest.raises(ValueError, match="text files have no column 'sex'"):
        open_notes(tmp_path / "folder", group_columns=["sex"])


def test_every_age_has_one_band() -> None:
    bands = [age_band(years) for years in np.arange(0, 120, 0.5)]
    assert len(set(bands)) == 6
    assert bands == sorted(bands, key=bands.index)
    assert age_band(64.99) == "45 to 64"
    assert age_band(65) == "65 to 74"
