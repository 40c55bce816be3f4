"""The token cache: every note of a source as token ids, in memory-mapped files.

A cache is a folder named by the SHA-256 of the source's fingerprint, the tokenizer's and this
format's version, so whatever changes the tokens changes the folder. It holds token ids without BOS
and EOS, MD5 digests of texts and patients (the split is a function of them) and label codes, but no
text. Token ids are as good as text: the folder is for its owner's eyes only (mode 0700).

Invariant: a folder under its final name is whole. It is built aside, synced, then renamed, and when
it is opened every byte is compared with the SHA-256 that was written.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import queue
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.notes import CohortNotes, Note, NoteSource
from data.tokenizer import token_dtype
from data.wording import counted
from data.worker import EncodedTexts, TextEncoder, Worker, encode_texts

FORMAT = 4
DIGEST_BLOCK = 1 << 18  # bytes that one thread hashes at once
BLOCK_CHARACTERS = 1 << 19
BLOCK_NOTES = 1 << 12
BLOCKS_BEFORE_WORKERS = 4  # a smaller source is done before the processes would have started
LABEL_LIMIT, LABEL_CHARACTERS = 10_000, 100

_FILES = {  # file: its numbers, beside tokens.bin
    "offsets.bin": np.dtype(np.int64),
    "texts.bin": np.dtype("S16"),
    "patients.bin": np.dtype("S16"),
    "label_ends.bin": np.dtype(np.int64),
    "labels.bin": np.dtype(np.int32),
}


class TokenCache:
    """A finished cache, memory-mapped: N notes, none of them in memory.

    tokens: uint16 or uint32 [total], without BOS and EOS, or for conversations as
    `data.prompts.PromptEncoder` gives them; offsets: int64 [N + 1];
    text_digests: S16 [N], MD5 of each text; patient_digests: S16 [N] or None, MD5 of each patient;
    labels: int32 [N], codes into `label_names`, -1 for a note without a label; where a note may
    have several (`multilabel`), those of all notes, note i's up to label_ends[i] (int64 [N]).
    cohort_counts: what became of the rows that a cohort's rules went through, by reason; often {}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = _read_meta(folder)
        _check_files(folder, meta)
        self.description: str = meta["description"]
        self.label_names: tuple[str, ...] = tuple(meta["label_names"])
        self.multilabel: bool = meta["multilabel"]
        self.cohort_counts: dict[str, int] = meta["cohort_counts"]
        notes = meta["notes"]
        self._notes = notes
        self.tokens = self._map("tokens.bin", np.dtype(meta["token_dtype"]), meta["tokens"])
        self.offsets = self._map("offsets.bin", _FILES["offsets.bin"], notes + 1)
        self.text_digests = self._map("texts.bin", _FILES["texts.bin"], notes)
        self.labels = self._map("labels.bin", _FILES["labels.bin"], meta["labels"])
        self.label_ends = self._map("label_ends.bin", _FILES["label_ends.bin"], notes)
        self.patient_digests: np.ndarray | None = None
        if meta["patients"]:
            self.patient_digests = self._map("patients.bin", _FILES["patients.bin"], notes)

    def __len__(self) -> int:
        return self._notes

    def tokens_of(self, note: int) -> np.ndarray:
        """The token ids of one note."""
        return self.tokens[self.offsets[note] : self.offsets[note + 1]]

    def lengths(self, notes: np.ndarray) -> np.ndarray:
        """Tokens in each of the notes: int64 [n]."""
        notes = notes.astype(np.int64)
        return self.offsets[notes + 1] - self.offsets[notes]

    def label_codes(self, notes: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
        """Codes of the notes' labels in `names` (default: the cache's own): int64 [n].

        Raises ValueError for a note without a label, and for a label that `names` does not have.
        """
        self._check_kind(multilabel=False)
        codes = np.asarray(self.labels[notes], np.int64)
        missing = int((codes < 0).sum())
        if missing:
            raise ValueError(
                f"{self.description}: {missing:,} of {counted(len(notes), 'note')} without a "
                "label; fill the label column, or drop such rows"
            )
        if names is None:
            return codes
        known = {name: code for code, name in enumerate(names)}
        translate = np.array([known.get(name, -1) for name in self.label_names], np.int64)
        codes = translate[codes] if len(codes) else codes
        unknown = int((codes < 0).sum())
        if unknown:
            raise ValueError(
                f"{self.description}: {unknown:,} of {counted(len(notes), 'note')} with a label "
                f"that is none of the {len(names)} known ones; correct the labels, or train on "
                "them too"
            )
        return codes

    def label_matrix(self, notes: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
        """Which of `names` (default: the cache's own) each note has: float32 [n, C] of 0 and 1.

        A label that `names` does not have is left out. Raises ValueError for notes of one label.
        """
        names = self.label_names if names is None else names
        self._check_kind(multilabel=True)
        known = {name: code for code, name in enumerate(names)}
        translate = np.array([known.get(name, -1) for name in self.label_names], np.int64)
        matrix = np.zeros((len(notes), len(names)), np.float32)
        for at, note in enumerate(notes.tolist()):
            codes = translate[self.labels[self._label_start(note) : self.label_ends[note]]]
            matrix[at, codes[codes >= 0]] = 1.0
        return matrix

    def label_counts(self, notes: np.ndarray) -> np.ndarray:
        """How many of the notes have each of `label_names`: int64 [C]."""
        self._check_kind(multilabel=True)
        parts = [self.labels[self._label_start(i) : self.label_ends[i]] for i in notes.tolist()]
        codes = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return np.bincount(codes, minlength=len(self.label_names))

    def _label_start(self, note: int) -> int:
        return int(self.label_ends[note - 1]) if note else 0

    def _check_kind(self, *, multilabel: bool) -> None:
        if len(self) and self.multilabel != multilabel:
            here, wanted = (
                ("several labels", "one") if self.multilabel else ("one label", "several")
            )
            raise ValueError(
                f"{self.description}: a note has {here} here, and {wanted} where these are to be "
                f"used; name notes of the same task"
            )

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise ValueError(
                f"{path}: missing, or not the size its cache says; delete the folder "
                f"{self.folder}, and it is made again"
            )
        if count == 0:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype, mode="r", shape=(count,))


def tokenise(
    source: NoteSource,
    tokenizer: TextEncoder,
    *,
    cache_folder: str | Path,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenCache:
    """Opens the cache of a source under a tokenizer, building it when it is not there.

    `workers` processes tokenise (default: one for each core this process may use; 1: in this
    process); `progress` is called with the number of notes done. Raises ValueError for a damaged
    source, RuntimeError when a process dies; neither leaves a cache behind.
    """
    cache_folder = Path(cache_folder)
    name = cache_key(source.fingerprint(), tokenizer)
    folder = cache_folder / name
    if not folder.is_dir():
        cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _build(folder, source, tokenizer, workers or len(os.sched_getaffinity(0)), progress)
    return TokenCache(folder)


def find_cache(
    source_fingerprint: str, tokenizer: TextEncoder, *, cache_folder: str | Path
) -> TokenCache | None:
    """The cache of a source that need not be there any more; None where it was never made."""
    folder = Path(cache_folder) / cache_key(source_fingerprint, tokenizer)
    return TokenCache(folder) if folder.is_dir() else None


def cache_key(source_fingerprint: str, tokenizer: TextEncoder) -> str:
    """The name of the cache: SHA-256 of the source's content, the tokenizer and the format."""
    parts = [FORMAT, source_fingerprint, tokenizer.fingerprint()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _build(
    folder: Path,
    source: NoteSource,
    tokenizer: TextEncoder,
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    _sweep(folder)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
    lock = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # says to others' _sweep that this build is alive
        with contextlib.ExitStack() as stack:
            writer = _Writer(aside, folder.name, source.description, tokenizer, stack)
            for notes, encoded in _encoded_blocks(_blocks(source), tokenizer, workers, stack):
                writer.write(notes, encoded)
                if progress is not None:
                    progress(writer.notes)
            if isinstance(source, CohortNotes):
                writer.finish(label_list=source.label_list, cohort_counts=source.counts or {})
            else:
                writer.finish(label_list=(), cohort_counts={})
        os.fsync(lock)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else: another process finished the same cache first
                raise
        _sync_folder(folder.parent)
    finally:
        os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what killed builds of this cache left: folders that no process holds a lock on."""
    for left in folder.parent.glob(f"{folder.name}.building-*"):
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _blocks(source: NoteSource) -> Iterator[list[Note]]:
    """The source's notes in blocks that are worth a trip to another process."""
    block: list[Note] = []
    characters = 0
    for note in source:
        block.append(note)
        characters += len(note.text)
        if characters >= BLOCK_CHARACTERS or len(block) == BLOCK_NOTES:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _encoded_blocks(
    blocks: Iterator[list[Note]],
    tokenizer: TextEncoder,
    workers: int,
    stack: contextlib.ExitStack,
) -> Iterator[tuple[list[Note], EncodedTexts]]:
    """Every block with its tokens, in order; by worker processes when there are enough blocks."""
    first = list(itertools.islice(blocks, BLOCKS_BEFORE_WORKERS))
    blocks = itertools.chain(first, blocks)
    if workers == 1 or len(first) < BLOCKS_BEFORE_WORKERS:
        for block in blocks:
            yield block, encode_texts(tokenizer, [note.text for note in block])
        return

    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    pool = stack.enter_context(ThreadPoolExecutor(workers))
    for _ in range(workers):
        worker = Worker(tokenizer)
        stack.callback(worker.close)  # before the pool's exit waits for its threads
        free.put(worker)

    def encode(block: list[Note]) -> EncodedTexts:
        worker = free.get()
        try:
            return worker.encode([note.text for note in block])
        finally:
            free.put(worker)

    ahead: deque[tuple[list[Note], Future[EncodedTexts]]] = deque()
    for block in blocks:
        ahead.append((block, pool.submit(encode, block)))
        if len(ahead) > 2 * workers:
            block, future = ahead.popleft()
            yield block, future.result()
    while ahead:
        block, future = ahead.popleft()
        yield block, future.result()


class _Writer:
    """Appends blocks to the files of a cache; keeps nothing of a note in memory."""

    def __init__(
        self,
        folder: Path,
        key: str,
        description: str,
        tokenizer: TextEncoder,
        stack: contextlib.ExitStack,
    ) -> None:
        self.notes = 0
        self._key = key
        self._description = description
        self._folder = folder
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokens = 0
        self._patients: bool | None = None
        self._multilabel: bool | None = None
        self._labels = 0
        self._label_codes: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {
            name: stack.enter_context(open(folder / name, "xb", opener=_private))  # noqa: SIM115
            for name in ("tokens.bin", *_FILES)
        }
        self._append("offsets.bin", np.zeros(1, np.int64))

    def write(self, notes: list[Note], encoded: EncodedTexts) -> None:
        self._append("tokens.bin", encoded.tokens.astype(self._dtype, copy=False))
        self._append("offsets.bin", self._tokens + np.cumsum(encoded.counts, dtype=np.int64))
        self._append("texts.bin", encoded.digests)
        codes = [self._codes(note.label) for note in notes]
        self._append("label_ends.bin", self._labels + np.cumsum([len(c) for c in codes]))
        self._labels += sum(len(c) for c in codes)
        self._append("labels.bin", np.array(list(itertools.chain(*codes)), np.int32))
        self._append("patients.bin", np.array(self._patient_digests(notes), "S16"))
        self._tokens += len(encoded.tokens)
        self.notes += len(notes)

    def finish(self, *, label_list: Sequence[str], cohort_counts: dict[str, int]) -> None:
        """Puts the label codes in the order of their names, syncs the files, writes the meta."""
        for name in label_list:
            self._code(name)
        names = sorted(self._label_codes, key=_label_order)
        for file in self._files.values():
            file.flush()
        if self._labels:
            rank = np.empty(len(names) + 1, np.int32)
            rank[[self._label_codes[name] for name in names]] = np.arange(len(names))
            rank[-1] = -1
            path = self._folder / "labels.bin"
            codes = np.memmap(path, np.int32, mode="r+")
            codes[:] = rank[codes]
            codes.flush()
        meta = {
            "format": FORMAT,
            "key": self._key,
            "description": self._description,
            "notes": self.notes,
            "tokens": self._tokens,
            "token_dtype": self._dtype.name,
            "patients": bool(self._patients),
            "multilabel": bool(self._multilabel),
            "labels": self._labels,
            "label_names": names,
            "cohort_counts": cohort_counts,
        }
        for file in self._files.values():
            os.fsync(file.fileno())
        meta["sha256"] = {name: _file_digest(self._folder / name) for name in self._files}
        with open(self._folder / "meta.json", "xb", opener=_private) as meta_file:
            meta_file.write(_sealed(meta))
            meta_file.flush()
            os.fsync(meta_file.fileno())

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(values.tobytes())

    def _codes(self, label: str | tuple[str, ...] | None) -> list[int]:
        if self._multilabel is None:
            self._multilabel = isinstance(label, tuple)
        assert self._multilabel == isinstance(label, tuple), "one kind of label in a source"
        if label is None:
            return [-1]
        return [self._code(name) for name in ((label,) if isinstance(label, str) else label)]

    def _code(self, label: str) -> int:
        if len(label) > LABEL_CHARACTERS:  # names of labels are written in plain; texts never are
            raise ValueError(
                f"{self._description}: a label has {len(label)} characters, and at most "
                f"{LABEL_CHARACTERS} are allowed; is the label column the right one?"
            )
        code = self._label_codes.setdefault(label, len(self._label_codes))
        if code >= LABEL_LIMIT:
            raise ValueError(
                f"{self._description}: more than {LABEL_LIMIT} different labels, the most that is "
                f"allowed; is the label column the right one?"
            )
        return code

    def _patient_digests(self, notes: list[Note]) -> list[bytes]:
        patients = notes[0].patient is not None
        if self._patients is None:
            self._patients = patients
        if any((note.patient is not None) != self._patients for note in notes):
            raise ValueError(
                f"{self._description}: some notes have a patient and some have none; every note "
                f"needs one, or the split could put one patient on both sides: drop the others"
            )
        if not self._patients:
            return []
        return [digest(note.patient) for note in notes if note.patient is not None]


def digest(text: str) -> bytes:
    """MD5 of a text or a patient, which decides its split."""
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def _label_order(name: str) -> tuple[bool, int, str]:
    """Whole numbers by value, then everything else by name."""
    number = name.lstrip("-").isdecimal() and len(name) < 19
    return (not number, int(name) if number else 0, name)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        content = path.read_bytes()
        meta = json.loads(content.partition(b"\n")[0])
        if content == _sealed(meta) and (meta["format"], meta["key"]) == (FORMAT, folder.name):
            return meta
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{path}: missing, damaged or of another version; delete the folder {folder}, and it is "
        f"made again"
    )


def _sealed(meta: dict[str, Any]) -> bytes:
    """The meta as a line of JSON, and a second line with the SHA-256 of the first."""
    line = json.dumps(meta).encode()
    return b"%s\n%s\n" % (line, hashlib.sha256(line).hexdigest().encode())


def _check_files(folder: Path, meta: dict[str, Any]) -> None:
    for name, written in meta["sha256"].items():
        path = folder / name
        if not path.is_file() or _file_digest(path) != written:
            raise ValueError(
                f"{path}: missing or damaged; delete the folder {folder}, and it is made again"
            )


def _file_digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of each block of a file, which all cores work on together."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offsets = range(0, os.fstat(descriptor).st_size, DIGEST_BLOCK)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            digests = pool.map(
                lambda at: hashlib.sha256(os.pread(descriptor, DIGEST_BLOCK, at)).digest(), offsets
            )
            return hashlib.sha256(b"".join(digests)).hexdigest()
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
