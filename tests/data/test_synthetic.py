"""The synthetic cohort: the same bytes, MIMIC's layouts, words that carry the known risk."""

import csv
import gzip
import hashlib
import itertools
import json
import random
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from data import conditions, synthetic, synthetic_patients, synthetic_text
from data.general_text import write_general_text
from data.synthetic_patients import expected_auroc

# Written out here, not taken from the generator: the tables' columns as the two releases have them.
COLUMNS = {
    "mimic-iii/NOTEEVENTS": '"ROW_ID","SUBJECT_ID","HADM_ID","CHARTDATE","CHARTTIME","STORETIME",'
    '"CATEGORY","DESCRIPTION","CGID","ISERROR","TEXT"',
    "mimic-iii/ADMISSIONS": '"ROW_ID","SUBJECT_ID","HADM_ID","ADMITTIME","DISCHTIME","DEATHTIME",'
    '"ADMISSION_TYPE","ADMISSION_LOCATION","DISCHARGE_LOCATION","INSURANCE","LANGUAGE","RELIGION",'
    '"MARITAL_STATUS","ETHNICITY","EDREGTIME","EDOUTTIME","DIAGNOSIS","HOSPITAL_EXPIRE_FLAG",'
    '"HAS_CHARTEVENTS_DATA"',
    "mimic-iii/PATIENTS": '"ROW_ID","SUBJECT_ID","GENDER","DOB","DOD","DOD_HOSP","DOD_SSN",'
    '"EXPIRE_FLAG"',
    "mimic-iii/ICUSTAYS": '"ROW_ID","SUBJECT_ID","HADM_ID","ICUSTAY_ID","DBSOURCE",'
    '"FIRST_CAREUNIT","LAST_CAREUNIT","FIRST_WARDID","LAST_WARDID","INTIME","OUTTIME","LOS"',
    "mimic-iii/DIAGNOSES_ICD": '"ROW_ID","SUBJECT_ID","HADM_ID","SEQ_NUM","ICD9_CODE"',
    "mimic-iii/PROCEDURES_ICD": '"ROW_ID","SUBJECT_ID","HADM_ID","SEQ_NUM","ICD9_CODE"',
    "mimic-iii/D_ICD_DIAGNOSES": '"ROW_ID","ICD9_CODE","SHORT_TITLE","LONG_TITLE"',
    "mimic-iii/CHARTEVENTS": '"ROW_ID","SUBJECT_ID","HADM_ID","ICUSTAY_ID","ITEMID","CHARTTIME",'
    '"STORETIME","CGID","VALUE","VALUENUM","VALUEUOM","WARNING","ERROR","RESULTSTATUS","STOPPED"',
    "mimic-iii/PROCEDUREEVENTS_MV": '"ROW_ID","SUBJECT_ID","HADM_ID","ICUSTAY_ID","STARTTIME",'
    '"ENDTIME","ITEMID","VALUE","VALUEUOM","LOCATION","LOCATIONCATEGORY","STORETIME","CGID",'
    '"ORDERID","LINKORDERID","ORDERCATEGORYNAME","SECONDARYORDERCATEGORYNAME",'
    '"ORDERCATEGORYDESCRIPTION","ISOPENBAG","CONTINUEINNEXTDEPT","CANCELREASON",'
    '"STATUSDESCRIPTION","COMMENTS_EDITEDBY","COMMENTS_CANCELEDBY","COMMENTS_DATE"',
    "mimic-iv-note/note/discharge": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,"
    "storetime,text",
    "mimic-iv-note/note/radiology": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,"
    "storetime,text",
    "mimic-iv-note/note/discharge_detail": "note_id,subject_id,field_name,field_value,"
    "field_ordinal",
    "mimic-iv-note/note/radiology_detail": "note_id,subject_id,field_name,field_value,"
    "field_ordinal",
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make_cohort(tmp_path_factory.mktemp("cohort"), patients=300, seed=7)


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with gzip.open(folder / f"{table}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def drawn(patients: int) -> list[synthetic_patients.Patient]:
    ids = itertools.count(1)
    return [
        synthetic_patients.draw_patient(random.Random(f"test {i}"), i, ids) for i in range(patients)
    ]


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first = digests(synthetic.make_cohort(tmp_path / "a", patients=20, seed=1))
    assert first == digests(synthetic.make_cohort(tmp_path / "b", patients=20, seed=1))
    other = digests(synthetic.make_cohort(tmp_path / "c", patients=20, seed=2))
    assert first.keys() == other.keys() == {f"{name}.csv.gz" for name in COLUMNS} | {"cohort.json"}
    del first["mimic-iii/D_ICD_DIAGNOSES.csv.gz"]  # a dictionary, the same in every cohort
    assert not set(first.values()) & set(other.values())
    for path in (tmp_path / "a").rglob("*.gz"):
        assert path.read_bytes()[3:8] == bytes(5)  # no name and no time in the header


def test_a_finished_cohort_is_left_alone_and_anything_else_refused(tmp_path: Path) -> None:
    folder = synthetic.make_cohort(tmp_path / "cohort", patients=5, seed=1)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert synthetic.make_cohort(folder, patients=5, seed=1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ValueError, match="another synthetic cohort"):
        synthetic.make_cohort(folder, patients=5, seed=2)
    (folder / "cohort.json").unlink()  # as an interrupted run leaves it: made again
    synthetic.make_cohort(folder, patients=5, seed=1)
    assert (folder / "cohort.json").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        synthetic.make_cohort(tmp_path / "thesis", patients=5, seed=1)
    with pytest.raises(ValueError, match="at least 1"):
        synthetic.make_cohort(tmp_path / "none", patients=0)


@pytest.mark.parametrize("table", COLUMNS)
def test_tables_have_the_columns_of_the_releases(cohort: Path, table: str) -> None:
    with gzip.open(cohort / f"{table}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        assert file.readline() == COLUMNS[table] + "\n"
    assert rows(cohort, table)


def test_mimic3_tables_hold_the_quirks_of_the_release(cohort: Path) -> None:
    notes = rows(cohort, "mimic-iii/NOTEEVENTS")
    assert {"Physician ", "Respiratory ", "Nursing", "Discharge summary"} <= {
        note["CATEGORY"] for note in notes
    }
    assert {"Report", "Addendum"} <= {note["DESCRIPTION"] for note in notes}
    assert any(note["HADM_ID"] == "" for note in notes)
    assert any(note["TEXT"] == "" for note in notes)
    assert any('"' in note["TEXT"] for note in notes)
    summaries = [note["TEXT"] for note in notes if note["CATEGORY"] == "Discharge summary"]
    assert any("[**" in text and "\n\nHistory of Present Illness:\n" in text for text in summaries)

    diagnoses = {row["ICD9_CODE"] for row in rows(cohort, "mimic-iii/DIAGNOSES_ICD")}
    procedures = {row["ICD9_CODE"] for row in rows(cohort, "mimic-iii/PROCEDURES_ICD")}
    assert {"0389", "E8859", "V1582"} <= diagnoses
    assert {"0331", "9671", "9672"} <= procedures

    admissions = rows(cohort, "mimic-iii/ADMISSIONS")
    assert any(row["ADMISSION_TYPE"] == "NEWBORN" for row in admissions)
    assert len({row["HADM_ID"] for row in admissions}) == len(admissions)
    first_seen: dict[str, datetime] = {}
    for row in admissions:
        start = datetime.fromisoformat(row["ADMITTIME"])
        assert 2100 <= start.year < 2200
        assert start < datetime.fromisoformat(row["DISCHTIME"])
        assert (row["DEATHTIME"] != "") == (row["HOSPITAL_EXPIRE_FLAG"] == "1")
        first_seen[row["SUBJECT_ID"]] = min(start, first_seen.get(row["SUBJECT_ID"], start))
    ages = []
    for row in rows(cohort, "mimic-iii/PATIENTS"):
        days = first_seen[row["SUBJECT_ID"]] - datetime.fromisoformat(row["DOB"])
        ages.append(days.days / 365.25)
    assert all(age < 90.5 or 299 < age < 301 for age in ages)
    assert any(age > 299 for age in ages)


def test_mimic4_notes_are_masked_by_underscores(cohort: Path) -> None:
    discharge = rows(cohort, "mimic-iv-note/note/discharge")
    radiology = rows(cohort, "mimic-iv-note/note/radiology")
    for note in discharge + radiology:
        assert "___" in note["text"] and "[**" not in note["text"]
        kind = f"{note['note_type']}-{note['note_seq']}"
        assert note["note_id"] == f"{note['subject_id']}-{kind}"
    assert {note["note_type"] for note in discharge} == {"DS"}
    assert {note["note_type"] for note in radiology} == {"RR"}
    details = {row["note_id"] for row in rows(cohort, "mimic-iv-note/note/radiology_detail")}
    assert details == {note["note_id"] for note in radiology}
    mimic3 = {row["SUBJECT_ID"] for row in rows(cohort, "mimic-iii/PATIENTS")}
    assert not mimic3 & {note["subject_id"] for note in discharge + radiology}


def test_the_recorded_outcomes_are_those_of_the_tables(cohort: Path) -> None:
    facts = json.loads((cohort / "cohort.json").read_text())
    flags = {
        int(row["HADM_ID"]): int(row["HOSPITAL_EXPIRE_FLAG"])
        for row in rows(cohort, "mimic-iii/ADMISSIONS")
    }
    law = facts["mor"]
    assert [flags[hadm_id] for hadm_id in law["hadm_id"]] == law["died"]
    assert facts["admissions"]["admissions"] == len(flags)
    assert facts["admissions"]["admission notes"] == len(law["died"]) == len(law["risk"])
    assert sum(facts["admissions"].values()) == 2 * len(flags)


def test_the_best_auroc_and_the_death_rate_are_as_documented() -> None:
    admissions = [a for patient in drawn(4000) for a in patient.admissions]
    risk = np.array([a.risk for a in admissions])
    assert 0.85 < expected_auroc(risk) < 0.88
    assert 0.19 < np.mean([a.died for a in admissions]) < 0.26
    # Calibrated: the law of the draw is the recorded risk.
    error = (np.array([a.died for a in admissions]) - risk) / np.sqrt(risk * (1 - risk))
    assert abs(error.sum() / np.sqrt(len(error))) < 4


def test_expected_auroc_is_the_mean_over_all_outcomes() -> None:
    risk = np.array([0.1, 0.4, 0.4, 0.9, 0.7])
    positive = negative = 0.0
    for i, j in itertools.permutations(range(len(risk)), 2):
        weight = risk[i] * (1 - risk[j])
        positive += weight * ((risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]))
        negative += weight
    assert expected_auroc(risk) == pytest.approx(positive / negative, abs=1e-12)
    assert expected_auroc(np.full(9, 0.3)) == pytest.approx(0.5, abs=1e-12)
    assert expected_auroc(np.array([0.0, 0.0, 1.0])) == pytest.approx(1.0, abs=1e-12)


def decoded_risk(sections: dict[str, str]) -> float:
    """The risk of death read from the words alone, by a reader who knows the phrases."""
    present = " ".join(sections["History of Present Illness"].split())
    (acute,) = [a for a in conditions.ACUTE if any(story in present for story in a.story)]
    (severity,) = [
        i for i, s in enumerate(conditions.SEVERITIES) if any(p in present for p in s.phrase)
    ]
    complications = [
        c for c in conditions.COMPLICATIONS if any(phrase in present for phrase in c.phrase)
    ]
    past = re.split(r"\n(?:\d+\. |- )|, (?!metastatic to)", "\n" + sections["Past Medical History"])
    items = {re.sub(r"^\s*(?:\d+\. |- )?", "", item).strip() for item in past}
    chronic = [c for c in conditions.CHRONIC if items & set(c.phrase)]
    age = re.match(r"(\d+|\[\*\*Age over 90 \*\*\]) ", present)
    assert age
    years = int(age[1]) if age[1].isdigit() else 91
    return synthetic_patients.death_risk(years, acute, severity, complications, chronic)


def test_the_words_of_a_note_tell_the_risk_and_never_the_outcome() -> None:
    told = re.compile(r"expired|passed away|deceased|\bCMO\b|(?<!Mother )(?<!Father )died", re.I)
    for patient in drawn(400):
        rng = random.Random(f"words {patient.subject_id}")
        for admission in patient.admissions:
            marks = synthetic_text.BracketMarks(rng)
            sections = synthetic_text.admission_sections(rng, marks, patient, admission)
            assert decoded_risk(sections) == pytest.approx(admission.risk, abs=1e-6)
            assert not told.search("\n".join(sections.values()))
            summary = synthetic_text.discharge_summary(rng, marks, patient, admission, sections)
            assert bool(told.search(summary)) == admission.died


def test_phrases_of_different_risk_never_contain_each_other() -> None:
    for group in (conditions.ACUTE, conditions.SEVERITIES, conditions.COMPLICATIONS):
        for one, other in itertools.permutations(group, 2):
            words = one.story if isinstance(one, conditions.Acute) else one.phrase
            theirs = other.story if isinstance(other, conditions.Acute) else other.phrase
            assert not any(a in b for a in words for b in theirs)


def test_a_stay_ends_with_death_only_once_and_last() -> None:
    for patient in drawn(500):
        assert not any(admission.died for admission in patient.admissions[:-1])
        for before, after in itertools.pairwise(patient.admissions):
            assert before.discharged < after.admitted
            assert before.age <= after.age
            assert before.chronic == after.chronic


def test_command_prints_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "cohort")
    assert synthetic.main(["--out", out, "--patients", "30", "--seed", "3"]) == 0
    assert "best reachable AUROC 0." in capsys.readouterr().out
    assert synthetic.main(["--out", out, "--patients", "31", "--seed", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_general_text_is_the_same_every_time_and_is_no_note(tmp_path: Path) -> None:
    first = write_general_text(tmp_path / "a", documents=40, seed=5)
    assert digests(first) == digests(write_general_text(tmp_path / "b", documents=40, seed=5))
    texts = [path.read_text(encoding="utf-8") for path in sorted(first.iterdir())]
    assert len(texts) == len(set(texts)) == 40
    assert not any(mark in text for text in texts for mark in ("___", "[**", "{", "}"))
    with pytest.raises(ValueError, match="not empty"):
        write_general_text(first)
