"""The token cache: same ids however it is built, its key, its privacy, and what a kill leaves."""

import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import cache as module
from data.cache import TokenCache, cache_key, digest, tokenise
from data.notes import Note, open_notes
from data.tokenizer import load_tokenizer
from data.worker import Worker, encode_texts
from tests.data.conftest import WORDS, CharacterTokenizer, ListedNotes

ROOT = Path(__file__).resolve().parents[2]


def some_notes(count: int) -> list[Note]:
    return [
        Note(
            " ".join(WORDS[i % 5 :: 1 + i % 3]) + f"\n{i} é" * (i % 4), f"p{i % 7}", str(9 - i % 10)
        )
        for i in range(count)
    ]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_NOTES", 7)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_cache_holds_what_the_tokenizer_gives(
    tokenizer_folder: Path, tmp_path: Path, small_blocks: None, workers: int
) -> None:
    notes = some_notes(100)
    tokenizer = load_tokenizer(tokenizer_folder)
    done: list[int] = []
    cache = tokenise(
        ListedNotes(notes), tokenizer, cache_folder=tmp_path, workers=workers, progress=done.append
    )
    assert len(cache) == 100
    assert done[-1] == 100
    assert done == sorted(done)
    for row, note in enumerate(notes):
        assert cache.tokens_of(row).tolist() == tokenizer.encode(note.text)
        assert cache.label_names[cache.labels[row]] == note.label
    assert cache.text_digests.tolist() == [digest(note.text) for note in notes]
    assert cache.patient_digests is not None
    assert cache.patient_digests.tolist() == [digest(note.patient) for note in notes]
    rows = np.array([3, 99, 0], np.uint32)
    assert cache.lengths(rows).tolist() == [len(tokenizer.encode(notes[r].text)) for r in rows]
    assert cache.tokens.dtype == np.uint16


@pytest.mark.parametrize(
    "folder", ["tokenizers/llama2.model", "stories260k", "tokenizers/bert_uncased"]
)
def test_real_notes_by_processes(real_data: Path, tmp_path: Path, monkeypatch, folder: str) -> None:
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 100_000)
    source = open_notes(real_data / "notes" / "medical_notes_500.csv", label_column="label")
    tokenizer = load_tokenizer(real_data / folder)
    cache = tokenise(source, tokenizer, cache_folder=tmp_path, workers=2)
    assert cache.label_names == ("1", "2", "3", "4")
    assert cache.patient_digests is None
    if tokenizer.path.suffix == ".model":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
        ids = processor.encode([note.text for note in source])
    else:
        ids = [tokenizer.encode(note.text) for note in source]
    assert [cache.tokens_of(row).tolist() for row in range(500)] == ids


def test_a_second_call_opens_the_same_cache(tmp_path: Path) -> None:
    class Once(ListedNotes):
        def __iter__(self):
            assert not (tmp_path / key).exists(), "read again"
            return super().__iter__()

    source = Once([Note("a"), Note("b")])
    key = cache_key(source.fingerprint(), CharacterTokenizer())
    first = tokenise(source, CharacterTokenizer(), cache_folder=tmp_path)
    assert first.folder == tmp_path / key
    assert tokenise(source, CharacterTokenizer(), cache_folder=tmp_path).folder == first.folder
    assert os.listdir(tmp_path) == [key]


def test_the_key_changes_with_one_byte_of_anything(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, model = tmp_path / "t.csv", tmp_path / "tokenizer.model"
    content = "text,label,person\nabc,1,9\n"
    shutil.copy(tokenizer_folder / "tokenizer.model", model)

    def key(content: str = content, **columns: str) -> str:
        table.write_text(content, encoding="utf-8")
        return cache_key(open_notes(table, **columns).fingerprint(), load_tokenizer(model))

    keys = [
        key(),
        key(content.replace("abc", "abd")),
        key(label_column="label"),
        key(patient_column="person"),
    ]
    assert key() == keys[0]
    changed = bytearray(model.read_bytes())
    changed[changed.index("\u2581patient".encode()) + 3] ^= 32
    model.write_bytes(changed)
    keys.append(key())
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    keys.append(key())
    assert len(set(keys)) == 6


def test_only_the_owner_can_read_it_and_it_holds_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    notes = [Note("CANARYTEXT", "CANARYPERSON", "label a"), Note("b", "2", None)]
    umask = os.umask(0)
    try:
        cache = tokenise(ListedNotes(notes), CharacterTokenizer(), cache_folder=folder)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    for file in cache.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert b"CANARY" not in file.read_bytes()
        assert "CANARY" not in file.name


def test_labels_are_numbered_by_value_then_name(make_cache) -> None:
    labels = ["10", "b", None, "9", "a", "-1", "10"]
    cache = make_cache([Note(str(i), None, label) for i, label in enumerate(labels)])
    assert cache.label_names == ("-1", "9", "10", "a", "b")
    assert cache.labels.tolist() == [2, 4, -1, 1, 3, 0, 2]
    rows = np.array([0, 1, 3], np.uint32)
    assert cache.label_codes(rows).tolist() == [2, 4, 1]
    assert cache.label_codes(rows, ["9", "10", "b"]).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="1 of 7 notes without a label"):
        cache.label_codes(np.arange(7))
    with pytest.raises(ValueError, match="2 of 3 notes with a label that is none of the 1 known"):
        cache.label_codes(rows, ["9"])


