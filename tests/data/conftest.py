"""A character tokenizer, a small sentencepiece model, and notes as a source, for the data room."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data.cache import TokenCache, tokenise
from data.notes import Note
from data.tokenizer import SpecialIds, Tokenizer

SENTENCE = "the patient was seen in clinic with chest pain and fever given aspirin 325 mg daily"
WORDS = SENTENCE.split()


class CharacterTokenizer(Tokenizer):
    """One token a character: lengths and ids are known without a model."""

    path = Path("characters")
    vocab_size = 1 << 12
    special = SpecialIds(unk=0, bos=1, eos=2, pad=None)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.uint16) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def fingerprint(self) -> str:
        return "characters"


class ListedNotes:
    """Notes held in a list, as a source."""

    description = "listed notes"

    def __init__(self, notes: Sequence[Note]) -> None:
        self.notes = notes

    def __iter__(self) -> Iterator[Note]:
        return iter(self.notes)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.notes).encode()).hexdigest()


def train_sentencepiece(path: Path, **options: object) -> Path:
    """A sentencepiece model of LLaMA's kind (BPE, byte fallback, no normalisation), unless told."""
    lines = [" ".join(WORDS[i % 7 :: 1 + i % 3]) + f" {i}." for i in range(300)]
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, **(settings | options)
        )
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA-like tokenizer.model of 400 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(folder / "tokenizer.model")
    return folder


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[[Sequence[Note]], TokenCache]:
    """Tokenises notes by character into a cache."""
    return lambda notes: tokenise(
        ListedNotes(notes), CharacterTokenizer(), cache_folder=tmp_path / "cache"
    )
