"""Plain English made by a small grammar: everyday stories, and health explained to the public.

    python -m data.general_text --out texts --documents 3000 --seed 0

The tiny base model in data/embedded is pretrained on this, so that clinical notes are new to it in
style and wording, as they are to a general model, while many of their words are not. The same
arguments give the same files.
"""

from __future__ import annotations

import argparse
import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.hospital_words import TERMS
from data.wording import counted

PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jack", "Kate",
    "Leo", "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Vera",
)  # fmt: skip
KIN = (
    "mother",
    "father",
    "sister",
    "brother",
    "neighbor",
    "teacher",
    "friend",
    "uncle",
    "aunt",
    "grandmother",
)
PLACES = (
    "the market", "the library", "the harbor", "the old school", "the park", "the station",
    "the bakery", "the river", "the village hall", "the office", "the museum", "the garden",
    "the beach", "the farm",
)  # fmt: skip
TIMES = (
    "On Monday morning", "Last summer", "After lunch", "Early in the day", "One cold evening",
    "Every weekend", "In the spring", "Before dinner", "Late at night", "Two years ago",
    "Around noon", "When the rain stopped",
)  # fmt: skip
ADJECTIVES = (
    "small", "quiet", "bright", "old", "heavy", "warm", "simple", "busy", "green", "broken",
    "famous", "long", "narrow", "careful", "cheap", "useful", "strange", "gentle",
)  # fmt: skip
THINGS = (
    "basket", "letter", "bicycle", "map", "radio", "blanket", "camera", "ticket", "lamp", "kettle",
    "book", "coat", "window", "boat", "clock", "chair", "picture", "bottle", "phone", "table",
)  # fmt: skip
FOODS = (
    "bread",
    "rice",
    "apples",
    "soup",
    "fish",
    "cheese",
    "beans",
    "carrots",
    "tea",
    "honey",
    "eggs",
    "pasta",
)
WEATHER = (
    "the sky was clear", "a light rain fell", "the wind was strong", "snow covered the road",
    "it was hot and dry", "fog lay over the fields", "the sun came out at last",
)  # fmt: skip
DEEDS = (
    "bought a {adjective} {thing}", "lost the {thing}", "painted the {adjective} {thing}",
    "cooked {food} with {food}", "walked to {place}", "waited near {place}",
    "read a {adjective} book about {food}", "sold {number} {thing}s", "carried the {thing} home",
    "talked with {person} about the {thing}", "planted {number} trees near {place}",
    "repaired the {adjective} {thing}", "wrote a letter to {person}",
    "found {number} coins under the {thing}", "took the {time_of_day} train",
    "learned to make {food}", "moved to a house near {place}",
)  # fmt: skip
FEELINGS = (
    "happy",
    "tired",
    "surprised",
    "proud",
    "worried",
    "calm",
    "hungry",
    "curious",
    "grateful",
    "nervous",
)
LESSONS = (
    "It is better to ask than to guess.", "Small steps lead to large changes.",
    "Nobody spoke for a while.", "They agreed to meet again next week.",
    "The plan was not perfect, but it worked.", "In the end it cost less than expected.",
    "Everyone laughed, and the day was saved.", "That was the last time anyone saw it.",
)  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """A subject of health education, in words for the public."""

    name: str
    what: tuple[str, ...]
    signs: tuple[str, ...]
    care: tuple[str, ...]


