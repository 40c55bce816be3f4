"""Tokenizers: sentencepiece (`tokenizer.model`), WordPiece and `tokenizer.json`.

`encode` never adds BOS or EOS (packing does), and text that spells a special token stays text: a
note that says "</s>" must not end a segment. Special ids come from the tokenizer's files; a preset
fills what they lack.

Sentencepiece BPE models are encoded word by word through a table of words already seen. This is
exact where no piece of the vocabulary reaches over a word boundary, because BPE merges only pairs
that are pieces, so the merges of two words cannot touch; `_word_boundaries` reads the model and
allows it only then. Other models take the plain path.
"""

import abc
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from data.wordpiece import WORD_CHARACTERS as PIECE_CHARACTERS
from data.wordpiece import WordPiece

SPACE = "\u2581"  # sentencepiece's escaped space
TOKENIZER_FILES = ("tokenizer.model", "vocab.txt", "tokenizer.json")  # the first one is read
WORDS_KEPT = 1 << 18  # words in the table before it starts again
TOKENIZER_LIMIT = 1 << 28  # bytes of a tokenizer file; the largest published have 40 MB
WORD_CHARACTERS = 64  # longer words are encoded each time they come


class SpecialIds(NamedTuple):
    """Ids of the special tokens; None where a tokenizer has none."""

    unk: int | None
    bos: int | None
    eos: int | None
    pad: int | None


PRESETS = {
    "llama": SpecialIds(unk=0, bos=1, eos=2, pad=0),
    "pmc-llama": SpecialIds(unk=0, bos=1, eos=2, pad=2),
}


class Tokenizer(abc.ABC):
    """What the rest of the project asks of a tokenizer."""

    path: Path  # the file it was read from
    vocab_size: int  # every id is below it
    special: SpecialIds
    # Whether a note that is classified ends in EOS: an encoder's [SEP].
    closes_notes: bool = False

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS; special-token text stays text."""

    @abc.abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, as arrays of `token_dtype(vocab_size)`."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after another: `encode` without the space some put before."""
        return self.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The text of `encode_continuation`'s ids, a space in front of it included."""
        return self.decode(ids)

    def token_id(self, token: str) -> int | None:
        """The id of a special token by its text, such as <|eot_id|>; None where there is none."""
        return None

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides `encode`."""

    def arguments(self) -> list[str]:
        """What a tokenising process is told, so that it reads the same tokenizer."""
        return [str(self.path.resolve())]

    @property
    def bos_id(self) -> int | None:
        return self.special.bos

    @property
    def eos_id(self) -> int | None:
        return self.special.eos

    @property
    def pad_id(self) -> int | None:
        return self.special.pad

    @property
    def unk_id(self) -> int | None:
        return self.special.unk


def load_tokenizer(path: str | Path, preset: str | None = None) -> Tokenizer:
    """Reads the tokenizer of a checkpoint folder, or one tokenizer file.

    `tokenizer.model` is taken first, then BERT's `vocab.txt`, then `tokenizer.json`. A
    `tokenizer.json` of a BERT is read as its `vocab.txt` would be; others need the library
    tokenizers. Raises ValueError for a folder with none of them, a file that is none of them, a
    preset that is not known, and special ids outside the vocabulary.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"tokenizer preset {preset!r} is not known; known: {', '.join(PRESETS)}")
    file = _tokenizer_file(Path(path))
    tokenizer: Tokenizer
    if file.suffix == ".txt":
        tokenizer = _WordPieceTokenizer(file, *_read_vocabulary(file))
    elif file.suffix == ".json":
        content = _read_file(file)
        wordpiece = _read_wordpiece_json(file, content)
        tokenizer = (
            _JsonTokenizer(file, content)
            if wordpiece is None
            else _WordPieceTokenizer(file, *wordpiece)
        )
    else:
        tokenizer = _SentencepieceTokenizer(file)
    if preset is not None:
        filled = (
            own if own is not None else default
            for own, default in zip(tokenizer.special, PRESETS[preset], strict=True)
        )
        tokenizer.special = SpecialIds(*filled)
    for name, value in tokenizer.special._asdict().items():
        if value is not None and not 0 <= value < tokenizer.vocab_size:
            raise ValueError(
                f"{file}: the {name} id is {value}, but ids go from 0 to "
                f"{tokenizer.vocab_size - 1}; correct the tokenizer's configuration files"
            )
    return tokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"{path}: no tokenizer.model, vocab.txt or tokenizer.json here; name a checkpoint folder "
        f"that has one of them"
    )


