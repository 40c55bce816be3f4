"""Medical Meadow's sources: their public files, read record by record as instruction rows.

MedAlpaca (arXiv 2304.08247) trained on a mix of them. The instruction is the published one where
that is known: "Answer this question truthfully" is in the files of Wikidoc and the flashcards, and
those of MedQA and CORD-19 are below, as they were misspelt. `STACKEXCHANGE`, `SECTION` and
`ABSTRACT` are this project's own words, since the published ones of such sources are not known;
OpenAssistant's prompts are instructions themselves. A file of any source that already holds rows
of instruction, input and output, as the Hub has them, is taken as it is.

Invariant: a record is a row, or says in a few words why there is none and never quotes the file.
A fault is the file's (a missing field, bytes that are no UTF-8); what a source's rule leaves out
(a question that nobody answered well) is none.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

from data.conversations import FORMATS, BadRows, read_rows, turns_of
from data.notes import LINE_LIMIT, csv_rows, read_lines
from data.questions import LETTERS, Question, QuestionSetName, read_questions

OPTIONS = "Please answer with one of the option in the bracket"
TITLE = "Please summerize the given abstract to a title"
STACKEXCHANGE = "Answer this question"
SECTION = 'Write the section "{}" of a clinical note from this conversation'
ABSTRACT = "Answer the question about the abstract with yes, no or maybe"
LEAST_SCORE = 5  # of a StackExchange answer: its upvotes less its downvotes

# MTS-Dialog's codes of sections, in words.
SECTIONS = {
    "ALLERGY": "Allergies",
    "ASSESSMENT": "Assessment",
    "CC": "Chief complaint",
    "DIAGNOSIS": "Diagnosis",
    "DISPOSITION": "Disposition",
    "EDCOURSE": "Emergency department course",
    "EXAM": "Physical examination",
    "FAM/SOCHX": "Family and social history",
    "GENHX": "History of present illness",
    "GYNHX": "Gynecologic history",
    "IMAGING": "Imaging",
    "IMMUNIZATIONS": "Immunizations",
    "LABS": "Laboratory results",
    "MEDICATIONS": "Medications",
    "OTHER_HISTORY": "Other history",
    "PASTMEDICALHX": "Past medical history",
    "PASTSURGICAL": "Past surgical history",
    "PLAN": "Plan",
    "PROCEDURES": "Procedures",
    "ROS": "Review of systems",
}


class Instruction(NamedTuple):
    """A row as it is trained on."""

    instruction: str
    input: str
    output: str


class Record(NamedTuple):
    """A record of a source: its row, or why there is none; `where` is for people."""

    where: str
    row: Instruction | None
    reason: str = ""
    is_fault: bool = False


Reader = Callable[[Path, BadRows], Iterator[Record]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a source's public file is read, and what was published about it."""

    read: Reader
    layout: str
    """The file that is expected, in words."""
    cap: int | None = None
    """Rows that MedAlpaca trained on where it took only some."""
    published: Mapping[str, int] = field(default_factory=dict)
    """Rows that the source has, by the document that says so; the documents disagree."""


def read_source(name: str, path: Path, bad_rows: BadRows) -> Iterator[Record]:
    """The records of a source's file, every row checked as those of an instruct run are.

    bad_rows: only what `read_questions` reads needs to know; faults of others are yielded.
    Raises ValueError for a file that cannot be read at all.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {name} is read from {SOURCES[name].layout}")
    read = _as_they_are if holds_rows(path) else SOURCES[name].read
    for record in read(path, bad_rows):
        if record.row is not None:
            try:
                turns_of(record.row._asdict())
            except ValueError as error:
                record = Record(record.where, None, str(error), is_fault=True)
        yield record


def holds_rows(path: Path) -> bool:
    """Whether the first record of a JSON file has an instruction and an output."""
    if not path.name.lower().endswith((".json", ".jsonl", ".jsonl.gz")):
        return False
    first = next(iter(read_rows(path)), None)
    value = None if first is None else first.value
    return isinstance(value, dict) and {"instruction", "output"} <= value.keys()


def _as_they_are(path: Path, _: BadRows) -> Iterator[Record]:
    """Rows of instruction, input and output; what else a row has is passed over."""
    if not path.name.lower().endswith((".json", ".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: this format is not known; rows are read from {FORMATS}")
    for where, value in _objects(path):
        if isinstance(value, Record):
            yield value
            continue
        missing = [key for key in Instruction._fields if key not in value]
        if missing:
            yield Record(where, None, f"no {missing[0]}", is_fault=True)
            continue
        given = value["input"]
        row = Instruction(value["instruction"], "" if given is None else given, value["output"])
        yield Record(where, row)


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Each JSON object of a file; a faulty `Record` in the place of what is none."""
    for found in read_rows(path):
        where = f"line {found.line}"
        if found.fault is not None:
            yield where, Record(where, None, found.fault, is_fault=True)
        elif not isinstance(found.value, dict):
            yield where, Record(where, None, "no JSON object", is_fault=True)
        else:
            yield where, found.value