TOPICS = (
    Topic(
        "sepsis",
        (
            "a severe reaction of the body to an infection in the blood",
            "an emergency caused by bacteria",
        ),
        ("fever and chills", "low blood pressure, also called hypotension", "confusion", "shock"),
        ("antibiotics such as vancomycin", "fluids through a vein", "pressors such as vasopressin"),
    ),
    Topic(
        "pneumonia",
        ("an infection of the lungs", "an infection that fills part of a lung, often at the base"),
        ("a productive cough", "shortness of breath", "fever", "opacities on a chest film"),
        ("antibiotics", "oxygen", "azithromycin or levofloxacin"),
    ),
    Topic(
        "heart failure",
        ("a weak heart that cannot pump enough blood", "a chronic illness of the heart"),
        ("swelling of the legs, called edema", "weight gain", "trouble breathing when lying flat"),
        ("a drug such as lisinopril or metoprolol", "less salt", "water pills such as lasix"),
    ),
    Topic(
        "a heart attack",
        ("a blocked artery of the heart", "a myocardial infarction, in the words of a doctor"),
        ("chest pain or pressure", "sweating", "nausea and vomiting"),
        ("aspirin", "a stent placed in the artery", "atorvastatin or simvastatin"),
    ),
    Topic(
        "stroke",
        ("a blocked or bleeding vessel in the brain", "a sudden loss of blood flow to the head"),
        (
            "facial droop",
            "slurred speech",
            "weakness of the right or left arm",
            "a sudden headache",
        ),
        ("a scan of the head", "physical therapy", "a drug that opens the vessel"),
    ),
    Topic(
        "a hemorrhage",
        (
            "bleeding inside the body",
            "bleeding that may be intracranial, which means inside the skull",
        ),
        (
            "headache",
            "black stool, called melena",
            "a low blood count",
            "a patient who is unresponsive",
        ),
        ("blood transfused in the hospital", "surgery", "pantoprazole for an ulcer"),
    ),
    Topic(
        "a hip fracture",
        ("a broken bone near the hip", "a fracture of the neck of the femur after a fall"),
        ("hip pain after a mechanical fall", "a leg that looks shortened and rotated"),
        ("an operation", "careful exercise", "walking with help"),
    ),
    Topic(
        "diabetes",
        ("too much glucose in the blood", "a chronic illness in which insulin is missing or weak"),
        ("thirst", "weight loss", "ketoacidosis when insulin runs out"),
        ("insulin", "metformin or glipizide", "a healthy diet"),
    ),
    Topic(
        "cirrhosis",
        ("scarring of the liver", "liver disease, often from alcohol"),
        ("jaundice", "a distended abdomen filled with ascites", "confusion called encephalopathy"),
        ("lactulose", "no alcohol", "a transplant for liver failure"),
    ),
    Topic(
        "cardiac arrest",
        ("a heart that stops beating", "a collapse in which the heart no longer pumps"),
        ("a person found down and unresponsive", "no pulse"),
        (
            "pressing on the chest at once",
            "a shock to the heart",
            "care in the intensive unit, intubated and sedated",
        ),
    ),
    Topic(
        "pancreatitis",
        ("an inflamed gland behind the stomach",),
        ("epigastric pain", "vomiting", "a tender abdomen"),
        ("fluids", "no food for some days", "pain medication such as oxycontin"),
    ),
    Topic(
        "an overdose",
        ("too much of a drug", "the ingestion of more pills than a body can bear"),
        ("a lethargic or obtunded person", "empty bottles"),
        ("a call for help", "an antidote", "a talk about depression and anxiety"),
    ),
    Topic(
        "pulmonary embolism",
        ("a clot in the vessels of the lungs", "a clot that travels from the calf to the lung"),
        ("pleuritic chest pain", "acute dyspnea, which means trouble breathing", "a swollen calf"),
        ("heparin and then coumadin", "early walking"),
    ),
    Topic(
        "bowel obstruction",
        ("a blocked bowel", "an intestine through which nothing passes"),
        ("crampy abdominal pain", "emesis, which means vomiting", "a distended abdomen"),
        ("rest", "a tube through the nose", "an operation"),
    ),
    Topic(
        "meningitis",
        ("an infection around the brain",),
        ("neck stiffness", "fever and headache", "photophobia, which is pain from light"),
        ("ceftriaxone at once", "a test of the fluid around the spine"),
    ),
    Topic(
        "kidney disease",
        ("kidneys that no longer clean the blood", "renal failure, in the words of a doctor"),
        ("tired days", "swelling", "high values in the labs"),
        ("dialysis for end stage renal disease", "sevelamer", "less salt"),
    ),
    Topic(
        "cancer",
        ("cells that grow without control", "a disease of the lung, breast, colon or bone"),
        (
            "weight loss",
            "pain",
            "metastatic growth, which means that it has spread to the liver or bone",
        ),
        ("dexamethasone", "surgery", "comfort and good talks"),
    ),
    Topic(
        "dementia",
        ("a slow loss of memory", "the most common form is Alzheimer's disease"),
        ("confusion", "trouble with names", "a change of affect"),
        ("donepezil or memantine", "a calm home", "a nursing home when it is advanced"),
    ),
    Topic(
        "chronic lung disease",
        ("narrow airways after years of tobacco", "an obstructive disease, called COPD"),
        ("cough", "tachypneic breathing, which means too fast", "wheezing"),
        ("an albuterol inhaler", "no smoking", "oxygen at home"),
    ),
    Topic(
        "atrial fibrillation",
        ("an irregular rhythm of the heart", "a heart that beats in a rapid and uneven way"),
        ("a fast pulse, called tachycardic", "a diaphoretic skin, which means sweating"),
        ("digoxin or metoprolol", "coumadin against clots"),
    ),
    Topic(
        "high blood pressure",
        ("hypertension, in the words of a doctor", "a pressure that is high on most days"),
        ("often no signs at all",),
        ("amlodipine or lisinopril daily", "exercise", "less salt"),
    ),
    Topic(
        "thyroid disease",
        ("a gland that makes too little hormone, called hypothyroidism",),
        ("cold hands", "tired days"),
        ("levothyroxine every morning",),
    ),
    Topic(
        "reflux",
        ("acid that rises from the stomach",),
        ("a burning chest", "cough at night"),
        ("omeprazole before meals", "a smaller dinner"),
    ),
)


