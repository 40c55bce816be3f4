"""The report's page: parsed as a browser would, and searched for what must not be in it."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.calibration import calibration, fit_temperature
from evaluation.figures import Axis, Line, chart
from evaluation.metrics import classification_metrics, probabilities
from evaluation.page import table as made_table
from evaluation.paired import paired_metrics
from evaluation.report import Curves, label_titles, read_history, report_html
from evaluation.score import ScoreConfig, score_run
from evaluation.thresholds import chosen_thresholds, threshold_table
from model.files import read_json
from tests.evaluation.conftest import CANARY_PATIENT, CANARY_TEXT

HOSTILE = "<script>alert('x')</script>\" onload=\"y"
VOID = {"meta", "circle", "polyline"}


class Page(HTMLParser):
    """What a page is made of; closing tags are held to the order of the opening ones."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.tables: list[list[tuple[str, dict[str, str]]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        assert len(found) == len(attributes)
        self.elements.append((tag, found))
        if tag == "table":
            self.tables.append([])
        if "table" in self._open:
            self.tables[-1].append((tag, found))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def tags(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def check_page(text: str) -> Page:
    """What holds for every report."""
    page = Page(text)
    names = {tag for tag, _ in page.elements}
    forbidden = {"script", "link", "img", "iframe", "object", "embed", "a", "base", "form"}
    assert not names & (forbidden | {"image", "use", "foreignobject"})
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"href", "src", "xlink:href", "action", "style"} & set(attributes)
    address = "http://www.w3.org/2000/svg"  # a name, never fetched
    assert "//" not in text.replace(address, "")
    assert "url(" not in text and "@import" not in text
    policy = next(m for m in page.tags("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert page.tables
    for table in page.tables:
        tags = [tag for tag, _ in table]
        assert tags[0] == "caption" and "thead" in tags
        columns = sum(attributes.get("scope") == "col" for _, attributes in table)
        rows = sum(attributes.get("scope") == "row" for _, attributes in table)
        assert columns >= 2
        assert rows * (columns - 1) == tags.count("td")
    for drawing in page.tags("svg"):
        assert drawing["role"] == "img"
        assert set(drawing["aria-labelledby"].split()) <= set(ids)
    assert len(page.tags("h1")) == 1
    assert page.tags("html") == [{"lang": "en"}]
    assert "nan" not in page.text.lower().replace("finance", "").replace("unanswered", "")
    return page


@pytest.fixture(scope="module")
def record(downstream_run: Path) -> dict[str, Any]:
    return read_json(downstream_run / "run.json")


def hostile_results(labels: np.ndarray, logits: np.ndarray, names: list[str]) -> dict[str, Any]:
    chances = probabilities(logits, multilabel=labels.ndim == 2)
    results = {
        "stage": "downstream",
        "task": "label",
        "data": HOSTILE,
        "data_fingerprint": "ab" * 32,
        "split": "all",
        "seen_in_training": None,
        "truncated": 0,
        "bootstrap": 50,
        "clusters_are": "patients",
        **classification_metrics(labels, logits, names, resamples=50),
    }
    temperature = fit_temperature(labels, logits)
    results["calibration"] = {
        "validation_notes": 5,
        "temperature": temperature,
        "before": calibration(labels, logits),
        "after": None if temperature is None else calibration(labels, logits / temperature),
    }
    results["thresholds"] = None
    if labels.ndim == 1 and logits.shape[1] == 2:
        chosen = chosen_thresholds(labels, chances[:, 1])
        results["thresholds"] = threshold_table(labels, chances[:, 1], chosen, resamples=50)
    shown = {"n": 5, "clusters": 5, "auroc": None, "auroc_ci": None, "auprc": 1, "auprc_ci": [0, 1]}
    if "positives" in results:
        shown["positives"] = 3
    results["subgroups"] = [
        {"group": HOSTILE, "value": HOSTILE, "suppressed": False, **shown},
        {"group": HOSTILE, "value": "few", "suppressed": True},
    ]
    results["exclusions"] = {HOSTILE: 3}
    pairs = paired_metrics(labels, chances, chances[::-1], resamples=50)
    results["comparison"] = {"run": HOSTILE, **pairs}
    return results


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "many labels"])
def test_hostile_names_stay_text(kind: str, record: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    n_labels = {"binary": 2, "multiclass": 4, "multilabel": 5, "many labels": 30}[kind]
    if kind in ("binary", "multiclass"):
        labels = rng.integers(0, n_labels, 80)
    else:
        labels = (rng.random((80, n_labels)) < 0.3).astype(int)
        labels[:, 0] = 0
    names = [f"{HOSTILE} {c}" for c in range(n_labels)]
    results = hostile_results(labels, rng.normal(size=(80, n_labels)), names)
    chances = probabilities(rng.normal(size=(80, n_labels)), multilabel=labels.ndim == 2)
    history = [{"step": i, "loss": 1 / i, "validation_auroc": 0.5} for i in range(1, 900)]
    hostile_record = {**record, "labels": names, "split": HOSTILE}
    page = check_page(
        report_html(results, hostile_record, history, Curves.of(labels, chances, names))
    )
    assert page.text.count(HOSTILE) >= 6
    headings = page.tags("h2")
    assert len(headings) == 8
    assert len(page.tags("svg")) == 5


@pytest.mark.parametrize(
    ("task", "title", "classes"),
    [
        ("mor", "in-hospital mortality", ["survived", "died in hospital"]),
        (
            "pmv",
            "prolonged mechanical ventilation",
            ["ventilated for under 7 days", "ventilated for 7 days or more"],
        ),
        (
            "los",
            "length of stay",
            ["up to 3 days", "over 3 to 7 days", "over 7 to 14 days", "over 14 days"],
        ),
        ("diag", "diagnosis groups", None),
        ("proc", "procedure groups", None),
    ],
)
def test_tasks_and_classes_of_mimic_are_told_in_words(
    task: str, title: str, classes: list[str] | None, record: dict[str, Any]
) -> None:
    rng = np.random.default_rng(1)
    names = ["038", "401", "V58"] if classes is None else [str(c) for c in range(len(classes))]
    labels = rng.integers(0, len(names), 80)
    if classes is None:
        labels = (rng.random((80, 3)) < 0.4).astype(int)
    logits = rng.normal(size=(80, len(names)))
    results = hostile_results(labels, logits, names)
    shown = label_titles(task, names)
    assert shown == (classes or names)
    chances = probabilities(logits, multilabel=labels.ndim == 2)
    config = {**record["config"], "task": task}
    page = check_page(
        report_html(
            results,
            {**record, "config": config, "labels": names},
            [],
            Curves.of(labels, chances, shown),
        )
    )
    assert f": {title}" in page.text
    told = shown[-1:] if len(names) == 2 else shown
    assert all(page.text.count(name) >= 2 for name in told)
    assert task == "mor" or 'The outcome is "1"' not in page.text


def test_a_page_of_undefined_figures(record: dict[str, Any]) -> None:
    labels, logits = np.zeros(12, int), np.zeros((12, 2))
    results = hostile_results(labels, logits, ["no", "yes"])
    curves = Curves.of(labels, probabilities(logits, multilabel=False), ["no", "yes"])
    page = check_page(report_html(results, record, [], curves))
    assert "not defined" in page.text


def test_the_report_of_a_run_says_what_results_json_says(downstream_run: Path) -> None:
    results = score_run(ScoreConfig(run=str(downstream_run), device="cpu", bootstrap=50))
    text = (downstream_run / "eval" / "report.html").read_text(encoding="utf-8")
    page = check_page(text)
    for name in ("auroc", "auprc", "accuracy", "f1"):
        assert f"{results[name]:.3f}" in page.text
        low, high = results[f"{name}_ci"]
        assert f"{low:.3f} to {high:.3f}" in page.text
    for words in ("ROC curve", "Reliability diagram", "Thresholds", "Loss while training"):
        assert words in page.text
    assert results["data_fingerprint"] in page.text
    assert CANARY_TEXT not in text and CANARY_PATIENT not in text


def test_a_language_models_report_is_shorter(clinical_run: Path) -> None:
    results = score_run(ScoreConfig(run=str(clinical_run), device="cpu"))
    text = (clinical_run / "eval" / "report.html").read_text(encoding="utf-8")
    page = check_page(text)
    assert f"{results['perplexity']:,.4f}" in page.text
    assert "AUROC" not in page.text
    assert CANARY_TEXT not in text and CANARY_PATIENT not in text


def test_a_thousand_labels_stay_below_5_mb(record: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random((50, 1266)) < 0.2).astype(int)
    logits = rng.normal(size=labels.shape)
    names = [f"label {c}" for c in range(1266)]
    results = hostile_results(labels, logits, names)
    curves = Curves.of(labels, probabilities(logits, multilabel=True), names)
    assert len(report_html(results, record, [], curves)) < 5e6


def test_a_missing_or_damaged_history_is_left_out(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert read_history(tmp_path) == []


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [0.001, 0.0011], [-5.0, 2e6], [0.1, 0.9]])
def test_an_axis_holds_its_values_under_round_numbers(values: list[float]) -> None:
    axis = Axis.around("loss", values)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 9
    drawn = chart("c", "t", "d", [Line("l", [(0, v) for v in values])], axis, axis)
    assert Page(drawn).tags("polyline")


