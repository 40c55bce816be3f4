"""Cells: results are taken as they are only where they are those that were asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evaluation.cells
from evaluation.cells import answers_of, scores_of
from evaluation.questions import QuestionConfig
from evaluation.score import ScoreConfig
from evaluation.strategies import STRATEGIES
from training.stages import downstream


def test_answers_of_other_versions_models_or_questions_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    stamps: dict[str, Any] = {"model": "m", "questions": ["q"]}

    def score(config: QuestionConfig) -> dict[str, Any]:
        asked.append(config.prompt)
        return {"n": len(asked)}

    monkeypatch.setattr(evaluation.cells, "score_questions", score)
    monkeypatch.setattr(evaluation.cells, "_model_stamp", lambda _: stamps["model"])
    monkeypatch.setattr(evaluation.cells, "_questions_stamp", lambda _: stamps["questions"])
    first = QuestionConfig(mcq="medqa", data="d", model="m", out="o", prompt="answer")
    nearest = replace(first, prompt="nearest", shots=1, shots_data="s")
    for config in (first, nearest):
        kept = tmp_path / f"{config.prompt}.json"
        found = answers_of(config, kept)
        # What only bounds the memory changes no answer.
        same = replace(config, cache_tokens=9, micro_tokens=9, device="cpu")
        assert answers_of(same, kept) == found
        with monkeypatch.context() as patch:
            newer = replace(STRATEGIES[config.prompt], version=99)
            patch.setattr("evaluation.strategies.STRATEGIES", {**STRATEGIES, config.prompt: newer})
            assert answers_of(config, kept) != found
    monkeypatch.setattr("evaluation.strategies.DEMONSTRATIONS_VERSION", 99)
    before = len(asked)
    answers_of(first, tmp_path / "answer.json")
    answers_of(first, tmp_path / "answer.json")
    answers_of(nearest, tmp_path / "nearest.json")
    assert asked[before:] == ["answer", "nearest"]  # each once: both were of version 99
    for name, other in (("model", "n"), ("questions", ["r"])):
        before, stamps[name] = len(asked), other
        for _ in range(2):
            answers_of(first, tmp_path / "answer.json")
        assert asked[before:] == ["answer"]


def test_results_of_other_resamples_or_label_scores_are_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[ScoreConfig] = []
    results = tmp_path / "eval" / "results.json"
    results.parent.mkdir()

    def score(config: ScoreConfig) -> None:
        scored.append(config)
        how = {"bootstrap": config.bootstrap, "seed": config.seed}
        how["label_scores"] = config.label_scores or "softmax"  # the default of such a run
        results.write_text(json.dumps(how))

    monkeypatch.setattr(evaluation.cells, "score_run", score)
    config = replace(downstream(), out=str(tmp_path), task="diag", cohort="paper")
    how = ScoreConfig(run="", bootstrap=20)
    for other in (
        how,
        replace(how, bootstrap=30),
        replace(how, bootstrap=30, seed=1),
        replace(how, bootstrap=30, seed=1, label_scores="sigmoid"),
    ):
        for _ in range(2):
            assert scores_of(config, other)["bootstrap"] == other.bootstrap
        assert scored[-1] == replace(other, run=str(tmp_path))
    assert len(scored) == 4
    # A language model has no such settings.
    results.write_text(json.dumps({"perplexity": 2.0}))
    assert scores_of(config, how) == {"perplexity": 2.0}
    assert len(scored) == 4
