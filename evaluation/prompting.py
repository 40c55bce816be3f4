"""How a question is put to a model, and how what it writes is read.

    letter_prompt     lm-evaluation-harness's of MedQA: "Question:", the stem, "A. text", "Answer:"
    reasoned_prompt   promptbase's of Medprompt (arXiv 2311.16452): "## Question", "## Answer", and
                      an answer that ends "Answer: [X]"
    medalpaca_prompt  MedAlpaca's of the USMLE self-assessment (arXiv 2304.08247)

The invariant: a parser gives the place, from 0, of an option as it was asked, or None; it never
guesses between two.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from data.prompts import PROMPTS, Turn, render
from data.questions import LETTERS, Question

# Where a model begins a question of its own, after reasons and after a chain of thought.
NEXT_REASONED, NEXT_STEPS = "## Question", "\nQuestion:"
_MEDALPACA = PROMPTS["medalpaca-question"]
_MEDALPACA_LEAD = "The Answer to the question is:"


def letter_prompt(question: Question) -> str:
    """The question with its options by letter, up to "Answer:"."""
    return f"{_stem(question)}\n{_listed(question, '. ')}\nAnswer:"


def choice_prompt(question: Question) -> str:
    """The question without its options, up to "Answer:"."""
    return f"{_stem(question)}\nAnswer:"


def step_prompt(question: Question) -> str:
    """The question with its options, and the beginning of a chain of thought."""
    return f"{letter_prompt(question)} Let's think step by step."


def reasoned_prompt(question: Question) -> str:
    """The question with its options, up to the reasons for an answer."""
    context = f"{question.context}\n\n" if question.context else ""
    listed = _listed(question, ". ")
    return f"{NEXT_REASONED}\n{context}{question.stem}\n\n{listed}\n\n## Answer\n"


def medalpaca_prompt(question: Question) -> str:
    """The question in MedAlpaca's format, up to "The Answer to the question is:"."""
    context = f"{question.context}\n" if question.context else ""
    asked = f"{context}{question.stem}\n{_listed(question, ': ')}"
    turn = Turn("user", "Answer this multiple choice question.", asked)
    return "".join(part for part, _ in render(_MEDALPACA, [turn]) if isinstance(part, str))


def _stem(question: Question) -> str:
    context = f"Abstract: {question.context}\n" if question.context else ""
    return f"{context}Question: {question.stem}"


def _listed(question: Question, between: str) -> str:
    options = zip(LETTERS, question.options, strict=False)
    return "\n".join(f"{letter}{between}{text}" for letter, text in options)


class Rationale(NamedTuple):
    """Reasons that end in an answer, written with the options in this order."""

    order: tuple[int, ...]
    text: str


def reasoned_shot(question: Question, rationale: Rationale, target: int | None = None) -> str:
    """A solved question with its reasons; its answer stands at place `target` (None: as written).

    As in promptbase the option there and the answer change places, and so do their letters in
    square brackets, which are what the reasons name options by.
    """
    shown, text = question.reordered(rationale.order), rationale.text
    if target is not None and target < len(shown.options) and target != shown.answer:
        order = list(range(len(shown.options)))
        order[target], order[shown.answer] = order[shown.answer], order[target]
        here, there = f"[{LETTERS[target]}]", f"[{LETTERS[shown.answer]}]"
        text = here.join(part.replace(here, there) for part in text.split(there))
        shown = shown.reordered(order)
    return f"{reasoned_prompt(shown)}{text}\n\n"


def letter_rationale(question: Question) -> Rationale:
    """No reasons, only the answer."""
    order = tuple(range(len(question.options)))
    return Rationale(order, f"Answer: [{LETTERS[question.answer]}]")


