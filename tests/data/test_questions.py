"""Question sets: every published layout, answers from one place, and bad rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.questions import (
    CLINICAL_SUBJECTS,
    USMLE_IMAGES,
    USMLE_PUBLISHED,
    Question,
    read_questions,
)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def medqa(**changes: Any) -> dict[str, Any]:
    options = {"A": "one", "B": "two", "C": "three", "D": "four", "E": "five"}
    row = {"question": "Which?", "options": options, "answer_idx": "C", "meta_info": "step1"}
    return row | changes


def medmcqa(cop: Any, id: str = "x", **changes: Any) -> dict[str, Any]:
    row = {"id": id, "question": "Which?", "opa": "one", "opb": "two", "opc": "three"}
    return row | {"opd": "four", "cop": cop, "subject_name": "Surgery"} | changes


def test_medqa_of_all_its_layouts(tmp_path: Path) -> None:
    listed = [{"key": key, "value": value} for key, value in medqa()["options"].items()]
    hub = {"id": "d", "sent1": "Which?", "ending0": "one", "ending1": "two", "label": 1}
    path = lines(
        tmp_path / "medqa.jsonl",
        medqa(),
        medqa(options={"A": "one", "B": "two", "C": "three", "D": "four"}, answer_idx="d"),
        medqa(options=listed),
        medqa(answer_idx=None, answer="five"),
        hub,
    )
    questions = read_questions("medqa", path).questions
    assert [question.answer for question in questions] == [2, 3, 2, 4, 1]
    assert [len(question.options) for question in questions] == [5, 4, 5, 5, 2]
    assert [question.id for question in questions] == [
        *("medqa-1", "medqa-2", "medqa-3", "medqa-4", "d")
    ]
    assert questions[0].step == "step1"


@pytest.mark.parametrize(("cops", "answers"), [((1, 2, 4), [0, 1, 3]), ((0, 2, 3), [0, 2, 3])])
def test_medmcqa_tells_which_number_is_the_first(
    tmp_path: Path, cops: tuple[int, ...], answers: list[int]
) -> None:
    rows = [medmcqa(cop, str(i)) for i, cop in enumerate(cops)]
    questions = read_questions("medmcqa", lines(tmp_path / "q.jsonl", *rows)).questions
    assert [question.answer for question in questions] == answers


@pytest.mark.parametrize("cops", [(1, 2), (0, 4)])
def test_medmcqa_asks_where_the_numbers_do_not_tell(tmp_path: Path, cops: tuple[int, ...]) -> None:
    path = lines(tmp_path / "q.jsonl", *(medmcqa(cop, str(cop)) for cop in cops))
    with pytest.raises(ValueError, match="--answers-from 0 or --answers-from 1"):
        read_questions("medmcqa", path)
    if 0 not in cops:
        told = read_questions("medmcqa", path, answers_from=0).questions
        assert [question.answer for question in told] == [1, 2]


def test_a_file_of_something_else_is_refused_by_its_first_row(tmp_path: Path) -> None:
    path = lines(tmp_path / "other.jsonl", {"a": 1}, {"text": "b"})
    with pytest.raises(ValueError, match=r"other\.jsonl.*line 1"):
        read_questions("medmcqa", path)


def test_pubmedqa_of_both_layouts(tmp_path: Path) -> None:
    article = {"QUESTION": "Is it?", "CONTEXTS": ["a", "b"], "final_decision": "maybe"}
    published = tmp_path / "pqal.json"
    published.write_text(json.dumps({"77": article}), encoding="utf-8")
    (first,) = read_questions("pubmedqa", published).questions
    assert first == Question("77", "Is it?", ("yes", "no", "maybe"), 2, context="a\nb")
    hub = {"pubid": 77, "question": "Is it?", "context": {"contexts": ["a", "b"]}}
    path = lines(tmp_path / "hub.jsonl", hub | {"final_decision": "maybe"})
    assert read_questions("pubmedqa", path).questions == (first,)


def test_mmlu_takes_the_clinical_subjects(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for subject in (*CLINICAL_SUBJECTS, "astronomy"):
        table = '"Which\nof them?",1,2,3,4,C\n"A, or?",1,2,3,4,A\n'
        (tmp_path / "test" / f"{subject}_test.csv").write_text(table, encoding="utf-8")
    found = read_questions("mmlu", tmp_path).questions
    assert Counter(question.subject for question in found) == dict.fromkeys(CLINICAL_SUBJECTS, 2)
    assert [question.answer for question in found[:2]] == [2, 0]
    row = {"question": "Which?", "choices": ["1", "2", "3", "4"], "answer": 0}
    rows = [row | {"subject": "anatomy"}, row | {"subject": "astronomy"}, row | {"answer": "D"}]
    hub = read_questions("mmlu", lines(tmp_path / "anatomy_test.jsonl", *rows)).questions
    assert [(question.subject, question.answer) for question in hub] == [
        ("anatomy", 0),
        ("anatomy", 3),
    ]


def write_usmle(folder: Path) -> Path:
    """The three steps in their published sizes; question 1 has an empty option before its own."""
    for step, size in (("step1", 119), ("step2", 120), ("step3", 135)):
        rows = [
            {"no": n, "question": "Which?", "options": {"A": "x", "B": "" if n == 1 else "y"}}
            for n in range(1, size + 1)
        ]
        for row in rows:
            row["options"] |= {"C": "z"}  # type: ignore[operator]
        (folder / f"{step}.json").write_text(json.dumps(rows), encoding="utf-8")
        solutions = {str(n): "c" for n in range(1, size + 1)}
        (folder / f"{step}_solutions.json").write_text(json.dumps(solutions), encoding="utf-8")
    return folder


@pytest.fixture
def usmle(tmp_path: Path) -> Path:
    return write_usmle(tmp_path)


def test_usmle_leaves_out_images_and_empty_options(usmle: Path) -> None:
    found = read_questions("usmle", usmle)
    assert Counter(question.step for question in found.questions) == USMLE_PUBLISHED
    assert {step: found.counts[f"{step} questions"] for step in USMLE_IMAGES} == USMLE_PUBLISHED
    assert found.counts["step1 image questions"] == 27
    assert found.questions[0].options == ("x", "z")
    assert found.questions[0].answer == 1
    assert found.questions[1].answer == 2
    assert not any(question.id == "step1-4" for question in found.questions)


BAD = [
    ("missing field", medqa(question=None), "there is no question"),
    ("missing field", medqa(options=None), "there is no options"),
    ("missing field", medqa(options={"A": "one", "B": " "}, answer_idx="A"), "1 option;"),
    ("missing field", [1], "not a JSON object"),
    ("answer not among the options", medqa(answer_idx="F"), "5 options"),
    ("answer not among the options", medqa(answer_idx="AB"), ""),
    ("answer not among the options", medqa(answer_idx=None, answer="six"), ""),
    ("duplicate id", medqa(id="first"), ""),
]


@pytest.mark.parametrize(("reason", "row", "detail"), BAD)
def test_a_bad_row_is_refused_with_its_place_or_counted(
    tmp_path: Path, reason: str, row: Any, detail: str
) -> None:
    path = lines(tmp_path / "q.jsonl", medqa(id="first"), row, medqa(id="last"))
    with pytest.raises(ValueError, match=rf"q.jsonl, line 2: {reason}.*{detail}.*--bad-rows skip"):
        read_questions("medqa", path)
    found = read_questions("medqa", path, bad_rows="skip")
    assert found.counts == {reason: 1}
    assert [question.id for question in found.questions] == ["first", "last"]


@pytest.mark.parametrize(
    ("reason", "damage"), [("invalid UTF-8", b"\xff"), ("not JSON", b'"'), ("invalid UTF-8", b"")]
)
def test_bytes_that_are_no_text_or_no_json(tmp_path: Path, reason: str, damage: bytes) -> None:
    path = lines(tmp_path / "q.jsonl", medqa(id="first"), medqa(id="second"))
    content = path.read_bytes().split(b"\n")
    content[1] = content[1].replace(b"Which", b"Wh" + (damage or b"\\ud800") + b"ich")
    path.write_bytes(b"\n".join(content))
    with pytest.raises(ValueError, match=f"q.jsonl, line 2: {reason}"):
        read_questions("medqa", path)
    assert read_questions("medqa", path, bad_rows="skip").counts == {reason: 1}


def test_an_error_quotes_no_question(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", medqa(question="zebrafinch", answer_idx="zebrafinch"))
    with pytest.raises(ValueError, match="line 1") as raised:
        read_questions("medqa", path)
    assert "zebrafinch" not in str(raised.value)


def test_options_are_reordered_with_their_answer() -> None:
    question = Question("q", "Which?", ("a", "b", "c"), 2)
    other = question.reordered((2, 0, 1))
    assert other.options == ("c", "a", "b")
    assert other.options[other.answer] == "c"


def test_the_published_files(real_data: Path) -> None:
    medmcqa = read_questions("medmcqa", real_data / "mcq" / "medmcqa_dev.jsonl")
    answers = Counter(question.answer for question in medmcqa.questions)
    assert answers == {0: 1348, 1: 1085, 2: 925, 3: 825}
    assert medmcqa.counts == {}
    pubmedqa = read_questions("pubmedqa", real_data / "mcq" / "pubmedqa_dev.json")
    assert len(pubmedqa.questions) == 500
    assert pubmedqa.counts == {}