@pytest.mark.parametrize("order", [1, -1])
def test_a_source_has_patients_or_none(make_cache, order: int) -> None:
    with pytest.raises(ValueError, match="listed notes: some notes have a patient and some have"):
        make_cache([Note("a", "1"), Note("b", None)][::order])


def test_too_many_labels_are_refused(make_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LABEL_LIMIT", 3)
    with pytest.raises(ValueError, match="more than 3 different labels") as caught:
        make_cache([Note("a", None, f"CANARY{i}") for i in range(4)])
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_source_leaves_nothing(
    tokenizer_folder: Path, tmp_path: Path, small_blocks: None, workers: int
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text\n" + "good note\n" * 60 + '"cut', encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_folder)
    with pytest.raises(ValueError, match="record 61"):
        tokenise(open_notes(table), tokenizer, cache_folder=tmp_path / "c", workers=workers)
    assert os.listdir(tmp_path / "c") == []


KILLED_BUILD = """
import os, signal, sys
from data.cache import tokenise
from data.notes import Note
from data.tokenizer import load_tokenizer
import data.cache

data.cache.BLOCK_NOTES = 5

class Source:
    description = "a source that ends the process"
    def fingerprint(self):
        return "killed"
    def __iter__(self):
        for i in range(100):
            yield Note(f"note {i}")
        if sys.argv[3] != "none":
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))
            signal.pause()
        yield Note("last")

tokenise(Source(), load_tokenizer(sys.argv[1]), cache_folder=sys.argv[2], workers=2)
"""


def build_in_a_process(
    tokenizer_folder: Path, cache: Path, name: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED_BUILD, str(tokenizer_folder), str(cache), name]
    # What a shell starts in the background ignores SIGINT, and so do its children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, preexec_fn=heed
    )


def test_a_killed_build_leaves_no_half_cache(tokenizer_folder: Path, tmp_path: Path) -> None:
    killed = build_in_a_process(tokenizer_folder, tmp_path, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert ".building-" in left.name
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    again = build_in_a_process(tokenizer_folder, tmp_path, "none")
    assert again.returncode == 0, again.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name == left.name.split(".")[0]
    assert len(TokenCache(folder)) == 101


def test_an_interrupted_build_cleans_up(tokenizer_folder: Path, tmp_path: Path) -> None:
    interrupted = build_in_a_process(tokenizer_folder, tmp_path, "SIGINT")
    assert interrupted.returncode != 0
    assert "KeyboardInterrupt" in interrupted.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    """Two processes that build the same cache: the second neither removes nor overwrites."""
    inner: list[TokenCache] = []

    class Nested(ListedNotes):
        def __iter__(self):
            yield self.notes[0]
            if not inner:
                same = ListedNotes(self.notes)
                inner.append(tokenise(same, CharacterTokenizer(), cache_folder=tmp_path))
            yield from self.notes[1:]

    notes = [Note("a"), Note("bc")]
    outer = tokenise(Nested(notes), CharacterTokenizer(), cache_folder=tmp_path)
    assert outer.folder == inner[0].folder
    assert os.listdir(tmp_path) == [outer.folder.name]
    assert outer.offsets.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "name", ["tokens.bin", "offsets.bin", "labels.bin", "texts.bin", "meta.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_refused(make_cache, name: str, damage: str) -> None:
    folder = make_cache([Note("abc", None, "x"), Note("de", None, "y")]).folder
    path = folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"delete the folder .*, and it is made again"):
        TokenCache(folder)


def test_notes_may_be_empty(make_cache) -> None:
    cache = make_cache([Note(""), Note("")])
    assert cache.lengths(np.arange(2)).tolist() == [0, 0]
    assert cache.tokens_of(1).tolist() == []


def test_a_worker_answers_as_this_process_does(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    worker = Worker(tokenizer)
    try:
        blocks = (["a b", "", "é\n\n😀"], [], ["x" * 3_000_000, *WORDS], [""])
        for texts in blocks:
            mine, its = encode_texts(tokenizer, texts), worker.encode(texts)
            for a, b in zip(mine, its, strict=True):
                assert a.dtype == b.dtype
                assert np.array_equal(a, b)
        worker._process.kill()
        with pytest.raises(RuntimeError, match="ended with code -9"):
            worker.encode(["text"])
    finally:
        worker.close()
    assert worker._process.poll() is not None


def test_a_worker_ends_with_its_input_and_needs_no_torch(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    worker = Worker(tokenizer)
    worker._stdin.close()
    assert worker._process.wait(timeout=30) == 0
    worker._stdout.close()
    check = "import sys, data.worker, data.loader, data.splits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
