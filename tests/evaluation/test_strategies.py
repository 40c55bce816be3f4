"""Strategies on answerers that say what the test tells them: orders, votes, tries, neighbours."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from data.questions import LETTERS, Question, read_questions
from data.tokenizer import load_tokenizer
from evaluation.answering import Asked, ModelAnswerer, Prompt
from evaluation.demonstrations import Demonstrations, gather_demonstrations, unit
from evaluation.prompting import (
    SOLVED_SHOTS,
    Rationale,
    medalpaca_prompt,
    parse_medalpaca,
    parse_reasoned,
    parse_steps,
    reasoned_prompt,
    reasoned_shot,
)
from evaluation.questions import AnsweredBy, QuestionConfig, ask_all, question_summary
from evaluation.strategies import STRATEGIES, Setting, StrategyName
from evaluation.writing import majority, orders, reasoning_tries, seed_of, spread_places
from model.batch import TokenBatch
from model.checkpoint import load_causal_lm
from model.generation import GenerationConfig
from tests.data.test_questions import write_usmle
from tests.evaluation.conftest import Scripted
from tests.evaluation.test_questions import made_questions

CPU = torch.device("cpu")
OPTIONS = ("cough", "fever", "pain", "rash")


def letter_of(prompt: str, option: str) -> str:
    """The letter before an option in the last question of a prompt."""
    found = re.findall(rf"^([A-Z])[.:] {re.escape(option)}$", prompt, re.MULTILINE)
    return str(found[-1])


def question(id: str = "q", answer: int = 1, options: tuple[str, ...] = OPTIONS) -> Question:
    return Question(id, f"Which sign is {id}?", options, answer)


# Votes and orders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([0, 1, 1], 1),
        ([2, 0, 0, 2], 2),  # a tie goes to the later letter
        ([3, 1, 2], 3),
        ([None, 0, None], 0),
        ([None, None], None),
    ],
)
def test_the_majority_wins_and_of_equals_the_later_letter(
    votes: list[int | None], winner: int | None
) -> None:
    assert majority(votes) == winner


def test_orders_are_fresh_and_five_are_never_drawn() -> None:
    drawn = orders(4, 19, seed=3)
    assert len(set(drawn)) == 19
    never = {tuple(map("ABCD".index, word)) for word in ("ACDB", "ADBC", "BCDA", "CBAD", "CDAB")}
    assert not never & set(drawn)
    assert drawn[:5] == orders(4, 5, seed=3)
    assert drawn != orders(4, 19, seed=4)
    # Two options have two orders: both are used before one comes again.
    assert [len(set(orders(2, 4, seed)[i : i + 2])) for seed in range(5) for i in (0, 2)] == [
        2
    ] * 10


def test_answers_are_spread_over_the_places() -> None:
    places = spread_places(4, 10, np.random.default_rng(0))
    assert sorted(Counter(places[-8:]).values()) == [2, 2, 2, 2]


def test_every_draw_has_a_seed_of_its_own() -> None:
    seeds = {
        seed_of(s, id, vote, t) for s in (0, 1) for id in "ab" for vote in (0, 1) for t in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "a", 0, 1) == 4889515343190374548


def test_votes_are_mapped_back_through_their_orders() -> None:
    model = Scripted(lambda prompt, *_: f"It is so.\n\nAnswer: [{letter_of(prompt, 'fever')}]")
    (answer,) = STRATEGIES["shuffle"].ask(model, [question()], Setting(votes=5, seed=1))
    assert answer.votes == (1,) * 5
    assert answer.choice == 1
    shown = [letter_of(prompt.text, "fever") for prompt in model.prompts]
    assert len(set(shown)) > 1  # the orders did move it
    drawn = orders(4, 5, seed=1)
    assert shown == [LETTERS[order.index(1)] for order in drawn]
    # One that always takes the first place votes for what the orders put there.
    first = Scripted(lambda *_: "Answer: [A]")
    (answer,) = STRATEGIES["shuffle"].ask(first, [question()], Setting(votes=5, seed=1))
    assert answer.votes == tuple(order[0] for order in drawn)


@pytest.mark.parametrize("name", ["answer", "chain-of-thought", "self-consistency", "medalpaca",
                                  "shuffle", "nearest"])  # fmt: skip
def test_shuffled_options_leave_a_writer_blind_to_position_as_it_was(name: StrategyName) -> None:
    def say(prompt: str, *_: Any) -> str:
        last = prompt.split("## Question")[-1]
        listed = re.findall(r"^([A-Z])[.:] (option \d+)$", last, re.MULTILINE)
        letter, text = max(listed, key=lambda pair: pair[1])
        return f"The answer is {letter}: {text}" if name != "medalpaca" else f"{letter}: {text}"

    def say_bracketed(prompt: str, *_: Any) -> str:
        return f"\nAnswer: [{say(prompt)[14]}]"

    questions = made_questions(60)
    generator = np.random.default_rng(1)
    shuffled = [
        one.reordered(generator.permutation(len(one.options)).tolist()) for one in questions
    ]
    right = []
    for each in (questions, shuffled):
        model = Scripted(say_bracketed if name in ("shuffle", "nearest") else say)
        answers = STRATEGIES[name].ask(model, each, Setting(votes=3, max_new_tokens=9))
        right.append([a.choice == q.answer for a, q in zip(answers, each, strict=True)])
    assert right[0] == right[1]
    assert 0 < sum(right[0]) < 60


# Self-consistency and tries -----------------------------------------------------------------------


def test_self_consistency_takes_the_majority_of_sampled_chains() -> None:
    texts = iter(["the answer is C", "The answer is: B", "no idea", "so the answer is B.", "A"])
    model = Scripted(lambda *_: next(texts))
    setting = Setting(votes=5, temperature=0.8, max_new_tokens=9, seed=5)
    (answer,) = STRATEGIES["self-consistency"].ask(model, [question("q7")], setting)
    assert answer.votes == (2, 1, None, 1, None)
    assert (answer.choice, answer.asked, answer.new_tokens) == (1, 5, 15)
    assert model.seeds == [seed_of(5, "q7", vote, 0) for vote in range(5)]
    assert {config.temperature for config in model.configs} == {0.8}
    assert len({prompt.text for prompt in model.prompts}) == 1


def test_medalpaca_tries_five_times_and_no_more() -> None:
    texts = ["A", "fever", "(B) ", "no", "B: fever", "C: pain"]
    said = iter(texts)
    model = Scripted(lambda *_: next(said))
    setting = Setting(max_new_tokens=128, temperature=0.4)
    (answer,) = STRATEGIES["medalpaca"].ask(model, [question()], setting)
    assert (answer.choice, answer.asked) == (1, 5)
    assert len(set(model.seeds)) == 5
    (config,) = set(model.configs)
    assert (config.temperature, config.top_k, config.top_p) == (0.4, 50, 0.9)
    never = Scripted(lambda *_: "nothing")
    (answer,) = STRATEGIES["medalpaca"].ask(never, [question()], setting)
    assert (answer.choice, answer.asked) == (None, 5)
    beyond = Scripted(lambda *_: "E: none of them")  # read, and wrong: the tries end
    (answer,) = STRATEGIES["medalpaca"].ask(beyond, [question()], setting)
    assert (answer.choice, answer.asked) == (None, 1)


def test_medalpaca_asks_as_published() -> None:
    asked = medalpaca_prompt(question())
    assert asked.startswith("Below is an instruction that describes a task, paired with an input")
    assert asked.endswith(
        "### Instruction:\nAnswer this multiple choice question.\n\n### Input:\nWhich sign is q?\n"
        "A: cough\nB: fever\nC: pain\nD: rash\n\n### Response:\nThe Answer to the question is:"
    )


def test_reasoning_is_tried_three_times_warmer_and_longer() -> None:
    model = Scripted(lambda _, config, __: "?" if config.temperature < 0.1 else "Answer: [B]")
    (answer,) = STRATEGIES["shuffle"].ask(model, [question()], Setting(max_new_tokens=100))
    assert (answer.asked, answer.choice is None) == (3, False)
    assert [config.temperature for config in model.configs] == [0.0, 0.05, 0.1]
    assert [config.max_new_tokens for config in model.configs] == [100, 140, 180]
    published = reasoning_tries(GenerationConfig(max_new_tokens=500), 3, 1 << 20)
    assert [config.max_new_tokens for config in published] == [500, 700, 900]
    cramped = reasoning_tries(GenerationConfig(max_new_tokens=250), 3, 512)
    assert [config.max_new_tokens for config in cramped] == [250, 256, 256]


# Parsers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("It is not A. The answer is B. Or the answer is: C", 2),
        ("The answer is (D)", 3),
        ("the answer is fever, of course", 1),
        ("The answer is a cough or a fever", None),
        ("B", None),
        ("The answer is B\n\nQuestion: Which?\nAnswer: The answer is C", 1),
        ("The answer is E", None),
    ],
)
def test_a_chain_of_thought_is_read(text: str, choice: int | None) -> None:
    assert parse_steps(text, OPTIONS) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Not [A].\n\nAnswer: [C]", 2),
        ("Answer: [C]", 2),
        ("\nAnswer: [A] or [B]", None),
        ("\nAnswer: [B], that is [B]", 1),
        ("\nAnswer: B", None),
        ("\nAnswer: [E]", None),
        ("I say [D]", 3),
        ("\nAnswer: [B]\n\n## Question\nWhich?\n## Answer\nAnswer: [C]", 1),
    ],
)
def test_a_reasoned_answer_is_read(text: str, choice: int | None) -> None:
    assert parse_reasoned(text, OPTIONS) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B: fever", 1),
        (" (B) fever", None),  # a bracket after the letter is none of ":", "." and nothing
        ("**C. pain**", 2),
        ("D rash.", 3),
        ("B", None),
        ("B:fever", None),
        ("A: no. The Answer to the question is: B: fever", 1),
        ("because", None),
    ],
)
def test_medalpacas_parser(text: str, choice: int | None) -> None:
    assert parse_medalpaca(text, OPTIONS) == choice


# Demonstrations -----------------------------------------------------------------------------------


def pool(vectors: list[list[float]], stems: list[str] | None = None) -> Demonstrations:
    n = len(vectors)
    questions = tuple(
        Question(f"s{i}", stems[i] if stems else f"Solved {i}?", OPTIONS, i % 4) for i in range(n)
    )
    rationales = tuple(
        (
            Rationale((0, 1, 2, 3), f"First {i}.\n\nAnswer: [{LETTERS[i % 4]}]"),
            Rationale((3, 2, 1, 0), f"Second {i}.\n\nAnswer: [{LETTERS[3 - i % 4]}]"),
        )
        for i in range(n)
    )
    return Demonstrations(questions, rationales, unit(np.array(vectors, np.float32)), {})


def test_the_nearest_come_by_cosine_the_most_similar_last() -> None:
    # Cosines with (1, 0): 0.6, 1, -1, 0.8, 0, 1. Lengths do not matter.
    found = pool([[3, 4], [9, 0], [-5, 0], [0.08, 0.06], [0, 2], [1, 0]])
    near = found.nearest(question(), np.array([2, 0], np.float32), 4)
    assert near == [0, 3, 5, 1]  # of the two with cosine 1 the first of the file is nearest
    assert found.nearest(question(), np.array([2, 0], np.float32), 9) == [2, 4, 0, 3, 5, 1]


def test_a_question_is_never_its_own_demonstration() -> None:
    asked = question()
    found = pool([[1, 0], [1, 0.1], [0, 1]], [f"So: {asked.stem} Now?", "Other?", "Third?"])
    assert found.nearest(asked, np.array([1, 0], np.float32), 2) == [2, 1]


def test_a_shot_changes_the_answers_place_and_its_letters() -> None:
    solved = question(answer=1)
    rationale = Rationale((2, 1, 0, 3), "[A] is not it, [B] is.\n\nAnswer: [B]")
    as_written = reasoned_shot(solved, rationale)
    assert "A. pain\nB. fever\nC. cough\nD. rash\n" in as_written
    moved = reasoned_shot(solved, rationale, 0)
    assert "A. fever\nB. pain\nC. cough\nD. rash\n" in moved
    assert moved.endswith("[B] is not it, [A] is.\n\nAnswer: [A]\n\n")
    assert reasoned_shot(solved, rationale, 1) == as_written
    assert reasoned_shot(solved, rationale, 7) == as_written  # it has no such place


def test_fixed_shots_end_in_their_answers() -> None:
    letters = [re.findall(r"Answer: \[([A-D])\]\n\n$", shot) for shot in SOLVED_SHOTS]
    assert sorted(letters) == [["A"], ["B"], ["C"], ["D"]]


def test_medprompt_shows_the_nearest_with_their_own_reasons() -> None:
    model = Scripted(lambda prompt, *_: f"\nAnswer: [{letter_of(prompt, 'fever')}]")
    setting = Setting(
        votes=5, neighbours=3, demonstrations=pool([[1, 1], [9, 1], [17, 1], [99, 1], [0, 1]])
    )
    questions = [question("q", 1), question("qqqqqqqq", 0)]  # stems of 16 and 23 characters
    answers = STRATEGIES["medprompt"].ask(model, questions, setting)
    assert [answer.choice for answer in answers] == [1, 1]
    assert {answer.asked for answer in answers} == {5}
    # Degrees from (16, 1) to the pool: 41.4, 2.8, 0.2, 3.0, 86; from (23, 1): 42.5, 3.9, 0.9, 1.9.
    orders_of_shots = [["3", "1", "2"]] * 5 + [["1", "3", "2"]] * 5
    drawn = set()
    for prompt, expected in zip(model.prompts, orders_of_shots, strict=True):
        assert [re.findall(r"Solved (\d)\?", shot)[0] for shot in prompt.shots] == expected
        for shot in prompt.shots:
            # Whatever the place, the letter at the end is that of the pool's own answer.
            number = int(re.findall(r"(?:First|Second) (\d)", shot)[0])
            letter = re.findall(r"Answer: \[(.)\]", shot)[0]
            assert letter_of(shot, OPTIONS[number % 4]) == letter
            drawn.add((re.findall(r"(First|Second)", shot)[0], letter))
    assert {kind for kind, _ in drawn} == {"First", "Second"}
    assert {letter for _, letter in drawn} == set("ABCD")
    alone = Scripted(model.say)
    STRATEGIES["medprompt"].ask(alone, questions[1:], setting)
    assert alone.prompts == model.prompts[5:]  # whatever is asked beside it
    assert alone.seeds == model.seeds[5:]


def test_rationales_are_kept_where_they_end_in_the_answer(tmp_path: Path) -> None:
    solved = [question(f"s{i}", i % 4) for i in range(40)]
    asked = []

    def say(prompt: str, config: GenerationConfig, seed: int) -> str:
        asked.append(seed)
        number = int(re.findall(r"Which sign is s(\d+)\?", prompt)[-1])
        if number % 5 == 0:
            return "I do not know"
        # Right in the first two orders, then always the first letter.
        right = letter_of(prompt, OPTIONS[number % 4])
        letter = right if number % 2 else "A"
        return f"Reason {number}\n\nAnswer: [{letter}]\n\n## Question\nmore"

    def gather() -> Demonstrations:
        return gather_demonstrations(
            Scripted(say), solved, tmp_path, {"model": "m"}, rationales=3, max_new_tokens=50, seed=2
        )

    found = gather()
    drawn = orders(4, 3, 2)
    for one, rationales in zip(found.questions, found.rationales, strict=True):
        number = int(one.id[1:])
        expected = [o for o in drawn if number % 2 or o.index(number % 4) == 0]
        assert [rationale.order for rationale in rationales] == expected
        for rationale in rationales:
            assert rationale.text.startswith(f"Reason {number}\n\nAnswer: [")
            assert "## Question" not in rationale.text
    ids = {one.id for one in found.questions}
    assert not ids & {f"s{i}" for i in range(0, 40, 5)}
    assert ids >= {f"s{i}" for i in range(1, 40, 2) if i % 5}
    # 8 questions are never read: two tries of three rationales each.
    assert len(asked) == 40 * 3 + 8 * 3
    counts = found.counts
    assert counts["rationales_kept"] == sum(map(len, found.rationales))
    assert counts["with_rationale"] == len(found.questions)
    # Kept on disk: nothing is asked again, the vectors neither; and a killed one goes on.
    (file,) = tmp_path.glob("*/rationales.jsonl")
    whole, before = file.read_bytes(), len(asked)
    again = gather()
    assert len(asked) == before
    assert (again.questions, again.rationales) == (found.questions, found.rationales)
    assert np.array_equal(again.vectors, found.vectors)
    file.write_bytes(whole[:-9])
    gather()
    assert file.read_bytes() == whole
    assert len(asked) == before + 8 * 3 + 1 * 3  # the second chunk: s32 to s39, s35 twice
    assert json.loads(whole.splitlines()[0])["seed"] == 2


# Whole runs ---------------------------------------------------------------------------------------


def write_medqa(path: Path, questions: Sequence[Question]) -> str:
    rows = [
        {
            "id": one.id,
            "question": one.stem,
            "options": dict(zip(LETTERS, one.options, strict=False)),
            "answer_idx": LETTERS[one.answer],
        }
        for one in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_strategies_share_their_rationales_and_stand_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(prompt: str, _: Any, seed: int) -> str:
        # Three of four are right about their own question.
        right = re.findall(r"Which sign is [sq]\d*?([0-3])\?", prompt)[-1]
        number = int(right) if seed % 4 else 3 - int(right)
        return f"So it is.\n\nAnswer: [{letter_of(prompt, OPTIONS[number])}]"

    data = write_medqa(tmp_path / "asked.jsonl", [question(f"q{i}", i % 4) for i in range(4)])
    solved = write_medqa(tmp_path / "solved.jsonl", [question(f"s{i}", i % 4) for i in range(4)])
    found, pool = read_questions("medqa", data), read_questions("medqa", solved)
    by = AnsweredBy("m" * 64, {"dtype": "float32"})

    def ask(prompt: StrategyName, root: Path, **more: Any) -> tuple[dict[str, Any], Scripted]:
        model = Scripted(say)
        config = QuestionConfig(
            mcq="medqa", data=data, model="x", out=str(root), prompt=prompt, shots=2,
            shots_data=solved, **more,
        )  # fmt: skip
        return ask_all(model, by, config, found, pool, root), model

    root = tmp_path / "out"
    results, model = ask("medprompt", root, votes=3)
    kept = results["rationales"]["rationales_kept"]
    assert results["rationales"]["rationales_tried"] == 4 * 5 == len(model.prompts) - 4 * 3
    assert 0 < kept < 20
    assert (results["texts_asked"], results["new_tokens"]) == (12, 36)
    assert results["settings"]["votes"] == 3
    assert results["settings"]["neighbours"] == 2
    again, asked = ask("medprompt", root, votes=3)
    assert (again, asked.prompts) == (results, [])
    # The other strategy reasons about no solved question again.
    near, asked = ask("nearest", root)
    assert len(asked.prompts) == 4
    assert near["rationales"] == results["rationales"]
    page = (Path(near["folder"]) / "report.html").read_text()
    assert "nearest (version 1) (this page)" in page
    assert "medprompt (version 1)" in page
    # Another seed is another run, beside it.
    other, _ = ask("medprompt", root, votes=3, seed=1)
    assert other["folder"] != results["folder"]
    compared, _ = ask("medprompt", root, votes=3, seed=1, compare=results["folder"])
    difference = compared["accuracy"] - results["accuracy"]
    assert compared["comparison"]["difference"] == pytest.approx(difference)
    assert compared["comparison"]["strategy"] == "medprompt"
    # Answers after demonstrations of an earlier version are not those of this one.
    monkeypatch.setattr("evaluation.strategies.DEMONSTRATIONS_VERSION", 99)
    assert ask("nearest", root)[0]["folder"] != near["folder"]
    # Another base's answers are never written over.
    kept = {path: path.read_bytes() for path in root.rglob("*.jsonl")}
    by = AnsweredBy("n" * 64, {"dtype": "float32"})
    with pytest.raises(ValueError, match=r"holds answers of another base .* choose another --out"):
        ask("medprompt", root, votes=3)
    assert {path: path.read_bytes() for path in root.rglob("*.jsonl")} == kept
    for value, shown in ((-0.25, "difference -0.250 to R, p 1"), (0.5, "difference +0.500 to R")):
        compared["comparison"] = {"run": "R", "difference": value, "p": 1.0}
        assert any(line.startswith(shown) for line in question_summary(compared))


def test_published_counts_stand_beside_what_was_scored(tmp_path: Path) -> None:
    folder = write_usmle(tmp_path)
    found = read_questions("usmle", folder)
    config = QuestionConfig(
        mcq="usmle", data=str(folder), model="x", out="y", prompt="medalpaca", bootstrap=0
    )
    model = Scripted(lambda prompt, *_: "C: z" if "\nB: y" in prompt else "B: z")
    results = ask_all(model, AnsweredBy("m", {}), config, found, None, tmp_path / "out")
    assert results["published_counts"] == {"step1": 92, "step2": 110, "step3": 122}
    scored = {step: one["n"] for step, one in results["per_step"].items()}
    assert scored == results["published_counts"]
    assert results["accuracy"] == 1.0
    assert "step2: 110 questions (the paper counts 110)" in list(question_summary(results))


# A real model -------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_are_the_mean_of_the_last_hidden_states(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    answerer = ModelAnswerer(load_causal_lm(base), tokenizer, CPU, micro_tokens=20)
    texts = ["the patient was seen", "chest pain and fever in clinic today", "fever"]
    twin = AutoModel.from_pretrained(base)
    for text, found in zip(texts, answerer.embed(texts), strict=True):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        expected = twin(ids).last_hidden_state[0, 1:].mean(0).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_shots_that_do_not_fit_are_left_out_from_the_front(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    answerer = ModelAnswerer(load_causal_lm(base), tokenizer, CPU, micro_tokens=4096)
    shots = tuple(f"shot {i} " + "the patient was seen in clinic. " * 12 for i in range(4))
    text = "Which?\nAnswer:"
    fits = [
        len(tokenizer.encode("".join(shots[i:]) + text + " A")) <= answerer.positions
        for i in range(5)
    ]
    left = fits.index(True)
    assert 0 < left < 4
    asked = [Asked(Prompt(text, shots), " A"), Asked(Prompt(text, shots[left:]), " A")]
    whole, kept = answerer.log_likelihoods(asked)
    assert whole.log_likelihood == pytest.approx(kept.log_likelihood, abs=1e-5)
    assert (whole.is_shortened, kept.is_shortened) == (True, False)
    config = GenerationConfig(max_new_tokens=5, temperature=1.0)
    prompts = [Prompt(text, shots), Prompt("a", ()), Prompt(text, shots[left + 1 :])]
    written = answerer.complete(prompts, config, [7, 8, 7])
    assert [one.is_shortened for one in written] == [True, False, False]
    assert answerer.complete(prompts[1:2], config, [8]) == written[1:2]


def test_nearest_without_rationales_shows_the_fixed_ones() -> None:
    model = Scripted(lambda *_: "\nAnswer: [A]")
    setting = Setting(demonstrations=Demonstrations((), (), np.zeros((0, 1), np.float32), {}))
    STRATEGIES["nearest"].ask(model, [question()], setting)
    assert model.prompts[0] == Prompt(reasoned_prompt(question()), SOLVED_SHOTS)


def test_writing_stops_where_nothing_more_is_read(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    answerer = ModelAnswerer(load_causal_lm(base), tokenizer, CPU, micro_tokens=4096)
    config = GenerationConfig(max_new_tokens=40, temperature=1.0)
    prompts, seeds = [Prompt("the patient"), Prompt("chest"), Prompt("the patient")], [3, 4, 5]
    whole = answerer.complete(prompts, config, seeds)
    end = whole[0].text[20:23]
    short = answerer.complete(prompts, config, seeds, end)
    for one, other in zip(whole, short, strict=True):
        cut = one.text.split(end)[0]
        assert other.text.split(end)[0] == cut
        assert (other.new_tokens < one.new_tokens) == (cut != one.text)
    assert short[0].text.endswith(end)
    assert short[0].new_tokens < 40


def test_what_prompts_begin_with_is_read_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(base)
    answerer = ModelAnswerer(model, load_tokenizer(base), CPU, micro_tokens=4096)
    shots = ("the patient was seen in clinic with chest pain. " * 8,)
    texts = ["Which?", "fever and pain, or what is it?", "Why now?", "aspirin?"]
    prompts = [Prompt(text, shots) for text in texts]
    asked = [Asked(p, f" {letter}") for p in [*prompts, Prompt("alone?")] for letter in "AB"]
    config = GenerationConfig(max_new_tokens=6, temperature=1.0)
    seeds = [4, 5, 6, 7]
    alone = [answerer.log_likelihoods([one])[0].log_likelihood for one in asked]
    each = [answerer.complete([p], config, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    read: list[int] = []
    forward = model.model.forward

    def counted(batch: TokenBatch, **more: Any) -> torch.Tensor:
        read.append(len(batch.input_ids))
        return forward(batch, **more)

    monkeypatch.setattr(model.model, "forward", counted)
    together = [one.log_likelihood for one in answerer.log_likelihoods(asked)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert answerer.complete(prompts, config, seeds) == each
    front = len(answerer.tokenizer.encode(shots[0]))
    assert front > 64
    # The front once for each; the rest of each prompt, and the prompt that begins otherwise.
    assert [front - 8 < n <= front + 1 for n in (read[0], read[3])] == [True, True]
    assert read[1] + read[4] < front
    assert len(read) == 5


def test_the_prompts_own_text_ends_nothing(base: Path) -> None:
    answerer = ModelAnswerer(load_causal_lm(base), load_tokenizer(base), CPU, micro_tokens=4096)
    config = GenerationConfig(max_new_tokens=9, temperature=1.0)
    prompt = Prompt("the patient ##")
    (whole,) = answerer.complete([prompt], config, [3])
    assert "##" not in whole.text and whole.new_tokens > 1
    assert answerer.complete([prompt], config, [3], "##") == [whole]
