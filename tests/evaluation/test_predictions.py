"""predictions.csv: what it says, and what it must never say."""

import csv
from pathlib import Path

import numpy as np

from evaluation.predictions import write_predictions


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_label_a_note(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    probabilities = np.array([[0.25, 0.75], [0.1, 0.9], [2 / 3, 1 / 3]])
    write_predictions(
        path,
        np.array([4, 7, 9]),
        probabilities,
        ["survived", "died"],
        labels=np.array([0, 1, 0]),
        patients=np.array([12, 3, 12]),
    )
    first, second, third = read(path)
    assert first == {
        "row": "4",
        "patient": "0",
        "label": "survived",
        "predicted": "died",
        "p_survived": "0.25",
        "p_died": "0.75",
    }
    assert (second["patient"], third["patient"]) == ("1", "0")
    assert float(third["p_died"]) == 1 / 3  # exactly: metrics can be computed again
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_labels_and_patients(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_predictions(path, np.array([0]), np.array([[0.5, 0.5]]), ["a", "b"])
    assert read(path) == [{"row": "0", "predicted": "a", "p_a": "0.5", "p_b": "0.5"}]


def test_several_labels_a_note(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(
        path,
        np.array([0]),
        np.array([[0.5, 0.25]]),
        ["a", "b"],
        multilabel=True,
        labels=np.array([[1.0, 0.0]]),
    )
    assert read(path) == [{"row": "0", "label_a": "1", "label_b": "0", "p_a": "0.5", "p_b": "0.25"}]


def test_label_names_cannot_be_formulas(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    hostile = ["=1+1", "+cmd", "-2", "@SUM(A1)", "\t=1", "\r=1", "a,b", 'c"d', "plain"]
    n = len(hostile)
    write_predictions(path, np.arange(n), np.eye(n), hostile, labels=np.arange(n))
    for line, name in zip(read(path), hostile, strict=True):
        assert line["label"] == line["predicted"]
        assert line["label"].lstrip("'") == name
        for cell in (*line, *line.values()):
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
