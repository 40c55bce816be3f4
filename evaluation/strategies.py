"""Ways to get an answer out of a model, each a function with a name and a version.

    letter, choice, choice-normalised       log-likelihoods, as lm-evaluation-harness
    answer, chain-of-thought                one written text, read by a parser
    self-consistency                        sampled chains of thought, as in Meditron (2311.16079)
    medalpaca                               as MedAlpaca's script (2304.08247)
    shuffle, nearest, medprompt             Medprompt (2311.16452) and its two halves

A vote counts once, and of options with equally many votes the later one wins, as in promptbase.
What cannot be read is no vote, and a question without a vote is wrong.

Change what a strategy asks or how it decides, and its version goes up. The invariant: a question's
answer depends on the model, the strategy, the settings, the seed and the question's own id and
text, not on what is asked beside it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from data.questions import LETTERS, Question
from evaluation.answering import Answerer, Asked, Prompt
from evaluation.demonstrations import VERSION as DEMONSTRATIONS_VERSION
from evaluation.demonstrations import Demonstrations
from evaluation.prompting import (
    NEXT_REASONED,
    NEXT_STEPS,
    SOLVED_SHOTS,
    choice_prompt,
    letter_prompt,
    letter_rationale,
    medalpaca_prompt,
    parse_answer,
    parse_medalpaca,
    parse_reasoned,
    parse_steps,
    reasoned_prompt,
    reasoned_shot,
    step_prompt,
)
from evaluation.writing import (
    Task,
    Told,
    majority,
    orders,
    reasoning_tries,
    seed_of,
    spread_places,
    write_until_read,
)
from model.generation import GenerationConfig

StrategyName = Literal[
    "letter",
    "choice",
    "choice-normalised",
    "answer",
    "chain-of-thought",
    "self-consistency",
    "medalpaca",
    "shuffle",
    "nearest",
    "medprompt",
]
TIE_RULE = "the later letter"
MEDALPACA_TRIES, REASONING_TRIES = 5, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a strategy is told besides the questions; it takes what concerns it."""

    shots: tuple[Question, ...] = ()  # solved questions in front of each question
    demonstrations: Demonstrations | None = None  # solved questions to find the nearest among
    neighbours: int = 0  # of them in front of each question
    max_new_tokens: int = 16
    temperature: float = 0.0
    votes: int = 1
    seed: int = 0


class Answer(NamedTuple):
    """What was chosen, from 0; None where no answer could be read."""

    choice: int | None
    scores: tuple[float, ...] | None = None  # log-likelihood of each option, as it was compared
    votes: tuple[int | None, ...] | None = None  # options by their own places
    asked: int = 0  # texts scored or written, all tries counted
    new_tokens: int = 0
    shortened: int = 0  # prompts that lost shots, or their beginning


# Log-likelihoods ----------------------------------------------------------------------------------


def by_letter(model: Answerer, questions: Sequence[Question], setting: Setting) -> list[Answer]:
    """The letter that is likeliest after the listed options."""
    shots = _solved_letters(setting.shots)
    asked = [
        [
            Asked(Prompt(letter_prompt(question), shots), f" {letter}")
            for letter in LETTERS[: len(question.options)]
        ]
        for question in questions
    ]
    return _likeliest(model, asked)


def by_choice(
    model: Answerer, questions: Sequence[Question], setting: Setting, *, is_normalised: bool = False
) -> list[Answer]:
    """The option whose whole text is likeliest after the question alone.

    is_normalised: of each option the log-likelihood divided by its characters.
    """
    shots = tuple(f"{choice_prompt(one)} {one.options[one.answer]}\n\n" for one in setting.shots)
    asked = [
        [Asked(Prompt(choice_prompt(question), shots), f" {option}") for option in question.options]
        for question in questions
    ]
    return _likeliest(model, asked, is_normalised=is_normalised)


def _solved_letters(shots: Sequence[Question], before: str = "") -> tuple[str, ...]:
    return tuple(f"{letter_prompt(one)}{before} {LETTERS[one.answer]}\n\n" for one in shots)


