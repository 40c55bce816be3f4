"""Does the corpus of stage 1 tell about the patients that stage 2 is tested on?

    python -m data.leaks --corpus NOTES --data MIMIC_DIR --task mor --write exclude.txt
    python train.py --stage clinical --data NOTES --exclude exclude.txt ...

MIMIC-III and MIMIC-IV share the years 2008 to 2012, and no public list says which patients are the
same. So a note of the corpus is taken for a leak in one of two ways: its patient's identifier is
that of a test patient (which says something only where both come from one release), or it has a
third of the word shingles of the shorter of the two in common with a test note. A shingle is six
words in a row; masks of either release ([**...**], ___) are no words, and a shingle of many test
notes, which is a template's, does not count.

Invariant: counts are reported, and the list holds digests of notes of the corpus; no text and no
identifier, not even a patient's digest, which could be undone by trying all identifiers.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cache import digest
from data.mimic import TASKS, open_mimic
from data.notes import NoteSource, open_notes
from data.splits import split_notes, write_exclusions
from data.wording import counted

SHINGLE_WORDS = 6
SHARE = 0.35  # of the shingles of the shorter note; the borders of sections cost some
FEWEST = 8  # shingles in common that are no chance
TEMPLATE_NOTES = 20  # a shingle of more test notes than this is a template's
SAY_EVERY = 15.0  # seconds

_MASK = re.compile(r"\[\*\*.*?\*\*\]|_{2,}", re.DOTALL)
_WORD = re.compile(r"[a-z0-9]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Leaks(NamedTuple):
    """What a corpus shares with the test notes of a task; `digests` are of the corpus's texts."""

    corpus_notes: int
    test_notes: int
    test_patients: int
    same_patient: int  # notes of the corpus whose patient is tested
    same_text: int  # notes of the corpus whose text is a test note's, in good part
    told_notes: int  # test notes whose text is in the corpus, in good part
    digests: frozenset[bytes]


class NoteDigests(NamedTuple):
    """The notes of a source by what decides their split (see data.splits.Digests)."""

    description: str
    text_digests: np.ndarray
    patient_digests: np.ndarray | None

    def __len__(self) -> int:
        return len(self.text_digests)


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters, without masks and punctuation."""
    return _WORD.findall(_MASK.sub(" ", text).lower())


def shingles(text: str | Sequence[str]) -> np.ndarray:
    """Hashes of every run of six words of a text or its words, each once: uint64 [n], ascending."""
    words = words_of(text) if isinstance(text, str) else text
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    count = len(codes) - SHINGLE_WORDS + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for at in range(SHINGLE_WORDS):  # arithmetic modulo 2**64
        hashes = (hashes + codes[at : at + count] + np.uint64(1)) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


class TestNotes:
    """The test notes of a task, ready to be compared with any number of others."""

    __test__ = False  # a name that pytest would collect

    def __init__(self, texts: Iterable[str], patients: Iterable[str | None]) -> None:
        found = [shingles(text) for text in texts]
        self.patients = {digest(patient) for patient in patients if patient is not None}
        hashes = np.concatenate([*found, np.zeros(0, np.uint64)])
        notes = np.repeat(np.arange(len(found)), [len(each) for each in found])
        order = np.argsort(hashes, kind="stable")
        hashes, notes = hashes[order], notes[order]
        copies = np.unique(hashes, return_counts=True)[1]
        is_own = np.repeat(copies <= TEMPLATE_NOTES, copies)
        self._hashes, self._notes = hashes[is_own], notes[is_own]
        self._sizes = np.bincount(self._notes, minlength=len(found))
        self._told = np.zeros(len(found), bool)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def told_notes(self) -> int:
        """How many of the test notes some compared text held in good part."""
        return int(self._told.sum())

    def shares_text(self, text: str) -> bool:
        """Whether a text has enough of its shingles, or of a test note's, in common with one."""
        return bool(len(self.sharing(text)))

    def sharing(self, text: str | Sequence[str]) -> np.ndarray:
        """Numbers of the test notes that a text, or its words, shares enough shingles with: [n]."""
        own = shingles(text)
        first = np.searchsorted(self._hashes, own, side="left")
        counts = np.searchsorted(self._hashes, own, side="right") - first
        if not counts.sum():
            return np.zeros(0, self._notes.dtype)
        at = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        notes, common = np.unique(self._notes[at], return_counts=True)
        smaller = np.minimum(self._sizes[notes], len(own))
        is_told = (common >= SHARE * smaller) & (common >= FEWEST)
        self._told[notes[is_told]] = True
        return notes[is_told]


