"""MIMIC-III read as admission notes: every label and every exclusion against the generator."""

import csv
import gzip
import itertools
import json
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import mimic, synthetic, tables
from data.cache import tokenise
from data.notes import Note
from data.splits import split_notes
from data.tables import COLUMNS
from tests.data.conftest import CharacterTokenizer

duckdb = pytest.importorskip("duckdb", reason="the optional library duckdb is absent")

SECRET = "Zebrafish"  # stands for text that no message may repeat


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make_cohort(tmp_path_factory.mktemp("cohort"), patients=500, seed=11)


@pytest.fixture(scope="module")
def facts(cohort: Path) -> dict:
    return json.loads((cohort / "cohort.json").read_text())


@pytest.fixture(scope="module")
def notes(cohort: Path) -> list[Note]:
    return list(mimic.open_mimic(cohort / "mimic-iii"))


ADMISSION = {
    "ROW_ID": "1", "SUBJECT_ID": "7", "HADM_ID": "100", "ADMITTIME": "2150-01-01 00:00:00",
    "DISCHTIME": "2150-01-05 00:00:00", "ADMISSION_TYPE": "EMERGENCY", "HOSPITAL_EXPIRE_FLAG": "0",
    "HAS_CHARTEVENTS_DATA": "1",
}  # fmt: skip
SUMMARY = {
    "ROW_ID": "1", "SUBJECT_ID": "7", "HADM_ID": "100", "CHARTDATE": "2150-01-05",
    "CATEGORY": "Discharge summary", "DESCRIPTION": "Report",
    "TEXT": "Chief Complaint:\ncough\n\nBrief Hospital Course:\nfine\n",
}  # fmt: skip


def write_table(path: Path, name: str, rows: list[dict[str, str]]) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        columns = COLUMNS[name].split()
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_mimic3(
    folder: Path,
    admissions: list[dict[str, str]],
    summaries: list[dict[str, str]],
) -> Path:
    """A MIMIC-III folder of these rows, each laid over a plain admission or summary."""
    folder.mkdir(exist_ok=True)
    write_table(folder / "ADMISSIONS.csv", "ADMISSIONS", [ADMISSION | row for row in admissions])
    write_table(folder / "NOTEEVENTS.csv", "NOTEEVENTS", [SUMMARY | row for row in summaries])
    return folder


def read(folder: Path) -> tuple[list[Note], dict[str, int]]:
    source = mimic.open_mimic(folder)
    notes = list(source)
    assert source.counts is not None
    kept = {name: count for name, count in source.counts.items() if count}
    return notes, kept


# --------------------------------------------------------------------------- against the generator


def test_labels_and_patients_equal_the_generators_row_for_row(
    cohort: Path, facts: dict, notes: list[Note]
) -> None:
    source = mimic.open_mimic(cohort / "mimic-iii")
    assert source.admission_ids().tolist() == facts["mor"]["hadm_id"]
    assert [note.label for note in notes] == [str(died) for died in facts["mor"]["died"]]
    with gzip.open(cohort / "mimic-iii" / "ADMISSIONS.csv.gz", "rt", newline="") as file:
        patients = {int(row["HADM_ID"]): row["SUBJECT_ID"] for row in csv.DictReader(file)}
    assert [note.patient for note in notes] == [patients[i] for i in facts["mor"]["hadm_id"]]
    assert sum(facts["mor"]["died"]) > 50


def test_exclusions_equal_what_the_generator_planted(cohort: Path, facts: dict) -> None:
    source = mimic.open_mimic(cohort / "mimic-iii")
    assert source.counts is None
    list(source)
    assert source.counts == facts["admissions"]
    assert list(source.counts) == list(facts["admissions"])  # in the order of the rules
    assert all(count > 0 for count in source.counts.values())


