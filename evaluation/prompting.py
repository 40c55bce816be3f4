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

    Read after the last "answer is" or "answer:", without these from the beginning.
    """
    after = re.split(r"answer(?:\s+is\b|\s*:)", text, flags=re.IGNORECASE)[-1]
    return _read_option(after, options)


def parse_steps(text: str, options: Sequence[str]) -> int | None:
    """What a chain of thought comes to: the option that is named after its last "answer is".

    What the model wrote from a next "Question:" on is not read.
    """
    parts = re.split(r"answer is\b", text.split(NEXT_STEPS)[0], flags=re.IGNORECASE)
    return _read_option(parts[-1], options) if len(parts) > 1 else None


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


# What makes a capital in front of an answer its letter: "A: fever", "A because ..." and "A or B",
# unlike "A fever", "B cells" and "D-dimer".
_AFTER_LETTER = r"(?=[])*:.,;\"']|\s*(?:\n|$)|\s+(?:is|as|because|since|or|and|[-\u2013\u2014])\s)"
_JOINED = re.compile(r"[^\w\n]*((?:or|and)\b[^\w\n]*)?(?:(?:an?|the|option|choice)\b[^\w\n]*)*")


def _read_option(text: str, options: Sequence[str]) -> int | None:
    """The option that a text names: by the letter in front of it, or else the only one named.

    An option is named by its whole text, or by its letter in brackets. Letters within an option's
    text ("vitamin C") name nothing, and neither does a letter in front that another option is
    joined to ("A or B").
    """
    letters = LETTERS[: len(options)]
    named = _whole_texts(text, options)

    def is_free(place: int) -> bool:
        return not any(start <= place < end and end - start > 1 for start, end, _ in named)

    in_front = rf"[\W_]*(?:(?i:option|choice|letter)\W+)?([{letters}]){_AFTER_LETTER}"
    if (found := re.match(in_front, text)) and is_free(found.start(1)):
        choice = letters.index(found[1])
        joined = _JOINED.match(text, found.end(1))
        assert joined is not None
        others = {option for start, _, option in named if start == joined.end()}
        second = rf"([{letters}])" + (r"(?!\w)" if joined[1] else _AFTER_LETTER)
        if (other := re.compile(second).match(text, joined.end())) and is_free(joined.end()):
            others.add(letters.index(other[1]))
        return choice if others <= {choice} else None
    chosen = {option for _, _, option in named}
    for bracketed in re.finditer(rf"[\[(]([{letters}])[\])]", text):
        if is_free(bracketed.start(1)):
            chosen.add(letters.index(bracketed[1]))
    return chosen.pop() if len(chosen) == 1 else None


def _whole_texts(text: str, options: Sequence[str]) -> list[tuple[int, int, int]]:
    """Where options' whole texts stand: beginning, end, option; none that lies in a longer one."""
    found = [
        (match.start(), match.end(), i)
        for i, option in enumerate(options)
        for match in re.finditer(
            rf"(?<!\w)(?<!\d[.,]){re.escape(option)}(?!\w)(?![.,]\d)", text, flags=re.IGNORECASE
        )
    ]
    return [
        (start, end, i)
        for start, end, i in found
        if not any(a <= start and end <= b and (a, b) != (start, end) for a, b, _ in found)
    ]
