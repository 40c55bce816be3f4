"""A finished run, scored on notes: what eval.py does, top to bottom.

    run folder -> model and notes -> losses or logits -> metrics -> results.json, report.html

Notes are the run's own held-out ones, or another source's. The test split of the run's own notes is
scored into `eval/`, everything else into a folder of its own in there, named by what was scored, so
no results take the place of others'.

Invariants: the run's own notes are scored under the split that the run was trained with, which the
fingerprint of the data vouches for; temperature and chosen thresholds come from its validation
notes, whatever is scored.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data.cache import tokenise
from data.conversations import fitting
from data.groups import read_groups
from data.mimic import MULTILABEL_TASKS, TASKS, AdmissionNotes
from data.notes import NoteSource, open_notes
from data.packing import ClassificationNotes
from data.splits import patient_groups, shared_notes
from data.wording import counted
from evaluation.calibration import calibration, fit_temperature
from evaluation.metrics import (
    HEADLINES,
    LabelScores,
    auroc,
    classification_metrics,
    default_label_scores,
    kind_of,
    probabilities,
)
from evaluation.paired import paired_metrics
from evaluation.perplexity import language_metrics
from evaluation.predictions import read_predictions, write_predictions
from evaluation.report import Curves, label_titles, read_history, seen_warning, write_report
from evaluation.subgroups import subgroup_rows
from evaluation.thresholds import chosen_thresholds, threshold_table
from model.checkpoint import base_fingerprint
from model.files import read_json, write_json
from model.heads import CausalLM, Classifier
from training.assemble import FinishedRun, has_same_lists, load_base, restore
from training.config import RunConfig
from training.notes import (
    LanguageDataset,
    Notes,
    cache_folder,
    find_notes,
    load_notes,
    make_dataset,
    open_cohort,
    open_source,
    source_pieces,
    split_and_fit,
    targets_of,
    text_encoder,
)
from training.objective import Classification, LanguageModelling
from training.parallel import Ranks, choose_device, flush_denormals
from training.run_folder import locked, private_files
from training.validation import classifier_logits

Split = Literal["train", "validation", "test"]
MOST_LABELS_SAID = 12  # one by one on the terminal


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
    compare: str | None = None
    """Folder of another run, already scored on the same notes: is the difference chance?"""
    subgroup_columns: tuple[str, ...] = ()
    """A table's columns of a few categories (sex, age, insurance), scored one by one."""
    label_scores: LabelScores | None = None
    """Several labels a note: rank each label by its own sigmoid, or, as the paper does, by the
    softmax over all labels. Default: softmax for runs of --cohort paper."""
    calibrate: bool = True
    """Fit a temperature and thresholds on the run's validation notes, which are scored for it."""
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
        if self.predict is not None:
            for flag, value in (
                ("--label-column", self.label_column),
                ("--subgroup-columns", self.subgroup_columns),
                ("--compare", self.compare),
            ):
                if value:
                    raise ValueError(f"{flag} is not used with --predict, which scores nothing")
        if self.bootstrap > 1_000_000:
            raise ValueError(f"--bootstrap must be at most 1,000,000, got {self.bootstrap}")
        if self.predict is not None:
            predict = Path(self.predict)
            if predict.suffix != ".csv" or predict.is_dir():
                raise ValueError(f"--predict must be a file that ends in .csv, got {predict}")
            if not predict.parent.is_dir():
                raise ValueError(f"--predict: there is no folder {predict.parent}; make it first")


@dataclass(frozen=True)
class Opened:
    """The notes that are scored, and the run's own, from whose validation part thresholds come."""

    source: NoteSource
    notes: Notes
    split: str  # train, validation, test, or all
    rows: NDArray[np.uint32]  # [n], of the scored notes in the source
    own: Notes | None  # None where the run's own notes are gone
    place: str  # of the results in the run's folder