# Solved questions with reasons, for models that have to see first how an answer is written; the
# answers stand at all four places.
_SOLVED = (
    (
        "A child who weighs 20 kg is given 15 mg of a drug for each kilogram. How many milligrams "
        "are one dose?",
        ("150", "200", "300", "450"),
        2,
        "One dose is the weight times the amount for each kilogram: 20 kg x 15 mg/kg = 300 mg.",
    ),
    (
        "Which vitamin is lacking in scurvy?",
        ("Vitamin C", "Vitamin D", "Vitamin K", "Thiamine"),
        0,
        "Scurvy comes with bleeding gums and wounds that heal badly, because collagen is not "
        "cross-linked without ascorbic acid. Ascorbic acid is vitamin C.",
    ),
    (
        "Which of these vessels carries blood rich in oxygen?",
        ("Pulmonary artery", "Superior vena cava", "Coronary sinus", "Pulmonary vein"),
        3,
        "The pulmonary artery, the superior vena cava and the coronary sinus carry blood that has "
        "given its oxygen away. Blood that has passed the lungs returns in the pulmonary veins.",
    ),
    (
        "Which organ makes insulin?",
        ("Liver", "Pancreas", "Spleen", "Kidney"),
        1,
        "Insulin comes from the beta cells of the islets of Langerhans, which lie in the pancreas.",
    ),
)
SOLVED_SHOTS = tuple(
    reasoned_shot(
        Question("", stem, options, answer),
        Rationale((0, 1, 2, 3), f"{reasons}\n\nAnswer: [{LETTERS[answer]}]"),
    )
    for stem, options, answer, reasons in _SOLVED
)


# What was written ---------------------------------------------------------------------------------


def parse_answer(text: str, options: Sequence[str]) -> int | None:
    """The option, from 0, that a written answer names; None where it names none or several.

    Read in this order: after the last "answer is" or "answer:"; a letter in front; one letter in
    brackets; the only option whose whole text stands in it.
    """
    letters = LETTERS[: len(options)]
    after = re.split(r"answer(?:\s+is)?\s*[:\s]\s*", text, flags=re.IGNORECASE)[-1].strip()
    if match := re.match(rf"[\[(*\s]*([{letters}])(?:[\])*:.,;\s]|$)", after):
        return letters.index(match[1])
    bracketed = set(re.findall(rf"[\[(]([{letters}])[\])]", after))
    if len(bracketed) == 1:
        return letters.index(bracketed.pop())
    return _only_named(after, options)


def parse_steps(text: str, options: Sequence[str]) -> int | None:
    """What a chain of thought comes to: the first letter after its last "answer is".

    Where no letter stands there, the only option whose whole text does. What the model wrote from
    a next "Question:" on is not read.
    """
    parts = re.split(r"answer is", text.split(NEXT_STEPS)[0], flags=re.IGNORECASE)
    if len(parts) < 2:
        return None
    letters = LETTERS[: len(options)]
    if match := re.search(rf"(?<!\w)([{letters}])(?!\w)", parts[-1]):
        return letters.index(match[1])
    return _only_named(parts[-1], options)


def parse_reasoned(text: str, options: Sequence[str]) -> int | None:
    """The one letter in square brackets after the first "Answer: " (without it: anywhere)."""
    own = answer_of_its_own(text)
    after = own.split("\nAnswer: ", maxsplit=1)[-1]
    found = [i for i in range(len(options)) if f"[{LETTERS[i]}]" in after]
    return found[0] if len(found) == 1 else None


def answer_of_its_own(text: str) -> str:
    """What was written before the model began a next question."""
    return text.split(NEXT_REASONED)[0].strip()


def parse_medalpaca(text: str, _: Sequence[str]) -> int | None:
    """The letter of "A: text", "A. text" or "A text"; a bare letter is no answer.

    As in MedAlpaca's script, also a letter that no option has.
    """
    response = text.rpartition(_MEDALPACA_LEAD)[2].strip()
    response = re.sub(r"^[^0-9A-Za-z]+|[^0-9A-Za-z]+$", "", response)
    match = re.match(r"([A-Z])(?::|\.|) .+", response)
    return LETTERS.index(match[1]) if match else None


def _only_named(text: str, options: Sequence[str]) -> int | None:
    named = [
        i
        for i, option in enumerate(options)
        if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, flags=re.IGNORECASE)
    ]
    return named[0] if len(named) == 1 else None
