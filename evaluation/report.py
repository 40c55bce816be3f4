"""report.html: the results of a scored run as one page that a clinician can read.

The page (`evaluation/page.py`) is made of numbers, names of labels and columns, and settings. It
says what results.json says, and draws the curves that are not in there.

Invariant: whatever comes from data or settings passes `escape`; no note and no identifier comes in.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from data.mimic import LABEL_TITLES, TITLES
from data.wording import counted
from evaluation.figures import UNIT_TICKS, Axis, Line, chart
from evaluation.page import (
    charts,
    flattened,
    interval_text,
    number,
    number_with_interval,
    page,
    section,
    table,
)
from evaluation.subgroups import FEWEST_PATIENTS
from model.files import write_whole
from training.record import fingerprints_by_name

MOST_POINTS = 200  # of a curve
MOST_CURVES = 6  # classes with a curve of their own; above, one curve over all pairs
Points = list[tuple[float, float]]


class Curve(NamedTuple):
    """One class or label against the rest, or all pairs of a note and a label pooled."""

    name: str
    roc: Points  # (1 - specificity, sensitivity)
    precision_recall: Points  # (recall, precision)


class Curves(NamedTuple):
    """What the report draws of n notes beside the numbers of results.json."""

    curves: list[Curve]
    prevalence: float  # share of the true ones among what the curves are about

    @classmethod
    def of(
        cls, labels: NDArray[Any], chances: NDArray[np.float64], label_names: Sequence[str]
    ) -> "Curves":
        """Draw labels [n] or [n, C] and probabilities [n, C]."""
        n_labels = len(label_names)
        if labels.ndim == 2:
            true = labels > 0
        else:
            true = labels[:, None] == np.arange(n_labels)
        if labels.ndim == 1 and n_labels == 2:
            shown = [(label_names[1], true[:, 1], chances[:, 1])]
        elif n_labels <= MOST_CURVES:
            shown = [(label_names[c], true[:, c], chances[:, c]) for c in range(n_labels)]
        else:
            shown = [("all labels pooled", true.ravel(), chances.ravel())]
        drawn = [each for each in shown if 0 < each[1].sum() < len(each[1])]
        curves = [_curve(*each) for each in drawn]
        return cls(curves, float(np.mean([each[1].mean() for each in drawn])) if drawn else 0.0)


def _curve(name: str, true: NDArray[np.bool_], chances: NDArray[np.float64]) -> Curve:
    false_share, true_share, _ = roc_curve(true, chances)
    precision, recall, _ = precision_recall_curve(true, chances, drop_intermediate=True)
    # The last pair is (0, 1) by convention, which no threshold reaches.
    return Curve(
        name, _thinned(false_share, true_share), _thinned(recall[:-1][::-1], precision[:-1][::-1])
    )


def _thinned(x: NDArray[Any], y: NDArray[Any]) -> Points:
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
    return [(float(x[i]), float(y[i])) for i in kept]


def read_history(run: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl; none where it is not there or damaged."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="ascii").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def write_report(
    path: Path,
    results: Mapping[str, Any],
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    curves: Curves | None = None,
) -> None:
    """Write the page for the results of `evaluation.score` and the run.json of the run."""
    text = report_html(results, record, history, curves)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def report_html(
    results: Mapping[str, Any],
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    curves: Curves | None = None,
) -> str:
    """Return the page; sections without content are left out."""
    sections = [_summary(results, record)]
    if "perplexity" in results:
        sections.append(_perplexity(results))
    if curves is not None:
        sections += [
            _discrimination(results, curves),
            _calibration(results),
            _thresholds(results),
            _subgroups(results),
            _comparison(results),
            _labels(results, record["config"]["task"]),
        ]
    sections += [_notes(results, record), _training(history), _settings(results, record)]
    return page(_title(record), sections)


def seen_warning(results: Mapping[str, Any]) -> str | None:
    """What a reader must know before the figures: how many notes the run was trained on."""
    seen = results["seen_in_training"]
    if seen is None:
        return "the run's own notes are gone, so nobody knows whether it was trained on these"
    by = {"text": "the text", "patient": "the patient"}
    told = [
        f"{count:,} of {counted(results['n'], 'note')} with {by[name]} of a note that the run was "
        "trained on"
        for name, count in seen.items()
        if count
    ]
    if not told:
        return None
    return "; ".join(told) + ": these figures are better than those of new notes would be"


def _title(record: Mapping[str, Any]) -> str:
    config = record["config"]
    of = {**TITLES, "label": config.get("label_column")}
    task = of.get(config["task"]) or f"stage {config['stage']}"
    return f"{Path(config['out']).name}: {task}"


def label_titles(task: str | None, label_names: Sequence[str]) -> list[str]:
    """What people read instead of the labels: those of MIMIC's classes in words."""
    of_task = LABEL_TITLES.get(task or "", {})
    return [of_task.get(name, name) for name in label_names]