def _likeliest(
    model: Answerer, asked: Sequence[Sequence[Asked]], *, is_normalised: bool = False
) -> list[Answer]:
    found = iter(model.log_likelihoods([one for options in asked for one in options]))
    answers = []
    for options in asked:
        scored = list(itertools.islice(found, len(options)))
        # Characters of the option without the space in front of it, as the harness counts.
        scores = [
            one.log_likelihood / (len(option.continuation) - 1 if is_normalised else 1)
            for one, option in zip(scored, options, strict=True)
        ]
        answers.append(
            Answer(
                int(np.argmax(scores)),
                tuple(scores),
                asked=len(options),
                shortened=int(any(one.is_shortened for one in scored)),
            )
        )
    return answers


# Written answers ----------------------------------------------------------------------------------


def by_written_answer(
    model: Answerer, questions: Sequence[Question], setting: Setting
) -> list[Answer]:
    """What the model writes, greedily, after the listed options."""
    shots = _solved_letters(setting.shots)
    tasks = [_task(question, Prompt(letter_prompt(question), shots)) for question in questions]
    config = GenerationConfig(max_new_tokens=setting.max_new_tokens)
    told = write_until_read(model, tasks, parse_answer, [config], setting.seed)
    return [_answer([one]) for one in told]


def by_steps(model: Answerer, questions: Sequence[Question], setting: Setting) -> list[Answer]:
    """The majority of chains of thought, sampled with the temperature; greedy at 0.

    Meditron takes one greedy chain, or the majority of several at temperature 0.8.
    """
    shots = _solved_letters(setting.shots, " The answer is:")
    tasks = [
        _task(question, Prompt(step_prompt(question), shots), vote)
        for question in questions
        for vote in range(setting.votes)
    ]
    config = GenerationConfig(
        max_new_tokens=setting.max_new_tokens, temperature=setting.temperature
    )
    told = write_until_read(model, tasks, parse_steps, [config], setting.seed, NEXT_STEPS)
    return [_answer(votes) for votes in _grouped(told, setting.votes)]


def by_medalpaca(model: Answerer, questions: Sequence[Question], setting: Setting) -> list[Answer]:
    """As MedAlpaca's script: its prompt, sampled, tried up to five times until its parser reads it.

    A letter that no option has ends the tries, and is wrong.
    """
    tasks = [_task(question, Prompt(medalpaca_prompt(question))) for question in questions]
    config = GenerationConfig(
        max_new_tokens=setting.max_new_tokens,
        temperature=setting.temperature,
        top_k=50,
        top_p=0.9,
    )
    told = write_until_read(model, tasks, parse_medalpaca, [config] * MEDALPACA_TRIES, setting.seed)
    return [
        _answer([one if (one.choice or 0) < len(question.options) else one._replace(choice=None)])
        for one, question in zip(told, questions, strict=True)
    ]


def by_reasoning(
    model: Answerer, questions: Sequence[Question], setting: Setting, *, is_shuffled: bool
) -> list[Answer]:
    """The majority of reasoned answers, each with the options in another order (`is_shuffled`).

    In front stand the nearest solved questions with reasons of the model's own, where there are
    demonstrations; else the solved questions without reasons; else the fixed ones.
    """
    fixed = tuple(reasoned_shot(one, letter_rationale(one)) for one in setting.shots)
    found: list[list[int]] = [[] for _ in questions]
    if setting.demonstrations is not None and setting.demonstrations.questions:
        vectors = model.embed([question.stem for question in questions])
        found = [
            setting.demonstrations.nearest(question, vector, setting.neighbours)
            for question, vector in zip(questions, vectors, strict=True)
        ]
    tasks, drawn = [], []
    for question, near in zip(questions, found, strict=True):
        unshuffled = [tuple(range(len(question.options)))] * setting.votes
        shuffled = orders(len(question.options), setting.votes, setting.seed)
        for vote, order in enumerate(shuffled if is_shuffled else unshuffled):
            shown = question.reordered(order)

            def prompt(
                number: int,
                shown: Question = shown,
                near: Sequence[int] = near,
                vote: int = vote,
            ) -> Prompt:
                shots = _near_shots(setting, near, shown, vote, number) if near else fixed
                return Prompt(reasoned_prompt(shown), shots or SOLVED_SHOTS)

            tasks.append(Task(prompt, shown.options, (question.id, vote)))
            drawn.append(order)
    first = GenerationConfig(max_new_tokens=setting.max_new_tokens)
    tries = reasoning_tries(first, REASONING_TRIES, model.positions)
    told = write_until_read(model, tasks, parse_reasoned, tries, setting.seed, NEXT_REASONED)
    mapped = [
        one if one.choice is None else one._replace(choice=order[one.choice])
        for one, order in zip(told, drawn, strict=True)
    ]
    return [_answer(votes) for votes in _grouped(mapped, setting.votes)]