def test_known_risk_is_the_generators_and_absent_elsewhere(
    cohort: Path, facts: dict, tmp_path: Path
) -> None:
    risk = mimic.open_mimic(cohort / "mimic-iii").known_risk()
    assert risk is not None and risk.dtype == np.float64
    assert risk.tolist() == facts["mor"]["risk"]
    folder = write_mimic3(tmp_path / "mimic-iii", [{}], [{}])
    assert mimic.open_mimic(folder).known_risk() is None
    (tmp_path / "cohort.json").write_bytes((cohort / "cohort.json").read_bytes())
    with pytest.raises(ValueError, match="does not belong"):
        mimic.open_mimic(folder).known_risk()


def test_notes_hold_the_eight_sections_and_nothing_later(notes: list[Note]) -> None:
    headings = list(mimic.SECTIONS.values())
    for note in notes:
        paragraphs = note.text.split("\n\n")
        assert [p.split(":")[0] for p in paragraphs] == headings
        assert not any(word in note.text for word in ("expired", "Disposition", "Hospital Course"))
        assert all(p.split(":")[1].strip() for p in paragraphs[:3])


def test_patients_never_cross_a_split(cohort: Path, notes: list[Note], tmp_path: Path) -> None:
    source = mimic.open_mimic(cohort / "mimic-iii")
    cache = tokenise(source, CharacterTokenizer(), cache_folder=tmp_path, workers=1)
    assert len(cache) == len(notes)
    splits = split_notes(cache)
    parts = (splits.train, splits.validation, splits.test)
    patients = [{notes[row].patient for row in part} for part in parts]
    assert all(patients) and sum(map(len, parts)) == len(notes)
    for one, other in itertools.combinations(patients, 2):
        assert not one & other
    # Some patient has several notes, or this would be no test.
    assert len({note.patient for note in notes}) < len(notes)


def test_crlf_and_lower_case_give_the_same_notes(
    cohort: Path, notes: list[Note], tmp_path: Path
) -> None:
    for name in ("NOTEEVENTS", "ADMISSIONS"):
        raw = gzip.decompress((cohort / "mimic-iii" / f"{name}.csv.gz").read_bytes())
        header, _, rest = raw.partition(b"\n")
        changed = b"\xef\xbb\xbf" + header.lower() + b"\n" + rest
        (tmp_path / f"{name.lower()}.csv").write_bytes(changed.replace(b"\n", b"\r\n"))
    source = mimic.open_mimic(tmp_path)
    assert list(source) == notes
    assert source.fingerprint() != mimic.open_mimic(cohort / "mimic-iii").fingerprint()


def test_a_table_in_many_pieces_gives_the_same_notes(
    cohort: Path, notes: list[Note], monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1000, 4099):  # bytes; most notes are longer
        monkeypatch.setattr(tables, "PIECE_BYTES", size)
        assert list(mimic.open_mimic(cohort / "mimic-iii")) == notes
    table = tables.find_table(cohort / "mimic-iii", "NOTEEVENTS")
    pieces = [piece.path.read_bytes() for piece in table.pieces()]
    header = pieces[0].partition(b"\n")[0] + b"\n"
    whole = gzip.decompress((cohort / "mimic-iii" / "NOTEEVENTS.csv.gz").read_bytes())
    assert header + b"".join(piece.removeprefix(header) for piece in pieces) == whole
    assert len(pieces) > 100


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one = mimic.open_mimic(write_mimic3(tmp_path / "a", [{}], [{}])).fingerprint()
    same = mimic.open_mimic(write_mimic3(tmp_path / "b", [{}], [{}])).fingerprint()
    label = [{"HOSPITAL_EXPIRE_FLAG": "1"}]
    other = mimic.open_mimic(write_mimic3(tmp_path / "c", label, [{}])).fingerprint()
    assert one == same != other and len(one) == 64


# --------------------------------------------------------------------------------------- the rules


