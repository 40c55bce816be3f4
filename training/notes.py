"""The notes of a run from its config: opened, tokenised, split, and cut into what is trained on.

Training and evaluation take their notes from here, so a run is scored on exactly the notes that it
held out. Invariant: which notes train, validate and test follows from the config and the notes
alone, never from what is done with them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import TokenCache, find_cache, tokenise
from data.conversations import Conversations, ConversationSegments, fitting
from data.joined import JoinedCache
from data.mimic import TASKS, open_mimic
from data.notes import ChainedNotes, NoteSource, open_notes, table_columns
from data.packing import ClassificationNotes, LanguagePieces, length_quantiles
from data.prompts import PromptEncoder
from data.sources import Source
from data.splits import Splits, join_splits, split_notes
from data.synthetic import make_cohort
from data.tokenizer import Tokenizer, load_tokenizer
from data.wording import counted
from data.worker import TextEncoder
from training.config import RunConfig
from training.stages import SYNTHETIC_COHORT

_PARTS = ("train", "validation", "test")
_VALIDATION_ORDER = 0  # seed of the choice of validation notes: the same in every run
LanguageDataset = LanguagePieces | ConversationSegments
Dataset = LanguageDataset | ClassificationNotes


@dataclass(frozen=True)
class SourceNotes:
    """One of several named sources of a run's notes."""

    name: str
    share: float  # of the tokens that are drawn
    first: int  # row of its first note in the run's cache
    end: int  # and the row behind its last
    fingerprint: str
    description: str
    rule: str  # of its split

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows of the run's cache that are of this source."""
        return rows[(self.first <= rows) & (rows < self.end)]


@dataclass(frozen=True)
class Notes:
    """The notes of a run, tokenised and split."""

    tokenizer: Tokenizer
    cache: TokenCache | JoinedCache
    splits: Splits
    label_names: tuple[str, ...]  # of a classifier: every label of the source; else empty
    fingerprint: str  # of the source
    left_out: Mapping[str, int] = field(default_factory=dict)  # rows by reason; of notes none
    sources: tuple[SourceNotes, ...] = ()  # where --data names them

    @property
    def fingerprints(self) -> str | dict[str, str]:
        """What run.json vouches for: the notes, or each of several sources by name."""
        if not self.sources:
            return self.fingerprint
        return {source.name: source.fingerprint for source in self.sources}

    def counts(self) -> dict[str, Any]:
        """What run.json tells about the notes: numbers only."""
        splits = self.splits
        return {
            "train_notes": len(splits.train),
            "validation_notes": len(splits.validation),
            "test_notes": len(splits.test),
            "validation_notes_left_out": splits.validation_duplicates,
            "test_notes_left_out": splits.test_duplicates,
            "unlisted_notes": splits.unlisted,
            "excluded_notes": splits.excluded,
            "cohort": self.cache.cohort_counts,
            "train_tokens": int(self.cache.lengths(splits.train).sum()),
            "note_length": length_quantiles(self.cache, splits.train),
            "left_out": dict(self.left_out),
        }

    def source_counts(self, source: SourceNotes) -> dict[str, int]:
        """Notes of a source in each part of the split, and tokens of those that are trained on."""
        splits = self.splits
        counts = {f"{part}_notes": len(source.rows(getattr(splits, part))) for part in _PARTS}
        train_tokens = int(self.cache.lengths(source.rows(splits.train)).sum())
        return counts | {"train_tokens": train_tokens}


def open_source(config: RunConfig, group_columns: Sequence[str] | None = None) -> NoteSource:
    """The notes that the config names; the synthetic cohort is made where it is first asked for.

    group_columns: a table's columns of categories, by which results are told apart; None where
        nothing is scored. MIMIC's groups are its own.
    """
    if config.data is None:
        raise ValueError("--data is missing: name a table of notes or a folder")
    if config.sources:
        return ChainedNotes(list(_open_sources(config).values()))
    assert isinstance(config.data, str)
    data = Path(config.data)
    if config.stage == "instruct":
        return Conversations(data, bad_rows=config.bad_rows)
    _make_if_synthetic(data)
    if config.task in TASKS:
        return open_cohort(config, data, grouped=group_columns is not None)
    return open_notes(
        data,
        text_column=config.text_column,
        label_column=config.label_column,
        patient_column=config.patient_column,
        group_columns=group_columns or (),
    )


