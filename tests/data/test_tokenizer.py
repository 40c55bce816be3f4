"""Tokenizers: known ids, the word table against sentencepiece itself, special text, special ids."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizer as module
from data.tokenizer import SpecialIds, load_tokenizer, token_dtype
from tests.data.conftest import WORDS, train_sentencepiece

# Characters that fall on each side of every rule: spaces plain and written out, newlines, others
# that some libraries take for either, unknown characters, digits, parts of special tokens.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [" ", "  ", "\u2581", "\n", "\n\n", "\r\n", "\t", "\x0b", "\u2028", "\xa0"]
        ),
        st.sampled_from([*WORDS, "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "é", "½", "😀", "漢"]),
        st.text(max_size=4).filter(lambda t: "\0" not in t),
    ),
    max_size=12,
).map("".join)

VARIANTS = {
    "llama": {},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "no prefix": {"add_dummy_prefix": False},
    "no byte fallback": {"byte_fallback": False},
    "no prefix, no byte fallback": {"add_dummy_prefix": False, "byte_fallback": False},
    "spaces inside pieces": {"split_by_whitespace": False},
    "user-defined piece": {"user_defined_symbols": ["pain and"]},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "unigram": {"model_type": "unigram"},
    "spaces as suffix": {"treat_whitespace_as_suffix": True},
}
BY_WORD = {name for name in VARIANTS if name.startswith(("llama", "extra", "no "))}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("variant") / "tokenizer.model"
    return request.param, load_tokenizer(train_sentencepiece(path, **VARIANTS[request.param]))


def encode_by_words(tokenizer, text: str) -> list[int]:
    return tokenizer.encode_many([text])[0].tolist()


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_many_texts_get_the_ids_that_sentencepiece_gives_each(variant, text: str) -> None:
    _, tokenizer = variant
    assert encode_by_words(tokenizer, text) == tokenizer.encode(text)


def test_words_are_used_only_where_they_are_proven_independent(variant) -> None:
    name, tokenizer = variant
    assert (tokenizer._words is not None) == (name in BY_WORD)


def test_a_piece_that_goes_on_after_a_newline_keeps_its_word_whole(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    pieces = [tokenizer._processor.id_to_piece(i) for i in range(3 + 256, tokenizer.vocab_size)]
    model = tokenizer.path.read_bytes()
    for new in ("a\n", "a\nb"):  # takes the place of a piece of the same length
        old = next(piece for piece in pieces if piece.isascii() and len(piece) == len(new))
        field = bytes([10, len(new)])
        model = model.replace(field + old.encode(), field + new.encode())
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path)
    text = "xa\nb a\nb\nc"
    assert tokenizer._processor.piece_to_id("a\nb") in tokenizer.encode(text)
    assert encode_by_words(tokenizer, text) == tokenizer.encode(text)


def test_a_full_word_table_starts_again(tokenizer_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "WORDS_KEPT", 5)
    tokenizer = load_tokenizer(tokenizer_folder)
    text = " ".join(WORDS) + " " + "x" * 100
    for _ in range(3):
        assert encode_by_words(tokenizer, text) == tokenizer.encode(text)
        assert len(tokenizer._words) <= 5
    assert all(len(word) <= module.WORD_CHARACTERS for word in tokenizer._words)


def test_golden_ids_of_the_llama_tokenizer(real_data: Path) -> None:
    folder = real_data / "tokenizers"
    tokenizer = load_tokenizer(folder / "llama2.model")
    texts = (
        (folder / "llama2.golden.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    )
    lines = (folder / "llama2.golden.out").read_text(encoding="utf-8").split("\n")
    expected = [[int(i) for i in line.split()] for line in lines[: len(texts)]]
    assert len(texts) > 30
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts
    assert tokenizer.special == SpecialIds(unk=0, bos=1, eos=2, pad=None)
    assert tokenizer.vocab_size == 32000


@pytest.mark.parametrize(
    "name", ["tokenizers/llama2.model", "tokenizers/mistral_v1.model", "stories260k"]
)
def test_real_notes_get_the_ids_that_sentencepiece_gives(real_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(real_data / name)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    text = (real_data / "notes" / "medical_notes_500.csv").read_text(encoding="utf-8")
    lines = text.split("\n")[:200]
    for part in (*lines, text[:50_000], text[:20_000].replace(". ", ".\n  ")):
        assert encode_by_words(tokenizer, part) == processor.encode(part)
    assert tokenizer._words is not None


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with special tokens, a template that adds them, truncation and padding."""
    folder = tmp_path_factory.mktemp("json")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_tokenizer_json_adds_cuts_and_pads_nothing(json_folder: Path) -> None:
    tokenizer = load_tokenizer(json_folder)
    text = " ".join(WORDS * 3)
    ids = tokenizer.encode(text)
    assert len(ids) > 32
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == text
    assert [array.tolist() for array in tokenizer.encode_many([text, ""])] == [ids, []]
    assert tokenizer.vocab_size == 1 + max(
        tokenizers.Tokenizer.from_file(str(tokenizer.path)).get_vocab().values()
    )