def _fill(rng: random.Random, pattern: str) -> str:
    """Replaces each {slot} by a word of its kind, drawn anew every time."""
    kinds = {
        "{adjective}": ADJECTIVES,
        "{thing}": THINGS,
        "{food}": FOODS,
        "{place}": PLACES,
        "{person}": PEOPLE,
        "{number}": ("two", "three", "four", "five", "six", "ten", "12", "20", "48", "150"),
        "{time_of_day}": ("morning", "evening", "last", "first", "noon"),
    }
    for slot, words in kinds.items():
        while slot in pattern:
            pattern = pattern.replace(slot, rng.choice(words), 1)
    return pattern


def story(rng: random.Random) -> str:
    """A paragraph of everyday life, five to nine sentences."""
    hero, other, kin = rng.choice(PEOPLE), rng.choice(PEOPLE), rng.choice(KIN)
    pronoun = rng.choice(("He", "She"))
    sentences = [f"{rng.choice(TIMES)}, {hero} {_fill(rng, rng.choice(DEEDS))}."]
    for _ in range(rng.randint(3, 7)):
        deed, second = _fill(rng, rng.choice(DEEDS)), _fill(rng, rng.choice(DEEDS))
        sentences.append(
            rng.choice(
                (
                    f"{pronoun} {deed} and then {second}.",
                    f"Because {rng.choice(WEATHER)}, {pronoun.lower()} {deed}.",
                    f"{rng.choice(WEATHER).capitalize()}, so {other} {deed}.",
                    f'"I {deed}," said {other}.',
                    f"The {kin} of {hero} {deed}, which made {other} {rng.choice(FEELINGS)}.",
                    f"{pronoun} was {rng.choice(FEELINGS)}, but nobody {second}.",
                    f"At {rng.randint(1, 12)} o'clock {other} {deed}.",
                )
            )
        )
    sentences.append(rng.choice(LESSONS))
    return _wrapped(" ".join(sentences))


def health_leaflet(rng: random.Random) -> str:
    """A paragraph that explains one or two topics to the public."""
    sentences = []
    for topic in rng.sample(TOPICS, 2):
        name = topic.name
        title = name[0].upper() + name[1:]
        signs = rng.sample(topic.signs, min(2, len(topic.signs)))
        care = rng.sample(topic.care, min(2, len(topic.care)))
        sentences += [
            rng.choice(
                (
                    f"{title} is {rng.choice(topic.what)}.",
                    f"Many people ask about {name}. It is {rng.choice(topic.what)}.",
                )
            ),
            rng.choice(
                (
                    f"A person with {name} may have {' or '.join(signs)}.",
                    f"Typical signs are {' and '.join(signs)}.",
                    f"Doctors look for {' and for '.join(signs)}.",
                )
            ),
            rng.choice(
                (
                    f"It is treated with {' and '.join(care)}.",
                    f"What helps is {' or '.join(care)}.",
                    f"In the hospital the team may give {' together with '.join(care)}.",
                )
            ),
            rng.choice(
                (
                    f"Age matters: it is more common after {rng.randint(4, 8)}0 years.",
                    "Ask your doctor before you stop a drug.",
                    "A father, mother, sister or brother with the same disease raises the risk.",
                    "Allergies to penicillins or sulfa should be told on admission.",
                    "The medical history and a physical exam come first.",
                    "Most patients go home after a few days; some need care in the unit.",
                    "Bring a list of every medication, with the mg taken daily.",
                    "Who lives alone, smokes or drinks beers every day should say so.",
                    "A wife, a son or a friend may come along, and a nurse will follow up.",
                    "A woman or a man who was never ill before is seen first.",
                )
            ),
        ]
    return _wrapped(" ".join(sentences))


