"""WordPiece against the tokenizers library: characters, generated and real texts, both cases."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import WordPiece as LibraryWordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from data import wordpiece
from data.tokenizer import Tokenizer, load_tokenizer
from data.wordpiece import split_words
from data.worker import Worker
from tests.data.conftest import WORDS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# On each side of every rule: spaces and controls, accents composed and not, letters whose capitals
# are of another length, CJK, marks and punctuation old and new, special tokens as text.
PARTS = [
    *(" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028"),
    *("\u200b", "\u200d", "\ufeff", "\ufffd", "\xad", "\0", "\ue000", "\U000e0001"),
    *("é", "e\u0301", "É", "Å", "ö", "ñ", "ß", "İ", "\u0131", "Σ", "ΟΔΟΣ", "ǅ", "ﬁ", "Ω", "\u0301"),
    *("漢", "字", "〆", "ひ", "カ", "한", "\uf900", "\U00020000", "\U0002b820", "\U0002b920"),
    *(".", ",", "-", "_", "$", "^", "`", "~", "|", "'s", "«", "…", "—", "¿", "\u2e43", "\u166d"),
    *("½", "µ", "°", "😀", "\u0300a", "a\u0300\u0323", "\u1fef", "\u037e"),
    *SPECIAL, "[unk]", "##ing", "a" * 100, "b" * 101, "é" * 100, "é" * 101,
]  # fmt: skip


def make_texts(count: int, seed: int) -> list[str]:
    """Words, parts as above and characters of all planes, with spaces between some of them."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        pieces: list[str] = []
        for _ in range(rng.integers(0, 14)):
            kind = rng.random()
            if kind < 0.4:
                word = str(rng.choice(WORDS))
                pieces.append([word, word.upper(), word.title()][rng.integers(3)])
            elif kind < 0.7:
                pieces.append(PARTS[rng.integers(len(PARTS))])
            else:
                top = (0x80, 0x250, 0x3000, 0x10000, 0x110000)[rng.integers(5)]
                pieces.append(character(int(rng.integers(top))))
            pieces.append(" " * int(rng.random() < 0.6))
        texts.append("".join(pieces))
    return texts


def character(code: int) -> str:
    """The character; a letter in place of surrogates and what is newer in Python or the library.

    That is capitals, which Python calls unprintable before it knows them, and one composed vowel.
    """
    is_newer = code > 0x1C00 and (not chr(code).isprintable() or code == 0x11938)
    if 0xD800 <= code < 0xE000 or is_newer:
        return "x"
    return chr(code)


def make_library(lowercase: bool) -> tokenizers.Tokenizer:
    """A small vocabulary, trained by the library on words and on characters of many kinds."""
    library = tokenizers.Tokenizer(LibraryWordPiece(unk_token="[UNK]"))
    library.normalizer = BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=700, special_tokens=SPECIAL, show_progress=False, limit_alphabet=300
    )
    library.train_from_iterator(
        [*make_texts(400, seed=9), *(f"{w} {w.title()}" for w in WORDS)], trainer
    )
    library.encode_special_tokens = True
    return library


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    folder = tmp_path_factory.mktemp("bert")
    library = make_library(request.param)
    write_vocabulary(folder, library, request.param)
    return load_tokenizer(folder), library


def write_vocabulary(folder: Path, library: tokenizers.Tokenizer, lowercase: bool) -> None:
    vocabulary = library.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    config = {"do_lower_case": lowercase, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def library_ids(library: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [x.ids for x in library.encode_batch(texts, add_special_tokens=False)]


def test_ten_thousand_texts_get_the_ids_of_the_library(
    pair: tuple[Tokenizer, tokenizers.Tokenizer],
) -> None:
    ours, library = pair
    texts = make_texts(10_000, seed=0)
    expected = library_ids(library, texts)
    assert [ids.tolist() for ids in ours.encode_many(texts)] == expected
    assert [ours.encode(text) for text in texts[:100]] == expected[:100]
    ids = [id for one in expected for id in one]
    assert 0.02 < ids.count(ours.unk_id) / len(ids) < 0.5  # both kinds of word are common
    assert len(set(ids)) > 300


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from([*PARTS, *WORDS]), st.text(max_size=3))))
def test_any_text_gets_the_ids_of_the_library(
    pair: tuple[Tokenizer, tokenizers.Tokenizer], parts: list[str]
) -> None:
    text = "".join(map(character, map(ord, "".join(parts))))
    assert pair[0].encode(text) == library_ids(pair[1], [text])[0]