def _read_file(path: Path) -> bytes:
    size = path.stat().st_size
    if size > TOKENIZER_LIMIT:
        raise ValueError(
            f"{path}: {size:,} bytes, and no tokenizer has more than {TOKENIZER_LIMIT:,}; is it "
            f"another file under this name?"
        )
    return path.read_bytes()


class _SentencepieceTokenizer(Tokenizer):
    """A sentencepiece model; special ids are the model's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = _read_file(path)
        try:
            if not model:  # sentencepiece takes it, without a piece
                raise IndexError
            boundaries = _word_boundaries(model)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, IndexError, TypeError, UnicodeDecodeError):
            raise ValueError(
                f"{path}: not a sentencepiece model (truncated, or another format under this "
                f"name); fetch the file again, or name a tokenizer.json"
            ) from None
        # Messages of protocol buffers that follow each other are merged: the last value holds.
        self._continuing = sentencepiece.SentencePieceProcessor(model_proto=model + _CONTINUES)
        self._digest = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        self._dtype = token_dtype(self.vocab_size)
        self._words = _Words(self._processor, self._dtype, boundaries) if boundaries else None
        ids = (getattr(self._processor, f"{name}_id")() for name in SpecialIds._fields)
        self.special = SpecialIds(*(None if value < 0 else value for value in ids))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._words is not None:
            return [self._words.encode(text) for text in texts]
        return [
            np.array(ids, self._dtype) for ids in self._processor.encode(list(texts), num_threads=1)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuing.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        return self._continuing.decode([int(i) for i in ids])

    def token_id(self, token: str) -> int | None:
        id = self._processor.piece_to_id(token)
        return id if self._processor.is_control(id) else None

    def fingerprint(self) -> str:
        return hashlib.sha256(f"sentencepiece {self._digest}".encode()).hexdigest()


class _JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, read by the tokenizers library; special ids from the files beside it."""

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{path}: reading tokenizer.json needs the optional library tokenizers; "
                f"pip install tokenizers, or name a sentencepiece tokenizer.model"
            ) from None
        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            reason = str(error)[:200]
            raise ValueError(f"{path}: not a tokenizer.json that can be read ({reason})") from None
        self._continuing = tokenizers.Tokenizer.from_str(_without_prefix(content))
        for each in (self._tokenizer, self._continuing):
            each.no_truncation()  # many files carry their model's 512 tokens as a limit
            each.no_padding()
            each.encode_special_tokens = True  # their text in a note stays text
        self._special_tokens = {
            added.content: id
            for id, added in self._tokenizer.get_added_tokens_decoder().items()
            if added.special
        }
        self._digest = hashlib.sha256(content).hexdigest()
        self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        self._dtype = token_dtype(self.vocab_size)
        self.special = self._read_special(path.parent)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuing.encode(text, add_special_tokens=False).ids

    def decode_continuation(self, ids: Sequence[int]) -> str:
        return self._continuing.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._special_tokens.get(token)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"tokenizer.json {self._digest}".encode()).hexdigest()

    def _read_special(self, folder: Path) -> SpecialIds:
        """By name in tokenizer_config or special_tokens_map, else by id in config.json."""
        named = [
            _read_json(folder / n) for n in ("tokenizer_config.json", "special_tokens_map.json")
        ]
        numbered = _read_json(folder / "config.json")
        found = (self._special_id(name, named, numbered) for name in SpecialIds._fields)
        return SpecialIds(*found)

    def _special_id(self, name: str, named: list[dict], numbered: dict) -> int | None:
        for config in named:
            token = config.get(f"{name}_token")
            content = token.get("content") if isinstance(token, dict) else token
            if content:
                if not isinstance(content, str) or content not in self._ids:
                    raise ValueError(
                        f"{self.path.parent}: the {name} token named in its configuration is not "
                        f"in {self.path.name}; the files belong to different tokenizers"
                    )
                return self._ids[content]
        value = numbered.get(f"{name}_token_id")
        if isinstance(value, list):  # Llama 3 lists several end tokens: the first ends a document
            value = value[0] if value else None
        return value if type(value) is int else None


def _without_prefix(content: bytes) -> str:
    """A tokenizer.json without the space that it puts before a text, and drops when decoding."""
    raw = json.loads(content)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        raw[part] = _steps_without_prefix(raw.get(part))
    return json.dumps(raw)


def _steps_without_prefix(step: dict | None) -> dict | None:
    """A step of a tokenizer.json, or a sequence of steps, likewise; None if nothing is left."""
    if step is None:
        return None
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in step:
            kept = [_steps_without_prefix(inner) for inner in step[name]]
            return {**step, name: [inner for inner in kept if inner is not None]}
    if step["type"] == "Prepend" or (step["type"] == "Strip" and step.get("content") == " "):
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never", "add_prefix_space": False}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


