"""Instruction rows and chats: read strictly row by row, then segments that are never cut.

A row is {instruction, input, output} or {messages: [{role, content}, ...]}, in a JSON array or in
JSON lines. A row that cannot be used is refused with its line, or counted by reason and skipped.

Invariants: no message holds a row's text. A segment is a whole conversation with the token that
ends its last response: rows longer than `max_length` are left out (`fitting`), never cut.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.cache import TokenCache
from data.notes import Note, read_lines, unique_keys
from data.packing import IGNORED, PIECES_LIMIT, PackedBatch, join_segments
from data.prompts import Turn, check_turns, pack_turns, split_supervision

BadRows = Literal["refuse", "skip"]
ARRAY_LIMIT = 1 << 31  # bytes of a JSON array, which is read whole
FORMATS = ".json (an array of rows, or a row a line), .jsonl or .jsonl.gz"


class Row(NamedTuple):
    """A row as it stands in its file: the line it begins on, and its value or what is wrong."""

    line: int
    value: object
    fault: str | None = None


class Conversations:
    """The conversations of a file, as a source of notes whose texts are `pack_turns`.

    The file is read once when it is opened, so that bad rows are known before anything is made of
    it: `bad_rows` counts them by reason (with "refuse" there are none).
    """

    group_names: tuple[str, ...] = ()

    def __init__(self, path: str | Path, *, bad_rows: BadRows = "refuse") -> None:
        """Raises ValueError for a file that cannot be read, a bad row, or no row that is left."""
        self._path = Path(path)
        if not self._path.is_file():
            raise ValueError(f"{path}: no such file; rows are read from {FORMATS}")
        if not self._path.name.lower().endswith((".json", ".jsonl", ".jsonl.gz")):
            raise ValueError(f"{path}: this format is not known; rows are read from {FORMATS}")
        self.description = f"{path}, instructions"
        faults: Counter[str] = Counter()
        good = 0
        for row, turns in self._rows():
            if turns is not None:
                good += 1
            elif bad_rows == "refuse":
                raise ValueError(
                    f"{path}: line {row.line}: the row that begins there has {row.fault}; correct "
                    "it, or let bad rows be counted and left out with --bad-rows skip"
                )
            else:
                assert row.fault is not None
                faults[row.fault] += 1
        if not good:
            raise ValueError(f"{path}: no row in it that can be used ({sum(faults.values())} bad)")
        self.bad_rows: Mapping[str, int] = dict(sorted(faults.items()))

    def __iter__(self) -> Iterator[Note]:
        for _, turns in self._rows():
            if turns is not None:
                yield Note(pack_turns(turns))

    def fingerprint(self) -> str:
        with self._path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(f"conversations {content}".encode()).hexdigest()

    def _rows(self) -> Iterator[tuple[Row, list[Turn] | None]]:
        """Every row with its turns, or with its fault and None."""
        seen: set[str] = set()
        for row in read_rows(self._path):
            turns = None
            if row.fault is None:
                try:
                    turns = turns_of(row.value, seen)
                except ValueError as error:
                    row = row._replace(fault=str(error))
            yield row, turns


def turns_of(value: object, seen: set[str] | None = None) -> list[Turn]:
    """The turns of a row; ValueError says what the row has that it must not, in a few words.

    seen: the ids of earlier rows, to which that of this row is added.
    """
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    if "messages" in value:
        turns = _chat(value["messages"])
    else:
        for key in ("instruction", "input", "output"):
            if key not in value:
                raise ValueError(f"no {key}")
        said = [
            _text(value["instruction"], "instruction"),
            _text("" if value["input"] is None else value["input"], "input"),
            _text(value["output"], "output"),
        ]
        turns = [Turn("user", said[0], said[1]), Turn("assistant", said[2])]
    check_turns(turns)
    if seen is not None and value.get("id") is not None:
        name = json.dumps(value["id"], sort_keys=True)
        if name in seen:
            raise ValueError("an id that an earlier row has")
        seen.add(name)
    return turns


def _chat(messages: object) -> list[Turn]:
    if not isinstance(messages, list):
        raise ValueError("messages that are no list")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role")
        if "content" not in message:
            raise ValueError("a message without content")
        turns.append(Turn(message["role"], _text(message["content"], "content")))
    return turns


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} that is no string")
    if "\0" in value:
        raise ValueError("a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:  # of bytes that are no UTF-8 (`read_rows`), or half a pair
        raise ValueError("text that is not UTF-8") from None
    return value


def read_rows(path: Path) -> Iterator[Row]:
    """Rows with their lines. A byte that is not UTF-8 becomes half a surrogate pair in its row."""
    lines = enumerate(read_lines(path, errors="surrogateescape"), 1)
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _array(path)
            return
        yield _json_row(number, line)
        break
    for number, line in lines:
        if line.strip():
            yield _json_row(number, line)


def _json_row(number: int, line: str) -> Row:
    try:
        return Row(number, json.loads(line, object_pairs_hook=unique_keys))
    except (ValueError, RecursionError):
        return Row(number, None, "no valid JSON")


def _array(path: Path) -> Iterator[Row]:
    """The rows of a JSON array, one at a time, with the line on which each begins."""
    if path.stat().st_size > ARRAY_LIMIT:
        raise ValueError(
            f"{path}: a JSON array of more than {ARRAY_LIMIT >> 30} GiB, which is read whole; "
            "write it as JSON lines"
        )
    text = "".join(read_lines(path, errors="surrogateescape"))
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    at = _skip(text, _skip(text, 0) + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise ValueError(
                f"{path}: line {line}: the row that begins there is no valid JSON, and the rows "
                "behind it cannot be told apart; write the file again, best as JSON lines"
            ) from None
        yield Row(line, value)
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError(f"{path}: the array is cut off or damaged behind line {line}")
    if text[at + 1 :].strip():
        raise ValueError(f"{path}: something follows the JSON array; write the file again")


def _skip(text: str, at: int) -> int:
    """The place of the next character that is no white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def fitting(cache: TokenCache, rows: np.ndarray, max_length: int) -> np.ndarray:
    """The rows whose conversations have at most `max_length` tokens."""
    return rows[cache.lengths(rows) <= max_length]


class ConversationSegments:
    """Whole conversations as segments; `rows` (uint32 [n]) are of a cache that has supervision.

    scores_inputs: label every token but the first, as language modelling does; else only the
    responses with what ends them.
    """

    def __init__(
        self, cache: TokenCache, rows: np.ndarray, *, max_length: int, scores_inputs: bool = False
    ) -> None:
        assert len(rows) == len(fitting(cache, rows, max_length))
        self.max_length = max_length
        self._cache, self._rows, self._scores_inputs = cache, rows, scores_inputs

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each conversation: int64 [n]."""
        return self._cache.lengths(self._rows[indices])

    @property
    def scored_tokens(self) -> int:
        """Labelled tokens of all segments."""
        everything = (self.batch(np.array([index])) for index in range(len(self)))
        return sum(int(np.count_nonzero(batch.labels != IGNORED)) for batch in everything)

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """The conversations as one stream, each supervised token labelled with its own id."""
        rows = self._rows[indices].astype(np.int64)
        tokens, offsets = join_segments([self._cache.tokens_of(row) for row in rows])
        input_ids, is_supervised = split_supervision(tokens)
        labels = np.where(is_supervised | self._scores_inputs, input_ids, IGNORED)
        labels[offsets[:-1]] = IGNORED
        return PackedBatch(input_ids, labels, offsets, rows * PIECES_LIMIT, None, rows)