def test_sections_of_a_known_summary() -> None:
    summary = (
        "Admission Date:  [**2150-1-1**]\n\nAllergies:\nPenicillins\n\nAttending:[**Name 1**]\n"
        "CHIEF COMPLAINT:\nchest\npain\n\n"
        "History of Present Illness:\n67 yo M. Was well.\n\nIn the ED, T 98.6 and so: fine.\n\n"
        "Past Medical History:\n1. HTN\n\n2. DM\n \nSocial History:\nretired\n\n"
        "Physical Exam:\nVS: 98.6\nNAD\n\nPertinent Results:\nx\n\n"
        "Medications on Admission:\naspirin 81\n\nDischarge Medications:\nnone\n\n"
        "History of Present Illness:\nsecond hit\n"
    )
    assert mimic.admission_note(mimic.admission_sections(summary)) == (
        "CHIEF COMPLAINT: chest pain\n\n"
        # A blank line ends a section only before a header: a digit or a full stop is none.
        "PRESENT ILLNESS: 67 yo M. Was well.  In the ED, T 98.6 and so: fine.\n\n"
        "MEDICAL HISTORY: 1. HTN  2. DM\n\n"
        "MEDICATION ON ADMISSION: aspirin 81\n\n"
        "ALLERGIES: Penicillins\n\n"
        "PHYSICAL EXAM: VS: 98.6 NAD\n\n"
        "FAMILY HISTORY:\n\n"
        "SOCIAL HISTORY: retired"
    )


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("he was well", True),
        ("mother died of cancer", True),
        ("the expired medication was thrown away", True),
        ("the patient died", False),
        ("pt has expired", False),
        ("Pt. passed\naway", False),
        ("the PATIENT HAD DECEASED", False),
        ("she expired", False),
        ("was pronounced expired", False),
        ("time of death 14:30", False),
    ],
)
def test_a_death_told_before_the_exam_removes_the_note(
    tmp_path: Path, body: str, kept: bool
) -> None:
    text = f"History of Present Illness:\n{body}\n\nBrief Hospital Course:\npatient died\n"
    notes, counts = read(write_mimic3(tmp_path, [{}], [{"TEXT": text}]))
    assert counts == {mimic.ADMISSIONS: 1, mimic.KEPT if kept else mimic.DEATH_TOLD: 1}
    assert len(notes) == kept


@pytest.mark.parametrize(
    "phrase", ["Pt expired.", "The patient has passed away.", "died", "Deceased."]
)
@pytest.mark.parametrize("section", ["Physical Exam", "Medications on Admission"])
def test_a_death_told_in_the_exam_or_the_medications_is_cut_out(
    tmp_path: Path, section: str, phrase: str
) -> None:
    text = f"Chief Complaint:\ncough\n\n{section}:\nbefore. {phrase} after\n\nDisposition:\nx\n"
    notes, _ = read(write_mimic3(tmp_path, [{}], [{"TEXT": text}]))
    assert len(notes) == 1
    assert "before." in notes[0].text and "after" in notes[0].text
    assert not mimic.DEATH_TO_CUT.search(notes[0].text)


