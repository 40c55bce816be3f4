"""WordPiece, the tokenizer of BERT (Devlin et al., arXiv 1810.04805): text to ids of a vocabulary.

A text is cleaned (controls go, every kind of space becomes one), CJK characters become words of
their own, an uncased vocabulary's text loses accents and capitals, and words are split at spaces
and around each punctuation mark. A word becomes the longest piece of the vocabulary that it begins
with, then the longest `##` piece that the rest begins with, and so on; a word that cannot be
finished, or has more than 100 characters, is [UNK] as a whole.

The invariant: ids equal those of the tokenizers library, which knows the characters of Unicode 8;
only capitals and composed letters are those of Python's own Unicode. No step looks past a space, so
what stands between spaces is encoded on its own and kept in a table.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping

import numpy as np

WORD_CHARACTERS = 100  # of a longer word nothing is known
WORDS_KEPT = 1 << 18  # words in the table before it starts again

# Spaces alone: \v, \f and the separators 0x1c to 0x1f are controls here, not spaces.
_SPACES = "\t\n\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_WORDS = re.compile(f"[^{_SPACES}]+")
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
# Where marks, punctuation and formats came after Unicode 8; none that it had lies in between.
_NEWER = (
    (0x61D, 0x61D), (0x7FD, 0x7FD), (0x890, 0x8E2), (0x9FD, 0x9FE), (0xA76, 0xA76), (0xAFA, 0xAFF),
    (0xB55, 0xB55), (0xC04, 0xC3C), (0xC77, 0xC77), (0xC84, 0xC84), (0xD00, 0xD00), (0xD3B, 0xD3C),
    (0xD81, 0xD81), (0xEBA, 0xEBA), (0x180F, 0x1886), (0x1ABF, 0x1ACE), (0x1B7D, 0x1B7E),
    (0x1DF6, 0x1DFB), (0x2E43, 0x2E5D), (0xA82C, 0xA82C), (0xA8C5, 0xA8C5), (0xA8FF, 0xA8FF),
    (0xA9BD, 0xA9BD), (0x10D24, 0x10F89), (0x11070, 0x11074), (0x110C2, 0x110CD),
    (0x111C9, 0x111C9), (0x111CF, 0x111CF), (0x1123E, 0x1123E), (0x1133B, 0x1133B),
    (0x11438, 0x1145E), (0x11660, 0x1166C), (0x116B9, 0x116B9), (0x1182F, 0x11FFF),
    (0x12FF1, 0x13438), (0x16E97, 0x16F4F), (0x16FE2, 0x16FE4), (0x1CF00, 0x1CF46),
    (0x1E000, 0x1E2EF), (0x1E944, 0x1E95F),
)  # fmt: skip
_CATEGORY_THEN = {0x166D: "Po", 0x111C9: "Po", 0x1734: "Mn"}  # changed since


def split_words(text: str, *, lowercase: bool, strip_accents: bool, split_cjk: bool) -> list[str]:
    """The words and punctuation marks of a text, cleaned, in order."""
    return [
        word
        for chunk in _WORDS.findall(text)
        for word in _split(chunk, lowercase, strip_accents, split_cjk)
    ]


class WordPiece(dict[str, bytes]):
    """Ids of the words (between spaces) seen, as bytes of an array; a new one is encoded and kept.

    vocabulary: piece -> id. unk_id: of a word that is not made of pieces.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        *,
        unk_id: int,
        dtype: np.dtype,
        lowercase: bool,
        strip_accents: bool,
        split_cjk: bool,
        word_characters: int = WORD_CHARACTERS,
    ) -> None:
        super().__init__()
        self._vocabulary, self._unk_id, self._dtype = vocabulary, unk_id, dtype
        self._longest = max(map(len, vocabulary), default=0)
        self._rules = lowercase, strip_accents, split_cjk
        self._word_characters = word_characters

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, without [CLS] and [SEP]; their text in it is text."""
        return np.frombuffer(b"".join(map(self.__getitem__, _WORDS.findall(text))), self._dtype)

    def __missing__(self, chunk: str) -> bytes:
        words = _split(chunk, *self._rules)
        ids = np.array([id for word in words for id in self._pieces(word)], self._dtype).tobytes()
        if len(chunk) <= self._word_characters:
            if len(self) >= WORDS_KEPT:
                self.clear()
            self[chunk] = ids
        return ids

    def _pieces(self, word: str) -> list[int]:
        """The longest pieces from left to right; [UNK] alone where they do not reach the end."""
        if len(word) > self._word_characters:
            return [self._unk_id]
        ids: list[int] = []
        start, prefix = 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                found = self._vocabulary.get(prefix + word[start:end])
                if found is not None:
                    break
            else:
                return [self._unk_id]
            ids.append(found)
            start, prefix = end, "##"
        return ids


def _split(chunk: str, lowercase: bool, strip_accents: bool, split_cjk: bool) -> list[str]:
    """The words of a text without spaces."""
    if chunk.isascii() and chunk.isalnum():
        return [chunk.lower() if lowercase else chunk]
    # Each step as the library has it: accents go before capitals, and a capital falls alone (a
    # Sigma at the end of a word becomes the same letter as within it).
    kept = "".join(c for c in chunk if not _is_control(c))
    if split_cjk:
        kept = "".join(f" {c} " if _is_cjk(c) else c for c in kept)
    if strip_accents:
        decomposed = unicodedata.normalize("NFD", kept)
        kept = "".join(c for c in decomposed if _category(c) != "Mn")
    if lowercase:
        kept = "".join(map(str.lower, kept))
    spaced = "".join(f" {c} " if _is_punctuation(c) else c for c in kept)
    return spaced.split()


@functools.lru_cache(maxsize=1 << 16)
def _category(c: str) -> str:
    """The category that Unicode 8 gave a character, as far as the steps ask for it."""
    code, category = ord(c), unicodedata.category(c)
    if code in _CATEGORY_THEN:
        return _CATEGORY_THEN[code]
    is_asked_for = category in ("Mn", "Cf") or category[0] == "P"
    is_newer = is_asked_for and any(first <= code <= last for first, last in _NEWER)
    return "Cn" if is_newer else category


def _is_control(c: str) -> bool:
    return c == "\ufffd" or _category(c) in ("Cc", "Cf", "Co", "Cs")


def _is_cjk(c: str) -> bool:
    return c > "\u3000" and any(first <= ord(c) <= last for first, last in _CJK)


def _is_punctuation(c: str) -> bool:
    """Every printable ASCII character that is no letter or digit counts, `$` and `^` too."""
    if c.isascii():
        return not c.isalnum() and c != " "  # controls are gone
    return _category(c)[0] == "P"
