"""Questions put to a model: log-likelihoods against transformers, accuracy against counting."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from transformers import AutoModelForCausalLM

import eval as command
from data.questions import LETTERS, Question, read_questions
from data.tokenizer import load_tokenizer
from evaluation.answering import Asked, ModelAnswerer, Prompt
from evaluation.prompting import letter_prompt, parse_answer, parse_steps
from evaluation.questions import QuestionConfig, accuracies, confusion, paired_accuracy
from evaluation.strategies import STRATEGIES, Setting, StrategyName
from model.checkpoint import load_causal_lm
from tests.data.conftest import CharacterTokenizer
from tests.evaluation.conftest import Scripted
from tests.model.oracle import hugging_face_twin, make_causal_lm, make_config

CPU = torch.device("cpu")


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
        Asked(Prompt(letter_prompt(question)), f" {text}")
        for question in questions
        for text in (*LETTERS[: len(question.options)], *question.options)
    ]
    found = model.log_likelihoods(asked)
    bos = [model.tokenizer.bos_id]
    for one, (value, is_shortened) in zip(asked, found, strict=True):
        assert not is_shortened
        context = bos + model.tokenizer.encode(one.prompt.text)
        both = bos + model.tokenizer.encode(one.prompt.text + one.continuation)
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


def test_log_likelihoods_equal_a_plain_loop_on_real_weights(real_data: Path) -> None:
    folder = real_data / "stories260k"
    answerer = ModelAnswerer(load_causal_lm(folder), load_tokenizer(folder), CPU, 4096)
    questions = read_questions("medmcqa", real_data / "mcq" / "medmcqa_dev.jsonl").questions
    short = [question for question in questions if len(letter_prompt(question)) < 250][:8]
    check(answerer, AutoModelForCausalLM.from_pretrained(folder), short)


def test_constant_answers_score_what_counting_says(real_data: Path) -> None:
    questions = read_questions("medmcqa", real_data / "mcq" / "medmcqa_dev.jsonl").questions
    for letter, count in zip("ABCD", (1348, 1085, 925, 825), strict=True):
        answers = STRATEGIES["letter"].ask(
            Scripted(score=f" {letter}".__eq__), questions, Setting()
        )
        found = accuracies(questions, [answer.choice for answer in answers], 0, 0)
        assert found["accuracy"] == count / 4183
        assert found["accuracy_of_constant"][letter] == count / 4183
    assert round(1348 / 4183, 3) == 0.322


@pytest.mark.parametrize("strategy", ["choice", "choice-normalised"])
def test_shuffled_options_leave_a_position_blind_scorer_as_it_was(strategy: StrategyName) -> None:
    rng = np.random.default_rng(1)
    model = Scripted(score=lambda text: float(zlib.crc32(text.encode())))
    questions = made_questions(200)
    shuffled = [one.reordered(rng.permutation(len(one.options)).tolist()) for one in questions]
    right = [
        [
            answer.choice == question.answer
            for answer, question in zip(
                STRATEGIES[strategy].ask(model, each, Setting()), each, strict=True
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


VITAMINS = ("Vitamin C", "Vitamin D", "Vitamin K", "Thiamine")
DRUGS = ("Digoxin", "A beta blocker", "Warfarin", "Heparin", "E. coli")


@pytest.mark.parametrize(
    ("text", "options", "choice"),
    [
        ("vitamin C", VITAMINS, 0),
        ("vitamin D.", VITAMINS, 1),
        ("hepatitis B", ("Hepatitis B", "Hepatitis C"), 0),
        ("hepatitis B", ("Hepatitis", "Rubella", "Hepatitis B"), 2),  # the longer of two
        ("hepatitis C.", ("Hepatitis A", "Rubella", "Measles"), None),
        ("A beta blocker.", DRUGS, 1),
        ("a beta blocker", ("Digoxin", "Beta blocker"), 1),
        ("B: a beta blocker", DRUGS, 1),
        ("B: digoxin", DRUGS, None),  # its letter and its text are of two options
        ("E. coli", ("Warfarin", "E. coli", "Heparin", "Digoxin", "None"), 1),
        ("E. coli is it", DRUGS, 4),
        ("A patient like this takes heparin", DRUGS, 3),
        ("B cells make it", DRUGS, None),
        ("D-dimer", DRUGS, None),
        ("A or B", DRUGS, None),
        ("A, B", DRUGS, None),
        ("A) or B)", DRUGS, None),
        ("either A or B", DRUGS, None),
        ("A and digoxin", DRUGS, 0),
        ("A or heparin", DRUGS, None),
        ("A or the heparin", DRUGS, None),
        ("B. A patient with asthma should not have it", DRUGS, 1),
        ("C, and it is cheap", DRUGS, 2),
        ("C because digoxin is dangerous", DRUGS, 2),
        ("option C.", DRUGS, 2),
        ("**C**", DRUGS, 2),
        ("\n\nC\n\nB. is wrong", DRUGS, 2),
        ("0.5 mg", ("5 mg", "50 mg", "0.5 mg"), 2),
        ("0.5 mg", ("5 mg", "50 mg", "1 mg"), None),
        ("B", ("A", "B", "AB", "O"), 1),  # blood groups
    ],
)
def test_words_are_not_letters_and_two_options_are_none(
    text: str, options: tuple[str, ...], choice: int | None
) -> None:
    for written in (text, f"So the answer is {text}", f"The answer is:{text}"):
        assert parse_answer(written, options) == choice
    assert parse_steps(f"Of course. The answer is {text}", options) == choice


def test_only_what_announces_an_answer_is_split_at() -> None:
    assert parse_answer("B. This is the correct answer because of it", DRUGS) == 1
    assert parse_answer("Answer: C", DRUGS) == 2
    assert parse_answer("the answer isn't A", DRUGS) is None


def test_pairs_are_compared() -> None:
    rows = [{"id": str(i), "answer": 0, "choice": 0} for i in range(20)]
    others = [row | {"choice": int(i < 6)} for i, row in enumerate(rows)]
    found = paired_accuracy(rows, others, 200, 0)
    assert (found["won"], found["lost"], found["difference"]) == (6, 0, pytest.approx(0.3))
    assert found["p"] == pytest.approx(2 / 2**6)  # six coins on one side
    # Six of twenty, each drawn with replacement: a twentieth of a binomial's quantiles.
    expected = [binom.ppf(share, 20, 0.3) / 20 for share in (0.025, 0.975)]
    assert paired_accuracy(rows, others, 20_000, 0)["ci"] == pytest.approx(expected)
    assert paired_accuracy(rows[:9], others[:9], 200, 0)["ci"] is None
    with pytest.raises(ValueError, match="other questions"):
        paired_accuracy(rows, others[1:], 0, 0)


def test_accuracy_is_that_of_each_group_with_its_interval() -> None:
    questions = [
        replace(one, answer=0, subject="ab"[i < 12]) for i, one in enumerate(made_questions(40))
    ]
    choices = [None if i % 4 == 0 else int(i < 4) for i in range(40)]
    found = accuracies(questions, choices, 20_000, 0)
    assert (found["n"], found["accuracy"], found["unanswered"]) == (40, 27 / 40, 10)
    expected = [binom.ppf(share, 40, 27 / 40) / 40 for share in (0.025, 0.975)]
    assert found["accuracy_ci"] == pytest.approx(expected)
    groups = {name: (one["n"], one["accuracy"]) for name, one in found["per_subject"].items()}
    assert groups == {"a": (28, 21 / 28), "b": (12, 6 / 12)}


def test_letters_are_counted_against_the_right_ones() -> None:
    pairs = [(0, 0), (0, 1), (1, 1), (2, None), (2, 0), (0, 1)]
    rows = [{"answer": answer, "choice": choice} for answer, choice in pairs]
    assert confusion(rows) == {
        "A": {"A": 1, "B": 2, "C": 0, "none": 0},
        "B": {"A": 0, "B": 1, "C": 0, "none": 0},
        "C": {"A": 1, "B": 0, "C": 0, "none": 1},
    }


def medqa(path: Path, n: int) -> Path:
    rows = [
        {
            "question": f"zebrafinch {i} {'and more ' * (20 * (i % 3))}?",
            "options": {"A": f"one {i}", "B": f"two {i}", "C": f"three {i}"},
            "answer_idx": "ABC"[i % 3],
            "meta_info": f"step{1 + i % 2}",
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("prompt", STRATEGIES)
def test_a_killed_command_ends_with_the_same_bytes(
    base: Path, tmp_path: Path, prompt: StrategyName
) -> None:
    data, solved = medqa(tmp_path / "medqa.jsonl", 40), medqa(tmp_path / "solved.jsonl", 34)
    solved.write_text(solved.read_text().replace("zebrafinch", "zebrafinch too"))
    out, strategy = tmp_path / "out", STRATEGIES[prompt]
    words = ["--model", str(base), "--out", str(out), "--mcq", "medqa", "--data", str(data)]
    words += ["--prompt", prompt, "--device", "cpu", "--bootstrap", "50"]
    words += ["--max-new-tokens", "4"] if strategy.max_new_tokens else []
    words += ["--votes", "2"] if strategy.votes else []
    words += ["--shots", "2", "--shots-data", str(solved)] if strategy.takes_shots else []
    words += ["--rationales", "1"] if strategy.finds_nearest else []
    assert command.main(words) == 0
    (answers,) = (out / "eval").glob("*/answers.jsonl")
    folder, lines = answers.parent, answers.read_bytes()
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    told = json.loads(written[folder / "results.json"])
    assert b"zebrafinch" not in b"".join(written.values())
    assert (told["n"], told["strategy_version"]) == (40, strategy.version)
    assert told["texts_asked"] >= 40
    assert told["shortened_prompts"] > 0
    header = json.loads(lines.splitlines()[0])
    assert (header["strategy"], header["version"]) == (prompt, strategy.version)
    edges = np.cumsum([len(line) for line in lines.splitlines(keepends=True)]).tolist()
    # In the header, in the first chunk, between chunks, in the second, before the results.
    killed_at = [9, edges[7] + 3, edges[32], edges[38] + 1, len(lines)]
    for size in killed_at if prompt == "letter" else [edges[35] + 3]:
        answers.write_bytes(lines[:size])
        (folder / "results.json").unlink()
        assert command.main(words) == 0
        assert {path: path.read_bytes() for path in written} == written
    for rationales in out.glob("eval/*/rationales.jsonl"):
        whole = rationales.read_bytes()
        rationales.write_bytes(whole[: len(whole) - 7])
        answers.unlink()
        assert command.main(words) == 0
        assert {path: path.read_bytes() for path in written} == written
    assert command.main([*words, "--compare", str(folder)]) == 0
    compared = json.loads((folder / "results.json").read_text())["comparison"]
    assert (compared["difference"], compared["p"], compared["strategy"]) == (0, 1.0, prompt)


def test_answers_to_other_questions_are_refused_before_any_is_asked(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(base), "--mcq", "medqa", "--device", "cpu", "--bootstrap", "0"]
    words += ["--data", str(medqa(tmp_path / "few.jsonl", 3)), "--out"]
    assert command.main([*words, str(tmp_path / "out")]) == 0
    (answers,) = (tmp_path / "out").glob("eval/*/answers.jsonl")
    medqa(tmp_path / "few.jsonl", 4)
    other = tmp_path / "other"
    assert command.main([*words, str(other), "--compare", str(answers.parent)]) == 2
    assert "answered other questions; score it on these" in capfd.readouterr().err
    assert not list(other.glob("eval/*/answers.jsonl"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", "letter", "--votes", "3"], "--votes means nothing to --prompt letter"),
        (["--prompt", "answer", "--temperature", "1"], "choose one of self-consistency"),
        (["--prompt", "shuffle", "--rationales", "2"], "choose one of nearest, medprompt"),
        (["--prompt", "medprompt"], "published: --shots 5"),
        (["--prompt", "medalpaca", "--shots", "1", "--shots-data", "x"], "--shots means nothing"),
        (["--prompt", "self-consistency", "--votes", "0"], "--votes must be at least 1, got 0"),
        (["--prompt", "self-consistency", "--temperature", "inf"], "at least 0, got inf"),
    ],
)
def test_what_a_strategy_has_no_use_for_is_refused(words: list[str], told: str) -> None:
    asked = ["--mcq", "medqa", "--data", "x", "--model", "x", "--out", "x", *words]
    with pytest.raises(ValueError, match=told):
        command.read_command(asked)


def test_numbers_to_choose_from_are_read() -> None:
    asked = ["--mcq", "medmcqa", "--data", "x", "--model", "x", "--out", "x", "--answers-from"]
    read = command.read_command([*asked, "1"])
    assert isinstance(read, QuestionConfig)
    assert read.answers_from == 1
    with pytest.raises(ValueError, match="--answers-from must be one of 0, 1, got '2'"):
        command.read_command([*asked, "2"])
