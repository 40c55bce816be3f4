"""Several sources in one order: exact shares, epochs of their own, exact resume, any ranks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data.cache import TokenCache
from data.joined import JoinedCache
from data.loader import Loader
from data.notes import Note
from data.order import Permutation, Share
from data.packing import LanguagePieces
from data.sources import read_sources
from data.splits import join_splits, split_notes

MAX_LENGTH = 24
SIZES = (40, 7, 25)  # notes of each source
WEIGHTS = (0.6, 0.3, 0.1)


@pytest.fixture
def caches(make_cache: Callable[..., TokenCache]) -> list[TokenCache]:
    random = np.random.default_rng(1)
    return [
        make_cache([Note(letter * int(n)) for n in random.integers(1, 70, count)])
        for letter, count in zip("abc", SIZES, strict=True)
    ]


def pieces_of(cache: TokenCache | JoinedCache) -> LanguagePieces:
    rows = np.arange(len(cache), dtype=np.uint32)
    return LanguagePieces(cache, rows, max_length=MAX_LENGTH, bos_id=1, eos_id=2)


@pytest.fixture
def shares(caches: list[TokenCache]) -> list[Share]:
    return [
        Share(name, len(pieces_of(cache)), weight)
        for name, cache, weight in zip("abc", caches, WEIGHTS, strict=True)
    ]


@pytest.fixture
def pieces(caches: list[TokenCache]) -> LanguagePieces:
    return pieces_of(JoinedCache(caches))


def loader_of(pieces: LanguagePieces, shares: list[Share], **options) -> Loader:
    settings = {"batch_tokens": 150, "micro_tokens": 60, "seed": 3} | options
    return Loader(pieces, shares=shares, **settings)


def samples(batches) -> list[int]:
    return sorted(sample for batch in batches for sample in batch.sample_ids.tolist())


@pytest.mark.parametrize("segments", [20, 100])
def test_how_often_a_segment_is_drawn_twice_in_a_step(segments: int) -> None:
    """By the epochs' orders alone: (k / S)^2 / 6 of the draws where k of S are drawn a step."""
    drawn, steps = segments // 4, 4000
    epochs = [
        Permutation(segments, 3, epoch)(np.arange(segments))
        for epoch in range(drawn * steps // segments + 1)
    ]
    # One more a step now and then, so that steps end anywhere in an epoch.
    ends = np.cumsum(drawn + np.arange(steps) % 2)
    stream = np.concatenate(epochs)
    steps_of = np.split(stream, ends[ends < len(stream)])[:-1]
    counts = [np.bincount(each, minlength=segments) for each in steps_of]
    assert max(int(each.max()) for each in counts) == 2
    twice = sum(int((each == 2).sum()) for each in counts) / sum(map(len, steps_of))
    share = np.mean([len(each) for each in steps_of]) / segments
    assert twice == pytest.approx(share**2 / 6, rel=0.15)


def by_hand(pieces: LanguagePieces, shares: list[Share], limit: int) -> Iterator[list[int]]:
    """Sample ids of each step, one segment at a time, from whoever has had least of its share."""
    firsts = np.cumsum([0, *(share.segments for share in shares)])
    tokens, taken = [0] * len(shares), [0] * len(shares)
    step, spent = [], 0
    while True:
        source = min(range(len(shares)), key=lambda s: (tokens[s] / shares[s].weight, s))
        epoch, position = divmod(taken[source], shares[source].segments)
        order = Permutation(shares[source].segments, 3, epoch)
        segment = firsts[source] + order(np.array([position]))
        length = int(pieces.lengths(segment)[0])
        if step and spent + length > limit:
            yield sorted(step)
            step, spent = [], 0
        step.append(int(pieces.batch(segment).sample_ids[0]))
        spent += length
        tokens[source] += length
        taken[source] += 1


@pytest.mark.parametrize("window", [1, 5, 4096])
def test_the_order_is_that_of_a_plain_loop(pieces, shares, monkeypatch, window: int) -> None:
    monkeypatch.setattr("data.order.WINDOW", window)
    loader, expected = loader_of(pieces, shares), by_hand(pieces, shares, 150)
    for _ in range(60):
        assert samples(loader.next_step()) == next(expected)


def test_shares_are_of_tokens_to_within_a_segment(pieces, shares) -> None:
    loader = loader_of(pieces, shares)
    total = 0
    for _ in range(200):
        total += sum(len(batch.input_ids) for batch in loader.next_step())
        drawn = loader.drawn()
        assert sum(of["tokens"] for of in drawn.values()) == total
        for share in shares:
            assert abs(drawn[share.name]["tokens"] - share.weight * total) <= 2 * MAX_LENGTH
    assert loader.drawn() == loader.drawn(200) == loader_of(pieces, shares).drawn(200)


def test_each_source_has_epochs_of_its_own(pieces, shares) -> None:
    """Source b is small: it begins again while a is read for the first time, each piece once."""
    loader = loader_of(pieces, shares, batch_tokens=None, batch_size=1)
    segments = np.cumsum([0, *(share.segments for share in shares)])
    ids = pieces.batch(np.arange(len(pieces))).sample_ids.tolist()
    number = {sample: i for i, sample in enumerate(ids)}
    seen: list[list[int]] = [[], [], []]
    steps = 0
    while loader.epoch == 0:
        steps += 1
        (segment,) = (number[sample] for sample in samples(loader.next_step()))
        seen[int(np.searchsorted(segments, segment, side="right")) - 1].append(segment)
    assert steps == loader.steps_per_epoch() == len(loader.first_epoch())
    assert sorted(seen[0]) == list(range(shares[0].segments))
    assert len(seen[1]) > 2 * shares[1].segments
    own = list(range(segments[1], segments[2]))
    passes = [seen[1][i : i + len(own)] for i in range(0, len(seen[1]) - len(own), len(own))]
    assert all(sorted(each) == own for each in passes) and passes[0] != passes[1]
    drawn = loader.drawn()
    assert drawn["a"]["epochs"] == 1.0
    assert drawn["b"]["epochs"] == pytest.approx(len(seen[1]) / len(own), abs=1e-4)


def test_resume_continues_with_the_same_batches(pieces, shares) -> None:
    straight = loader_of(pieces, shares)
    states, seen = [straight.state()], []
    for _ in range(50):
        seen.append(straight.next_step())
        states.append(straight.state())
    for done in (0, 1, 17, 49):
        resumed = loader_of(pieces, shares)
        resumed.load_state(json.loads(json.dumps(states[done])))
        for step in range(done, 50):
            assert resumed.state() == states[step]
            for a, b in zip(resumed.next_step(), seen[step], strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_ranks_divide_the_same_steps(pieces, shares) -> None:
    single = loader_of(pieces, shares)
    ranks = [loader_of(pieces, shares, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(30):
        step = [batch for rank in ranks for batch in rank.next_step()]
        assert samples(step) == samples(single.next_step())
        assert all(rank.state() == single.state() for rank in ranks)


def test_a_position_of_other_sources_is_refused(pieces, shares) -> None:
    loader = loader_of(pieces, shares)
    state = loader.state()
    renamed = [share._replace(name=share.name * 2) for share in shares]
    with pytest.raises(ValueError, match="of other sources"):
        loader_of(pieces, renamed).load_state(state)
    state["sources"]["b"]["position"] = 10**6
    with pytest.raises(ValueError, match="position 1000000"):
        loader.load_state(state)


def test_a_source_without_a_segment_is_refused(caches) -> None:
    pieces = pieces_of(caches[0])
    shares = [Share("a", len(pieces), 0.5), Share("b", 0, 0.5)]
    with pytest.raises(ValueError, match="source b: there is nothing to train on"):
        loader_of(pieces, shares)


def test_joined_notes_are_those_of_the_parts(caches) -> None:
    joined = JoinedCache(caches)
    whole, parts = pieces_of(joined), [pieces_of(cache) for cache in caches]
    assert len(whole) == sum(map(len, parts)) and len(joined) == sum(SIZES)
    assert whole.scored_tokens == sum(part.scored_tokens for part in parts)
    batch = whole.batch(np.arange(len(whole)))
    alone = [part.batch(np.arange(len(part))) for part in parts]
    assert batch.input_ids.tolist() == np.concatenate([b.input_ids for b in alone]).tolist()
    assert batch.labels.tolist() == np.concatenate([b.labels for b in alone]).tolist()
    assert len(set(batch.sample_ids.tolist())) == len(whole)
    assert joined.patient_digests is None
    assert joined.text_digests.tolist() == [
        digest for cache in caches for digest in cache.text_digests.tolist()
    ]


def test_what_another_source_trains_on_is_not_held_out(make_cache) -> None:
    """Of two copies of a text one source trains on, by its patient, and one holds out."""
    random = np.random.default_rng(0)
    texts = ["x" * int(n) for n in random.permutation(np.arange(1, 301))]
    by_patient = make_cache([Note(text, patient=f"p{i}") for i, text in enumerate(texts)])
    by_text = make_cache([Note(text) for text in texts])
    joined = JoinedCache([by_patient, by_text])
    splits = [split_notes(cache) for cache in (by_patient, by_text)]
    parts = [("one", 0, splits[0]), ("two", 300, splits[1])]
    both = join_splits(joined, parts)
    assert both.train.tolist() == [*splits[0].train, *(splits[1].train + 300)]
    trained = set(joined.text_digests[both.train].tolist())
    for part in ("validation", "test"):
        rows = getattr(both, part)
        held_out = [*getattr(splits[0], part), *(getattr(splits[1], part) + 300)]
        assert rows.tolist() == [row for row in held_out if joined.text_digests[row] not in trained]
        assert len(rows) + getattr(both, f"{part}_duplicates") == len(held_out)
        assert len(rows) < len(held_out)
    # A note without a patient is a unit of its own.
    assert joined.patient_digests is not None
    assert joined.patient_digests[300:].tolist() == by_text.text_digests.tolist()


def test_a_word_that_is_a_path_there_is_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = read_sources("year=2020/notes.csv")
    assert source == ("year", "2020/notes.csv", None)
    (tmp_path / "year=2020").mkdir()
    (tmp_path / "year=2020" / "notes.csv").write_text("text\na\n")
    assert read_sources("year=2020/notes.csv") == read_sources("year=2020") == ()
    assert read_sources(["year=2020/notes.csv:1"]) == (("year", "2020/notes.csv", 1.0),)


def test_words_become_sources() -> None:
    assert read_sources("notes.csv") == read_sources("./a=b.csv") == read_sources(None) == ()
    assert read_sources("notes=a.csv")[0] == ("notes", "a.csv", None)
    assert read_sources(["n=a:b.csv:2", "g=C:/texts:1e-1"]) == (
        ("n", "a:b.csv", 2.0),
        ("g", "C:/texts", 0.1),
    )
