"""Notes as a model will see them: segments, positions, what is scored, BOS and EOS, truncation.

    python -m data.preview --data notes.csv --text-column text --model llama-7b
    python -m data.preview --data cohort.csv --label-column died --model llama-7b --stage downstream
    python -m data.preview --data rows.json --model llama-7b --stage instruct --prompt-format alpaca
    python -m data.preview --data notes.csv --model llama-7b --show-text

The first notes of the table, or the first instruction rows and chats, pass through the same
tokeniser, cache and packing as in training.
Invariant: text, and token ids, from which it can be read, are shown with --show-text alone, and
only on a terminal, so that no note ends in a file or in another program.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from data.cache import TokenCache, tokenise
from data.conversations import BadRows, Conversations, ConversationSegments, fitting
from data.notes import Note, NoteSource, open_notes
from data.packing import IGNORED, PIECES_LIMIT, ClassificationNotes, LanguagePieces, PackedBatch
from data.prompts import PROMPTS, PromptEncoder, split_supervision
from data.tokenizer import Tokenizer, load_tokenizer
from data.wording import counted
from model.config import check_length, read_config
from model.ending import CommandParser, exit_code

_MOST_NOTES = 1000


class FirstNotes:
    """The first notes of a source, as a source."""

    def __init__(self, source: NoteSource, count: int) -> None:
        self._source, self._count = source, count
        self.group_names = source.group_names
        self.description = f"the first {counted(count, 'note')} of {source.description}"

    def __iter__(self) -> Iterator[Note]:
        return itertools.islice(iter(self._source), self._count)

    def fingerprint(self) -> str:
        """No cache of these notes is kept, so the whole table need not be read for its name."""
        return self.description


def main(arguments: Sequence[str]) -> int:
    """Read the command line, print, and return the exit code."""

    def work() -> None:
        parser = CommandParser("data.preview", "Show how notes become what a model is trained on.")
        parser.add_argument("--data", required=True, metavar="NOTES", help="as for train.py")
        parser.add_argument("--model", required=True, metavar="DIR", help="folder of the tokenizer")
        parser.add_argument("--text-column", metavar="NAME")
        parser.add_argument("--label-column", metavar="NAME")
        parser.add_argument("--patient-column", metavar="NAME")
        parser.add_argument("--tokenizer-preset", metavar="NAME", help="llama or pmc-llama")
        parser.add_argument(
            "--stage",
            choices=("clinical", "downstream", "instruct"),
            default="clinical",
            help="pieces of notes for the language model, whole notes for a classifier, or rows",
        )
        parser.add_argument(
            "--max-length", type=int, metavar="TOKENS", help="default: 512, of instruct 1024"
        )
        parser.add_argument("--truncate", choices=("head", "tail", "both"), default="head")
        parser.add_argument("--prompt-format", choices=tuple(PROMPTS), help="default: alpaca")
        parser.add_argument("--train-on-inputs", action="store_true", help="of instruct")
        parser.add_argument("--bad-rows", choices=get_args(BadRows), help="default: refuse")
        parser.add_argument(
            "--notes", type=int, default=3, metavar="N", help="how many, from first"
        )
        parser.add_argument("--show-text", action="store_true", help="on a terminal only")
        given = parser.read(arguments)
        if given.show_text and not sys.stdout.isatty():
            raise ValueError(
                "--show-text prints notes, and does so on a terminal only; here the output goes to "
                "a file or a program: leave --show-text out"
            )
        if not 1 <= given.notes <= _MOST_NOTES:
            raise ValueError(f"--notes must be from 1 to {_MOST_NOTES}, got {given.notes}")
        max_length = given.max_length or (1024 if given.stage == "instruct" else 512)
        if (Path(given.model) / "config.json").is_file():  # a tokenizer alone can be previewed too
            check_length(read_config(Path(given.model)), max_length)
        tokenizer = load_tokenizer(given.model, given.tokenizer_preset)
        columns = (given.text_column, given.label_column, given.patient_column)
        if given.stage == "instruct":
            if columns != (None, None, None):
                raise ValueError("--stage instruct reads rows and chats, which have no columns")
            rows = Conversations(given.data, bad_rows=given.bad_rows or "refuse")
            for reason, count in rows.bad_rows.items():
                print(f"bad rows, left out: {count:,} with {reason}")
            preview_rows(
                FirstNotes(rows, given.notes),
                PromptEncoder(tokenizer, given.prompt_format or "alpaca"),
                max_length=max_length,
                scores_inputs=given.train_on_inputs,
                show_text=given.show_text,
            )
            return
        if given.prompt_format or given.train_on_inputs or given.bad_rows:
            raise ValueError(
                "--prompt-format, --train-on-inputs and --bad-rows are settings of --stage instruct"
            )
        source = open_notes(
            given.data, text_column=columns[0], label_column=columns[1], patient_column=columns[2]
        )
        preview(
            FirstNotes(source, given.notes),
            tokenizer,
            is_language=given.stage == "clinical",
            max_length=max_length,
            truncate=given.truncate,
            show_text=given.show_text,
        )

    return exit_code("data.preview", arguments, work, interrupted="interrupted")


def preview(
    source: NoteSource,
    tokenizer: Tokenizer,
    *,
    is_language: bool,
    max_length: int,
    truncate: str,
    show_text: bool,
) -> None:
    """Print every note of the source, segment by segment."""
    with tempfile.TemporaryDirectory(prefix="preview-") as folder:  # mode 0700
        cache = tokenise(source, tokenizer, cache_folder=folder, workers=1)
        if not len(cache):
            raise ValueError(f"{source.description}: there is no note")
        print(source.description)
        print(f"tokenizer: {tokenizer.vocab_size:,} pieces, {_special(tokenizer)}")
        for row in range(len(cache)):
            note = np.array([row], np.uint32)
            segments: LanguagePieces | ClassificationNotes
            if is_language:
                segments = LanguagePieces(
                    cache,
                    note,
                    max_length=max_length,
                    bos_id=tokenizer.bos_id,
                    eos_id=tokenizer.eos_id,
                )
            else:
                segments = ClassificationNotes(
                    cache, note, max_length=max_length, bos_id=tokenizer.bos_id, truncate=truncate
                )
            batch = segments.batch(np.arange(len(segments)))
            print(f"\nnote in row {row}: {_facts(cache, row)}")
            for line in _describe(batch, cache, row, tokenizer):
                print(f"  {line}")
            if isinstance(segments, ClassificationNotes):
                _say_cut(segments, cache, row, len(batch.input_ids), truncate)
            if show_text:
                _show(batch, tokenizer)


def preview_rows(
    source: NoteSource,
    encoder: PromptEncoder,
    *,
    max_length: int,
    scores_inputs: bool,
    show_text: bool,
) -> None:
    """Print every conversation of the source as prompts and responses, token by token."""
    own = encoder.tokenizer
    with tempfile.TemporaryDirectory(prefix="preview-") as folder:  # mode 0700
        cache = tokenise(source, encoder, cache_folder=folder, workers=1)
        print(source.description)
        print(f"tokenizer: {own.vocab_size:,} pieces, {_special(own)}")
        print(f"prompt format: {encoder.name}, a response ends with token {encoder.end_id}")
        for number in range(len(cache)):
            row = np.array([number], np.uint32)
            tokens = int(cache.lengths(row)[0])
            print(f"\nrow {number}: {counted(tokens, 'token')}")
            if not len(fitting(cache, row, max_length)):
                print(f"  left out: more tokens than --max-length {max_length:,}")
                continue
            segments = ConversationSegments(
                cache, row, max_length=max_length, scores_inputs=scores_inputs
            )
            batch = segments.batch(np.array([0]))
            assert batch.labels is not None
            supervised = split_supervision(cache.tokens_of(number))[1]
            kinds = _kinds(batch.input_ids, supervised, encoder)
            for kind, is_scored, begins, n in _runs(kinds, batch.labels):
                scored = "scored" if is_scored else "not scored"
                print(f"  {_where(begins, n):>16}  {kind:<8}  {scored}")
                if show_text and kind in ("prompt", "response"):
                    ids = batch.input_ids[begins : begins + n].tolist()
                    decode = own.decode if kind == "prompt" else own.decode_continuation
                    print(f"  text: {printable(decode(ids))}")
                    print(f"  token ids: {' '.join(map(str, ids))}")


def _kinds(ids: np.ndarray, supervised: np.ndarray, encoder: PromptEncoder) -> list[str]:
    """What each token of a conversation is, by its id and by whether it is supervised."""
    own = encoder.tokenizer
    named = {id: part.token for part, id in encoder.special.items() if id is not None}
    named |= {id: name for id, name in ((own.bos_id, "BOS"), (own.eos_id, "EOS")) if id is not None}
    return [
        named.get(id, "response" if is_supervised else "prompt")
        for id, is_supervised in zip(ids.tolist(), supervised.tolist(), strict=True)
    ]


def _special(tokenizer: Tokenizer) -> str:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return f"BOS {'none' if bos is None else bos}, EOS {'none' if eos is None else eos}"


def _facts(cache: TokenCache, row: int) -> str:
    tokens = int(cache.lengths(np.array([row]))[0])
    if cache.multilabel:
        label = counted(int(cache.label_matrix(np.array([row])).sum()), "label")
    else:
        code = int(cache.labels[row])
        label = "no label" if code < 0 else f"label {cache.label_names[code]!r}"
    patient = "no patient" if cache.patient_digests is None else "a patient"
    return f"{counted(tokens, 'token')}, {label}, {patient}"


def _describe(
    batch: PackedBatch, cache: TokenCache, row: int, tokenizer: Tokenizer
) -> Iterator[str]:
    """Each segment in runs of tokens of one kind."""
    count = len(batch.offsets) - 1
    length = int(cache.lengths(np.array([row]))[0])
    has_bos = tokenizer.bos_id is not None
    for i, (begin, end) in enumerate(itertools.pairwise(batch.offsets.tolist())):
        piece = int(batch.sample_ids[i]) % PIECES_LIMIT
        size = end - begin
        first = piece * (len(batch.input_ids[: batch.offsets[1]]) - 1)  # token of BOS + note + EOS
        labels = None if batch.labels is None else batch.labels[begin:end]
        scored = 0 if labels is None else int((labels != IGNORED).sum())
        yield (
            f"segment {i + 1} of {count}: {counted(size, 'token')} at positions 0 to {size - 1:,}, "
            + (f"{scored:,} scored" if labels is not None else "its last one is classified")
        )
        kinds = ["note"] * size
        if has_bos and first == 0:
            kinds[0] = "BOS"
        if labels is not None and first + size > length + has_bos:
            kinds[-1] = "EOS"
        for kind, is_scored, begins, n in _runs(kinds, labels):
            why = "" if labels is None else "  scored" if is_scored else "  not scored"
            if labels is not None and not is_scored:
                why += ": the segment before scored it" if first else ": nothing stands before it"
            yield f"  {_where(begins, n):>16}  {kind:<4}{why}"


def _runs(kinds: Sequence[str], labels: np.ndarray | None) -> Iterator[tuple[str, bool, int, int]]:
    """Runs of tokens of one kind: the kind, whether they are scored, the first, how many."""
    at = 0
    for (kind, is_scored), run in itertools.groupby(
        (kind, labels is not None and labels[at] != IGNORED) for at, kind in enumerate(kinds)
    ):
        n = len(list(run))
        yield kind, is_scored, at, n
        at += n


def _where(begins: int, n: int) -> str:
    return f"{begins:,}" if n == 1 else f"{begins:,} to {begins + n - 1:,}"


def _say_cut(
    segments: ClassificationNotes, cache: TokenCache, row: int, kept: int, truncate: str
) -> None:
    if segments.truncated:
        lost = int(cache.lengths(np.array([row]))[0]) + 1 - kept
        print(
            f"  truncated: {counted(lost, 'token is', 'tokens are')} left out, the {truncate} is "
            "kept"
        )


def _show(batch: PackedBatch, tokenizer: Tokenizer) -> None:
    for i, (begin, end) in enumerate(itertools.pairwise(batch.offsets.tolist())):
        ids = batch.input_ids[begin:end].tolist()
        print(f"  text of segment {i + 1}: {printable(tokenizer.decode(ids))}")
        print(f"  token ids of segment {i + 1}: {' '.join(map(str, ids))}")


def printable(text: str) -> str:
    """Text whose control characters are written out: a note must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
