"""A finished run, scored on notes: what eval.py does, top to bottom.

    run folder -> model and notes -> losses or logits -> metrics -> eval/results.json

Notes are the run's own held-out ones, or another source's. Invariant: the run's own notes are
scored under the split that the run was trained with, which the fingerprint of the data vouches for.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data.cache import tokenise
from data.mimic import AdmissionNotes, open_mimic3
from data.notes import NoteSource, open_notes
from data.packing import ClassificationNotes, LanguagePieces
from data.splits import patient_groups, split_notes
from evaluation.metrics import auroc, classification_metrics, probabilities
from evaluation.perplexity import language_metrics
from evaluation.predictions import write_predictions
from model.files import write_json
from model.heads import CausalLM, Classifier
from training.assemble import (
    FinishedRun,
    Notes,
    cache_folder,
    load_notes,
    make_dataset,
    open_source,
    restore,
)
from training.objective import Classification, LanguageModelling
from training.parallel import Ranks, choose_device, flush_denormals
from training.run_folder import locked, private_files
from training.validation import classifier_logits

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Score a finished run, or let it predict."""

    run: str
    """Folder of the finished run."""
    split: Split | None = None
    """Part of the notes. Default: test of the run's own notes, all notes of --data."""
    data: str | None = None
    """Other notes than the run's own: a table, a folder of text files or a MIMIC folder."""
    text_column: str | None = None
    """Column of the notes' text in --data. Default: as in the run."""
    label_column: str | None = None
    """Column of the labels in --data. Default: as in the run."""
    patient_column: str | None = None
    """Column of the patients' ids in --data. Default: as in the run."""
    predict: str | None = None
    """Write predictions to this CSV file and nothing else; the notes need no labels."""
    bootstrap: int = 1000
    """Resamples of patients behind each interval; 0 for no intervals."""
    seed: int = 0
    """Decides the resamples."""
    micro_tokens: int | None = None
    """Most tokens that pass through the model at once. Default: as in the run."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one."""

    def __post_init__(self) -> None:
        for flag, number, least in (
            ("--bootstrap", self.bootstrap, 0),
            ("--seed", self.seed, 0),
            ("--micro-tokens", self.micro_tokens, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{flag} must be at least {least}, got {number}")
        for flag, column in (
            ("--text-column", self.text_column),
            ("--label-column", self.label_column),
            ("--patient-column", self.patient_column),
        ):
            if column is not None and self.data is None:
                raise ValueError(f"{flag} names a column of --data, which is not given")
        if self.bootstrap > 1_000_000:
            raise ValueError(f"--bootstrap must be at most 1,000,000, got {self.bootstrap}")
        if self.predict is not None:
            predict = Path(self.predict)
            if predict.suffix != ".csv" or predict.is_dir():
                raise ValueError(f"--predict must be a file that ends in .csv, got {predict}")
            if not predict.parent.is_dir():
                raise ValueError(f"--predict: there is no folder {predict.parent}; make it first")


def score_run(config: ScoreConfig) -> dict[str, Any]:
    """Score the run, write eval/results.json and eval/predictions.csv, and return the results.

    With `predict` only that file is written, and the results say on how many notes.
    Raises ValueError for the user's mistakes, RunFailed for losses that are not finite.
    """
    flush_denormals()
    device = choose_device(config.device)
    with private_files():
        finished = restore(Path(config.run), device)
        micro_tokens = config.micro_tokens or finished.config.micro_tokens
        if micro_tokens < finished.config.max_length:
            raise ValueError(
                f"--micro-tokens must be at least the run's --max-length "
                f"({finished.config.max_length}), got {micro_tokens}"
            )
        if isinstance(finished.model, CausalLM):
            return _score_language(config, finished, device, micro_tokens)
        return _score_classifier(config, finished, device, micro_tokens)


def summary(results: dict[str, Any]) -> Iterator[str]:
    """The results as lines for people."""
    of = "notes of the " + results["split"] + " split" if results["split"] != "all" else "notes"
    yield f"{results['data']}: {results['n']:,} {of}"
    if "predictions" in results:
        yield f"predictions are in {results['predictions']}"
    if "tokens" in results:
        base = results["perplexity_base"]
        without = "" if base is None else f"; without the adapters {base:.4f}"
        yield f"perplexity {results['perplexity']:.4f} over {results['tokens']:,} tokens{without}"
    for name in ("accuracy", "f1", "auroc"):
        if name in results:
            ceiling = results.get("auroc_ceiling") if name == "auroc" else None
            best = "" if ceiling is None else f"; best reachable {ceiling:.3f}"
            yield f"{name} {_with_interval(results[name], results[name + '_ci'])}{best}"
    for name, label in results.get("per_label", {}).items():
        auroc_of_label = _with_interval(label["auroc"], label["auroc_ci"])
        yield f"  auroc of {name} ({label['positives']:,}) {auroc_of_label}"


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "not defined"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _score_language(
    config: ScoreConfig, finished: FinishedRun, device: torch.device, micro_tokens: int
) -> dict[str, Any]:
    assert isinstance(finished.model, CausalLM)
    if config.predict is not None:
        raise ValueError(f"--predict needs a classifier, but {config.run} is a language model")
    _, notes = _open(config, finished)
    split, rows = _rows(config, notes)
    pieces = make_dataset(finished.config, notes, rows)
    assert isinstance(pieces, LanguagePieces)
    objective = LanguageModelling(finished.model, device)
    metrics = language_metrics(objective, pieces, Ranks(0, 1, device), micro_tokens=micro_tokens)
    results = {**_what_was_scored(finished, notes, split), "n": len(rows), **metrics}
    with _eval_folder(config) as folder:
        write_json(folder / "results.json", results)
    return results


def _score_classifier(
    config: ScoreConfig, finished: FinishedRun, device: torch.device, micro_tokens: int
) -> dict[str, Any]:
    assert isinstance(finished.model, Classifier)
    source, notes = _open(config, finished)
    split, rows = _rows(config, notes)
    if len(rows) == 0:
        raise ValueError("there is no note to score: name other data or another split")
    dataset = make_dataset(
        finished.config,
        notes,
        rows[np.argsort(notes.cache.lengths(rows), kind="stable")],  # like lengths pass faster
        label_names=finished.label_names,
        is_labelled=config.predict is None,
    )
    assert isinstance(dataset, ClassificationNotes)
    labels, logits = classifier_logits(
        Classification(finished.model, device),
        dataset,
        rows,
        Ranks(0, 1, device),
        micro_tokens=micro_tokens,
        n_classes=len(finished.label_names),
    )
    scores = probabilities(logits, multilabel=False)
    results = _what_was_scored(finished, notes, split) | {"truncated": dataset.truncated}
    if config.predict is not None:
        write_predictions(Path(config.predict), rows, scores, finished.label_names)
        return results | {"n": len(rows), "predictions": config.predict}

    has_patients = notes.cache.patient_digests is not None
    clusters = patient_groups(notes.cache, rows)
    results |= {
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "clusters_are": "patients" if has_patients else "texts",
    }
    results |= classification_metrics(
        labels,
        logits,
        finished.label_names,
        clusters=clusters,
        resamples=config.bootstrap,
        seed=config.seed,
    )
    if isinstance(source, AdmissionNotes) and (risk := source.known_risk()) is not None:
        # Of the generator's true probabilities on these very notes: chance favours both alike.
        results["auroc_ceiling"] = auroc(labels, risk[rows])
    with _eval_folder(config) as folder:
        write_json(folder / "results.json", results)
        write_predictions(
            folder / "predictions.csv",
            rows,
            scores,
            finished.label_names,
            labels=labels,
            patients=clusters if has_patients else None,
        )
    return results


def _open(config: ScoreConfig, finished: FinishedRun) -> tuple[NoteSource, Notes]:
    """The run's own notes, or those of --data, tokenised as the run did."""
    # The run may have been moved since; its caches are made beside it.
    run = dataclasses.replace(finished.config, out=config.run)
    if config.data is None:
        _check_not_the_notes(config.predict, Path(run.data or "."))
        source, notes = open_source(run), load_notes(run, finished.tokenizer)
        if notes.fingerprint != finished.record["fingerprints"]["data"]:
            raise ValueError(
                f"the notes in {run.data} have changed since the run was trained, so its split no "
                "longer holds; to score them as other notes, name them with --data"
            )
        return source, notes
    data = Path(config.data)
    _check_not_the_notes(config.predict, data)
    if run.task == "mor" and data.is_dir():
        source = open_mimic3(data, "mor", spill_folder=cache_folder(run))
    else:
        labelled = config.predict is None
        source = open_notes(
            data,
            text_column=config.text_column or run.text_column,
            label_column=(config.label_column or run.label_column) if labelled else None,
            patient_column=(config.patient_column or run.patient_column) if labelled else None,
        )
    cache = tokenise(
        source, finished.tokenizer, cache_folder=cache_folder(run), workers=run.workers
    )
    splits = split_notes(cache, test_share=run.test_share)
    return source, Notes(
        finished.tokenizer, cache, splits, finished.label_names, source.fingerprint()
    )


def _check_not_the_notes(predict: str | None, data: Path) -> None:
    """Refuse predictions that would take the place of the notes, or lie where notes are read."""
    if predict is not None and data.exists():
        target = Path(predict).resolve()
        if data.resolve() in (target, target.parent):
            raise ValueError(f"--predict {predict} is, or lies in, the data; name another file")


def _rows(config: ScoreConfig, notes: Notes) -> tuple[str, NDArray[np.uint32]]:
    """The split that is scored, by name, and its notes."""
    if config.data is not None and config.split is None:
        return "all", np.arange(len(notes.cache), dtype=np.uint32)
    split = config.split or "test"
    return split, getattr(notes.splits, split)


def _what_was_scored(finished: FinishedRun, notes: Notes, split: str) -> dict[str, Any]:
    results = {
        "stage": finished.config.stage,
        "task": finished.config.task,
        "data": notes.cache.description,
        "data_fingerprint": notes.fingerprint,
        "split": split,
    }
    if split in ("validation", "test"):
        # Their text occurs in the training part too.
        results["left_out"] = getattr(notes.splits, f"{split}_duplicates")
    return results


@contextmanager
def _eval_folder(config: ScoreConfig) -> Iterator[Path]:
    with locked(Path(config.run)):
        folder = Path(config.run) / "eval"
        folder.mkdir(mode=0o700, exist_ok=True)
        yield folder
