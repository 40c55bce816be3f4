"""The page of question runs: what it says, and what must not be in it."""

from typing import Any

import numpy as np

from data.questions import Question
from evaluation.question_report import question_report_html
from evaluation.questions import accuracies, confusion, paired_accuracy
from tests.evaluation.test_report import HOSTILE, check_page

CONFIG = {"mcq": "usmle", "data": f"questions/{HOSTILE}", "votes": 5, "out": None, "int8": {"x": 1}}


def made_results(strategy: str, seed: int, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    """Results of 60 questions in two steps, a third of a hostile subject."""
    generator = np.random.default_rng(seed)
    questions = [
        Question(str(i), "zebrafinch?", ("one", "two", "three"), i % 3, HOSTILE if i % 3 else None,
                 f"step{1 + i % 2}")
        for i in range(60)
    ]  # fmt: skip
    choices = [None if i == 7 else int(generator.integers(3)) for i in range(60)]
    rows = [
        {"id": one.id, "answer": one.answer, "choice": choice}
        for one, choice in zip(questions, choices, strict=True)
    ]
    results = {
        "mcq": "usmle",
        "strategy": strategy,
        "strategy_version": 1,
        "shots": 5,
        "settings": {"votes": 5, "temperature": None},
        "tie_rule": "the later letter",
        "rationales": {"rationales_kept": 1234},
        "questions_fingerprint": "q" * 64,
        "model_fingerprint": "m" * 64,
        "counts": {"step1 questions": 30, "step1 image questions": 27},
        "published_counts": {"step1": 92},
        "shortened_prompts": 2,
        "texts_asked": 330,
        "new_tokens": 6600,
        "bootstrap": 100,
        "comparison": None,
        **accuracies(questions, choices, 100, 0),
        "confusion": confusion(rows),
        **changes,
    }
    return results, rows


def test_the_page_says_what_the_results_say() -> None:
    earlier, others = made_results("letter", 1)
    results, rows = made_results("medprompt", 0)
    results["comparison"] = {"run": HOSTILE, "strategy": "letter", "version": 2} | (
        paired_accuracy(rows, others, 100, 0)
    )
    page = check_page(question_report_html(results, CONFIG, [earlier]))
    text = " ".join(page.text.split())
    for found in (results, earlier):
        low, high = found["accuracy_ci"]
        assert f"{found['accuracy']:.3f} ({low:.3f} to {high:.3f})" in text
        for step in found["per_step"].values():
            assert found is earlier or f"{step['accuracy']:.3f}" in text
    for words in (
        "medprompt (version 1) (this page)",
        "letter (version 1)",
        "5.5",  # texts a question
        "110.0",  # new tokens a question
        "1,234",
        "always",
        f"{results['comparison']['difference']:+.3f}",
        f"{results['comparison']['won']:,}",
        "step1 questions, as published",
        "the later letter",
        HOSTILE,
        "q" * 64,
    ):
        assert words in text
    assert "zebrafinch" not in text
    tables = question_report_html(results, CONFIG).split("<table")
    (table,) = (each for each in tables if "chose A" in each)
    counts = [int(cell.split("<")[0]) for cell in table.split('<td class="number">')[1:]]
    assert counts == [n for row in results["confusion"].values() for n in row.values()]
    assert sum(counts) == 60


def test_what_is_not_there_has_no_section() -> None:
    results, _ = made_results("letter", 0, rationales=None, published_counts=None, tie_rule=None)
    results |= {"per_subject": {}, "per_step": {}, "accuracy_ci": None}
    page = check_page(question_report_html(results, CONFIG))
    for words in ("Beside an earlier run", "Parts of the questions", "rationales", "tie rule"):
        assert words not in page.text
    assert "no interval" in page.text
