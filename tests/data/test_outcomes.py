"""The labels of the five tasks: against the generator row for row, and rule by rule by hand."""

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from data import mimic, outcomes, synthetic, ventilation
from data.cache import tokenise
from data.notes import Note
from data.splits import split_notes
from data.tables import COLUMNS, connect, find_table
from tests.data.conftest import CharacterTokenizer

pytest.importorskip("duckdb", reason="the optional library duckdb is absent")

SECRET = "Zebrafish"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make_cohort(tmp_path_factory.mktemp("cohort"), patients=500, seed=11)


@pytest.fixture(scope="module")
def facts(cohort: Path) -> dict:
    return json.loads((cohort / "cohort.json").read_text())["outcomes"]


def as_facts(label: str | tuple[str, ...] | None) -> str | list[str]:
    assert label is not None
    return label if isinstance(label, str) else list(label)


@pytest.fixture(scope="module")
def mimic4(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cohort under the names and columns of MIMIC-IV and MIMIC-IV-Note."""
    folder = tmp_path_factory.mktemp("physionet")
    renamed = {"ICUSTAY_ID": "stay_id", "ICD9_CODE": "icd_code", "DESCRIPTION": "note_type"}
    for path in (cohort / "mimic-iii").iterdir():
        name = path.name.removesuffix(".csv.gz")
        target, part = {
            "NOTEEVENTS": ("discharge", "note"),
            "CHARTEVENTS": ("chartevents", "icu"),
            "ICUSTAYS": ("icustays", "icu"),
            "PROCEDUREEVENTS_MV": ("procedureevents", "icu"),
        }.get(name, (name.lower(), "hosp"))
        births = first_admissions(cohort)
        with gzip.open(path, "rt", newline="") as file:
            rows = list(csv.DictReader(file))
        out = []
        for row in rows:
            if name == "NOTEEVENTS" and row["CATEGORY"] != "Discharge summary":
                continue
            if name == "CHARTEVENTS" and row["ERROR"] == "1":
                continue
            new = {renamed.get(key, key.lower()): value for key, value in row.items()}
            if "icd_code" in new:
                new["icd_version"] = "9"
            if name == "NOTEEVENTS":
                new["charttime"] = new.pop("chartdate") + " 00:00:00"
                new["note_seq"] = new["row_id"]
                new["note_type"] = "DS" if new["note_type"] == "Report" else "AD"
            if name == "PATIENTS":
                year = births[row["SUBJECT_ID"]].year
                age = (births[row["SUBJECT_ID"]] - datetime.fromisoformat(row["DOB"])).days / 365.25
                new |= {"anchor_year": str(year), "anchor_age": str(min(int(age), 91))}
            out.append(new)
        (folder / part).mkdir(exist_ok=True)
        with gzip.open(folder / part / f"{target}.csv.gz", "wt", newline="") as file:
            writer = csv.DictWriter(file, list(out[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(out)
    return folder


def first_admissions(cohort: Path) -> dict[str, datetime]:
    first: dict[str, datetime] = {}
    with gzip.open(cohort / "mimic-iii" / "ADMISSIONS.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["ADMITTIME"])
            first[row["SUBJECT_ID"]] = min(at, first.get(row["SUBJECT_ID"], at))
    return first


# --------------------------------------------------------------------------- against the generator


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("task", outcomes.TASKS)
def test_labels_and_exclusions_equal_the_generators_row_for_row(
    cohort: Path, facts: dict, task: str, paper: bool
) -> None:
    source = mimic.open_mimic(cohort / "mimic-iii", task, paper=paper)
    notes = list(source)
    known = facts[task]
    assert source.admission_ids().tolist() == known["hadm_id"]
    labels = known["labels_paper" if paper else "labels"]
    assert [as_facts(note.label) for note in notes] == labels
    assert source.counts == known["counts"]
    # Or the comparison would show little.
    assert len({str(label) for label in labels}) == {"pmv": 2, "mor": 2, "los": 4}.get(
        task, len({str(label) for label in labels})
    )
    if not paper:
        for reason in outcomes.REASONS[task]:
            rare = (outcomes.UNDER_18, outcomes.BACKWARDS, outcomes.NO_DIAGNOSIS)
            assert source.counts[reason] > 0 or reason in rare


def test_the_paper_loses_leading_zeros_and_lists_every_code(cohort: Path) -> None:
    correct = mimic.open_mimic(cohort / "mimic-iii", "proc")
    paper = mimic.open_mimic(cohort / "mimic-iii", "proc", paper=True)
    assert correct.fingerprint() != paper.fingerprint()
    kept = {label for note in correct for label in note.label or ()}
    lost = {label for note in paper for label in note.label or ()}
    assert "033" in kept and "331" not in kept
    assert "331" in lost and "033" not in lost
    assert correct.label_list == ()
    # A newborn's code stands for a class although no note has it.
    assert "995" in paper.label_list and "995" not in lost and lost < set(paper.label_list)


@pytest.mark.parametrize("task", outcomes.TASKS)
def test_mimic4_gives_the_same_labels_under_its_own_names(
    mimic4: Path, facts: dict, task: str
) -> None:
    source = mimic.open_mimic(mimic4, task)
    labels = [as_facts(note.label) for note in source]
    known = facts[task]["labels"]
    if task in outcomes.MULTILABEL_TASKS:
        known = [[f"9:{label}" for label in row] for row in known]
    assert labels == known and source.counts == facts[task]["counts"]
    assert source.description.startswith("MIMIC-IV ")


def test_several_labels_a_note_pass_through_the_cache(cohort: Path, tmp_path: Path) -> None:
    source = mimic.open_mimic(cohort / "mimic-iii", "diag", paper=True)
    notes = list(source)
    cache = tokenise(source, CharacterTokenizer(), cache_folder=tmp_path, workers=1)
    assert cache.multilabel and cache.cohort_counts == source.counts
    assert set(cache.label_names) == set(source.label_list)
    rows = split_notes(cache).test
    matrix = cache.label_matrix(rows)
    assert matrix.dtype == "float32" and matrix.shape == (len(rows), len(cache.label_names))
    for row, found in zip(rows, matrix, strict=True):
        names = {name for name, has in zip(cache.label_names, found, strict=True) if has}
        assert names == set(notes[row].label or ())
    assert cache.label_matrix(rows, ["401", "nowhere"]).sum(0)[1] == 0
    assert cache.label_counts(rows).tolist() == matrix.sum(0).astype(int).tolist()
    with pytest.raises(ValueError, match="several labels here, and one where"):
        cache.label_codes(rows)


# --------------------------------------------------------------------------------------- the rules

PLAIN = {
    "ADMISSIONS": {
        "ROW_ID": "1", "SUBJECT_ID": "7", "HADM_ID": "100", "ADMITTIME": "2150-01-01 00:00:00",
        "DISCHTIME": "2150-01-05 00:00:00", "ADMISSION_TYPE": "EMERGENCY",
        "HOSPITAL_EXPIRE_FLAG": "0",
    },
    "NOTEEVENTS": {
        "HADM_ID": "100", "CHARTDATE": "2150-01-05", "CATEGORY": "Discharge summary",
        "DESCRIPTION": "Report",
    },
    "PATIENTS": {"SUBJECT_ID": "7", "DOB": "2090-01-01 00:00:00"},
    "ICUSTAYS": {"HADM_ID": "100", "ICUSTAY_ID": "9"},
    "DIAGNOSES_ICD": {"HADM_ID": "100", "ICD9_CODE": "4019"},
    "PROCEDURES_ICD": {"HADM_ID": "100", "ICD9_CODE": "0331"},
    "D_ICD_DIAGNOSES": {"ICD9_CODE": "4019", "LONG_TITLE": "Hypertension"},
    "CHARTEVENTS": {"ICUSTAY_ID": "9", "ITEMID": "220339", "VALUE": "5"},
    "PROCEDUREEVENTS_MV": {"ICUSTAY_ID": "9", "ITEMID": "227194"},
}  # fmt: skip


def write_mimic3(folder: Path, **tables: list[dict[str, str]]) -> Path:
    """A MIMIC-III folder of these rows, each laid over a plain one; a note for each admission."""
    folder.mkdir(exist_ok=True)
    admissions = tables.setdefault("ADMISSIONS", [{}])
    tables.setdefault("PATIENTS", [{}])
    ids = [row.get("HADM_ID", "100") for row in admissions]
    tables.setdefault(
        "NOTEEVENTS",
        [{"HADM_ID": i, "TEXT": f"Chief Complaint:\n{SECRET} {i}\n\nx\n"} for i in ids],
    )
    for name, columns in COLUMNS.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns.split(), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(PLAIN[name] | row for row in tables.get(name, []))
    return folder


def read(folder: Path, task: str, *, paper: bool = False) -> tuple[list[Note], dict[str, int]]:
    source = mimic.open_mimic(folder, task, paper=paper)
    notes = list(source)
    assert source.counts is not None
    return notes, {name: count for name, count in source.counts.items() if count}


@pytest.mark.parametrize(
    ("minutes", "label"),
    [
        (3 * 1440, "0"), (3 * 1440 + 72, "0"), (3 * 1440 + 73, "1"), (7 * 1440 + 71, "1"),
        (7 * 1440 + 216, "2"), (14 * 1440, "2"), (14 * 1440 + 72, "2"),
        (14 * 1440 + 73, "3"), (-600, "0"),
    ],
)  # fmt: skip
def test_days_of_stay_are_rounded_to_a_tenth(tmp_path: Path, minutes: int, label: str) -> None:
    left = datetime(2150, 1, 1) + timedelta(minutes=minutes)
    folder = write_mimic3(tmp_path, ADMISSIONS=[{"DISCHTIME": str(left)}])
    notes, _ = read(folder, "los", paper=True)
    assert [note.label for note in notes] == [label]
    if minutes < 0:
        assert read(folder, "los") == ([], {mimic.ADMISSIONS: 1, outcomes.BACKWARDS: 1})


def test_who_died_has_no_length_of_stay(tmp_path: Path) -> None:
    folder = write_mimic3(tmp_path, ADMISSIONS=[{"HOSPITAL_EXPIRE_FLAG": "1"}])
    assert read(folder, "los") == ([], {mimic.ADMISSIONS: 1, outcomes.DIED: 1})


def test_codes_are_grouped_by_their_first_characters(tmp_path: Path) -> None:
    codes = ["4019", "4011", "V1582", "E8859", "0389", "", " 25000 "]
    folder = write_mimic3(
        tmp_path,
        ADMISSIONS=[{}, {"HADM_ID": "101"}],
        DIAGNOSES_ICD=[{"ICD9_CODE": code} for code in codes],
        PROCEDURES_ICD=[{"HADM_ID": "101", "ICD9_CODE": code} for code in ("0331", "9671", "331")],
    )
    notes, counts = read(folder, "diag")
    assert notes[0].label == ("038", "250", "401", "E885", "V158")
    assert counts == {mimic.ADMISSIONS: 2, outcomes.NO_DIAGNOSIS: 1, mimic.KEPT: 1}
    assert read(folder, "proc")[0][0].label == ("033", "331", "967")
    assert read(folder, "proc", paper=True)[0][0].label == ("331", "967")


def test_both_versions_of_codes_are_kept_apart(mimic4: Path, tmp_path: Path) -> None:
    for path in mimic4.rglob("*.gz"):
        target = tmp_path / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(path)
    target = tmp_path / "hosp" / "procedures_icd.csv.gz"
    with gzip.open(target, "rt", newline="") as file:
        admission = next(csv.DictReader(file))["hadm_id"]
    target.unlink()
    rows = (f"{admission},0210093,10", f"{admission},0211,9", f"{admission},5A1955Z,10")
    (tmp_path / "hosp" / "procedures_icd.csv").write_text(
        "\n".join(("hadm_id,icd_code,icd_version", *rows)) + "\n"
    )
    notes, _ = read(tmp_path, "proc")
    assert [note.label for note in notes] == [("10:021", "10:5A1", "9:021")]


def hours(*values: float) -> list[dict[str, str]]:
    start = datetime(2150, 1, 1)
    return [{"CHARTTIME": str(start + timedelta(hours=value))} for value in values]


def every(step: float, start: float, end: float) -> Iterator[float]:
    while start < end:
        yield start
        start += step
    yield end


@pytest.mark.parametrize(
    ("charted", "expected"),
    [
        (hours(*every(6, 0, 162)), "1"),  # seven days less the quarter that is allowed
        (hours(*every(6, 0, 161.9)), "0"),
        (hours(*every(6, 0, 42)), "0"),
        (hours(*every(6, 0, 41.9)), outcomes.SHORTLY_VENTILATED),
        (hours(*every(6, 0, 30), 170, 171), "1"),  # the gap counts
        (hours(*every(6, 0, 60), 170), "0"),  # a moment alone does not
        (hours(5), outcomes.NOT_VENTILATED),
        ([], outcomes.NOT_VENTILATED),
    ],
)
def test_prolonged_is_a_span_of_seven_days(
    tmp_path: Path, charted: list[dict[str, str]], expected: str
) -> None:
    notes, counts = read(write_mimic3(tmp_path, ICUSTAYS=[{}], CHARTEVENTS=charted), "pmv")
    if expected in "01":
        assert [note.label for note in notes] == [expected]
    else:
        assert counts == {mimic.ADMISSIONS: 1, expected: 1}


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"PATIENTS": [{"DOB": "2132-02-01 00:00:00"}]}, outcomes.UNDER_18),
        ({"PATIENTS": [{"DOB": "1850-01-01 00:00:00"}]}, mimic.KEPT),  # an age of over 89, shifted
        ({"ICUSTAYS": []}, outcomes.WITHOUT_STAY),
        ({"DIAGNOSES_ICD": [{"ICD9_CODE": "1429"}]}, outcomes.EXCLUDED_DIAGNOSIS),
        ({"DIAGNOSES_ICD": [{"ICD9_CODE": "94831"}]}, outcomes.EXCLUDED_DIAGNOSIS),
        ({"DIAGNOSES_ICD": [{"ICD9_CODE": "94821"}]}, mimic.KEPT),
        ({"DIAGNOSES_ICD": [{"ICD9_CODE": "V594"}],
          "D_ICD_DIAGNOSES": [{"ICD9_CODE": "V594", "LONG_TITLE": "Kidney Donors"}]},
         outcomes.EXCLUDED_DIAGNOSIS),
        ({"DIAGNOSES_ICD": []}, mimic.KEPT),  # a patient without codes
        ({"CHARTEVENTS": [row | {"ERROR": "1"} for row in hours(*every(6, 0, 200))]},
         outcomes.NOT_VENTILATED),
        ({"CHARTEVENTS": [row | {"VALUE": ""} for row in hours(*every(6, 0, 200))]},
         outcomes.NOT_VENTILATED),
        ({"CHARTEVENTS": [row | {"ICUSTAY_ID": ""} for row in hours(*every(6, 0, 200))]},
         outcomes.NOT_VENTILATED),
    ],
)  # fmt: skip
def test_who_is_no_part_of_pmv(
    tmp_path: Path, tables: dict[str, list[dict[str, str]]], reason: str
) -> None:
    whole = {"ICUSTAYS": [{}], "CHARTEVENTS": hours(*every(6, 0, 200))}
    _, counts = read(write_mimic3(tmp_path, **whole | tables), "pmv")
    assert counts == {mimic.ADMISSIONS: 1, reason: 1}


def spans_by_rule(
    moments: list[tuple[datetime, bool, bool, bool]],
) -> tuple[datetime, datetime] | None:
    """The span of one stay, moment by moment: (time, ventilator, oxygen, extubated), in order."""
    number, last_setting, after_extubation = 0, None, False
    events: dict[int, list[tuple[datetime, bool]]] = {}
    for at in sorted({moment[0] for moment in moments}):
        together = sorted((m for m in moments if m[0] == at), key=lambda m: m[3])
        for _, ventilator, oxygen, extubated in together:
            begins = False
            if ventilator or extubated:
                begins, after_extubation = after_extubation, extubated
            if oxygen and not ventilator:
                begins = True
            if ventilator:
                begins |= last_setting is not None and at - last_setting > timedelta(hours=8)
                last_setting = at
            number += begins
        for _, ventilator, _, extubated in together:
            if ventilator or extubated:
                events.setdefault(number, []).append((at, ventilator))
    kept = [
        (event[0][0], event[-1][0])
        for event in events.values()
        if any(ventilator for _, ventilator in event) and event[0][0] < event[-1][0]
    ]
    return (min(start for start, _ in kept), max(end for _, end in kept)) if kept else None


def test_spans_equal_the_rules_taken_moment_by_moment(tmp_path: Path) -> None:
    rng = random.Random(0)
    charts, extubations, expected = [], [], {}
    for stay in range(1, 400):
        moments: dict[datetime, list[bool]] = {}
        own: list[tuple[datetime, bool, bool, bool]] = []
        at = datetime(2150, 1, 1)
        for _ in range(rng.randrange(1, 12)):
            at += timedelta(minutes=rng.choice((0, 30, 240, 479, 480, 481, 900)))
            row = {"ICUSTAY_ID": str(stay), "CHARTTIME": str(at)}
            kind = rng.choice(("vent", "vent", "vent", "oxygen", "old", "out", "other"))
            known = moments.setdefault(at, [False] * 3)
            if kind == "vent":
                charts.append(row | {"ITEMID": str(rng.choice(ventilation.SETTINGS))})
                known[0] = True
            elif kind == "oxygen":
                charts.append(row | {"ITEMID": "226732", "VALUE": "Trach mask "})
                known[1] = True
            elif kind == "old":
                charts.append(row | {"ITEMID": "640", "VALUE": "Self Extubation"})
                known[2] = True
            elif kind == "other":
                charts.append(row | {"ITEMID": "468", "VALUE": "Ventilator"})
                charts.append(row | {"ITEMID": "720", "VALUE": "Other/Remarks"})
            else:
                extubations.append({"ICUSTAY_ID": str(stay), "STARTTIME": str(at)})
                own.append((at, False, False, True))
        moments = {at: known for at, known in moments.items() if any(known)}
        every_moment = {*own, *((at, *known) for at, known in moments.items())}
        expected[stay] = spans_by_rule(list(every_moment))
    folder = write_mimic3(tmp_path, CHARTEVENTS=charts, PROCEDUREEVENTS_MV=extubations)
    layout = outcomes.MIMIC3.tables
    with connect() as connection:
        ventilation.load_spans(
            connection,
            find_table(folder, "CHARTEVENTS"),
            layout["charts"][1],
            find_table(folder, "PROCEDUREEVENTS_MV"),
            layout["procedure_events"][1],
        )
        rows = connection.execute("SELECT * FROM spans ORDER BY stay_id").fetchall()
    known = {stay: span for stay, span in expected.items() if span}
    assert {stay: (start, end) for stay, start, end in rows} == known
    assert 100 < len(known) < 399


# --------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("task", "tables", "message"),
    [
        ("proc", {"PROCEDURES_ICD": [{"ICD9_CODE": "66"}]}, "read as numbers"),
        ("diag", {"DIAGNOSES_ICD": [{"ICD9_CODE": "410.0"}]}, "dtype=str"),
        ("diag", {"DIAGNOSES_ICD": [{"ICD9_CODE": "4010"}] * 600}, "none of 600 codes begins"),
        ("diag", {"DIAGNOSES_ICD": [{"HADM_ID": "1.0"}]}, "not a whole number"),
        ("los", {"ADMISSIONS": [{"ADMITTIME": "50-01-01 00:00:00"}]}, "four digits"),
        ("los", {"ADMISSIONS": [{"DISCHTIME": "2150-13-01 00:00:00"}]}, "DISCHTIME is not a date"),
        ("pmv", {"PATIENTS": [{"DOB": "90-01-01"}]}, "four digits"),
        ("pmv", {"PATIENTS": [{}, {}]}, "more than one row"),
        ("pmv", {"PATIENTS": [{"SUBJECT_ID": "8"}]}, "patient is missing"),
        ("pmv", {"CHARTEVENTS": [{"CHARTTIME": "01/02/50"}]}, "four digits"),
        ("pmv", {"CHARTEVENTS": [{"ITEMID": SECRET}]}, "an item is not a whole number"),
    ],
)
def test_impossible_rows_are_refused_without_repeating_them(
    tmp_path: Path, task: str, tables: dict[str, list[dict[str, str]]], message: str
) -> None:
    folder = write_mimic3(tmp_path, **tables)
    with pytest.raises(ValueError, match=message) as caught:
        read(folder, task)
    assert SECRET not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("task", ["pmv", "diag", "proc"])
def test_crlf_and_lower_case_give_the_same_labels(
    cohort: Path, facts: dict, tmp_path: Path, task: str
) -> None:
    for path in (cohort / "mimic-iii").iterdir():
        header, _, rest = gzip.decompress(path.read_bytes()).partition(b"\n")
        changed = (header.lower() + b"\n" + rest).replace(b"\n", b"\r\n")
        (tmp_path / path.name.lower().removesuffix(".gz")).write_bytes(changed)
    notes = list(mimic.open_mimic(tmp_path, task))
    assert [as_facts(note.label) for note in notes] == facts[task]["labels"]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in the middle": lambda packed: packed[: len(packed) // 2],
    "cut at the end": lambda packed: packed[:-4],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_gzip_cut_short_leaves_nothing_half_written(
    cohort: Path, tmp_path: Path, damage: str
) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    for path in (cohort / "mimic-iii").iterdir():
        (tables / path.name).write_bytes(path.read_bytes())
    path = tables / "CHARTEVENTS.csv.gz"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    source = mimic.open_mimic(tables, "pmv")
    with pytest.raises(ValueError, match=r"CHARTEVENTS\.csv\.gz is cut short or damaged"):
        tokenise(source, CharacterTokenizer(), cache_folder=tmp_path / "cache", workers=1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_mimic4_must_have_its_columns(mimic4: Path, tmp_path: Path) -> None:
    for path in mimic4.rglob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "diagnoses_icd.csv.gz").unlink()
    (tmp_path / "diagnoses_icd.csv").write_text(f"hadm_id,{SECRET}\n1,2\n")
    with pytest.raises(ValueError, match="icd_code, icd_version is not there once") as caught:
        mimic.open_mimic(tmp_path, "diag")
    assert SECRET not in str(caught.value)


def test_the_columns_of_real_mimic4_tables_are_known(real_data: Path) -> None:
    folder = real_data / "mimic-iv-synthetic"
    for name in ("admissions", "patients", "icustays", "diagnoses_icd", "procedures_icd"):
        table = find_table(folder, name)
        with connect() as connection, table.reading(connection):
            assert connection.execute(f"SELECT count(*) FROM {table.csv()}").fetchone()[0] > 0