def test_columns_of_single_numbers_stand_on_the_right() -> None:
    rows = [["a", "1,204", "0.5 (0.4 to 0.6)", "+0.010", "7"], ["b", "under 10", "1", "none", "x"]]
    page = Page(made_table("t", ["name", "n", "value", "difference", "code"], rows))
    for tag in ("th", "td"):
        classes = [a.get("class", "") for name, a in page.elements if name == tag]
        cells = [c for c in classes if c]
        assert cells == ["number"] * (2 if tag == "th" else 4)
    plain = Page(made_table("t", ["a", "b"], [["x", "1"]], kind="settings"))
    assert plain.tags("td") == [{}]


def test_nothing_in_a_chart_runs_over_its_edge_or_an_axis() -> None:
    name = "Malignant neoplasm of ill-defined sites within the respiratory system " + "x" * 50
    y = Axis.around("AUROC", [0.4941, 0.4943])
    lines = [Line(name, [(0, 0.4941)]), Line("short", [(1, 0.4943)])]
    drawn = chart("c", "t", "d", lines, Axis("step", 0, 1, (0, 1)), y)
    words = [w for a, w in re.findall(r"<text ([^>]*)>([^<]*)</text>", drawn) if '"start"' in a]
    assert "".join(words).replace(" ", "") == (name + "short").replace(" ", "")
    assert max(map(len, words)) * 8.5 <= 380 - 100
    downs = [float(a["y"]) for a in Page(drawn).tags("text") if a["text-anchor"] == "start"]
    assert np.diff(downs).min() >= 18
    assert max(downs) < float(Page(drawn).tags("svg")[0]["viewbox"].split()[3])
    # A number of y ends at x and begins 8.5 a character before; the axis's name reaches to 18.
    ends = [float(a["x"]) for a in Page(drawn).tags("text") if a["text-anchor"] == "end"]
    assert ends and min(ends) - 8 * max(len(f"{tick:.6g}") for tick in y.ticks) >= 18