def score_run(config: ScoreConfig) -> dict[str, Any]:
    """Score the run, write results and report into its folder, and return the results.

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
    of = f" of the {results['split']} split" if results["split"] != "all" else ""
    yield f"{results['data']}: {counted(results['n'], 'note')}{of}"
    if "predictions" in results:
        yield f"predictions are in {results['predictions']}"
    if (warning := seen_warning(results)) is not None:
        yield f"warning: {warning}"
    for name, reason in results.get("subgroups_left_out", {}).items():
        yield f"warning: the group {name} is left out: {reason}"
    if "tokens" in results:
        yield _perplexity_in_words(results)
    for name, of in results.get("per_source", {}).items():
        yield f"  {name}: {_perplexity_in_words(of)}"
    for name in HEADLINES:
        if name in results:
            ceiling = results.get("auroc_ceiling") if name == "auroc" else None
            best = "" if ceiling is None else f"; best reachable {ceiling:.3f}"
            yield f"{name} {_with_interval(results[name], results[name + '_ci'])}{best}"
    if results.get("calibration") is not None:
        before, after = results["calibration"]["before"], results["calibration"]["after"]
        scaled = "" if after is None else f"; {after['ece']:.3f} after temperature scaling"
        yield f"calibration error {before['ece']:.3f}{scaled}"
    if results.get("comparison") is not None:
        found = results["comparison"]["auroc"]
        chance = "" if found["p"] is None else f", p {found['p']:.3g}"
        difference = _with_interval(found["difference"], found["ci"])
        yield f"auroc difference to {results['comparison']['run']}: {difference}{chance}"
    per_label = results.get("per_label", {})
    if len(per_label) > MOST_LABELS_SAID:
        yield (
            f"  auroc is the mean of {results['labels_scored']:,} of {len(per_label):,} labels: "
            "results.json and report.html have them one by one"
        )
        return
    for name, label in per_label.items():
        auroc_of_label = _with_interval(label["auroc"], label["auroc_ci"])
        yield f"  auroc of {name} ({label['positives']:,}) {auroc_of_label}"


def _perplexity_in_words(of: dict[str, Any]) -> str:
    base = of["perplexity_base"]
    alone = "" if base is None else f"; the base alone {base:.4f}"
    return f"perplexity {of['perplexity']:.4f} over {counted(of['tokens'], 'token')}{alone}"


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "not defined"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _score_language(
    config: ScoreConfig, finished: FinishedRun, device: torch.device, micro_tokens: int
) -> dict[str, Any]:
    assert isinstance(finished.model, CausalLM)
    for flag, value, word in (
        ("--predict", config.predict, "needs"),
        ("--compare", config.compare, "needs"),
        ("--subgroup-columns", config.subgroup_columns, "need"),
        ("--label-column", config.label_column, "needs"),
    ):
        if value:
            raise ValueError(f"{flag} {word} a classifier, but {config.run} is a language model")
    opened = _open(config, finished)
    parts: Mapping[str, LanguageDataset]
    parts = source_pieces(finished.config, opened.notes, opened.rows)
    if not parts:
        pieces = make_dataset(finished.config, opened.notes, opened.rows)
        assert not isinstance(pieces, ClassificationNotes)
        parts = {"": pieces}
    metrics = language_metrics(
        LanguageModelling(finished.model, device),
        parts,
        Ranks(0, 1, device),
        micro_tokens=micro_tokens,
        base=lambda: _untrained(finished, device),
    )
    for source in opened.notes.sources:
        if source.name in metrics["per_source"]:
            metrics["per_source"][source.name]["n"] = len(source.rows(opened.rows))
    results = {**_what_was_scored(finished, opened), "n": len(opened.rows), **metrics}
    with _eval_folder(config, opened) as folder:
        write_json(folder / "results.json", results)
        write_report(
            folder / "report.html", results, finished.record, read_history(Path(config.run))
        )
    return results


def _untrained(finished: FinishedRun, device: torch.device) -> LanguageModelling | None:
    """The base whose weights a run trained, if it is still there; the run's own model goes."""
    config = finished.config
    if config.from_scratch or config.model is None or not Path(config.model).is_dir():
        return None
    if base_fingerprint(Path(config.model)) != finished.record["fingerprints"]["base"]:
        return None
    finished.model.to("meta")  # two whole models may be more than the memory holds
    base = load_base(config, Path(config.model), 0, device)
    assert isinstance(base, CausalLM)
    return LanguageModelling(base, device)