def find_leaks(
    corpus: NoteSource,
    source: NoteSource,
    *,
    lists: str | Path | None = None,
    test_share: float = 0.1,
) -> Leaks:
    """Compares every note of the corpus with the test notes that the source's split holds out."""
    test = _test_notes(source, lists, test_share)
    same_patient = same_text = count = 0
    digests: set[bytes] = set()
    told = time.monotonic()
    for count, note in enumerate(corpus, 1):
        is_patient = note.patient is not None and digest(note.patient) in test.patients
        is_text = test.shares_text(note.text)
        same_patient += is_patient
        same_text += is_text
        if is_patient or is_text:
            digests.add(digest(note.text))
        if time.monotonic() - told > SAY_EVERY:
            told = time.monotonic()
            print(f"compared {counted(count, 'note')}", file=sys.stderr, flush=True)
    return Leaks(
        count,
        len(test),
        len(test.patients),
        same_patient,
        same_text,
        test.told_notes,
        frozenset(digests),
    )


def _test_notes(source: NoteSource, lists: str | Path | None, test_share: float) -> TestNotes:
    texts, patients = [], []
    for note in source:
        texts.append(digest(note.text))
        patients.append(note.patient)
    known = [digest(patient) for patient in patients if patient is not None]
    held_out = split_notes(
        NoteDigests(
            source.description,
            np.array(texts, "S16"),
            np.array(known, "S16") if known else None,
        ),
        lists=lists,
        test_share=test_share,
    ).test
    chosen = set(held_out.tolist())
    return TestNotes(
        (note.text for row, note in enumerate(source) if row in chosen),
        (patients[row] for row in chosen),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.leaks",
        description="Compare a corpus of stage 1 with the test notes of stage 2.",
        allow_abbrev=False,
    )
    parser.add_argument("--corpus", required=True, metavar="NOTES", help="the notes of stage 1")
    parser.add_argument("--text-column", metavar="NAME", help="of the corpus; default: text")
    parser.add_argument("--patient-column", metavar="NAME", help="of the corpus")
    parser.add_argument("--data", required=True, metavar="DIR", help="the MIMIC folder of stage 2")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["mor"], help="default: mor")
    parser.add_argument("--cohort", choices=("correct", "paper"), default="correct")
    parser.add_argument("--splits", metavar="DIR", help="lists of patients, as train.py takes them")
    parser.add_argument("--test-share", type=float, default=0.1)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a list for train.py --exclude")
    arguments = parser.parse_args(argv)
    try:
        corpus = open_notes(
            arguments.corpus,
            text_column=arguments.text_column,
            patient_column=arguments.patient_column,
        )
        leaked: set[bytes] = set()
        for task in arguments.task:
            leaks = find_leaks(
                corpus,
                open_mimic(arguments.data, task, paper=arguments.cohort == "paper"),
                lists=arguments.splits,
                test_share=arguments.test_share,
            )
            leaked |= leaks.digests
            print(
                f"{task}: {counted(leaks.test_notes, 'test note')} of "
                f"{counted(leaks.test_patients, 'patient')} against "
                f"{counted(leaks.corpus_notes, 'note')}\n"
                f"  by patient: {leaks.same_patient:,} of the corpus's notes belong to test "
                "patients\n"
                f"  by text: {leaks.same_text:,} of the corpus's notes share text with "
                f"{counted(leaks.told_notes, 'test note')}"
            )
        if arguments.write is not None:
            write_exclusions(arguments.write, leaked)
            print(f"{arguments.write} lists {counted(len(leaked), 'text')} for train.py --exclude")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