# Questions ----------------------------------------------------------------------------------------


def _questions(set_name: QuestionSetName, convert: Callable[[Question], Instruction]) -> Reader:
    def read(path: Path, bad_rows: BadRows) -> Iterator[Record]:
        found = read_questions(set_name, path, bad_rows=bad_rows)
        for reason, count in found.counts.items():
            yield from itertools.repeat(Record("", None, reason, is_fault=True), count)
        for question in found.questions:
            yield Record(f"question {question.id}", convert(question))

    return read


def _options_row(question: Question) -> Instruction:
    """As Medical Meadow has MedQA: the options as a Python dictionary, "E: Nitrofurantoin"."""
    options = dict(zip(LETTERS, question.options, strict=False))
    asked = f"Q:{question.stem}? {options},"
    answer = LETTERS[question.answer]
    return Instruction(OPTIONS, asked, f"{answer}: {options[answer]}")


def _abstract_row(question: Question) -> Instruction:
    asked = f"Abstract: {question.context}\nQuestion: {question.stem}"
    return Instruction(ABSTRACT, asked, question.options[question.answer])


# Tables -------------------------------------------------------------------------------------------


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str] | Record]]:
    """The named columns of each record of a CSV; a faulty `Record` where fields are missing."""
    rows = csv_rows(path, errors="surrogateescape")  # found again in its row
    header = next(rows, (0, []))[1]
    if missing := [name for name in columns if header.count(name) != 1]:
        raise ValueError(
            f"{path}: the header has no column {missing[0]!r}, or has it twice; the columns read "
            f"are {', '.join(columns)}"
        )
    places = [header.index(name) for name in columns]
    for line, row in rows:
        where = f"the record that ends on line {line}"
        if len(row) != len(header):
            yield where, Record(where, None, "more or fewer fields than the header", is_fault=True)
        else:
            yield where, [row[place] for place in places]


def _cord19(path: Path, _: BadRows) -> Iterator[Record]:
    """metadata.csv: abstract and title of each paper that has both."""
    for where, found in _table(path, ("title", "abstract")):
        if isinstance(found, Record):
            yield found
            continue
        title, abstract = found
        lacking = [n for n, text in (("title", title), ("abstract", abstract)) if not text.strip()]
        row = None if lacking else Instruction(TITLE, abstract, title)
        yield Record(where, row, f"a paper without {lacking[0]}" if lacking else "")


def _mts_dialog(path: Path, _: BadRows) -> Iterator[Record]:
    """A conversation of doctor and patient, and the section of a note written from it."""
    for where, found in _table(path, ("section_header", "section_text", "dialogue")):
        if isinstance(found, Record):
            yield found
            continue
        code, text, dialogue = found
        if not dialogue.strip():
            yield Record(where, None, "an empty dialogue", is_fault=True)
        elif code.strip().upper() not in SECTIONS:
            yield Record(where, None, "a section that is not known", is_fault=True)
        else:
            instruction = SECTION.format(SECTIONS[code.strip().upper()])
            dialogue, text = (each.replace("\r\n", "\n") for each in (dialogue, text))
            yield Record(where, Instruction(instruction, dialogue, text))


# OpenAssistant ------------------------------------------------------------------------------------