def _make_if_synthetic(data: Path) -> None:
    if data.parent == Path(SYNTHETIC_COHORT):
        make_cohort(SYNTHETIC_COHORT)


def _open_sources(config: RunConfig) -> dict[Source, NoteSource]:
    """The named sources. Columns are those of tables; patients' that of the tables that have it."""
    opened: dict[Source, NoteSource] = {}
    has_table = has_patients = False
    for source in config.sources:
        path = Path(source.path)
        _make_if_synthetic(path)
        columns = table_columns(path)
        patient = config.patient_column if config.patient_column in (columns or ()) else None
        has_table |= columns is not None
        has_patients |= patient is not None
        opened[source] = open_notes(
            path,
            text_column=None if columns is None else config.text_column,
            patient_column=patient,
        )
    for flag, column, is_there in (
        ("--text-column", config.text_column, has_table),
        ("--patient-column", config.patient_column, has_patients),
    ):
        if column is not None and not is_there:
            raise ValueError(
                f"{flag} is {column}, but none of the sources "
                f"{', '.join(source.name for source in opened)} is a table with that column"
            )
    return opened


def open_cohort(config: RunConfig, data: Path, *, grouped: bool) -> NoteSource:
    """Admission notes of a MIMIC folder with the labels of the run's task, by its rules."""
    assert config.task is not None
    private = cache_folder(config)
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_paper = config.cohort == "paper"
    return open_mimic(data, config.task, paper=is_paper, grouped=grouped, spill_folder=private)


def cache_folder(config: RunConfig) -> Path:
    """Where the run's token caches lie: outside of the run folder, so that runs share them."""
    return Path(config.cache_dir) if config.cache_dir else Path(config.out).parent / "token-cache"


def text_encoder(config: RunConfig, tokenizer: Tokenizer) -> TextEncoder:
    """What makes tokens of the run's notes: the tokenizer, or the prompt format over it."""
    if config.stage == "instruct":
        return PromptEncoder(tokenizer, config.prompt_format)
    return tokenizer


def split_and_fit(
    config: RunConfig, cache: TokenCache, source: NoteSource
) -> tuple[Splits, dict[str, int]]:
    """The split of the run's notes; of rows and chats those that fit, and what was left out."""
    splits = split_notes(
        cache, lists=config.splits, test_share=config.test_share, exclude=config.exclude
    )
    if not isinstance(source, Conversations):
        return splits, {}
    fit = {part: fitting(cache, getattr(splits, part), config.max_length) for part in _PARTS}
    long = sum(len(getattr(splits, part)) - len(rows) for part, rows in fit.items())
    left_out = {f"more tokens than --max-length {config.max_length}": long} if long else {}
    splits = splits._replace(train=fit["train"], validation=fit["validation"], test=fit["test"])
    return splits, {**source.bad_rows, **left_out}


def load_notes(config: RunConfig, tokenizer: Tokenizer | None = None) -> Notes:
    """Tokenise the run's notes (or open their cache) with the base's tokenizer, and split them."""
    if config.model is None:
        raise ValueError("--model is missing: name the folder of the base")
    if tokenizer is None:
        tokenizer = load_tokenizer(config.model, config.tokenizer_preset)
    if config.sources:
        return _load_sources(config, tokenizer)
    source = open_source(config)
    cache = tokenise(
        source,
        text_encoder(config, tokenizer),
        cache_folder=cache_folder(config),
        workers=config.workers,
    )
    splits, left_out = split_and_fit(config, cache, source)
    label_names = cache.label_names if config.stage == "downstream" else ()
    if cache.multilabel and config.cohort == "correct":  # what nobody shows cannot be learned
        counts = cache.label_counts(splits.train)
        label_names = tuple(np.array(label_names, object)[counts > 0])
    if config.stage == "downstream" and len(label_names) < 2:
        raise ValueError(
            f"{config.data} has {counted(len(label_names), 'label')} in "
            f"{counted(len(cache), 'note')}; a classifier needs at least 2 different ones"
        )
    return Notes(tokenizer, cache, splits, label_names, source.fingerprint(), left_out)


