"""The loader: a fair shuffle, the same steps for any ranks, exact resume, and little memory."""

import itertools
import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from data.cache import TokenCache, tokenise
from data.loader import Loader, deal, iter_batches
from data.notes import Note
from data.order import Permutation
from data.packing import ClassificationNotes, LanguagePieces
from data.splits import split_notes
from tests.data.conftest import CharacterTokenizer, ListedNotes

MAX_LENGTH = 24


@pytest.fixture
def pieces(make_cache: Callable[..., TokenCache]) -> LanguagePieces:
    random = np.random.default_rng(0)
    cache = make_cache([Note("x" * int(length)) for length in random.integers(0, 70, 80)])
    notes = np.arange(80, dtype=np.uint32)
    return LanguagePieces(cache, notes, max_length=MAX_LENGTH, bos_id=1, eos_id=2)


def loader_of(pieces: LanguagePieces, **options) -> Loader:
    settings = {"batch_tokens": 150, "micro_tokens": 60, "seed": 3} | options
    return Loader(pieces, **settings)


def samples(batches) -> list[int]:
    return [sample for batch in batches for sample in batch.sample_ids.tolist()]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_a_permutation_reaches_every_number_once(count: int) -> None:
    for epoch in range(3):
        order = Permutation(count, seed=7, epoch=epoch)(np.arange(count))
        assert sorted(order.tolist()) == list(range(count))
    positions = np.array([count - 1, 0])
    assert Permutation(count, 7, 2)(positions).tolist() == order[positions].tolist()


