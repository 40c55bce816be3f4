"""Which notes train, validate and test: a function of the patient, or of the text without one.

MD5 of the patient's identifier (of the text where a source has no patients), read as one number,
modulo 10 is the bucket: 0 tests, 1 validates, the rest trains. So a patient is on one side in every
table, run and machine, without a seed or a stored list; lists of patients can take its place. A
held-out note whose text also occurs in training says nothing about new notes and is left out.

Invariant: the three sets are disjoint, and no patient and no text of training is in another set.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data.cache import digest
from data.wording import counted

TRAIN, VALIDATION, TEST = 0, 1, 2
LIST_LIMIT = 1 << 30  # bytes of a list, which is read whole
UNLISTED, EXCLUDED = 3, 4  # in no list of patients, in the list of texts to leave out
EXCLUSIONS_HEADER = "md5 of the text"

_LIST_FILES = {  # ours, and those that CORe publishes
    TRAIN: ("train.csv", "mimic_train.csv"),
    VALIDATION: ("validation.csv", "val.csv", "mimic_val.csv"),
    TEST: ("test.csv", "mimic_test.csv"),
}


class Digests(Protocol):
    """Notes to be split, by what decides it; a token cache is one."""

    @property
    def description(self) -> str: ...

    @property
    def text_digests(self) -> np.ndarray:
        """MD5 of each text: S16 [N]."""
        ...

    @property
    def patient_digests(self) -> np.ndarray | None:
        """MD5 of each patient: S16 [N]; None where the notes have none."""
        ...

    def __len__(self) -> int: ...


class Splits(NamedTuple):
    """Rows of a cache by use, ascending (uint32), and what was left out."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    validation_duplicates: int  # held-out notes left out because their text is in training
    test_duplicates: int
    unlisted: int  # notes of patients in none of the lists
    excluded: int  # notes that a list of texts leaves out
    rule: str  # one line for people


def split_notes(
    cache: Digests,
    *,
    lists: str | Path | None = None,
    test_share: float = 0.1,
    exclude: str | Path | None = None,
) -> Splits:
    """Splits the notes of a cache by patient lists, by patient, or by text, in this order.

    `lists` is a folder with train.csv, validation.csv (or val.csv) and test.csv, or with the lists
    that CORe publishes (mimic_train.csv and so on), each one column of patient identifiers under a
    header. `test_share` is in tenths, 0.1 to 0.8; bucket 0 tests, then 9, 8 and so on. Notes whose
    text `exclude` lists (see write_exclusions) are used nowhere. Raises ValueError for lists that
    overlap or match no patient.
    """
    if lists is not None:
        if cache.patient_digests is None:
            raise ValueError(
                f"{cache.description}: split lists name patients, but these notes have none; name "
                f"their column with --patient-column, or leave --splits out"
            )
        use = _listed_use(cache, Path(lists))
        rule = f"by the patient lists in {lists}"
    else:
        unit = "text" if cache.patient_digests is None else "patient"
        use = bucket_use(test_share)[buckets(_unit_digests(cache))]
        rule = f"by {unit}, md5 modulo 10, test share {test_share:g}"
    if exclude is not None:
        use[_contained(np.asarray(cache.text_digests), read_exclusions(Path(exclude)))] = EXCLUDED
    train, validation, test, unlisted, excluded = (
        np.flatnonzero(use == part).astype(np.uint32)
        for part in (TRAIN, VALIDATION, TEST, UNLISTED, EXCLUDED)
    )
    training_texts = cache.text_digests[train]
    training_texts.sort()
    kept_validation = _absent(cache.text_digests, validation, training_texts)
    kept_test = _absent(cache.text_digests, test, training_texts)
    return Splits(
        train,
        kept_validation,
        kept_test,
        len(validation) - len(kept_validation),
        len(test) - len(kept_test),
        len(unlisted),
        len(excluded),
        rule,
    )


def join_splits(cache: Digests, parts: Sequence[tuple[str, int, Splits]]) -> Splits:
    """The split of several sources as that of one.

    parts: of each source its name, the row of its first note in `cache`, and its own split. A
    held-out note whose text is in the training part of any source is left out.
    """
    train, validation, test = (
        np.concatenate([getattr(split, part) + np.uint32(first) for _, first, split in parts])
        for part in ("train", "validation", "test")
    )
    training_texts = np.sort(cache.text_digests[train])
    kept_validation = _absent(cache.text_digests, validation, training_texts)
    kept_test = _absent(cache.text_digests, test, training_texts)
    splits = [split for _, _, split in parts]
    return Splits(
        train,
        kept_validation,
        kept_test,
        sum(each.validation_duplicates for each in splits) + len(validation) - len(kept_validation),
        sum(each.test_duplicates for each in splits) + len(test) - len(kept_test),
        sum(each.unlisted for each in splits),
        sum(each.excluded for each in splits),
        "; ".join(f"{name} {split.rule}" for name, _, split in parts),
    )


def buckets(digests: np.ndarray) -> np.ndarray:
    """`int(md5, 16) % 10` of each digest: S16 [N] -> uint8 [N], exactly.

    With the digest as high * 2**64 + low, and 2**64 = 6 modulo 10.
    """
    halves = np.asarray(digests).view(">u8").reshape(-1, 2)
    return ((halves[:, 0] % 10 * 6 + halves[:, 1] % 10) % 10).astype(np.uint8)