@pytest.mark.parametrize(
    "text", ["<|begin|>", "a</s>b <s>", "<unk>", "[INST] <<SYS>>", "<|end|><|end|>"]
)
def test_special_token_text_stays_text(
    tokenizer_folder: Path, json_folder: Path, text: str
) -> None:
    for folder in (tokenizer_folder, json_folder):
        tokenizer = load_tokenizer(folder)
        for ids in (tokenizer.encode(text), tokenizer.encode_many([text])[0].tolist()):
            assert not {tokenizer.bos_id, tokenizer.eos_id, 0, 1, 2} & set(ids)
            assert tokenizer.decode(ids) == text


def test_special_ids_of_tokenizer_json_come_from_the_files_beside_it(
    json_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(json_folder / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).special == SpecialIds(None, None, None, None)
    write_json(tmp_path / "config.json", {"bos_token_id": 1, "eos_token_id": [2, 3]})
    assert load_tokenizer(tmp_path).special == SpecialIds(None, 1, 2, None)
    write_json(
        tmp_path / "special_tokens_map.json",
        {"eos_token": "<|end|>", "pad_token": "", "unk_token": "<unk>"},
    )
    write_json(
        tmp_path / "tokenizer_config.json",
        {"bos_token": {"content": "<|begin|>"}, "eos_token": None},
    )
    assert load_tokenizer(tmp_path).special == SpecialIds(0, 1, 2, None)
    assert load_tokenizer(tmp_path, "pmc-llama").special == SpecialIds(0, 1, 2, 2)


@pytest.mark.parametrize(("preset", "pad"), [(None, None), ("llama", 0), ("pmc-llama", 2)])
def test_a_preset_fills_only_what_the_tokenizer_lacks(tokenizer_folder: Path, preset, pad) -> None:
    tokenizer = load_tokenizer(tokenizer_folder, preset)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        0,
        1,
        2,
        pad,
    )


def test_presets_as_published() -> None:
    assert module.PRESETS == {"llama": (0, 1, 2, 0), "pmc-llama": (0, 1, 2, 2)}


def test_fingerprint_changes_with_one_byte(
    tokenizer_folder: Path, json_folder: Path, tmp_path: Path
) -> None:
    same = tmp_path / "same.model"
    shutil.copy(tokenizer_folder / "tokenizer.model", same)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert load_tokenizer(same).fingerprint() == tokenizer.fingerprint()
    model = bytearray(same.read_bytes())
    at = model.index("▁patient".encode())
    model[at + 3] ^= 32  # ▁patient becomes ▁Patient
    same.write_bytes(model)
    assert load_tokenizer(same).fingerprint() != tokenizer.fingerprint()
    other = tmp_path / "tokenizer.json"
    other.write_bytes((json_folder / "tokenizer.json").read_bytes() + b"\n")
    assert load_tokenizer(other).fingerprint() != load_tokenizer(json_folder).fingerprint()


def bad_folder(tmp_path: Path, tokenizer_folder: Path, json_folder: Path, case: str) -> Path:
    model = (tokenizer_folder / "tokenizer.model").read_bytes()
    if case == "empty folder":
        return tmp_path
    if case in ("cut model", "text model", "empty model"):
        content = {"cut model": model[:-300], "text model": b"IQ== 0\n", "empty model": b""}[case]
        (tmp_path / "tokenizer.model").write_bytes(content)
        return tmp_path
    if case == "cut json":
        (tmp_path / "tokenizer.json").write_bytes(
            (json_folder / "tokenizer.json").read_bytes()[:99]
        )
        return tmp_path
    shutil.copy(json_folder / "tokenizer.json", tmp_path)
    configs = {
        "id outside": ("config.json", '{"bos_token_id": 4000}'),
        "token absent": ("tokenizer_config.json", '{"bos_token": "<nowhere>"}'),
        "config not JSON": ("config.json", "{"),
        "config a list": ("config.json", "[]"),
    }
    name, content = configs[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("empty folder", "no tokenizer.model, vocab.txt or tokenizer.json"),
        ("cut model", "not a sentencepiece model"),
        ("text model", "not a sentencepiece model"),
        ("empty model", "not a sentencepiece model"),
        ("cut json", "not a tokenizer.json"),
        ("id outside", "the bos id is 4000"),
        ("token absent", "belong to different tokenizers"),
        ("config not JSON", "not valid JSON"),
        ("config a list", "holds a list"),
    ],
)
def test_bad_tokenizers_are_refused(tmp_path, tokenizer_folder, json_folder, case, says) -> None:
    folder = bad_folder(tmp_path, tokenizer_folder, json_folder, case)
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_known_ones(tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match="'lama' is not known; known: llama, pmc-llama"):
        load_tokenizer(tokenizer_folder, "lama")


def test_token_dtype_holds_every_id() -> None:
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32
