"""The leak check: planted notes are found by patient and by text, and left out of a run's split."""

import csv
import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from data import leaks, mimic, synthetic
from data.cache import tokenise
from data.notes import open_notes
from data.splits import read_exclusions, split_notes, write_exclusions
from tests.data.conftest import CharacterTokenizer

pytest.importorskip("duckdb", reason="the optional library duckdb is absent")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make_cohort(tmp_path_factory.mktemp("cohort"), patients=400, seed=5)


def discharge_summaries(cohort: Path) -> list[dict[str, str]]:
    with gzip.open(cohort / "mimic-iii" / "NOTEEVENTS.csv.gz", "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["CATEGORY"] == "Discharge summary"]
    return [
        row for row in rows if row["HADM_ID"] and row["TEXT"] and row["DESCRIPTION"] == "Report"
    ]


def write_corpus(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "patient"))
        writer.writerows(rows)
    return path


def test_a_planted_leak_is_found_and_removed(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = mimic.open_mimic(cohort / "mimic-iii")
    cache = tokenise(source, CharacterTokenizer(), cache_folder=tmp_path / "a", workers=1)
    tested = source.admission_ids()[split_notes(cache).test].tolist()
    words = [f"word{i}" for i in range(40)]
    rng = random.Random(1)
    clean = [(" ".join(rng.choices(words, k=200)), f"c{i}") for i in range(30)]
    # The whole summary, as the other release masks it, and of another patient's number.
    summaries = {row["HADM_ID"]: row for row in discharge_summaries(cohort)}
    known = [summaries[str(hadm_id)] for hadm_id in tested if str(hadm_id) in summaries][:5]
    planted = [(leaks._MASK.sub("___", row["TEXT"]), f"p{i}") for i, row in enumerate(known)]
    own_patient = (clean[0][0] + " more", known[0]["SUBJECT_ID"])
    corpus = write_corpus(tmp_path / "corpus.csv", [*clean, *planted, own_patient])

    found = tmp_path / "exclude.txt"
    arguments = ["--corpus", str(corpus), "--patient-column", "patient", "--write", str(found)]
    assert leaks.main([*arguments, "--data", str(cohort / "mimic-iii")]) == 0
    shown = capsys.readouterr().out
    assert "by patient: 1 of the corpus's notes" in shown
    assert "by text: 5 of the corpus's notes share text with" in shown
    assert not any(row["SUBJECT_ID"] in found.read_text() for row in known)

    notes = open_notes(corpus, patient_column="patient")
    cache = tokenise(notes, CharacterTokenizer(), cache_folder=tmp_path / "b", workers=1)
    splits = split_notes(cache, exclude=found)
    used = np.concatenate((splits.train, splits.validation, splits.test))
    assert splits.excluded == 6 and set(used.tolist()) == set(range(30))
    everything = split_notes(cache)
    assert everything.excluded == 0


def test_other_patients_of_the_same_hospital_are_no_leak(cohort: Path, tmp_path: Path) -> None:
    source = mimic.open_mimic(cohort / "mimic-iii")
    found = leaks.find_leaks(open_notes(cohort / "mimic-iv-note"), source)
    assert found.same_patient == 0
    assert found.same_text == 0 and found.corpus_notes > 200


def test_shingles_skip_masks_and_case() -> None:
    ours = "Pt [**Name 1**] was seen in the clinic with chest pain and fever on [**2-1**] today"
    theirs = "pt ___ was seen in the CLINIC with chest pain, and fever on ___ today"
    assert np.array_equal(leaks.shingles(ours), leaks.shingles(theirs))
    assert len(leaks.shingles(ours)) == 13 - 6 + 1
    assert not len(np.intersect1d(leaks.shingles(ours), leaks.shingles(ours[::-1])))
    assert len(leaks.shingles("too short")) == 0


def test_a_list_of_exclusions_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    write_exclusions(path, [bytes(range(16)), bytes(range(1, 17))])
    assert read_exclusions(path).tolist() == [bytes(range(16)), bytes(range(1, 17))]
    for content in ("", "md5 of the text\nabc\n", "00" * 16 + "\n", "md5 of the text\n" + "x" * 32):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a list of notes to leave out"):
            read_exclusions(path)
