"""Does a row that is trained on hold a question that the model will be tested with?

A row holds a test question in one of four ways, all on words in small letters without punctuation:
its instruction or its input is the question and nothing else; the question stands in it whole and
has at least eight words; the question and the text of each of its options stand in it, whatever the
order of the options; or it shares a third of the six-word shingles of the shorter of the two, at
least eight of them, as notes of one patient do (`data.leaks`), with the question and what that is
about. The third is for short questions ("Which of the following is true?"), which begin many others
and mean nothing without their options; the fourth cannot find one of fewer than thirteen words.

Invariant: a question counts as held whichever row held it; no text of either is kept or shown.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data.leaks import TestNotes, words_of
from data.questions import QuestionSet

_FIRST = 3  # words by which a question is looked up
# Words of a question that tells itself from others. Of MedMCQA's even questions ten hold an odd one
# of six words, nine of these "which of the following is true"; of eight words or more one does, and
# it asks the same.
_TELLING = 8
# Options that were written as a Python dictionary have tabs and the like in this form.
_ESCAPE = re.compile(r"\\(?:[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4})")


class TestQuestions:
    """The questions of test sets, ready to be compared with any number of rows."""

    __test__ = False  # a name that pytest would collect

    def __init__(self, sets: Sequence[QuestionSet]) -> None:
        questions = [question for one in sets for question in one.questions]
        self._sizes = [len(one.questions) for one in sets]
        self._notes = TestNotes((f"{one.context}\n{one.stem}" for one in questions), [])
        self._held = np.zeros(len(questions), bool)
        self._stems = [_spaced(words_of(one.stem)) for one in questions]
        self._options = [
            [words for option in one.options if (words := _spaced(words_of(option)))]
            for one in questions
        ]
        self._by_stem: dict[str, list[int]] = defaultdict(list)
        self._by_first: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, stem in enumerate(self._stems):
            if stem:
                self._by_stem[stem].append(number)
                self._by_first[tuple(stem.split()[:_FIRST])].append(number)
        self._heads = {first[0] for first in self._by_first}
        self._firsts = sorted({len(first) for first in self._by_first})

    @property
    def held(self) -> list[int]:
        """Of each test set, how many of its questions some compared row held."""
        ends = np.cumsum([0, *self._sizes])
        return [int(self._held[a:b].sum()) for a, b in itertools.pairwise(ends)]

    def overlaps(self, instruction: str, input: str) -> bool:
        """Whether a row with this instruction and input holds a test question."""
        input = _ESCAPE.sub(" ", input)
        parts = [words_of(instruction), words_of(input)]
        words = parts[0] + parts[1]
        numbers = {
            number for part in (*parts, words) for number in self._by_stem.get(_spaced(part), ())
        }
        numbers.update(self._standing(words))
        numbers.update(self._notes.sharing(words).tolist())
        self._held[list(numbers)] = True
        return bool(numbers)

    def _standing(self, words: Sequence[str]) -> set[int]:
        """Questions that stand among the words whole, short ones with all of their options."""
        candidates = {
            number
            for at, word in enumerate(words)
            if word in self._heads  # which most words are not
            for length in self._firsts
            for number in self._by_first.get(tuple(words[at : at + length]), ())
        }
        if not candidates:
            return candidates
        text = _spaced(words)
        return {
            number
            for number in candidates
            if self._stems[number] in text
            and (
                len(self._stems[number].split()) >= _TELLING
                or (
                    self._options[number]
                    and all(option in text for option in self._options[number])
                )
            )
        }


def _spaced(words: Sequence[str]) -> str:
    """Words in one text in which a run of them is found whole; "" for none."""
    return f" {' '.join(words)} " if words else ""
