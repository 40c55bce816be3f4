"""Numbers and nouns that go together, in one function and in what is told with it."""

import pytest

from data.wording import counted


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (counted(1, "note"), "1 note"),
        (counted(0, "note"), "0 notes"),
        (counted(1234, "note"), "1,234 notes"),
        (counted(1, "note is", "notes are"), "1 note is"),
        (counted(2, "note is", "notes are"), "2 notes are"),
    ],
)
def test_one_and_several(said: str, words: str) -> None:
    assert said == words
