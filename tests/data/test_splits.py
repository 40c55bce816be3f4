"""Splits: the exact rule, patients on one side, duplicates left out, lists, refusals."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cache import digest
from data.notes import Note
from data.splits import TEST, TRAIN, VALIDATION, bucket_use, buckets, patient_groups, split_notes


def bucket(text: str) -> int:
    return int(hashlib.md5(text.encode()).hexdigest(), 16) % 10


@given(st.lists(st.text(max_size=20), max_size=50))
def test_a_bucket_is_the_whole_digest_modulo_10(texts: list[str]) -> None:
    digests = np.array([digest(text) for text in texts], "S16")
    assert buckets(digests).tolist() == [bucket(text) for text in texts]


def test_without_patients_the_text_decides(make_cache) -> None:
    texts = [f"note {i % 80}" for i in range(100)]
    splits = split_notes(make_cache([Note(text) for text in texts]))
    expected = [{0: TEST, 1: VALIDATION}.get(bucket(text), TRAIN) for text in texts]
    for part, rows in ((TRAIN, splits.train), (VALIDATION, splits.validation), (TEST, splits.test)):
        assert rows.tolist() == [row for row, use in enumerate(expected) if use == part]
        assert rows.dtype == np.uint32
    assert (splits.validation_duplicates, splits.test_duplicates, splits.unlisted) == (0, 0, 0)


def test_no_patient_and_no_training_text_is_on_two_sides(make_cache) -> None:
    random = np.random.default_rng(0)
    notes = [
        Note(f"text {random.integers(150)}", str(10_000 + random.integers(60))) for _ in range(600)
    ]
    splits = split_notes(make_cache(notes))
    parts = (splits.train, splits.validation, splits.test)
    assert all(len(part) for part in parts)
    patients = [{notes[row].patient for row in part} for part in parts]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    assert not patients[1] & patients[2]
    use = [{0: TEST, 1: VALIDATION}.get(bucket(note.patient), TRAIN) for note in notes]
    assert splits.train.tolist() == [row for row, part in enumerate(use) if part == TRAIN]
    training_texts = {notes[row].text for row in splits.train}
    dropped = {VALIDATION: 0, TEST: 0}
    for part, rows in ((VALIDATION, splits.validation), (TEST, splits.test)):
        held_out = [row for row, owner in enumerate(use) if owner == part]
        kept = [row for row in held_out if notes[row].text not in training_texts]
        dropped[part] = len(held_out) - len(kept)
        assert rows.tolist() == kept
    assert splits.validation_duplicates == dropped[VALIDATION] > 0
    assert splits.test_duplicates == dropped[TEST] > 0


def test_share_of_the_test_set(make_cache) -> None:
    cache = make_cache([Note(f"note {i}") for i in range(300)])
    splits = split_notes(cache, test_share=0.3)
    assert splits.test.tolist() == [i for i in range(300) if bucket(f"note {i}") in (0, 9, 8)]
    assert splits.validation.tolist() == [i for i in range(300) if bucket(f"note {i}") == 1]
    assert (bucket_use(0.8) == TRAIN).nonzero()[0].tolist() == [2]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.9, 1.0, -0.1, float("nan")])
def test_shares_that_no_bucket_makes_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"allowed: 0.1 to 0.8"):
        bucket_use(share)


def write_lists(folder: Path, **lists: str) -> Path:
    for name, content in lists.items():
        (folder / f"{name}.csv").write_text(content, encoding="utf-8")
    return folder


def test_lists_of_patients_decide_before_the_digest(make_cache, tmp_path: Path) -> None:
    patients = ["007", "7", "8", "8", "9", "10"]
    cache = make_cache([Note(f"note {i}", patient) for i, patient in enumerate(patients)])
    lists = write_lists(
        tmp_path,
        train="\ufeffSUBJECT_ID\r\n7\r\n99\r\n7\r\n",
        val="SUBJECT_ID\n8\n",
        test='"SUBJECT_ID"\n"9"\n"007"\n',
    )
    splits = split_notes(cache, lists=lists)
    assert splits.train.tolist() == [1]
    assert splits.validation.tolist() == [2, 3]
    assert splits.test.tolist() == [0, 4]
    assert splits.unlisted == 1


GOOD = {"train": "id\n1\n", "validation": "id\n2\n", "test": "id\n3\n"}
BAD_LISTS = {
    "a list is missing": ({"test": None}, "none of test.csv, mimic_test.csv is there"),
    "two names of a list": ({"val": "id\n4\n"}, "more than one of validation.csv, val.csv"),
    "an empty file": ({"test": ""}, "an empty file"),
    "two columns": ({"test": "id,x\n3,4\n"}, "rows with more columns"),
    "no header": ({"test": "70031\n3\n"}, "not a header"),
    "no header over words": ({"test": "P-70031\n3\n"}, "not a header"),
    "an open quote": ({"test": 'id\n"3\n'}, "not CSV in UTF-8"),
    "a patient in two lists": ({"test": "id\n1\n3\n"}, "1 patient is both in train.csv and"),
    "held-out lists overlap": ({"test": "id\n2\n3\n"}, "1 patient is both in validation.csv and"),
    "other identifiers": (
        {"train": "id\na\n", "validation": "id\nb\n", "test": "id\nc\n"},
        "none of",
    ),
}


@pytest.mark.parametrize(("change", "says"), BAD_LISTS.values(), ids=list(BAD_LISTS))
def test_bad_lists_are_refused(make_cache, tmp_path: Path, change: dict, says: str) -> None:
    lists = {name: content for name, content in (GOOD | change).items() if content is not None}
    folder = tmp_path / "lists"
    folder.mkdir()
    cache = make_cache([Note("note", "1"), Note("other", "2"), Note("third", "P-70031")])
    with pytest.raises(ValueError, match=says) as caught:
        split_notes(cache, lists=write_lists(folder, **lists))
    assert "70031" not in str(caught.value)


def test_cores_own_lists_are_read_as_they_are_published(make_cache, tmp_path: Path) -> None:
    """One SUBJECT_ID for each admission, so that a patient stands there several times."""
    cache = make_cache([Note(str(i), patient) for i, patient in enumerate("77899")])
    lists = write_lists(
        tmp_path,
        mimic_train="SUBJECT_ID\n7\n7\n",
        mimic_val="SUBJECT_ID\n8\n",
        mimic_test="SUBJECT_ID\n9\n9\n9\n",
    )
    splits = split_notes(cache, lists=lists)
    assert splits.train.tolist() == [0, 1]
    assert splits.validation.tolist() == [2]
    assert splits.test.tolist() == [3, 4]


def test_lists_need_patients(make_cache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="these notes have none"):
        split_notes(make_cache([Note("note")]), lists=write_lists(tmp_path, **GOOD))


def test_groups_are_patients_or_texts(make_cache) -> None:
    cache = make_cache([Note("a", "1"), Note("b", "2"), Note("c", "1"), Note("d", "3")])
    groups = patient_groups(cache, np.array([0, 1, 2, 3], np.uint32)).tolist()
    assert groups[0] == groups[2]
    assert sorted(set(groups)) == [0, 1, 2]
    cache = make_cache([Note("same"), Note("other"), Note("same")])
    groups = patient_groups(cache, np.array([0, 1, 2], np.uint32)).tolist()
    assert groups[0] == groups[2] != groups[1]