class _Rules(NamedTuple):
    """How a BERT's text is prepared; see `data.wordpiece`."""

    lowercase: bool
    strip_accents: bool
    split_cjk: bool


_BERT_TOKENS = {"unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]"}
_BERT_NAMES = {"unk": "unk_token", "bos": "cls_token", "eos": "sep_token", "pad": "pad_token"}


class _WordPieceTokenizer(Tokenizer):
    """A BERT's vocabulary: [CLS] is BOS and [SEP] is EOS."""

    closes_notes = True

    def __init__(self, path: Path, pieces: Sequence[str], rules: _Rules) -> None:
        self.path = path
        self.vocab_size = len(pieces)
        self._pieces = pieces
        vocabulary = {piece: id for id, piece in enumerate(pieces)}
        config = _read_json(path.parent / "tokenizer_config.json")
        found = {}
        for name, default in _BERT_TOKENS.items():
            token = config.get(_BERT_NAMES[name]) or default
            token = token.get("content") if isinstance(token, dict) else token
            if token not in vocabulary:
                raise ValueError(
                    f"{path}: the vocabulary lacks {token!r}, which marks a text for a BERT; is "
                    "it another file under this name?"
                )
            found[name] = vocabulary[token]
        self.special = SpecialIds(**found)
        self._words = WordPiece(
            vocabulary,
            unk_id=found["unk"],
            dtype=token_dtype(self.vocab_size),
            **rules._asdict(),
        )
        described = json.dumps([pieces, rules, self.special])
        self._digest = hashlib.sha256(f"wordpiece {described}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text).tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._words.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self._pieces[int(id)] for id in ids).replace(" ##", "")

    def fingerprint(self) -> str:
        return self._digest


def _read_vocabulary(path: Path) -> tuple[list[str], _Rules]:
    """The pieces of a vocab.txt, one a line, and what the file beside it says of the text."""
    try:
        lines = _read_file(path).decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text in UTF-8; fetch the file again") from None
    pieces = lines[:-1] if lines[-1] == "" else lines
    config = _read_json(path.parent / "tokenizer_config.json")
    settings = {
        name: config.get(name)
        for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    }
    for name, value in settings.items():
        if value not in (None, True, False):
            raise ValueError(f"{path.parent}/tokenizer_config.json: {name} is not true or false")
    lowercase = settings["do_lower_case"]
    if lowercase is None:
        # Older folders do not say; a cased vocabulary has capitals, an uncased one has none.
        lowercase = all(piece == piece.lower() for piece in pieces if not piece.startswith("["))
    return pieces, _rules(lowercase, settings["strip_accents"], settings["tokenize_chinese_chars"])


def _rules(lowercase: bool, strip_accents: bool | None, split_cjk: bool | None) -> _Rules:
    return _Rules(
        lowercase=lowercase,
        strip_accents=lowercase if strip_accents is None else strip_accents,
        split_cjk=split_cjk is not False,
    )


def _read_wordpiece_json(path: Path, content: bytes) -> tuple[list[str], _Rules] | None:
    """The same of a tokenizer.json whose model is BERT's WordPiece; None for any other."""
    if b'"WordPiece"' not in content:
        return None
    raw = _read_json(path)
    model, normalizer = raw.get("model"), raw.get("normalizer")
    if not isinstance(model, dict) or model.get("type") != "WordPiece":
        return None
    vocabulary = model.get("vocab")
    is_bert = (
        isinstance(normalizer, dict)
        and normalizer.get("type") == "BertNormalizer"
        and normalizer.get("clean_text") is True
        and raw.get("pre_tokenizer") == {"type": "BertPreTokenizer"}
        and model.get("continuing_subword_prefix") == "##"
        and model.get("max_input_chars_per_word") == PIECE_CHARACTERS
    )
    if not is_bert or not isinstance(vocabulary, dict):
        raise ValueError(
            f"{path}: its text is not prepared as BERT's is, which alone is read of WordPiece"
        )
    assert isinstance(normalizer, dict)
    try:
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    except TypeError:
        pieces = []
    added = raw.get("added_tokens") or []
    known = all(vocabulary.get(token["content"]) == token["id"] for token in added)
    if list(map(vocabulary.get, pieces)) != list(range(len(vocabulary))) or not known:
        raise ValueError(f"{path}: the ids of the vocabulary are not 0, 1, 2, ...")
    return pieces, _rules(
        bool(normalizer.get("lowercase")),
        normalizer.get("strip_accents"),
        normalizer.get("handle_chinese_chars"),
    )


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not valid JSON in UTF-8; fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__} where a JSON object is expected")
    return value