def check_characters(codes: range, lowercase: bool) -> None:
    """Each character between letters, where all steps show."""
    normalizer, splitter = BertNormalizer(lowercase=lowercase), BertPreTokenizer()
    text = " ".join(f"x a{chr(code)}B" for code in codes)
    expected = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    found = split_words(text, lowercase=lowercase, strip_accents=lowercase, split_cjk=True)
    assert found == expected, hex(codes.start)


@pytest.mark.parametrize("lowercase", [True, False])
def test_characters_of_the_first_planes_are_the_library_s(lowercase: bool) -> None:
    """In the uncased form 0x1c89 and 0xa7cb on: capitals that came after this Python."""
    for start in range(0, 0x1C00, 0x80):
        check_characters(range(start, start + 0x80), lowercase)
    check_characters(range(0x1E00, 0x3100), lowercase)
    check_characters(range(0xF900, 0x10000), lowercase)


@pytest.mark.slow
def test_every_character_is_the_library_s() -> None:
    for start in range(0, 0x110000, 0x800):
        if not 0xD800 <= start < 0xE000:
            check_characters(range(start, start + 0x800), lowercase=False)


def test_a_tokenizer_json_of_a_bert_is_the_same_tokenizer_without_the_library(
    pair: tuple[Tokenizer, tokenizers.Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 writes no vocab.txt."""
    ours, library = pair
    library.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    found = load_tokenizer(tmp_path)
    texts = make_texts(50, seed=1)
    assert [found.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    assert found.special == ours.special and found.fingerprint() == ours.fingerprint()
    assert (found.vocab_size, found.closes_notes) == (ours.vocab_size, True)


def test_special_ids_and_text_again(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, library = pair
    names = ("[UNK]", "[CLS]", "[SEP]", "[PAD]")
    assert list(ours.special) == [library.token_to_id(name) for name in names]
    ids = ours.encode("Chest pain, and [SEP] fever")
    assert ours.eos_id not in ids and ours.bos_id not in ids
    assert ours.decode(ours.encode("pain and fever")) == "pain and fever"


def test_case_follows_the_vocabulary_where_no_file_says_it(tmp_path: Path) -> None:
    for name, words, lowercase in (("a", ["pain", "Pain"], False), ("b", ["pain"], True)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode("pain") == [5]
        assert tokenizer.encode("Pain") == ([5] if lowercase else [6])
        assert tokenizer.encode("PAIN") == ([5] if lowercase else [tokenizer.unk_id])


def test_settings_beside_the_vocabulary_are_honoured(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "e", "é", "漢字", "漢", "字"]))
    for config, text, pieces in (
        ({}, "É", "e"),
        ({"strip_accents": False}, "É", "é"),
        ({"do_lower_case": False}, "é", "é"),
        ({"do_lower_case": False, "strip_accents": True}, "é", "e"),
        ({}, "漢字", "漢 字"),
        ({"tokenize_chinese_chars": False}, "漢字", "漢字"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.encode(text)) == pieces, config


def test_a_full_table_begins_again(
    pair: tuple[Tokenizer, tokenizers.Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wordpiece, "WORDS_KEPT", 3)
    ours = load_tokenizer(pair[0].path)
    texts = make_texts(50, seed=2)
    assert [ours.encode(text) for text in texts] == [pair[0].encode(text) for text in texts]


def test_a_worker_encodes_the_same(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    worker = Worker(pair[0])
    texts = make_texts(20, seed=3)
    encoded = worker.encode(texts)
    worker.close()
    assert encoded.tokens.tolist() == [id for text in texts for id in pair[0].encode(text)]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("pain\nfever\n")
    with pytest.raises(ValueError, match=r"lacks '\[UNK\]'"):
        load_tokenizer(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        load_tokenizer(tmp_path)
    path.write_text("\n".join(SPECIAL))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}')
    with pytest.raises(ValueError, match="do_lower_case is not true or false"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "BertNormalizer", "clean_text": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"type": "WordPiece", "vocab": {"a": 3}, "max_input_chars_per_word": 5}},
    ],
    ids=str,
)
def test_a_wordpiece_that_is_not_bert_s_is_refused(changes: dict, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    make_library(True).save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="not prepared as BERT's"):
        load_tokenizer(tmp_path)


def test_real_notes_and_a_published_vocabulary(real_data: Path) -> None:
    folder = real_data / "tokenizers" / "bert_uncased"
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    ours = load_tokenizer(folder)
    assert ours.path.name == "vocab.txt" and ours.vocab_size == 30_522
    notes = real_data / "notes" / "medical_notes_500.csv"
    with notes.open(newline="", encoding="utf-8") as file:
        texts = [cell for row in csv.reader(file) for cell in row]
    texts += [line for text in texts for line in text.splitlines()]
    assert len(texts) > 3000
    assert [ids.tolist() for ids in ours.encode_many(texts)] == library_ids(library, texts)