def _score_classifier(
    config: ScoreConfig, finished: FinishedRun, device: torch.device, micro_tokens: int
) -> dict[str, Any]:
    assert isinstance(finished.model, Classifier)
    opened = _open(config, finished)
    notes, rows = opened.notes, opened.rows
    if len(rows) == 0:
        raise ValueError("there is no note to score: name other data or another split")
    # Groups first: a column that holds none is said before the notes are scored, which takes long.
    of_cohort = opened.source if isinstance(opened.source, AdmissionNotes) else None
    left_out: dict[str, str] = {}
    groups = read_groups(opened.source, None if of_cohort is None else left_out)
    if of_cohort is not None:
        left_out |= of_cohort.groups_left_out
    others = None
    if config.compare is not None:  # another run that cannot be compared is refused before the work
        labels = targets_of(notes, rows, finished.label_names).astype(np.int64)
        others = _other_chances(config.compare, opened, labels, finished.label_names)
    objective = Classification(finished.model, device)

    def scored(notes: Notes, rows: NDArray[np.uint32], is_labelled: bool) -> _Scored:
        dataset = make_dataset(
            finished.config,
            notes,
            rows[np.argsort(notes.cache.lengths(rows), kind="stable")],  # like lengths pass faster
            label_names=finished.label_names,
            is_labelled=is_labelled,
        )
        assert isinstance(dataset, ClassificationNotes)
        labels, logits = classifier_logits(
            objective,
            dataset,
            rows,
            Ranks(0, 1, device),
            micro_tokens=micro_tokens,
            n_classes=len(finished.label_names),
        )
        return _Scored(labels, logits, dataset.truncated)

    test = scored(notes, rows, config.predict is None)
    multilabel = finished.config.task in MULTILABEL_TASKS
    chances = probabilities(test.logits, multilabel=multilabel)
    results = _what_was_scored(finished, opened) | {"truncated": test.truncated}
    if config.predict is not None:
        write_predictions(
            Path(config.predict), rows, chances, finished.label_names, multilabel=multilabel
        )
        return results | {"n": len(rows), "predictions": config.predict}

    has_patients = notes.cache.patient_digests is not None
    clusters = patient_groups(notes.cache, rows)
    how: dict[str, Any] = {"resamples": config.bootstrap, "seed": config.seed}
    label_scores = config.label_scores or default_label_scores(finished.config)
    results |= {
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "clusters_are": "patients" if has_patients else "texts",
        "label_scores": label_scores,
    }
    results |= classification_metrics(
        test.labels,
        test.logits,
        finished.label_names,
        clusters=clusters,
        label_scores=label_scores,
        **how,
    )
    risk = None if of_cohort is None else of_cohort.known_risk()
    if risk is not None:
        # Of the generator's true probabilities on these very notes: chance favours both alike.
        results["auroc_ceiling"] = auroc(test.labels, risk[rows])
    is_binary = kind_of(test.labels, test.logits) == "binary"
    validation = None
    if config.calibrate and opened.own is not None and len(opened.own.splits.validation):
        validation = scored(opened.own, opened.own.splits.validation, True)
    results["calibration"] = _calibration(test, validation)
    results["thresholds"] = None
    if is_binary:
        chosen = {}
        if validation is not None:
            of_validation = probabilities(validation.logits, multilabel=False)[:, 1]
            chosen = chosen_thresholds(validation.labels, of_validation)
        results["thresholds"] = threshold_table(
            test.labels, chances[:, 1], chosen, clusters=clusters, **how
        )
    results["subgroups"] = subgroup_rows(
        groups,
        rows,
        test.labels,
        test.logits,
        finished.label_names,
        clusters=clusters,
        label_scores=label_scores,
        **how,
    )
    results["subgroups_left_out"] = left_out
    results["exclusions"] = getattr(opened.source, "counts", None)
    results["comparison"] = None
    if others is not None:
        results["comparison"] = {"run": config.compare} | paired_metrics(
            test.labels,
            chances,
            others,
            clusters=clusters,
            label_scores=label_scores,
            **how,
        )
    shown = label_titles(finished.config.task, finished.label_names)
    curves = Curves.of(test.labels, chances, shown)
    with _eval_folder(config, opened) as folder:
        write_json(folder / "results.json", results)
        write_predictions(
            folder / "predictions.csv",
            rows,
            chances,
            finished.label_names,
            multilabel=test.labels.ndim == 2,
            labels=test.labels,
            patients=clusters if has_patients else None,
        )
        write_report(
            folder / "report.html",
            results,
            finished.record,
            read_history(Path(config.run)),
            curves,
        )
    return results


