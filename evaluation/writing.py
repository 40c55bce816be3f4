"""Texts that are written until they can be read, orders of options, and the count of votes.

The invariant: every draw has a seed of its own, made of the run's seed and of what is drawn (the
question's id, the vote, the try), so it is the same whatever was written before it.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data.questions import LETTERS
from evaluation.answering import Answerer, Prompt
from model.generation import GenerationConfig

# Orders that promptbase never draws.
_NEVER_DRAWN = ("ACDB", "ADBC", "BCDA", "CBAD", "CDAB")


def seed_of(seed: int, *drawn: str | int) -> int:
    """The seed, 63 bits, of one draw: SHA-256 of the run's seed and of what is drawn."""
    digest = hashlib.sha256(json.dumps([seed, *drawn]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Task:
    """A text to be written and read."""

    prompt: Callable[[int], Prompt]  # of the first try (0), the second, ...
    options: tuple[str, ...]  # as the prompt lists them
    drawn: tuple[str | int, ...]  # what its draws are: a question's id and the vote


class Told(NamedTuple):
    """What became of a task: the option that was read, the last text, and what it took."""

    choice: int | None
    text: str
    tries: int
    new_tokens: int
    shortened: int  # prompts that lost shots, or their beginning


def write_until_read(
    model: Answerer,
    tasks: Sequence[Task],
    parse: Callable[[str, Sequence[str]], int | None],
    tries: Sequence[GenerationConfig],
    seed: int,
    end: str = "",
) -> list[Told]:
    """Let the model write for each task, and again for those whose text could not be read.

    tries: how each try is written; as many as there are at most. end: a text after which nothing is
    read.
    """
    found = [Told(None, "", 0, 0, 0) for _ in tasks]
    waiting = list(range(len(tasks)))
    for number, config in enumerate(tries):
        prompts = [tasks[i].prompt(number) for i in waiting]
        seeds = [seed_of(seed, *tasks[i].drawn, number) for i in waiting]
        for i, written in zip(waiting, model.complete(prompts, config, seeds, end), strict=True):
            found[i] = Told(
                parse(written.text, tasks[i].options),
                written.text,
                number + 1,
                found[i].new_tokens + written.new_tokens,
                found[i].shortened + written.is_shortened,
            )
        waiting = [i for i in waiting if found[i].choice is None]
        if not waiting:
            break
    return found


def reasoning_tries(first: GenerationConfig, count: int, positions: int) -> list[GenerationConfig]:
    """promptbase's tries: greedy, then a little warmer and longer each time.

    500, 700, 900 new tokens, or as many to `first`'s; never more than half of the positions unless
    `first` has more.
    """
    most = max(first.max_new_tokens, positions // 2)
    return [
        replace(
            first,
            temperature=0.05 * number,
            max_new_tokens=min(most, first.max_new_tokens * (5 + 2 * number) // 5),
        )
        for number in range(count)
    ]


def orders(options: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """An order of the options for each of `count` votes: order[i] is what stands at place i.

    Drawn as in promptbase: one that has not been used before, and for four options none of five
    others. Where all have been used they begin anew.
    """
    generator = np.random.default_rng(seed_of(seed, "orders", options))
    used = {tuple(map(LETTERS.index, word)) for word in _NEVER_DRAWN if len(word) == options}
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        if len(used) == math.factorial(options):
            used = set()
        order = tuple(generator.permutation(options).tolist())
        if order not in used:
            used.add(order)
            found.append(order)
    return found


def spread_places(options: int, count: int, generator: np.random.Generator) -> list[int]:
    """A place for the answer of each of `count` shots: every place about equally often."""
    rounds = [generator.permutation(options).tolist() for _ in range(math.ceil(count / options))]
    places = [place for each in rounds for place in each]
    return places[len(places) - count :]


def majority(votes: Sequence[int | None]) -> int | None:
    """The option with most votes, the later one of equals; None where nobody voted."""
    counts = Counter(vote for vote in votes if vote is not None)
    return max(counts, key=lambda option: (counts[option], option), default=None)
