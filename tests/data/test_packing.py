"""Packing: every token scored exactly once, notes come back whole, cuts where they are meant."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.notes import Note
from data.packing import (
    IGNORED,
    PIECES_LIMIT,
    ClassificationNotes,
    LanguagePieces,
    length_quantiles,
)
from tests.data.conftest import CharacterTokenizer

BOS, EOS = 1, 2


def rows_of(cache) -> np.ndarray:
    return np.arange(len(cache), dtype=np.uint32)


def text_of_length(length: int, seed: int) -> str:
    return "".join(chr(3 + (seed * 37 + i) % 1000) for i in range(length))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    max_length=st.integers(2, 17),
    bos=st.sampled_from([BOS, None]),
    eos=st.sampled_from([EOS, None]),
    order=st.randoms(use_true_random=False),
)
def test_every_token_is_scored_exactly_once(
    make_cache, lengths, max_length, bos, eos, order
) -> None:
    texts = [text_of_length(length, seed) for seed, length in enumerate(lengths)]
    cache = make_cache([Note(text) for text in texts])
    pieces = LanguagePieces(cache, rows_of(cache), max_length=max_length, bos_id=bos, eos_id=eos)
    indices = list(range(len(pieces)))
    order.shuffle(indices)
    batch = pieces.batch(np.array(indices, np.int64))
    sizes = np.diff(batch.offsets)
    assert sizes.tolist() == pieces.lengths(np.array(indices, np.int64)).tolist()
    assert len(sizes) == 0 or (sizes.min() >= 1 and sizes.max() <= max_length)
    assert len(set(batch.sample_ids.tolist())) == len(indices)

    scored: dict[int, list] = {row: [] for row in range(len(texts))}
    by_sample = np.argsort(batch.sample_ids)
    for segment in by_sample:
        begin, end = batch.offsets[segment : segment + 2]
        assert batch.labels[begin] == IGNORED
        assert np.array_equal(batch.labels[begin + 1 : end], batch.input_ids[begin + 1 : end])
        row, piece = divmod(int(batch.sample_ids[segment]), PIECES_LIMIT)
        assert row == batch.rows[segment]
        if piece:  # the overlap: the last token of the piece before
            assert batch.input_ids[begin] == scored[row][-1]
        else:
            scored[row].append(batch.input_ids[begin])
        scored[row] += batch.input_ids[begin + 1 : end].tolist()
    for row, text in enumerate(texts):
        whole = (
            [bos] * (bos is not None)
            + CharacterTokenizer().encode(text)
            + [eos] * (eos is not None)
        )
        assert scored[row] == whole


@pytest.mark.parametrize("eos", [EOS, None])
def test_the_first_piece_alone_is_the_beginning_of_each_note(make_cache, eos) -> None:
    texts = [text_of_length(length, length) for length in (9, 30, 0, 6, 7)]
    cache = make_cache([Note(text) for text in texts])
    pieces = LanguagePieces(
        cache, rows_of(cache), max_length=8, bos_id=BOS, eos_id=eos, first_only=True
    )
    batch = pieces.batch(np.arange(len(pieces)))
    ends = [] if eos is None else [eos]
    whole = [[BOS, *CharacterTokenizer().encode(text), *ends][:8] for text in texts]
    assert np.split(batch.input_ids, batch.offsets[1:-1])[1].tolist() == whole[1]
    assert batch.input_ids.tolist() == [token for note in whole for token in note]
    assert pieces.lengths(np.arange(len(pieces))).tolist() == [len(note) for note in whole]
    assert pieces.scored_tokens == sum(len(note) - 1 for note in whole)
    assert pieces.notes_cut == (3 if eos is not None else 2)


def test_a_batch_is_the_same_stream_whatever_is_beside_it(make_cache) -> None:
    cache = make_cache([Note(text_of_length(length, length)) for length in (9, 30, 0, 17)])
    pieces = LanguagePieces(cache, rows_of(cache), max_length=8, bos_id=BOS, eos_id=EOS)
    together = pieces.batch(np.arange(len(pieces)))
    assert (together.input_ids.dtype, together.labels.dtype) == (np.int64, np.int64)
    assert (together.offsets.dtype, together.sample_ids.dtype) == (np.int32, np.int64)
    for index in range(len(pieces)):
        alone = pieces.batch(np.array([index]))
        begin, end = together.offsets[index : index + 2]
        assert np.array_equal(alone.input_ids, together.input_ids[begin:end])
        assert np.array_equal(alone.labels, together.labels[begin:end])
        assert alone.sample_ids[0] == together.sample_ids[index]
    assert pieces.notes_cut == 3
    empty = pieces.batch(np.array([], np.int64))
    assert (len(empty.input_ids), empty.offsets.tolist()) == (0, [0])


@pytest.mark.parametrize(
    ("truncate", "expected"),
    [
        ("head", [1, 100, 101, 102, 103, 104]),
        ("tail", [1, 105, 106, 107, 108, 109]),
        ("both", [1, 100, 101, 102, 108, 109]),
    ],
)
def test_a_long_note_keeps_the_part_asked_for(make_cache, truncate, expected) -> None:
    long = "".join(chr(i) for i in range(100, 110))
    cache = make_cache([Note("ab"), Note(long), Note("abcde"), Note("")])
    notes = np.array([1, 3, 2], np.uint32)
    dataset = ClassificationNotes(
        cache,
        notes,
        max_length=6,
        bos_id=1,
        truncate=truncate,
        targets=np.array([5, 6, 7]),
    )
    assert dataset.truncated == 1
    assert dataset.lengths(np.arange(3)).tolist() == [6, 1, 6]
    batch = dataset.batch(np.array([2, 0, 1]))
    assert batch.offsets.tolist() == [0, 6, 12, 13]
    assert batch.input_ids[6:12].tolist() == expected
    assert batch.input_ids[:6].tolist() == [1, *map(ord, "abcde")]
    assert batch.input_ids[12:].tolist() == [1]
    assert batch.targets.tolist() == [7, 5, 6]
    assert batch.rows.tolist() == [2, 1, 3]
    assert batch.sample_ids.tolist() == [2 * PIECES_LIMIT, PIECES_LIMIT, 3 * PIECES_LIMIT]
    assert batch.labels is None


def test_several_labels_a_note(make_cache) -> None:
    cache = make_cache([Note("a"), Note("b")])
    targets = np.array([[0, 1, 1], [1, 0, 0]], np.float32)
    dataset = ClassificationNotes(cache, rows_of(cache), max_length=4, bos_id=1, targets=targets)
    assert dataset.batch(np.array([1])).targets.tolist() == [[1, 0, 0]]
    assert (
        ClassificationNotes(cache, rows_of(cache), max_length=4, bos_id=1)
        .batch(np.array([1]))
        .targets
        is None
    )


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (
            LanguagePieces,
            {"max_length": 1, "bos_id": 1, "eos_id": 2},
            "max length is 1; at least 2",
        ),
        (ClassificationNotes, {"max_length": 1, "bos_id": 1}, "max length is 1; at least 2"),
        (
            ClassificationNotes,
            {"max_length": 4, "bos_id": 1, "truncate": "middle"},
            "allowed: head",
        ),
        (ClassificationNotes, {"max_length": 4, "bos_id": None}, "1 note is empty"),
        (
            ClassificationNotes,
            {"max_length": 4, "bos_id": 1, "targets": np.zeros(3, np.int64)},
            "3 targets for 2 notes",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(make_cache, kind, options, says) -> None:
    cache = make_cache([Note(""), Note("a")])
    with pytest.raises(ValueError, match=says):
        kind(cache, rows_of(cache), **options)


def test_quantiles_are_lengths_of_whole_notes(make_cache) -> None:
    cache = make_cache([Note("x" * i) for i in range(101)])
    assert length_quantiles(cache, rows_of(cache)) == {
        "min": 0, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "99%": 99, "max": 100
    }  # fmt: skip
    assert length_quantiles(cache, rows_of(cache)[:0]) == {}