def bucket_use(test_share: float) -> np.ndarray:
    """What each of the ten buckets is for: uint8 [10] of TRAIN, VALIDATION and TEST."""
    tenths = next((i for i in range(1, 9) if abs(i / 10 - test_share) < 1e-9), None)
    if tenths is None:
        raise ValueError(f"test share is {test_share}; allowed: 0.1 to 0.8 in steps of 0.1")
    use = np.full(10, TRAIN, np.uint8)
    use[1] = VALIDATION
    use[[-i % 10 for i in range(tenths)]] = TEST
    return use


def write_exclusions(path: Path, digests: Iterable[bytes]) -> None:
    """Writes a list of texts to leave out: their MD5 in hexadecimal, one a line under a header."""
    lines = [EXCLUSIONS_HEADER, *sorted(digest.hex() for digest in digests)]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "x", encoding="ascii") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_exclusions(path: Path) -> np.ndarray:
    """Digests of the texts that a list leaves out, sorted: S16 [n]."""
    try:
        header, *lines = path.read_text(encoding="ascii").splitlines()
        if header != EXCLUSIONS_HEADER or any(len(line) != 32 for line in lines):
            raise ValueError
        return np.sort(np.array([bytes.fromhex(line) for line in lines], "S16"))
    except (OSError, ValueError):
        raise ValueError(
            f"--exclude {path}: not a list of notes to leave out; make it with python -m "
            f"data.leaks --write"
        ) from None


def patient_groups(cache: Digests, notes: np.ndarray) -> np.ndarray:
    """One number per patient for each note, 0 and up: int64 [n]; per text without patients.

    Intervals resample these groups, since notes of one patient are not independent.
    """
    return np.unique(_unit_digests(cache)[notes], return_inverse=True)[1].astype(np.int64)


def shared_notes(
    cache: Digests, notes: np.ndarray, other: Digests, other_notes: np.ndarray
) -> dict[str, int | None]:
    """How many of the notes the other notes tell about: by `text`, the same; by `patient`, theirs.

    `patient` is None where either has no patients.
    """
    shared: dict[str, int | None] = {"text": None, "patient": None}
    pairs = {
        "text": (cache.text_digests, other.text_digests),
        "patient": (cache.patient_digests, other.patient_digests),
    }
    for name, (digests, other_digests) in pairs.items():
        if digests is not None and other_digests is not None:
            known = np.sort(np.asarray(other_digests[other_notes]))
            shared[name] = int(_contained(np.asarray(digests[notes]), known).sum())
    return shared


def _unit_digests(cache: Digests) -> np.ndarray:
    """Digests of what is split: patients, or texts where the source has no patients."""
    return cache.text_digests if cache.patient_digests is None else cache.patient_digests


def _absent(digests: np.ndarray, notes: np.ndarray, sorted_digests: np.ndarray) -> np.ndarray:
    """The notes whose digest is not among the sorted ones."""
    return notes[~_contained(digests[notes], sorted_digests)]


def _contained(digests: np.ndarray, sorted_digests: np.ndarray) -> np.ndarray:
    if not len(sorted_digests):
        return np.zeros(len(digests), bool)
    at = np.searchsorted(sorted_digests, digests)
    at[at == len(sorted_digests)] = 0
    return sorted_digests[at] == digests


def _listed_use(cache: Digests, folder: Path) -> np.ndarray:
    """What each note is for by its patient's list: uint8 [N]."""
    assert cache.patient_digests is not None
    known = np.unique(np.asarray(cache.patient_digests))
    patients = {part: _read_list(folder, names, known) for part, names in _LIST_FILES.items()}
    for first, second in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        both = int(_contained(patients[first], patients[second]).sum())
        if both:
            raise ValueError(
                f"{folder}: {counted(both, 'patient is', 'patients are')} both in "
                f"{_LIST_FILES[first][0]} and in "
                f"{_LIST_FILES[second][0]}; a patient may be in one list only"
            )
    use = np.full(len(cache), UNLISTED, np.uint8)
    for part, listed in patients.items():
        use[_contained(np.asarray(cache.patient_digests), listed)] = part
    if (use == UNLISTED).all():
        raise ValueError(
            f"{folder}: none of the listed patients has a note in {cache.description}; the lists "
            f"must hold the values of the patient column, written the same way"
        )
    return use


def _read_list(folder: Path, names: Iterable[str], known: np.ndarray) -> np.ndarray:
    """Digests of the patients of one list, sorted, each once: S16 [n].

    `known` are the digests of the notes' patients, sorted: a first line among them is no header.
    """
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        raise ValueError(
            f"{folder}: {'none' if not found else 'more than one'} of {', '.join(names)} is there; "
            f"train.csv, validation.csv and test.csv are needed, once each"
        )
    path = found[0]
    if path.stat().st_size > LIST_LIMIT:
        raise ValueError(f"{path}: more than {LIST_LIMIT:,} bytes; is it a list of patient ids?")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (csv.Error, UnicodeDecodeError):
        raise ValueError(f"{path}: not CSV in UTF-8; write the list again") from None
    if not rows or any(len(row) != 1 for row in rows):
        raise ValueError(
            f"{path}: one column of patient identifiers under a header is expected; found "
            f"{'an empty file' if not rows else 'rows with more columns'}"
        )
    if rows[0][0].isdecimal() or _contained(np.array([digest(rows[0][0])], "S16"), known).any():
        raise ValueError(f"{path}: the first line is a patient, not a header; add a header line")
    return np.unique(np.array([digest(row[0]) for row in rows[1:]], "S16"))