def glossary(rng: random.Random) -> str:
    """A list of words of the hospital and what they mean."""
    terms = [
        (term[0].upper() + term[1:] if rng.random() < 0.3 else term, meaning)
        for term, meaning in rng.sample(TERMS, rng.randint(5, 12))
    ]
    title = rng.choice(("Words of the hospital", "In plain words", "WHAT THE LETTERS MEAN", ""))
    style = rng.choice(("colon", "dash", "number", "sentence", "reverse", "pair"))
    if style == "pair":
        short = ", ".join(term for term, _ in terms)
        return f"In short: {short}.\nIn full: {', '.join(meaning for _, meaning in terms)}."
    if style == "sentence":
        sentences = [
            rng.choice(
                (
                    f"{term} means {meaning}.",
                    f"By {term} the doctors mean {meaning}.",
                    f"{term} stands for {meaning}.",
                )
            )
            for term, meaning in terms
        ]
        return _wrapped(" ".join(sentences))
    lines = []
    for number, (term, meaning) in enumerate(terms, start=1):
        lines.append(
            {
                "colon": f"{term}: {meaning}",
                "dash": f"- {term} {meaning}",
                "number": f"{number}. {term}: {meaning}",
                "reverse": f"{meaning}: {term}",
            }[style]
        )
    return "\n".join([f"{title}:", *lines] if title else lines)


def form(rng: random.Random) -> str:
    """A form of everyday life, filled in: headings in capitals or not, lists, dates and numbers."""
    things = rng.sample(THINGS, rng.randint(2, 5))
    things = [f"{rng.choice(ADJECTIVES)} {thing}" for thing in things]
    layout = rng.choice((", ", "\n- ", " - ", "\n"))
    listed = layout.join(things)
    if layout == "\n":
        listed = "\n".join(f"{number}. {thing}" for number, thing in enumerate(things, start=1))
    fields = {
        "Name": rng.choice(PEOPLE),
        "Date": f"{rng.randint(1950, 2200)}-{rng.randint(1, 12)}-{rng.randint(1, 28)}",
        "Age": str(rng.randint(18, 95)),
        "Sex": rng.choice("MF"),
        "Place": rng.choice(PLACES),
        "Unit No": str(rng.randint(1, 9999)),
        "Request": _fill(rng, rng.choice(DEEDS)).capitalize() + ".",
        "List of Items": listed,
        "Condition": rng.choice(("Good", "Stable", "Old", "None", "Broken")),
        "Reason": rng.choice(WEATHER).capitalize() + ".",
        "Price": f"{rng.randint(1, 400)} for {rng.randint(1, 12)}",
        "Instructions": rng.choice(LESSONS),
    }
    names = [name for name in fields if rng.random() < 0.6] or ["Name"]
    if rng.random() < 0.5:
        return "\n\n".join(f"{name.upper()}: {fields[name]}" for name in names)
    gap = rng.choice((" ", "  ", "\n"))
    return rng.choice(("\n", "\n\n")).join(f"{name}:{gap}{fields[name]}" for name in names)


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 90)


def write_general_text(folder: str | Path, *, documents: int = 3000, seed: int = 0) -> Path:
    """Writes `documents` .txt files of one to three paragraphs (about 110 words each file) and
    returns the folder.

    Raises ValueError for a folder that is not empty.
    """
    if documents < 1:
        raise ValueError(f"documents is {documents}; at least 1 is needed")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder for the texts")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        rng = random.Random(f"{seed} general {index}")
        kinds = (story, health_leaflet, glossary, glossary, form)
        text = "\n\n".join(rng.choice(kinds)(rng) for _ in range(rng.randint(1, 3)))
        (folder / f"{index:06d}.txt").write_text(text + "\n", encoding="utf-8", newline="\n")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.general_text",
        description="Write plain English texts.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--documents", type=int, default=3000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    arguments = parser.parse_args(argv)
    try:
        folder = write_general_text(
            arguments.out, documents=arguments.documents, seed=arguments.seed
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {counted(arguments.documents, 'text')} to {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