class _Scored(NamedTuple):
    labels: NDArray[np.int64]  # [n]
    logits: NDArray[np.float64]  # [n, C]
    truncated: int


def _calibration(test: _Scored, validation: _Scored | None) -> dict[str, Any]:
    """The scored notes' calibration as it is, and with the temperature of the validation notes."""
    temperature = None
    if validation is not None:
        temperature = fit_temperature(validation.labels, validation.logits)
    after = None if temperature is None else calibration(test.labels, test.logits / temperature)
    return {
        "validation_notes": None if validation is None else len(validation.labels),
        "temperature": temperature,
        "before": calibration(test.labels, test.logits),
        "after": after,
    }


def _other_chances(
    run: str, opened: Opened, labels: NDArray[Any], label_names: Sequence[str]
) -> NDArray[np.float64]:
    """Another run's probabilities for the scored notes: [n, C]; ValueError where they differ."""
    folder = Path(run) / opened.place
    if not (folder / "results.json").is_file():
        raise ValueError(
            f"--compare {run}: it has not been scored on these notes; run eval.py with --run {run} "
            "and the same --data and --split first"
        )
    others = read_json(folder / "results.json")
    wanted = (opened.notes.fingerprint, opened.split)
    if (others.get("data_fingerprint"), others.get("split")) != wanted:
        raise ValueError(f"--compare {run}: {folder} holds results of other notes; score it again")
    rows, their_labels, chances = read_predictions(
        folder / "predictions.csv", label_names, multilabel=labels.ndim == 2
    )
    if not np.array_equal(rows, opened.rows) or not np.array_equal(their_labels, labels):
        raise ValueError(
            f"--compare {run}: it was scored on other notes or labels (its split or its classes "
            "are not the same); the two cannot be paired"
        )
    return chances