class _WordBoundaries(NamedTuple):
    """How a model's texts fall into words that are encoded independently."""

    pattern: re.Pattern[str]
    dummy_prefix: bool  # the model puts a space before a text
    collapse_spaces: bool  # the model drops spaces at both ends and repeated ones


class _Words(dict[str, bytes]):
    """Ids of the words seen, as the bytes of an array; a new word is encoded and kept."""

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        dtype: np.dtype,
        boundaries: _WordBoundaries,
    ) -> None:
        super().__init__()
        self._processor = processor
        self._dtype = dtype
        self._find_words = boundaries.pattern.findall
        self._dummy_prefix = boundaries.dummy_prefix
        self._collapse_spaces = boundaries.collapse_spaces
        self._newline_ids = len(processor.encode("\n"))

    def encode(self, text: str) -> np.ndarray:
        if self._collapse_spaces:
            if SPACE in text:  # written out, it counts as a space in some places and not in others
                return np.array(self._processor.encode(text), self._dtype)
            text = " ".join(filter(None, text.split(" ")))
        if self._dummy_prefix and text:
            text = " " + text
        ids = b"".join(map(self.__getitem__, self._find_words(text)))
        return np.frombuffer(ids, self._dtype)

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._encode_word(word), self._dtype).tobytes()
        if len(word) <= WORD_CHARACTERS:
            if len(self) >= WORDS_KEPT:
                self.clear()
            self[word] = ids
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if not self._dummy_prefix:
            return self._processor.encode(word)
        if word in (" ", SPACE):  # an empty text gets no prefix
            return [self._processor.piece_to_id(SPACE)]
        if word[:1] in (" ", SPACE):
            return self._processor.encode(word[1:])
        # A word after a newline must not get the prefix: encode the newline too, and drop its ids.
        return self._processor.encode("\n" + word)[self._newline_ids :]


# Numbers of the fields of sentencepiece_model.proto that decide whether words are independent.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_TYPE = 1, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BPE = 3, 24, 2
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
# A model's end that takes back the space before a text and keeps all others.
_CONTINUES = bytes((_NORMALIZER << 3 | 2, 4, _DUMMY_PREFIX << 3, 0, _REMOVE_EXTRA_SPACES << 3, 0))


def _word_boundaries(model: bytes) -> _WordBoundaries | None:
    """Where this model's text may be cut without changing its ids; None where that is not proven.

    A word is a run of spaces with the characters up to the next space, or up to and with the next
    newline where no piece goes on after one. Asked of the model: BPE, no normalisation of
    characters, no user-defined pieces (they are matched before the merges), and no piece with a
    space after another character.
    """
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    newline_ends_word = True
    newline_is_known = False  # unknown characters side by side become one <unk>, over a newline too
    pieces = set()
    for number, value in _fields(model):
        if number == _PIECES and isinstance(value, bytes):
            piece = dict(_fields(value))
            piece_text = piece.get(_PIECE_TEXT, b"")
            if not isinstance(piece_text, bytes):  # a number: the file is damaged
                raise TypeError
            text = piece_text.decode()
            kind = piece.get(_PIECE_TYPE, _NORMAL)
            if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE):
                return None
            if text == "\n" or (kind == _BYTE and text == "<0x0A>"):
                newline_is_known = True
            if kind == _NORMAL:
                if SPACE in text.lstrip(SPACE):
                    return None
                newline_ends_word = newline_ends_word and "\n" not in text[:-1]
                pieces.add(text)
        elif number == _TRAINER and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == _NORMALIZER and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    plain = (
        trainer.get(_MODEL_TYPE) == _BPE
        and not trainer.get(_WHITESPACE_AS_SUFFIX, 0)
        and not normalizer.get(_CHARACTER_MAP)
        and normalizer.get(_ESCAPE_SPACES, 1)
        and SPACE in pieces
    )
    if not plain:
        return None
    until = rf"[^ {SPACE}\n]*\n?" if newline_ends_word and newline_is_known else rf"[^ {SPACE}]*"
    return _WordBoundaries(
        re.compile(rf"[ {SPACE}]*{until}"),
        dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        collapse_spaces=bool(normalizer.get(_REMOVE_EXTRA_SPACES, 1)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one protocol-buffer message; raises IndexError when it is cut."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise IndexError
        if at + size > len(message):
            raise IndexError
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
