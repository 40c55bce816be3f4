"""Questions put to a model: log-likelihoods against transformers, accuracy against counting."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import eval as command
from data.questions import LETTERS, Question, read_questions
from data.tokenizer import load_tokenizer
from evaluation.questions import (
    Asked,
    ModelAnswerer,
    accuracies,
    by_choice,
    by_letter,
    by_normalised_choice,
    letter_prompt,
    paired_accuracy,
    parse_answer,
)
from model.checkpoint import load_causal_lm
from model.generation import GenerationConfig
from tests.data.conftest import CharacterTokenizer
from tests.model.oracle import hugging_face_twin, make_causal_lm, make_config

GENERATION = GenerationConfig(max_new_tokens=4)
CPU = torch.device("cpu")


class Fixed:
    """Prefers what `score` says of a continuation."""

    def __init__(self, favourite: str) -> None:
        self.favourite = favourite

    def log_likelihoods(self, asked: Sequence[Asked]) -> list[float]:
        if len(self.favourite) == 1:
            return [float(one.continuation == f" {self.favourite}") for one in asked]
        return [float(zlib.crc32(one.continuation.encode())) for one in asked]  # blind to position

    def complete(self, prompts: Sequence[str], config: GenerationConfig) -> list[str]:
        return [f" {self.favourite}" for _ in prompts]


def made_questions(n: int, seed: int = 0) -> list[Question]:
    rng = np.random.default_rng(seed)
    return [
        Question(
            str(i),
            f"Which of {rng.integers(1000)}?",
            tuple(f"option {rng.integers(10**6)}" for _ in range(2 + i % 4)),
            int(rng.integers(2 + i % 4)),
            subject="ab"[i % 2],
        )
        for i in range(n)
    ]


def plain_loop(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    logits = model(torch.tensor([context + continuation])).logits[0]
    log_p = logits.log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(float(log_p[i, token]) for i, token in zip(places, continuation, strict=True))


@torch.no_grad()
def check(model: ModelAnswerer, twin: torch.nn.Module, questions: Sequence[Question]) -> None:
    asked = [
        Asked(letter_prompt(question), f" {text}")
        for question in questions
        for text in (*LETTERS[: len(question.options)], *question.options)
    ]
    found = model.log_likelihoods(asked)
    bos = [model.tokenizer.bos_id]
    for one, value in zip(asked, found, strict=True):
        context = bos + model.tokenizer.encode(one.context)
        both = bos + model.tokenizer.encode(one.context + one.continuation)
        assert both[: len(context)] == context
        assert value == pytest.approx(
            plain_loop(twin, context, both[len(context) :]), abs=1e-4, rel=1e-6
        )


def test_log_likelihoods_equal_a_plain_loop_on_a_mistral() -> None:
    ours = make_causal_lm(
        make_config(
            model_type="mistral", sliding_window=9, vocab_size=128, max_position_embeddings=512
        )
    )
    answerer = ModelAnswerer(ours, CharacterTokenizer(), CPU, micro_tokens=300)
    check(answerer, hugging_face_twin(ours), made_questions(6))
    assert answerer.shortened == 0


def test_log_likelihoods_equal_a_plain_loop_on_real_weights(real_data: Path) -> None:
    folder = real_data / "stories260k"
    answerer = ModelAnswerer(load_causal_lm(folder), load_tokenizer(folder), CPU, 4096)
    questions = read_questions("medmcqa", real_data / "mcq" / "medmcqa_dev.jsonl").questions
    short = [question for question in questions if len(letter_prompt(question)) < 250][:8]
    check(answerer, AutoModelForCausalLM.from_pretrained(folder), short)


def test_constant_answers_score_what_counting_says(real_data: Path) -> None:
    questions = read_questions("medmcqa", real_data / "mcq" / "medmcqa_dev.jsonl").questions
    for letter, count in zip("ABCD", (1348, 1085, 925, 825), strict=True):
        answers = by_letter(Fixed(letter), questions, (), GENERATION)
        found = accuracies(questions, [answer.choice for answer in answers], 0, 0)
        assert found["accuracy"] == count / 4183
        assert found["accuracy_of_constant"][letter] == count / 4183
    assert round(1348 / 4183, 3) == 0.322


@pytest.mark.parametrize("strategy", [by_choice, by_normalised_choice])
def test_shuffled_options_leave_a_position_blind_scorer_as_it_was(strategy) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    questions = made_questions(200)
    shuffled = [one.reordered(rng.permutation(len(one.options)).tolist()) for one in questions]
    right = [
        [
            answer.choice == question.answer
            for answer, question in zip(
                strategy(Fixed("text"), each, (), GENERATION), each, strict=True
            )
        ]
        for each in (questions, shuffled)
    ]
    assert right[0] == right[1]
    assert 0 < sum(right[0]) < 200


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        (" B", 1),
        ("(c)", None),
        ("(C)", 2),
        ("B. fever", 1),
        ("The answer is: A", 0),
        ("It is not A. The answer is B.", 1),
        ("Answer: [C]", 2),
        ("either [A] or [B]", None),
        ("it must be fever", 1),
        ("Aspirin", None),
        ("", None),
    ],
)
def test_an_answer_is_read(text: str, choice: int | None) -> None:
    assert parse_answer(text, ("cough", "fever", "pain")) == choice


def test_pairs_are_compared() -> None:
    rows = [{"id": str(i), "answer": 0, "choice": 0} for i in range(20)]
    others = [row | {"choice": int(i < 6)} for i, row in enumerate(rows)]
    found = paired_accuracy(rows, others, 200, 0)
    assert (found["won"], found["lost"], found["difference"]) == (6, 0, pytest.approx(0.3))
    assert found["p"] == pytest.approx(2 / 2**6)  # six coins on one side
    with pytest.raises(ValueError, match="other questions"):
        paired_accuracy(rows, others[1:], 0, 0)


@pytest.mark.parametrize("prompt", ["letter", "answer"])
def test_the_command_resumes_and_keeps_text_out(base: Path, tmp_path: Path, prompt: str) -> None:
    rows = [
        {"question": "zebrafinch?", "options": {"A": "one", "B": "two"}, "answer_idx": "AB"[i % 2]}
        for i in range(40)
    ]
    data = tmp_path / "medqa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    words = ["--model", str(base), "--out", str(out), "--mcq", "medqa", "--data", str(data)]
    words += ["--prompt", prompt, "--device", "cpu", "--bootstrap", "50"]
    assert command.main(words) == 0
    (folder,) = (out / "eval").iterdir()
    answers, results = folder / "answers.jsonl", folder / "results.json"
    whole, told = answers.read_bytes(), results.read_bytes()
    assert b"zebrafinch" not in whole + told
    assert json.loads(told)["n"] == 40
    answers.write_bytes(whole[: len(whole) - 7])  # killed while it wrote
    assert command.main(words) == 0
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    before = [json.loads(line) for line in whole.splitlines()]
    for one, other in zip(again[1:], before[1:], strict=True):
        assert (one["id"], one["choice"]) == (other["id"], other["choice"])
    assert command.main([*words, "--compare", str(folder)]) == 0
    assert json.loads(results.read_text())["comparison"]["difference"] == 0
