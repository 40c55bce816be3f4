"""Solved questions with reasons of the model's own, found by nearness to a question.

Medprompt's preparation (Nori et al., arXiv 2311.16452): the model reasons about questions whose
answers are known, with the options in several orders; reasons that end in the right answer are
kept, and questions without any leave the pool. A question is compared by its embedding, the mean of
the model's own last hidden states over the stem. The invariant: rationales and embeddings are a
function of the model, the solved questions and the settings, and are made once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.questions import Question
from evaluation.answering import Answerer, Prompt
from evaluation.journal import CHUNK, Row, digest_of, worked_through
from evaluation.prompting import (
    NEXT_REASONED,
    SOLVED_SHOTS,
    Rationale,
    answer_of_its_own,
    parse_reasoned,
    reasoned_prompt,
)
from evaluation.writing import Task, orders, reasoning_tries, write_until_read
from model.files import open_safetensors, write_safetensors
from model.generation import GenerationConfig

VERSION = 1  # of what rationales are asked with and kept for
TRIES = 2  # of each rationale, as in promptbase
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """The pool: questions, the rationales of each (at least one), and unit vectors [n, D]."""

    questions: tuple[Question, ...]
    rationales: tuple[tuple[Rationale, ...], ...]
    vectors: Vectors
    counts: Mapping[str, int]

    def nearest(self, question: Question, vector: Vectors, count: int) -> list[int]:
        """The most similar by cosine, the most similar last; of equals the first of the file.

        A question that contains the asked one's text is left out.
        """
        found: list[int] = []
        similarities = self.vectors @ unit(vector)
        for i in np.argsort(-similarities, kind="stable").tolist():
            if len(found) == count:
                break
            if question.stem not in self.questions[i].stem:
                found.append(i)
        return found[::-1]


def unit(vectors: Vectors) -> Vectors:
    """Vectors [..., D] of length 1; one of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


def gather_demonstrations(
    model: Answerer,
    solved: Sequence[Question],
    folder: Path,
    header: Mapping[str, Any],
    *,
    rationales: int,
    max_new_tokens: int,
    seed: int,
) -> Demonstrations:
    """Let the model reason about solved questions and keep what ends in the answer.

    folder: where a folder of their own holds rationales.jsonl, which a killed command goes on from,
    and embeddings.safetensors. header: what names model and questions. rationales: tried for each
    question, each with the options in another order.
    """
    header = {
        **header,
        "version": VERSION,
        "rationales": rationales,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    folder = folder / f"rationales-{digest_of(header)[:8]}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tries = reasoning_tries(GenerationConfig(max_new_tokens=max_new_tokens), TRIES, model.positions)

    def work(chunk: range) -> list[Row]:
        asked = [
            (question, repeat, question.reordered(order), order)
            for question in (solved[i] for i in chunk)
            for repeat, order in enumerate(orders(len(question.options), rationales, seed))
        ]
        tasks = [
            Task(_prompt_of(shown), shown.options, ("rationale", question.id, repeat))
            for question, repeat, shown, _ in asked
        ]
        kept: dict[str, list[Row]] = {solved[i].id: [] for i in chunk}
        told = write_until_read(model, tasks, parse_reasoned, tries, seed, NEXT_REASONED)
        for (question, _, shown, order), one in zip(asked, told, strict=True):
            if one.choice == shown.answer:
                row = {"order": order, "text": answer_of_its_own(one.text)}
                kept[question.id].append(row)
        return [{"id": id, "kept": rows} for id, rows in kept.items()]

    rows = worked_through(folder / "rationales.jsonl", header, len(solved), work)
    by_question = [
        tuple(Rationale(tuple(kept["order"]), kept["text"]) for kept in row["kept"]) for row in rows
    ]
    chosen = [i for i, found in enumerate(by_question) if found]
    questions = tuple(solved[i] for i in chosen)
    return Demonstrations(
        questions,
        tuple(by_question[i] for i in chosen),
        _vectors(model, questions, folder / "embeddings.safetensors", header),
        {
            "solved_questions": len(solved),
            "with_rationale": len(chosen),
            "rationales_tried": rationales * len(solved),
            "rationales_kept": sum(map(len, by_question)),
        },
    )


def _prompt_of(shown: Question) -> Callable[[int], Prompt]:
    prompt = Prompt(reasoned_prompt(shown), SOLVED_SHOTS)
    return lambda _: prompt


def _vectors(
    model: Answerer, questions: Sequence[Question], path: Path, header: Mapping[str, Any]
) -> Vectors:
    """Unit vectors [n, D] of the questions' stems, from `path` where they are these."""
    named = digest_of([header, [question.id for question in questions]])
    if path.is_file():
        try:
            with open_safetensors(path) as file:
                if file.metadata().get("of") == named:
                    return np.asarray(file.get_tensor("vectors").numpy())
        except ValueError:
            pass  # damaged: made again
    if not questions:
        return np.zeros((0, 1), np.float32)
    parts = [
        model.embed([question.stem for question in questions[start : start + CHUNK]])
        for start in range(0, len(questions), CHUNK)
    ]
    vectors = unit(np.concatenate(parts))
    write_safetensors(path, {"vectors": torch.from_numpy(vectors)}, {"of": named})
    return vectors