def _load_sources(config: RunConfig, tokenizer: Tokenizer) -> Notes:
    """The notes of several sources: a cache and a split of each, joined."""
    opened = _open_sources(config)
    prints = {source.name: notes.fingerprint() for source, notes in opened.items()}
    for name, found in prints.items():
        first = next(other for other in prints if prints[other] == found)
        if first != name:
            raise ValueError(
                f"the sources {first} and {name} hold the same notes; give them once, with the "
                "weight of both"
            )
    caches = [
        tokenise(notes, tokenizer, cache_folder=cache_folder(config), workers=config.workers)
        for notes in opened.values()
    ]
    return _joined(config, tokenizer, caches, prints)


def _joined(
    config: RunConfig,
    tokenizer: Tokenizer,
    caches: Sequence[TokenCache],
    prints: Mapping[str, str],
) -> Notes:
    """Caches of the config's sources, in their order, as the notes of one run."""
    joined = JoinedCache(caches)
    if config.splits is not None and joined.patient_digests is None:
        raise ValueError(
            "--splits names patients, but none of the sources has any; name their column with "
            "--patient-column, or leave --splits out"
        )
    splits = [
        split_notes(
            cache,
            lists=None if cache.patient_digests is None else config.splits,
            test_share=config.test_share,
            exclude=config.exclude,
        )
        for cache in caches
    ]
    firsts = joined.firsts.tolist()
    # Without weights each source counts as what an epoch draws of it, so that all end theirs
    # together.
    trained = [
        _pieces(config, tokenizer, cache, split.train)
        for cache, split in zip(caches, splits, strict=True)
    ]
    weights = [
        pieces.lengths(np.arange(len(pieces))).sum() if source.weight is None else source.weight
        for source, pieces in zip(config.sources, trained, strict=True)
    ]
    sources = tuple(
        SourceNotes(
            source.name,
            float(weights[i] / max(1e-300, sum(weights))),
            firsts[i],
            firsts[i + 1],
            prints[source.name],
            caches[i].description,
            splits[i].rule,
        )
        for i, source in enumerate(config.sources)
    )
    names = [source.name for source in sources]
    return Notes(
        tokenizer,
        joined,
        join_splits(joined, list(zip(names, firsts[:-1], splits, strict=True))),
        (),
        hashlib.sha256(json.dumps(list(prints.items())).encode()).hexdigest(),
        sources=sources,
    )


def find_notes(
    config: RunConfig, tokenizer: Tokenizer, recorded: str | Mapping[str, str]
) -> Notes | None:
    """The notes that a run was trained on, from their caches alone; None where one is gone.

    recorded: their fingerprint in run.json, or of several sources each one's.
    """
    folder, encoder = cache_folder(config), text_encoder(config, tokenizer)
    prints = (
        {"": recorded}
        if isinstance(recorded, str)
        else {source.name: recorded[source.name] for source in config.sources}
    )
    found = [find_cache(each, encoder, cache_folder=folder) for each in prints.values()]
    caches = [cache for cache in found if cache is not None]
    if len(caches) < len(found):
        return None
    if not isinstance(recorded, str):
        return _joined(dataclasses.replace(config, exclude=None), tokenizer, caches, prints)
    splits = split_notes(caches[0], lists=config.splits, test_share=config.test_share)
    return Notes(tokenizer, caches[0], splits, (), recorded)