def _summary(results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    split = {
        "test": ("test note", "which the run was neither trained nor tuned on"),
        "validation": ("validation note", "by which the run's weights were chosen"),
        "train": ("training note", "which the run knows"),
        "all": ("note", "which are not the run's own"),
    }[results["split"]]
    clusters = outcome = ""
    if results.get("clusters_are") == "patients":
        clusters = f" of {counted(results['clusters'], 'patient')}"
    if "positives" in results:
        _, name = label_titles(record["config"]["task"], record["labels"])
        outcome = f'The outcome is "{name}", in {counted(results["positives"], "note")}. '
    parts = [
        f"<h1>{escape(_title(record))}</h1>",
        f'<p class="source">{counted(results["n"], split[0])}{clusters}, {split[1]}. '
        f"{escape(outcome)}Data: {escape(results['data'])}.</p>",
    ]
    if (warning := seen_warning(results)) is not None:
        parts.append(f'<p class="warning" role="note"><b>Warning:</b> {escape(warning)}.</p>')
    shown = []
    for key, name in (("auroc", "AUROC"), ("auprc", "AUPRC"), ("accuracy", "Accuracy")):
        if key in results:
            interval = results[f"{key}_ci"]
            between = f"95% interval {interval_text(interval)}" if interval else "no interval"
            shown.append((name, number(results[key]), between))
    if results.get("calibration"):
        ece = results["calibration"]["before"]["ece"]
        shown.append(("Calibration error", number(ece), "mean distance, predicted from observed"))
    if "perplexity" in results:
        without = results["perplexity_base"]
        told = "no base beside it" if without is None else f"the base alone {without:,.3f}"
        shown.append(("Perplexity", f"{results['perplexity']:,.3f}", told))
    items = (
        f"<li>{escape(name)}<b>{escape(value)}</b><small>{escape(told)}</small></li>"
        for name, value, told in shown
    )
    return "\n".join((*parts, '<ul class="headlines">' + "".join(items) + "</ul>"))


def _perplexity(results: Mapping[str, Any]) -> str:
    parts = {"all": results} | results.get("per_source", {})
    rows = [
        [
            name,
            f"{of['tokens']:,}",
            f"{of['perplexity']:,.4f}",
            "" if of["perplexity_base"] is None else f"{of['perplexity_base']:,.4f}",
        ]
        for name, of in parts.items()
    ]
    return section(
        "Perplexity",
        "How surprised the model is by a token of the notes, on average: 1 is never. It is the "
        f"exponential of the mean loss over {counted(results['tokens'], 'token')}, each once.",
        table("Perplexity", ["notes", "tokens", "this run", "base alone"], rows),
    )


def _discrimination(results: Mapping[str, Any], curves: Curves) -> str:
    units = results["clusters_are"]
    rows = [
        [name, number(results[key]), interval_text(results[f"{key}_ci"])]
        for key, name in (
            ("auroc", "AUROC"),
            ("auprc", "AUPRC"),
            ("accuracy", "Accuracy"),
            ("f1", "F1"),
        )
    ]
    if results.get("auroc_ceiling") is not None:
        rows.append(["best AUROC that can be reached", number(results["auroc_ceiling"]), ""])
    words = (
        "AUROC is the chance that a note with the outcome is ranked above one without: 0.5 is a "
        "coin, 1 is never wrong. AUPRC is the precision at each threshold, averaged over the "
        "recall; a model that knows nothing reaches the share of notes with the outcome. Intervals "
        f"come from {results['bootstrap']:,} resamples of whole {units}. Accuracy is the share of "
        "predictions that are right; F1 combines precision and recall, 1 is best."
    )
    if "labels_scored" in results:
        words += (
            f" {results['labels_scored']:,} of {len(results['per_label']):,} labels occur both with"
            " and without among these notes; the others have no AUROC and are in no mean."
        )
    content = table("Discrimination", ["metric", "value", "95% interval"], rows)
    if curves.curves:
        named = ", ".join(curve.name for curve in curves.curves)
        roc = chart(
            "roc",
            "ROC curve",
            f"Sensitivity against 1 - specificity at every threshold, of {named}. "
            f"AUROC {number(results['auroc'])}.",
            [Line(curve.name, curve.roc) for curve in curves.curves],
            Axis("1 - specificity (false alarms)", 0, 1, UNIT_TICKS),
            Axis("sensitivity", 0, 1, UNIT_TICKS),
            diagonal="chance",
        )
        precision = chart(
            "pr",
            "Precision-recall curve",
            f"Precision against recall at every threshold, of {named}. "
            f"AUPRC {number(results['auprc'])}; share with the outcome {curves.prevalence:.3f}.",
            [
                *(Line(curve.name, curve.precision_recall) for curve in curves.curves),
                Line("share with the outcome", [(0, curves.prevalence), (1, curves.prevalence)]),
            ],
            Axis("recall (sensitivity)", 0, 1, UNIT_TICKS),
            Axis("precision (PPV)", 0, 1, UNIT_TICKS),
        )
        content += charts([("ROC curve", roc), ("Precision-recall curve", precision)])
    return section("How well it ranks", words, content)


def _calibration(results: Mapping[str, Any]) -> str:
    found = results["calibration"]
    temperature, before, after = found["temperature"], found["before"], found["after"]
    if temperature is None:
        told = "No temperature was fitted: "
        told += (
            "validation notes were not scored."
            if found["validation_notes"] is None
            else f"none can be told from {counted(found['validation_notes'], 'validation note')}."
        )
    else:
        told = (
            f"Dividing the model's raw scores (logits) by {temperature:.3f}, fitted on "
            f"{counted(found['validation_notes'], 'validation note')}, gives the second "
            "column; predictions.csv holds the probabilities as they are."
        )
    names = (
        ("ece", "Expected calibration error"),
        ("ece_adaptive", "The same, bins of equal size"),
        ("brier", "Brier score"),
        ("log_loss", "Log loss"),
    )
    columns = [before] if after is None else [before, after]
    rows = [[name, *(number(column[key]) for column in columns)] for key, name in names]
    header = ["error (0 is best)", "as predicted", "after scaling"][: 1 + len(columns)]
    labels = ("as predicted", "after temperature scaling")
    lines = [
        Line(label, [(b["predicted"], b["observed"]) for b in column["bins"]], dots=True)
        for label, column in zip(labels, columns, strict=False)
    ]
    drawn = chart(
        "reliability",
        "Reliability diagram",
        "Share with the outcome against the mean predicted probability, in ten bins of equal "
        "width. A calibrated model lies on the diagonal. Expected calibration error "
        + " and after scaling ".join(number(column["ece"]) for column in columns)
        + ".",
        lines,
        Axis("predicted probability", 0, 1, UNIT_TICKS),
        Axis("share with the outcome", 0, 1, UNIT_TICKS),
        diagonal="calibrated",
    )
    return section(
        "Whether its probabilities hold",
        "Of notes with a predicted risk of 20%, one in five should have the outcome. The "
        "calibration error is the mean distance from that. Brier score and log loss also count how "
        "well notes are told apart. " + told,
        table("Calibration", header, rows) + charts([("Reliability diagram", drawn)]),
    )


def _thresholds(results: Mapping[str, Any]) -> str:
    if not results["thresholds"]:
        return ""
    named = {
        "fixed": "fixed",
        "youden": "best sensitivity + specificity (Youden)",
        "sensitivity 0.9": "sensitivity of 90%",
        "specificity 0.9": "specificity of 90%",
    }
    header = ["threshold", "chosen by", "notes flagged", "sensitivity", "specificity"]
    rows = [
        [
            f"{row['threshold']:.3f}",
            named[row["rule"]],
            *(
                number_with_interval(row[name], row[f"{name}_ci"], percent=True)
                for name in ("flagged", "sensitivity", "specificity", "ppv", "npv")
            ),
        ]
        for row in results["thresholds"]
    ]
    words = (
        "A note is flagged when its predicted probability is at least the threshold. Sensitivity "
        "is the share of notes with the outcome that are flagged, specificity the share of those "
        "without that are not. PPV is the share of flagged notes with the outcome, NPV the share "
        "of the others without. "
    )
    if len({row["rule"] for row in results["thresholds"]}) > 1:
        words += (
            "Thresholds that are not fixed were chosen on the validation notes, so here they may "
            "miss what they aim at. "
        )
    words += "In brackets: 95% interval."
    return section(
        "What a threshold would do",
        words,
        table("Thresholds", [*header, "PPV", "NPV"], rows, kind="wide"),
    )


def _subgroups(results: Mapping[str, Any]) -> str:
    left_out = results.get("subgroups_left_out", {})
    if not results["subgroups"] and not left_out:
        return ""
    has_positives = "positives" in results
    units = results["clusters_are"]
    header = ["group", "notes", units]
    header += ["with the outcome"] if has_positives else []
    rows = []
    for row in results["subgroups"]:
        cells = [f"{row['group']}: {row['value']}"]
        if row["suppressed"]:
            cells += ["not shown", f"under {FEWEST_PATIENTS}"] + ["not shown"] * (2 + has_positives)
        else:
            cells += [f"{row['n']:,}", f"{row['clusters']:,}"]
            cells += [f"{row['positives']:,}"] if has_positives else []
            cells += [
                number_with_interval(row[key], row[f"{key}_ci"]) for key in ("auroc", "auprc")
            ]
        rows.append(cells)
    missing = "".join(f" Left out: {name}, because {why}." for name, why in left_out.items())
    return section(
        "Groups of patients",
        "The same model on parts of the same notes. Where intervals overlap, a difference can be "
        "chance; AUPRC also follows how common the outcome is in the group. Notes whose group is "
        f"not known are in no row, and one with under {FEWEST_PATIENTS} {units} has no figures."
        + missing,
        table("Subgroups", [*header, "AUROC", "AUPRC"], rows, kind="wide"),
    )


def _comparison(results: Mapping[str, Any]) -> str:
    found = results["comparison"]
    if found is None:
        return ""
    names = (("auroc", "AUROC"), ("auprc", "AUPRC"), ("accuracy", "Accuracy"), ("f1", "F1"))
    rows = []
    for key, name in names:
        row = found[key]
        p = "" if row["p"] is None else f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001"
        rows.append(
            [
                name,
                number(row["this"]),
                number(row["other"]),
                number(row["difference"], signed=True),
                interval_text(row["ci"], signed=True),
                p,
            ]
        )
    header = ["metric", "this run", "other run", "difference", "95% interval", "p"]
    return section(
        "Beside another run",
        f"The other run is {found['run']}, on the same notes. Both were resampled with the same "
        f"{results['clusters_are']}; an interval without 0 says that the difference is more than "
        "chance.",
        table("Paired comparison", header, rows, kind="wide"),
    )


def _labels(results: Mapping[str, Any], task: str | None) -> str:
    if "per_label" not in results:
        return ""
    titles = label_titles(task, list(results["per_label"]))
    rows = [
        [
            name,
            f"{label['positives']:,}",
            *(number_with_interval(label[key], label[f"{key}_ci"]) for key in ("auroc", "auprc")),
        ]
        for name, label in zip(titles, results["per_label"].values(), strict=True)
    ]
    return section(
        "Label by label",
        "Each label against all notes without it. An interval is missing where too few patients "
        "have the label.",
        table("Labels", ["label", "notes with it", "AUROC", "AUPRC"], rows, kind="wide"),
    )


def _notes(results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    counts = record["counts"]
    rows = [
        ["training notes", f"{counts['train_notes']:,}"],
        ["validation notes", f"{counts['validation_notes']:,}"],
        ["test notes", f"{counts['test_notes']:,}"],
        ["left out of validation: text is in training", f"{counts['validation_notes_left_out']:,}"],
        ["left out of the test: text is in training", f"{counts['test_notes_left_out']:,}"],
        ["in no list of patients", f"{counts['unlisted_notes']:,}"],
        ["scored here", f"{results['n']:,}"],
    ]
    if "positives" in results:
        rows.append(["scored here, with the outcome", f"{results['positives']:,}"])
    if "truncated" in results:
        rows.append(["scored here, longer than the model reads", f"{results['truncated']:,}"])
    content = table("Notes of the run", ["notes", "count"], rows)
    if results.get("exclusions"):
        reasons = [[reason, f"{count:,}"] for reason, count in results["exclusions"].items()]
        content += table("What became of every admission", ["admissions", "count"], reasons)
    return section("Notes", f"Split {record['split']}.", content)


def _training(history: Sequence[Mapping[str, float]]) -> str:
    def line(label: str, key: str, *, dots: bool = False) -> list[Line]:
        points = [(float(h["step"]), float(h[key])) for h in history if key in h]
        points = [point for point in points if np.isfinite(point).all()]
        return [Line(label, _averaged(points), dots)] if points else []

    losses = line("training", "loss") + line("validation", "validation_loss", dots=True)
    scores = line("validation AUROC", "validation_auroc", dots=True)
    drawn = []
    for name, title, unit, lines in (
        ("loss", "Loss while training", "loss", losses),
        ("score", "AUROC while training", "AUROC", scores),
    ):
        if lines:
            steps = [x for each in lines for x, _ in each.points]
            values = [y for each in lines for _, y in each.points]
            described = f"From {min(values):.3f} to {max(values):.3f} over {max(steps):,.0f} steps."
            axes = Axis.around("step", [0.0, *steps]), Axis.around(unit, values)
            drawn.append((title, chart(name, title, described, lines, *axes)))
    if not drawn:
        return ""
    return section("Training", "Means of neighbouring steps.", charts(drawn))


def _averaged(points: Points) -> Points:
    if len(points) <= MOST_POINTS:
        return points
    return [
        (float(block[:, 0].mean()), float(block[:, 1].mean()))
        for block in np.array_split(np.array(points), MOST_POINTS)
    ]


def _settings(results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    settings = [
        [f"--{flag}", " ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for flag, value in flattened(record["config"])
        if value is not None
    ]
    origin = [
        ["run began", record["began"]],
        ["weights of step", f"{record['kept']['step']:,} of {record['kept']['last_step']:,}"],
        ["trainable parameters", f"{record['parameters']['trainable']:,}"],
        ["all parameters", f"{record['parameters']['all']:,}"],
        ["commit", environment["commit"] or "not known"],
        ["device", environment["device"]],
        *([name, version] for name, version in environment["versions"].items()),
    ]
    named = fingerprints_by_name(record["fingerprints"])
    prints = [[name, digest or "none"] for name, digest in named.items()]
    prints.append(["data scored here", results["data_fingerprint"]])
    return section(
        "Settings and fingerprints",
        "Two runs with the same settings and fingerprints give the same results.",
        table("Settings", ["setting", "value"], settings, kind="settings")
        + table("Origin", ["what", "value"], origin, kind="settings")
        + table("Fingerprints (SHA-256)", ["of", "digest"], prints, kind="settings"),
    )