def _near_shots(
    setting: Setting, near: Sequence[int], shown: Question, vote: int, number: int
) -> tuple[str, ...]:
    """Of each of the nearest questions one of its rationales; the answers stand at every place."""
    assert setting.demonstrations is not None
    generator = np.random.default_rng(seed_of(setting.seed, shown.id, vote, number, "shots"))
    pool = setting.demonstrations
    shots = []
    for i, place in zip(near, spread_places(len(shown.options), len(near), generator), strict=True):
        rationale = pool.rationales[i][int(generator.integers(len(pool.rationales[i])))]
        shots.append(reasoned_shot(pool.questions[i], rationale, place))
    return tuple(shots)


def _task(question: Question, prompt: Prompt, vote: int = 0) -> Task:
    return Task(lambda _: prompt, question.options, (question.id, vote))


def _grouped(told: Sequence[Told], votes: int) -> list[Sequence[Told]]:
    return [told[start : start + votes] for start in range(0, len(told), votes)]


def _answer(told: Sequence[Told]) -> Answer:
    votes = tuple(one.choice for one in told)
    return Answer(
        majority(votes),
        votes=votes,
        asked=sum(one.tries for one in told),
        new_tokens=sum(one.new_tokens for one in told),
        shortened=sum(one.shortened for one in told),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How it asks, its version, and what it is told by default; None: it has no use for it."""

    ask: Callable[[Answerer, Sequence[Question], Setting], list[Answer]]
    version: int
    max_new_tokens: int | None = None
    temperature: float | None = None
    votes: int | None = None
    takes_shots: bool = True
    finds_nearest: bool = False  # among the solved questions, instead of taking the first
    draws: bool = False  # whether the seed decides anything


STRATEGIES: Mapping[StrategyName, Strategy] = {
    "letter": Strategy(ask=by_letter, version=2),
    "choice": Strategy(ask=by_choice, version=2),
    "choice-normalised": Strategy(ask=partial(by_choice, is_normalised=True), version=2),
    "answer": Strategy(ask=by_written_answer, version=3, max_new_tokens=16),
    "chain-of-thought": Strategy(ask=by_steps, version=2, max_new_tokens=1024),
    "self-consistency": Strategy(
        ask=by_steps, version=2, max_new_tokens=1024, temperature=0.8, votes=5, draws=True
    ),
    "medalpaca": Strategy(
        ask=by_medalpaca,
        version=1,
        max_new_tokens=128,
        temperature=0.4,
        takes_shots=False,
        draws=True,
    ),
    "shuffle": Strategy(
        ask=partial(by_reasoning, is_shuffled=True),
        version=1,
        max_new_tokens=500,
        votes=5,
        draws=True,
    ),
    "nearest": Strategy(
        ask=partial(by_reasoning, is_shuffled=False),
        version=1,
        max_new_tokens=500,
        finds_nearest=True,
        draws=True,
    ),
    "medprompt": Strategy(
        ask=partial(by_reasoning, is_shuffled=True),
        version=1,
        max_new_tokens=500,
        votes=5,
        finds_nearest=True,
        draws=True,
    ),
}


def versions_of(name: StrategyName) -> dict[str, int]:
    """`version` of the strategy and, where it shows them, of `demonstrations`: decide answers."""
    strategy = STRATEGIES[name]
    shown = {"demonstrations": DEMONSTRATIONS_VERSION} if strategy.finds_nearest else {}
    return {"version": strategy.version, **shown}