def make_dataset(
    config: RunConfig,
    notes: Notes,
    rows: np.ndarray,
    *,
    label_names: tuple[str, ...] | None = None,
    is_labelled: bool = True,
    is_trained_on: bool = False,
) -> Dataset:
    """The segments of some notes, as the run's stage cuts them.

    label_names: the classes' order where it is not that of these notes but of a finished run.
    is_trained_on: with --train-on-inputs prompts are labelled too; scored are responses alone.
    is_labelled: False for notes to predict, whose labels are not there or not asked for.
    """
    if config.stage == "instruct":
        assert isinstance(notes.cache, TokenCache)
        return ConversationSegments(
            notes.cache,
            rows,
            max_length=config.max_length,
            scores_inputs=is_trained_on and config.train_on_inputs,
        )
    if config.stage != "downstream":
        return _pieces(config, notes.tokenizer, notes.cache, rows)
    assert isinstance(notes.cache, TokenCache)
    return ClassificationNotes(
        notes.cache,
        rows,
        max_length=config.max_length,
        bos_id=notes.tokenizer.bos_id,
        eos_id=notes.tokenizer.eos_id if notes.tokenizer.closes_notes else None,
        truncate=config.truncate,
        targets=targets_of(notes, rows, label_names or notes.label_names) if is_labelled else None,
    )


def _pieces(
    config: RunConfig, tokenizer: Tokenizer, cache: TokenCache | JoinedCache, rows: np.ndarray
) -> LanguagePieces:
    return LanguagePieces(
        cache,
        rows,
        max_length=config.max_length,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        first_only=config.pieces == "first",
    )


def source_pieces(config: RunConfig, notes: Notes, rows: np.ndarray) -> dict[str, LanguagePieces]:
    """The segments of some notes of several sources, by the name of the source."""
    found = {}
    for source in notes.sources:
        pieces = make_dataset(config, notes, source.rows(rows))
        assert isinstance(pieces, LanguagePieces)
        found[source.name] = pieces
    return found


def targets_of(notes: Notes, rows: np.ndarray, label_names: tuple[str, ...]) -> np.ndarray:
    """What a classifier answers of each note: int64 [n], or float32 [n, C] of several labels."""
    assert isinstance(notes.cache, TokenCache)
    if notes.cache.multilabel:
        return notes.cache.label_matrix(rows, label_names)
    return notes.cache.label_codes(rows, label_names)


def validation_rows(config: RunConfig, notes: Notes) -> np.ndarray:
    """The validation notes that are scored during training: `eval_tokens` at most, of each source.

    A fixed choice of whole notes, the same in every run on the same notes, neighbours in length
    together because that is how they pass fastest.
    """
    rows = notes.splits.validation
    if not notes.sources:
        return _chosen(config, notes, rows)
    return np.concatenate([_chosen(config, notes, each.rows(rows)) for each in notes.sources])


def _chosen(config: RunConfig, notes: Notes, rows: np.ndarray) -> np.ndarray:
    """Some of the rows, `eval_tokens` at most but one at least, in the order of their lengths."""
    shuffled = np.random.default_rng(_VALIDATION_ORDER).permutation(rows)
    lengths = np.minimum(
        notes.cache.lengths(shuffled),
        config.max_length
        if config.stage == "downstream" or config.pieces == "first"
        else np.iinfo(np.int64).max,
    )
    count = int(np.searchsorted(np.cumsum(lengths), config.eval_tokens, side="right"))
    chosen, lengths = shuffled[: max(1, count)], lengths[: max(1, count)]
    return chosen[np.argsort(lengths, kind="stable")]


def how_cut(config: RunConfig, train_set: Dataset) -> str:
    """What became of notes longer than --max-length, in words."""
    if isinstance(train_set, ClassificationNotes):
        return f"{train_set.truncated:,} truncated ({config.truncate} kept)"
    if isinstance(train_set, LanguagePieces):
        rest = "the first kept" if train_set.first_only else "none truncated"
        return f"{train_set.notes_cut:,} cut into pieces, {rest}"
    return "longer ones left out, none cut"