def test_the_shuffle_is_fair() -> None:
    """Where an item lands, and who follows whom, are uniform (chi-square over many keys)."""
    count, draws = 5, 3000
    landed = np.zeros((count, count))
    followed = np.zeros((count, count))
    for key in range(draws):
        order = Permutation(count, seed=key // 10, epoch=key % 10)(np.arange(count))
        landed[np.arange(count), order] += 1
        followed[order[:-1], order[1:]] += 1
    chi = ((landed - draws / count) ** 2 / (draws / count)).sum()
    assert chi < 40  # 16 degrees of freedom: 99.9% lie below 39.3
    expected = draws * (count - 1) / (count * (count - 1))
    off_diagonal = followed[~np.eye(count, dtype=bool)]
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 46  # about 20 degrees of freedom
    long = Permutation(100_000, seed=0, epoch=0)(np.arange(100_000))
    assert abs(np.corrcoef(long, np.arange(100_000))[0, 1]) < 0.015
    assert (np.diff(long) == 1).sum() < 10


def test_an_epoch_takes_every_segment_once_and_the_next_another_order(pieces) -> None:
    loader = loader_of(pieces)
    orders = []
    for epoch in range(3):
        seen: list[int] = []
        steps = 0
        while loader.epoch == epoch:
            step = loader.next_step()
            steps += 1
            seen += samples(step)
            assert sum(len(batch.input_ids) for batch in step) <= 150
        if epoch == 0:
            assert steps == loader.steps_per_epoch()
        assert len(seen) == len(set(seen)) == len(pieces)
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert samples(loader_of(pieces, seed=4).next_step()) != samples(loader_of(pieces).next_step())


@pytest.mark.parametrize("window", [1, 5, 4096])
def test_a_step_is_filled_until_the_next_segment_would_not_fit(
    pieces, monkeypatch, window: int
) -> None:
    monkeypatch.setattr("data.order.WINDOW", window)
    loader = loader_of(pieces)
    order = Permutation(len(pieces), 3, 0)(np.arange(len(pieces)))
    lengths = pieces.lengths(order)
    at = 0
    while loader.epoch == 0:
        taken = len(samples(loader.next_step()))
        assert taken >= 1
        assert lengths[at : at + taken].sum() <= 150
        assert at + taken == len(order) or lengths[at : at + taken + 1].sum() > 150
        at += taken
    assert at == len(order)
    small = loader_of(pieces, batch_tokens=1)
    assert all(len(samples(small.next_step())) == 1 for _ in range(5))


@pytest.mark.parametrize("size", [{"batch_tokens": 150}, {"batch_tokens": None, "batch_size": 7}])
@pytest.mark.parametrize("micro_tokens", [MAX_LENGTH, 60, 10_000])
def test_ranks_and_micro_batches_divide_the_same_steps(pieces, size, micro_tokens) -> None:
    single = loader_of(pieces, **size, micro_tokens=1000)
    expected = [sorted(samples(single.next_step())) for _ in range(40)]
    for world_size in (1, 2, 3):
        ranks = [
            loader_of(pieces, **size, micro_tokens=micro_tokens, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for step in expected:
            shares = [loader.next_step() for loader in ranks]
            assert sorted(samples(batch for share in shares for batch in share)) == step
            tokens = [sum(len(batch.input_ids) for batch in share) for share in shares]
            if len(step) > 2 * world_size:
                assert max(tokens) - min(tokens) <= MAX_LENGTH
            for share in shares:
                lengths = np.concatenate([np.diff(b.offsets) for b in share] or [[]])
                assert (np.diff(lengths) >= 0).all()  # equal lengths are neighbours
                assert all(len(batch.input_ids) <= micro_tokens for batch in share)
        assert len({json.dumps(loader.state()) for loader in ranks}) == 1


def test_resume_continues_with_the_same_batches(pieces) -> None:
    straight = loader_of(pieces)
    steps = 2 * straight.steps_per_epoch() + 5
    states, seen = [straight.state()], []
    for _ in range(steps):
        seen.append(straight.next_step())
        states.append(straight.state())
    assert straight.epoch == 2
    for done in (0, 1, 7, straight.steps_per_epoch(), steps - 3):
        resumed = loader_of(pieces)
        resumed.load_state(json.loads(json.dumps(states[done])))
        for step in range(done, steps):
            assert resumed.state() == states[step]
            for a, b in zip(resumed.next_step(), seen[step], strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        assert resumed.state() == states[steps]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"segments": 3}, "order with segments 3"),
        ({"seed": 9}, "order with seed 9"),
        ({"position": 10**6}, "position 1000000 of epoch 0"),
        ({"position": -1}, "position -1"),
        ({"epoch": -1}, "of epoch -1"),
    ],
)
def test_a_position_of_another_order_is_refused(pieces, change, says) -> None:
    loader = loader_of(pieces)
    with pytest.raises(ValueError, match=says):
        loader.load_state(loader.state() | change)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_tokens": None}, "give one of them"),
        ({"batch_size": 3}, "give one of them"),
        ({"batch_tokens": 0}, "batch tokens is 0; at least 1"),
        ({"batch_tokens": None, "batch_size": -2}, "batch size is -2; at least 1"),
        ({"micro_tokens": MAX_LENGTH - 1}, "micro tokens is 23; at least the max length 24"),
    ],
)
def test_impossible_steps_are_refused(pieces, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        loader_of(pieces, **options)


def test_nothing_to_train_on_is_refused(make_cache) -> None:
    cache = make_cache([Note("a")])
    empty = ClassificationNotes(cache, np.array([], np.uint32), max_length=8, bos_id=1)
    with pytest.raises(ValueError, match="nothing to train on"):
        Loader(empty, batch_size=1, micro_tokens=8, seed=0)
    assert list(iter_batches(empty, micro_tokens=8)) == []


@pytest.mark.parametrize("micro_tokens", [MAX_LENGTH, 50, 100_000])
def test_evaluation_reads_every_segment_in_order(pieces, micro_tokens: int) -> None:
    whole = list(iter_batches(pieces, micro_tokens=micro_tokens))
    assert samples(whole) == pieces.batch(np.arange(len(pieces))).sample_ids.tolist()
    assert all(len(batch.input_ids) <= micro_tokens for batch in whole)
    for before, after in itertools.pairwise(whole):  # none could have taken one more
        assert len(before.input_ids) + after.offsets[1] > micro_tokens
    shares = [
        list(iter_batches(pieces, micro_tokens=micro_tokens, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert sorted(samples(batch for share in shares for batch in share)) == sorted(samples(whole))


def test_deal_is_balanced_and_leaves_nobody_out() -> None:
    lengths = np.array([9, 1, 5, 5, 3, 2, 2])
    owner = deal(lengths, 3)
    assert np.bincount(owner, weights=lengths).tolist() == [9, 9, 9]
    assert deal(np.array([4, 4]), 3).tolist() == [0, 1]


class Stream(ListedNotes):
    """Short notes that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return (Note(f"note {i}", str(i // 3), str(i % 2)) for i in range(self.count))

    def fingerprint(self) -> str:
        return f"stream {self.count}"


def test_tokenising_keeps_at_most_64_bytes_a_note(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data.cache.BLOCK_NOTES", 256)
    count = 30_000
    tracemalloc.start()
    try:
        tokenise(Stream(count), CharacterTokenizer(), cache_folder=tmp_path, workers=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 64 * count, f"{peak / count:.0f} bytes a note at the peak"


def test_training_keeps_at_most_64_bytes_a_note(tmp_path) -> None:
    """Split, both datasets, their loaders and steps: the peak, not only what stays."""
    count = 200_000
    cache = tokenise(Stream(count), CharacterTokenizer(), cache_folder=tmp_path, workers=1)
    tracemalloc.start()
    try:
        splits = split_notes(cache)
        train = LanguagePieces(cache, splits.train, max_length=8, bos_id=1, eos_id=2)
        targets = cache.label_codes(splits.train)
        classes = ClassificationNotes(cache, splits.train, max_length=8, bos_id=1, targets=targets)
        for dataset in (train, classes):
            loader = Loader(dataset, batch_tokens=4096, micro_tokens=512, seed=0)
            loader.steps_per_epoch()
            for _ in range(20):
                loader.next_step()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(train) > count
    assert peak <= 64 * count, (
        f"{peak / count:.0f} bytes a note at the peak, {kept / count:.0f} kept"
    )