def test_reports_and_addenda_are_joined_by_date_and_repeated_texts_dropped(tmp_path: Path) -> None:
    admissions = [{"HADM_ID": str(i)} for i in (100, 101, 102, 103, 104, 106)] + [
        {"HADM_ID": "105", "ADMISSION_TYPE": "NEWBORN"}
    ]
    addendum = {"DESCRIPTION": "Addendum", "TEXT": "Social History:\nlives alone\n"}
    corrected = {"DESCRIPTION": "Addendum", "TEXT": "Chief Complaint:\ncorrected\n"}
    same = {"TEXT": "Chief Complaint:\nthe same\n"}
    summaries: list[dict[str, str]] = [
        # The addenda stand first in the file but are dated later; the report is filed twice.
        {"HADM_ID": "100", "CHARTDATE": "2150-01-09"} | addendum,
        {"HADM_ID": "100", "CHARTDATE": "2150-01-10"} | corrected,
        {"HADM_ID": "100"},
        {"HADM_ID": "100"},
        # One text for two admissions: the later one keeps it.
        {"HADM_ID": "101", "CHARTDATE": "2151-01-01"} | same,
        {"HADM_ID": "102", "CHARTDATE": "2150-06-01"} | same,
        {"HADM_ID": "101", "CHARTDATE": "2151-01-02", "TEXT": "Allergies:\nnuts\n"},
        {"HADM_ID": "104", "CHARTDATE": "2152-01-02", "TEXT": "Allergies:\nnuts\n"},
        {"HADM_ID": "103", "DESCRIPTION": "Addendum", "TEXT": "Chief Complaint:\nan addendum\n"},
        {"HADM_ID": "106", "CATEGORY": "Nursing"},
        {"HADM_ID": "106", "TEXT": ""},
        {"HADM_ID": "", "TEXT": "Chief Complaint:\nof nobody\n"},
        {"HADM_ID": "999", "TEXT": "Chief Complaint:\nof an unknown admission\n"},
        {"HADM_ID": "105", "TEXT": "Chief Complaint:\nborn\n"},
    ]
    notes, counts = read(write_mimic3(tmp_path, admissions, summaries))
    assert counts == {
        mimic.ADMISSIONS: 7,
        mimic.NEWBORN: 1,
        mimic.NO_SUMMARY: 1,
        mimic.REPEATED: 1,
        mimic.NO_REPORT: 1,
        mimic.NO_SECTION: 1,
        mimic.KEPT: 2,
    }
    assert notes[0].text.startswith("CHIEF COMPLAINT: cough\n\n")
    assert notes[0].text.endswith("SOCIAL HISTORY: lives alone")
    assert notes[1].text.startswith("CHIEF COMPLAINT: the same\n\n")
    assert "nuts" not in notes[1].text  # that text went to a later admission


def test_a_note_without_an_admission_section_is_counted(tmp_path: Path) -> None:
    text = "Physical Exam:\nNAD\n\nAllergies:\nnone\n"
    notes, counts = read(write_mimic3(tmp_path, [{}], [{"TEXT": text}]))
    assert notes == [] and counts == {mimic.ADMISSIONS: 1, mimic.NO_SECTION: 1}


# --------------------------------------------------------------------------------------- the files


def test_an_empty_noteevents_gives_no_notes_and_says_so(tmp_path: Path) -> None:
    notes, counts = read(write_mimic3(tmp_path, [{}, {"HADM_ID": "101"}], []))
    assert notes == [] and counts == {mimic.ADMISSIONS: 2, mimic.NO_SUMMARY: 2}


def test_a_long_note_with_quotes_and_line_breaks_survives(tmp_path: Path) -> None:
    words = 'said "so", and\nwent on; ' * 150_000  # 3.6 MB in one cell
    text = f"Chief Complaint:\n{words}"
    notes, _ = read(write_mimic3(tmp_path, [{}], [{"TEXT": text}]))
    body = words.replace("\n", " ").strip()
    assert notes[0].text.startswith(f"CHIEF COMPLAINT: {body}\n\n")