def _openassistant(path: Path, _: BadRows) -> Iterator[Record]:
    """Trees of messages: each English first prompt with the reply that people ranked best."""
    for where, value in _objects(path):
        if isinstance(value, Record):
            yield value
            continue
        prompt = value.get("prompt")
        if not isinstance(prompt, dict) or not isinstance(prompt.get("replies"), list):
            yield Record(where, None, "no prompt with replies", is_fault=True)
            continue
        replies = [one for one in prompt["replies"] if isinstance(one, dict)]
        if len(replies) < len(prompt["replies"]):
            yield Record(where, None, "a reply that is no JSON object", is_fault=True)
        elif value.get("tree_state", "ready_for_export") != "ready_for_export":
            yield Record(where, None, "a tree that is not ready for export")
        elif prompt.get("lang") != "en":
            yield Record(where, None, "a prompt that is not English")
        elif prompt.get("deleted") is True:
            yield Record(where, None, "a prompt that was deleted")
        elif (best := _best_reply(replies)) is None:
            yield Record(where, None, "no reply, or several and none of them ranked")
        elif any("text" not in one for one in (prompt, best)):
            yield Record(where, None, "no text", is_fault=True)
        else:
            yield Record(where, Instruction(prompt["text"], "", best["text"]))


def _best_reply(replies: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The assistant's reply of the lowest rank (0 is best), or the only one."""
    there = [
        one for one in replies if one.get("role") == "assistant" and one.get("deleted") is not True
    ]
    ranked = [one for one in there if type(one.get("rank")) is int]
    if ranked:
        return min(ranked, key=lambda one: one["rank"])
    return there[0] if len(there) == 1 else None


# StackExchange ------------------------------------------------------------------------------------


def _stackexchange(path: Path, _: BadRows) -> Iterator[Record]:
    """Posts.xml of a dump: each question with its best answer, both as plain text.

    The best has the highest score, of at least 5; of equals the earliest. Dumps do not tell
    upvotes, but the score: upvotes less downvotes. The file is read twice: for scores, then for
    the texts of the pairs alone.
    """
    best: dict[int, tuple[int, int]] = {}  # of a question: score and negative id of the answer
    for _where, post in _posts(path):
        if isinstance(post, _Post) and post.kind == 2 and post.score >= LEAST_SCORE:
            found = (post.score, -post.id)
            best[post.parent] = max(best.get(post.parent, found), found)
    waiting: dict[int, str] = {}  # of a question the half that has been read
    answers = {-negative: question for question, (_, negative) in best.items()}
    for where, post in _posts(path):
        if isinstance(post, Record):
            yield post
            continue
        if post.kind == 1:
            if post.id not in best:
                yield Record(where, None, f"no answer with a score of at least {LEAST_SCORE}")
                continue
            question, text = post.id, f"{post.title}\n\n{plain_text(post.body)}".strip()
        elif post.id in answers:
            question, text = answers[post.id], plain_text(post.body)
        else:
            continue
        if question not in waiting:
            waiting[question] = text
            continue
        other = waiting.pop(question)
        asked, answer = (text, other) if post.kind == 1 else (other, text)
        yield Record(where, Instruction(STACKEXCHANGE, asked, answer))
    lost = Record("", None, "an answer to a question that the dump lacks")
    yield from itertools.repeat(lost, len(waiting))


class _Post(NamedTuple):
    """A question (kind 1) or an answer (kind 2)."""

    kind: int
    id: int
    parent: int  # 0 of a question
    score: int
    title: str
    body: str


def _posts(path: Path) -> Iterator[tuple[str, "_Post | Record"]]:
    """Questions and answers of Posts.xml; a faulty `Record` where one lacks what it needs."""
    for line, row in _xml_rows(path):
        where = f"line {line}"
        kind = row.get("PostTypeId")
        if kind is None:
            yield where, Record(where, None, "no PostTypeId", is_fault=True)
        if kind not in ("1", "2"):
            continue
        needed = ["Id", "Score", "Body"] + (["ParentId"] if kind == "2" else [])
        if lacking := [name for name in needed if name not in row]:
            yield where, Record(where, None, f"no {lacking[0]}", is_fault=True)
            continue
        numbers = [row["Id"], row.get("ParentId", "0"), row["Score"]]
        if not all(re.fullmatch(r"-?[0-9]{1,18}", number) for number in numbers):
            yield where, Record(where, None, "an Id or a Score that is no number", is_fault=True)
            continue
        id, parent, score = map(int, numbers)
        yield where, _Post(int(kind), id, parent, score, row.get("Title", ""), row["Body"])


def _xml_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Attributes of every <row>, with its line, in memory one at a time.

    Nothing is fetched, and a document type, by which a small file can unfold to a huge one or name
    other files, is refused.
    """
    parser = expat.ParserCreate("UTF-8")  # whatever the file says of itself
    found: list[tuple[int, dict[str, str]]] = []

    def begin(name: str, attributes: dict[str, str]) -> None:
        if name == "row":
            found.append((parser.CurrentLineNumber, attributes))

    def refuse(*_: object) -> None:
        raise ValueError(f"{path}: it has a document type, which a dump of posts does not")

    parser.StartElementHandler = begin
    parser.StartDoctypeDeclHandler = refuse
    fed = 0
    try:
        for line in read_lines(path):
            block = line.encode()
            parser.Parse(block)
            fed += len(block)
            if fed - parser.CurrentByteIndex > LINE_LIMIT:
                raise ValueError(f"{path}: an element of more than {LINE_LIMIT >> 20} MiB")
            yield from found
            found.clear()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise ValueError(
            f"{path}: line {error.lineno}: not well-formed XML "
            f"({expat.ErrorString(error.code)}); the file is cut off or damaged: fetch it again"
        ) from None


class _PlainText(HTMLParser):
    """What a reader sees of HTML: paragraphs, items and lines of code on lines of their own."""

    _BLOCKS = {"p", "div", "ul", "ol", "pre", "blockquote", "table", "h1", "h2", "h3", "h4"}
    _LINES = {"br", "li", "tr", "hr"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, _: object) -> None:
        if tag in self._BLOCKS or tag in self._LINES:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def plain_text(html: str) -> str:
    """HTML without its tags, entities as characters, at most one empty line in a row."""
    parser = _PlainText()
    parser.feed(html)
    parser.close()
    lines = (line.rstrip() for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


# What there is ------------------------------------------------------------------------------------

_ROWS = "rows of instruction, input and output"
_POSTS = "Posts.xml of the site's dump"


def _published(cap: int | None = None, **published: int) -> Source:
    """A source whose rows were published in the form in which they are trained on."""
    return Source(read=_as_they_are, layout=_ROWS, cap=cap, published=published)


def _site(readme: int, data_description: int) -> Source:
    counts = {"README": readme, "DATA_DESCRIPTION": data_description}
    return Source(read=_stackexchange, layout=_POSTS, published=counts)


SOURCES: Mapping[str, Source] = {
    "rows": Source(read=_as_they_are, layout=_ROWS),  # anybody's
    "flashcards": _published(README=33_955),
    "wikidoc": _published(10_000, README=67_704),
    "wikidoc-patient-information": _published(README=5_942),
    "mediqa": _published(README=2_208),
    "pubmed-causal": _published(README=2_446),
    "health-advice": _published(README=10_178, DATA_DESCRIPTION=8_676),
    "mmmlu": _published(README=3_787),  # MMLU's test questions
    "chatdoctor": Source(
        read=_as_they_are,
        layout="HealthCareMagic's JSON of instruction, input and output",
        cap=10_000,
        published={"README": 215_000, "model card": 200_000},
    ),
    "medqa": Source(
        read=_questions("medqa", _options_row),
        layout="the JSON lines of the US questions, for training",
        published={"DATA_DESCRIPTION": 10_178},
    ),
    "cord19": Source(
        read=_cord19,
        layout="metadata.csv",
        cap=50_000,
        published={"README": 1_056_660, "Hub": 821_007},
    ),
    "stackexchange-academia": _site(40_865, 39_633),
    "stackexchange-biology": _site(27_887, 7_482),
    "stackexchange-fitness": _site(9_833, 3_026),
    "stackexchange-health": _site(7_721, 1_428),
    "stackexchange-bioinformatics": _site(5_407, 906),
    "openassistant": Source(
        read=_openassistant,
        layout="the JSON lines of ready trees, also packed by gzip",
        published={"README": 9_209},
    ),
    # Not in Medical Meadow.
    "mts-dialog": Source(read=_mts_dialog, layout="MTS-Dialog's CSV of dialogues and sections"),
    "medmcqa": Source(
        read=_questions("medmcqa", _options_row),
        layout="the JSON lines of MedMCQA, for training",
        published={"dataset card": 182_822},
    ),
    "pubmedqa": Source(
        read=_questions("pubmedqa", _abstract_row),
        layout="PubMedQA's JSON of labelled articles that are not in its test",
    ),
}