def _open(config: ScoreConfig, finished: FinishedRun) -> Opened:
    """The run's own notes, or those of --data, tokenised as the run did."""
    # The run may have been moved since; its caches are made beside it.
    run = dataclasses.replace(finished.config, out=config.run)
    recorded = finished.record["fingerprints"]
    group_columns = config.subgroup_columns if config.predict is None else None
    if config.data is None:
        if isinstance(run.data, str):
            _check_not_the_notes(config.predict, Path(run.data))
        if not has_same_lists(run, recorded):
            raise ValueError(
                f"the patient lists in {run.splits} are missing or have changed since the run was "
                "trained, so its split no longer holds"
            )
        if config.subgroup_columns and run.task not in (None, "label"):
            raise ValueError("--subgroup-columns names columns of a table; MIMIC has its own")
        source = open_source(run, group_columns)
        notes = load_notes(run, finished.tokenizer)
        if notes.fingerprints != recorded["data"]:
            changed = [
                f"{source.description} ({source.name})"
                for source in notes.sources
                if source.fingerprint != recorded["data"][source.name]
            ]
            raise ValueError(
                f"the notes in {' and '.join(changed) or run.data} have changed since the run was "
                "trained, so its split no longer holds; to score them as other notes, name them "
                "with --data"
            )
        split = config.split or "test"
        place = "eval" if split == "test" else f"eval/{split}"
        return Opened(source, notes, split, getattr(notes.splits, split), notes, place)
    data = Path(config.data)
    _check_not_the_notes(config.predict, data)
    if run.stage == "instruct":
        if config.text_column or config.patient_column:
            raise ValueError(
                f"--text-column and --patient-column are of notes, but {data} holds rows or chats"
            )
        source = open_source(dataclasses.replace(run, data=str(data)))
    elif run.task in TASKS and data.is_dir():
        for flag, named in (
            ("--text-column", config.text_column),
            ("--label-column", config.label_column),
            ("--patient-column", config.patient_column),
            ("--subgroup-columns", config.subgroup_columns),
        ):
            if named:
                raise ValueError(f"{flag} names a column of a table, but {data} is a MIMIC folder")
        source = open_cohort(run, data, grouped=group_columns is not None)
    else:
        labelled = config.predict is None
        source = open_notes(
            data,
            text_column=config.text_column or run.text_column,
            label_column=(config.label_column or run.label_column) if labelled else None,
            # What is typed must be there; the run's own column may be missing from new notes.
            patient_column=config.patient_column or (run.patient_column if labelled else None),
            group_columns=config.subgroup_columns,
        )
    cache = tokenise(
        source,
        text_encoder(run, finished.tokenizer),
        cache_folder=cache_folder(run),
        workers=run.workers,
    )
    splits, left_out = split_and_fit(
        dataclasses.replace(run, splits=None, exclude=None), cache, source
    )
    notes = Notes(
        finished.tokenizer, cache, splits, finished.label_names, source.fingerprint(), left_out
    )
    everything = np.arange(len(cache), dtype=np.uint32)
    if run.stage == "instruct":
        everything = fitting(cache, everything, run.max_length)
    rows = everything if config.split is None else getattr(splits, config.split)
    part: str = config.split or "all"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.name.split(".")[0]).strip("-.")[:40] or "data"
    place = f"eval/{name}-{notes.fingerprint[:8]}" + ("" if part == "all" else f"-{part}")
    return Opened(source, notes, part, rows, _own_notes(run, finished), place)


def _own_notes(run: RunConfig, finished: FinishedRun) -> Notes | None:
    """The notes that the run was trained on, where their cache and its lists are still there."""
    recorded = finished.record["fingerprints"]
    if not has_same_lists(run, recorded):
        return None
    notes = find_notes(run, finished.tokenizer, recorded["data"])
    return notes and dataclasses.replace(notes, label_names=finished.label_names)


def _check_not_the_notes(predict: str | None, data: Path) -> None:
    """Refuse predictions that would take the place of the notes, or lie where notes are read."""
    if predict is not None and data.exists():
        target = Path(predict).resolve()
        if data.resolve() in (target, target.parent):
            raise ValueError(f"--predict {predict} is, or lies in, the data; name another file")


def _what_was_scored(finished: FinishedRun, opened: Opened) -> dict[str, Any]:
    notes, own = opened.notes, opened.own
    results = {
        "stage": finished.config.stage,
        "task": finished.config.task,
        "data": notes.cache.description,
        "data_fingerprint": notes.fingerprint,
        "split": opened.split,
        # Notes that tell about those the run was trained on; null where that is not known.
        "seen_in_training": None
        if own is None
        else shared_notes(notes.cache, opened.rows, own.cache, own.splits.train),
    }
    if notes.left_out:
        results["rows_left_out"] = dict(notes.left_out)
    if opened.split in ("validation", "test"):
        # Their text occurs in the training part too.
        results["left_out"] = getattr(notes.splits, f"{opened.split}_duplicates")
    return results


@contextmanager
def _eval_folder(config: ScoreConfig, opened: Opened) -> Iterator[Path]:
    with locked(Path(config.run)):
        folder = Path(config.run) / opened.place
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield folder