def header_swapped(raw: bytes) -> bytes:
    header, _, rest = raw.partition(b"\n")
    return header.replace(b"CATEGORY,DESCRIPTION", b"DESCRIPTION,CATEGORY") + b"\n" + rest


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "columns swapped": (header_swapped, "in another order"),
    "no header": (lambda raw: raw.partition(b"\n")[2], "does not begin with the header"),
    "nothing at all": (lambda raw: b"", "no header line"),
    "a column too many": (lambda raw: raw.replace(b"TEXT\n", b"TEXT,MORE\n"), "header"),
    "a field too many": (lambda raw: raw + b"1,2,3,,,,,,,,x,y\n", "row 4: not the CSV"),
    "a field too few": (lambda raw: raw + b"1,2,3\n", "row 4: not the CSV"),
    "a stray quote": (lambda raw: raw + b'1,2,3,,,,"a"b"",,,,x\n', "row 4: not the CSV"),
    "an open quote": (lambda raw: raw + b'1,2,3,,,,,,,,"never closed\n', "inside a quoted cell"),
    "a byte that is not UTF-8": (lambda raw: raw.replace(b"fine", b"f\xffne"), "not the CSV"),
    "a zero byte": (lambda raw: raw.replace(b"fine", b"f\0ne"), "zero byte"),
    "a year of two digits": (lambda raw: raw.replace(b"2150-01-05", b"50-01-05"), "four digits"),
    "a number for an id": (lambda raw: raw.replace(b",100,", b",100.0,"), "not a whole number"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_noteevents_is_refused_without_repeating_it(
    tmp_path: Path, damage: str, packed: bool
) -> None:
    change, message = DAMAGE[damage]
    text = f"Chief Complaint:\n{SECRET}\n\nBrief Hospital Course:\nfine\n"
    write_mimic3(tmp_path, [{}], [{"TEXT": text}, {"TEXT": text + "again"}])
    plain = tmp_path / "NOTEEVENTS.csv"
    changed = change(plain.read_bytes())
    assert changed != plain.read_bytes()
    plain.write_bytes(changed)
    if packed:
        (tmp_path / "NOTEEVENTS.csv.gz").write_bytes(gzip.compress(changed))
        plain.unlink()
    spill = tmp_path / "spill"
    spill.mkdir()
    with pytest.raises(ValueError, match=message) as caught:
        list(mimic.open_mimic(tmp_path, spill_folder=spill))
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown and "NOTEEVENTS" in shown
    assert list(spill.iterdir()) == []


@pytest.mark.parametrize("table", ["NOTEEVENTS", "ADMISSIONS"])
def test_a_gzip_cut_short_or_changed_is_refused(cohort: Path, tmp_path: Path, table: str) -> None:
    for name in ("NOTEEVENTS", "ADMISSIONS"):
        raw = (cohort / "mimic-iii" / f"{name}.csv.gz").read_bytes()
        (tmp_path / f"{name}.csv.gz").write_bytes(raw)
    path = tmp_path / f"{table}.csv.gz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the stored checksum, which duckdb does not look at
    for damaged in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), b"not gzip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut short or damaged|not a whole gzip"):
            list(mimic.open_mimic(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"HOSPITAL_EXPIRE_FLAG": "2"}, "HOSPITAL_EXPIRE_FLAG is neither 0 nor 1"),
        ({"HOSPITAL_EXPIRE_FLAG": ""}, "HOSPITAL_EXPIRE_FLAG is neither 0 nor 1"),
        ({"HADM_ID": "100.0"}, "HADM_ID is not a whole number"),
        ({"HADM_ID": "0100"}, "more than one row"),
        ({"SUBJECT_ID": ""}, "SUBJECT_ID is not a whole number"),
    ],
)
def test_impossible_admissions_are_refused(
    tmp_path: Path, row: dict[str, str], message: str
) -> None:
    folder = write_mimic3(tmp_path, [{}, {"HADM_ID": "101"} | row], [{}])
    with pytest.raises(ValueError, match=message):
        list(mimic.open_mimic(folder))


def test_missing_and_doubled_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        mimic.open_mimic(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no ADMISSIONS\.csv\.gz"):
        mimic.open_mimic(tmp_path)
    folder = write_mimic3(tmp_path / "mimic-iii", [{}], [{}])
    (folder / "noteevents.csv.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="NOTEEVENTS more than once"):
        mimic.open_mimic(folder)
    with pytest.raises(ValueError, match="unknown MIMIC task 'age'; known: pmv, mor"):
        mimic.open_mimic(folder, "age")


def test_without_duckdb_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[mimic\]"):
        mimic.open_mimic(write_mimic3(tmp_path, [{}], [{}]))


def test_waiting_texts_have_no_name_on_disk(cohort: Path, tmp_path: Path) -> None:
    reader = iter(mimic.open_mimic(cohort / "mimic-iii", spill_folder=tmp_path))
    next(reader)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):  # the folder is the one that is used
        next(iter(mimic.open_mimic(cohort / "mimic-iii", spill_folder=tmp_path / "nowhere")))
