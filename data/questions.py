"""Multiple-choice questions of the medical benchmarks, from their published files to one form.

MedQA (Jin et al., arXiv 2009.13081), MedMCQA (arXiv 2203.14371), PubMedQA (arXiv 1909.06146), the
clinical subjects of MMLU (arXiv 2009.03300), and the USMLE self-assessment of MedAlpaca (arXiv
2304.08247). The invariant: `Question.answer` counts from 0 among the options that are kept; letters
and numbers from 1 are turned into it here and nowhere else.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from data.wording import counted

QuestionSetName = Literal["medqa", "medmcqa", "pubmedqa", "mmlu", "usmle"]
BadRows = Literal["refuse", "skip"]

LETTERS = ascii_uppercase  # of the options, in their order
FILE_LIMIT = 1 << 30  # bytes of a file of questions; the largest published has 140 MB
CLINICAL_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
# Questions of the USMLE self-assessment that show an image, by their field "no", as the authors'
# notebook lists them.
USMLE_IMAGES = {
    "step1": frozenset(
        (4, 7, 9, 11, 18, 21, 30, 32, 34, 36, 40, 42, 44, 47, 53, 56, 62, 68, 77, 80, 85, 88, 89,
         100, 105, 113, 114)
    ),
    "step2": frozenset((25, 26, 33, 53, 60, 76, 80, 87, 107, 114)),
    "step3": frozenset((5, 21, 34, 41, 63, 66, 67, 88, 96, 102, 113, 118, 130)),
}  # fmt: skip
USMLE_PUBLISHED = {"step1": 92, "step2": 110, "step3": 122}  # questions left, as the paper counts


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `step` and `subject` are None where the set does not tell them."""

    id: str
    stem: str
    options: tuple[str, ...]
    answer: int  # from 0
    subject: str | None = None
    step: str | None = None
    context: str = ""  # what the question is about: PubMedQA's abstract

    def reordered(self, order: Sequence[int]) -> "Question":
        """The question with option order[i] at place i."""
        assert sorted(order) == list(range(len(self.options)))
        options = tuple(self.options[i] for i in order)
        return dataclasses.replace(self, options=options, answer=list(order).index(self.answer))


@dataclass(frozen=True, slots=True)
class QuestionSet:
    name: str
    questions: tuple[Question, ...]
    counts: Mapping[str, int]  # what was left out and why; of USMLE what each step keeps
    fingerprint: str  # SHA-256 of the files that were read


class BadRow(ValueError):
    """A row that is no question: `reason` is counted, the message tells where."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


# A row as its file has it, and where: "line 3" or "entry 3".
Row = tuple[str, Any]


def read_questions(
    name: QuestionSetName,
    path: str | Path,
    *,
    bad_rows: BadRows = "refuse",
    answers_from: Literal[0, 1] | None = None,
) -> QuestionSet:
    """Read a question set: its file, or the folder of MMLU's tables or the USMLE files.

    bad_rows: "skip" counts rows that are no question (missing fields, an answer that is not among
    the options, an id that came before, invalid UTF-8) in `counts` instead of refusing them.
    answers_from: what MedMCQA's first answer is numbered; None reads it off the answers.

    Raises ValueError with file and line for what cannot be read.
    """
    reading = _Reading(name, bad_rows)
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; name the file of the questions of {name}")
    if name == "usmle":
        _read_usmle(reading, path)
    elif name == "mmlu":
        for file in _mmlu_files(path):
            subject = file.stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val")
            reading.read(
                file,
                functools.partial(_mmlu, subject=subject),
                is_wanted=_is_clinical if file.suffix != ".csv" else None,
            )
    elif name == "medmcqa":
        first = answers_from if answers_from is not None else _first_answer(reading.rows(path))
        reading.read(path, functools.partial(_medmcqa, first=first))
    else:
        reading.read(path, {"medqa": _medqa, "pubmedqa": _pubmedqa}[name])
    if answers_from is not None and name != "medmcqa":
        raise ValueError(f"the numbers of answers can be chosen for medmcqa, not for {name}")
    if not reading.questions:
        raise ValueError(f"{path} holds no question of {name} that can be scored")
    return QuestionSet(
        name, tuple(reading.questions), dict(reading.counts), reading.digest.hexdigest()
    )


class _Reading:
    """What has been read so far, of one or several files."""

    def __init__(self, name: str, bad_rows: BadRows) -> None:
        self.name, self.bad_rows = name, bad_rows
        self.questions: list[Question] = []
        self.counts: Counter[str] = Counter()
        self.digest = hashlib.sha256(name.encode())
        self._ids: set[str] = set()

    def read(
        self,
        path: Path,
        convert: Callable[[Any], Question],
        *,
        is_wanted: Callable[[Any], bool] | None = None,
    ) -> None:
        """Add the questions of a file; a question without an id is named after its place."""
        for where, row in self.rows(path):
            try:
                if isinstance(row, BadRow):
                    raise row
                if is_wanted is not None and not is_wanted(row):
                    continue
                question = convert(row)
                if not question.id:
                    id = f"{path.stem}-{where.split()[-1]}"
                    question = dataclasses.replace(question, id=id)
                if question.id in self._ids:
                    raise BadRow("duplicate id", "it came before; every question needs its own")
            except BadRow as bad:
                self._bad(path, where, bad)
                continue
            self._ids.add(question.id)
            self.questions.append(question)

    def rows(self, path: Path) -> Iterator[Row]:
        """The rows of a JSON, JSON-lines or CSV file; BadRow in the place of one that is not."""
        content = self._content(path)
        # A byte that is no UTF-8 becomes a lone surrogate, which is found again in its row.
        text = content.decode(errors="surrogateescape").removeprefix("\ufeff")
        if path.suffix == ".csv":
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            try:
                for row in reader:
                    if row:
                        yield f"line {reader.line_num}", _checked(row)
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: not a CSV ({error})") from None
            return
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None
        if isinstance(whole, list):
            yield from ((f"entry {i}", _checked(row)) for i, row in enumerate(whole, start=1))
        elif isinstance(whole, dict) and all(isinstance(row, dict) for row in whole.values()):
            entries = enumerate(whole.items(), start=1)
            yield from ((f"entry {i}", _checked({"id": id, **row})) for i, (id, row) in entries)
        else:
            yield from _json_lines(text)

    def _content(self, path: Path) -> bytes:
        if not path.is_file():
            raise ValueError(f"{path} does not exist or is not a file")
        if (size := path.stat().st_size) > FILE_LIMIT:
            raise ValueError(f"{path} has {size:,} bytes; at most {FILE_LIMIT:,} are read")
        content = path.read_bytes()
        self.digest.update(hashlib.sha256(content).digest())
        return content

    def _bad(self, path: Path, where: str, bad: BadRow) -> None:
        if self.bad_rows == "refuse":
            raise ValueError(
                f"{path}, {where}: {bad}; correct the row, or leave such rows out with "
                "--bad-rows skip"
            )
        self.counts[bad.reason] += 1


def _json_lines(text: str) -> Iterator[Row]:
    # Not splitlines, which also splits at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = BadRow("not JSON", "")
        yield f"line {number}", _checked(row)


def _checked(row: Any) -> Any:
    """The row, or BadRow where a byte of it was no UTF-8."""
    text = json.dumps(row, ensure_ascii=False) if not isinstance(row, BadRow) else ""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return BadRow("invalid UTF-8", "")
    return row


def _question(
    id: Any, stem: Any, options: Sequence[Any], answer: int | None, **more: Any
) -> Question:
    """A question of checked parts, without its empty options; `answer` counts from 0."""
    if not isinstance(stem, str) or not stem.strip():
        raise BadRow("missing field", "there is no question")
    if not all(option is None or isinstance(option, str) for option in options):
        raise BadRow("missing field", "an option is not text")
    kept = [i for i, option in enumerate(options) if option is not None and option.strip()]
    if len(kept) < 2:
        raise BadRow("missing field", f"{counted(len(kept), 'option')}; at least 2")
    if len(options) > len(LETTERS):
        raise BadRow("too many options", f"{len(options)}; at most {len(LETTERS)}")
    if answer is None or answer not in kept:
        raise BadRow(
            "answer not among the options",
            f"{counted(len(kept), 'option has', 'options have')} text",
        )
    if not isinstance(id, str | int | None):
        raise BadRow("missing field", "the id is neither text nor a number")
    return Question(
        id="" if id is None else str(id),
        stem=stem.strip(),
        options=tuple(str(options[i]).strip() for i in kept),
        answer=kept.index(answer),
        **more,
    )


def _field(row: Any, *names: str) -> Any:
    if not isinstance(row, dict):
        raise BadRow("missing field", "the row is not a JSON object")
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadRow("missing field", f"there is no {' or '.join(names)}")


def _letter(value: Any) -> int | None:
    """A letter's place from 0; None for what is no letter."""
    letter = value.strip().upper() if isinstance(value, str) else ""
    return LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else None


def _number(value: Any, first: int) -> int | None:
    """A number's place from 0 where the first answer is numbered `first`."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return value - first if type(value) is int and value >= first else None


def _medqa(row: Any) -> Question:
    """Options as {A: text}, as [{key, value}], or as ending0, ending1, ... with a label from 0."""
    step = row.get("meta_info") if isinstance(row, dict) else None
    if isinstance(row, dict) and "ending0" in row:
        endings: list[Any] = []
        while (name := f"ending{len(endings)}") in row:
            endings.append(row[name])
        answer = _number(_field(row, "label"), 0)
        return _question(row.get("id"), _field(row, "sent1"), endings, answer, step=step)
    given = _field(row, "options")
    if isinstance(given, list):
        given = {_field(one, "key"): _field(one, "value") for one in given}
    if not isinstance(given, dict) or not given:
        raise BadRow("missing field", "options are neither an object nor a list of key and value")
    letters = sorted(given)
    if letters != list(LETTERS[: len(letters)]):
        raise BadRow("missing field", "the options are not A, B, C, ...")
    options = [given[letter] for letter in letters]
    if row.get("answer_idx") is not None:
        answer = _letter(row["answer_idx"])
    else:  # the answer's text alone, which must be one option's
        text = _field(row, "answer")
        answer = options.index(text) if options.count(text) == 1 else None
    return _question(row.get("id"), _field(row, "question"), options, answer, step=step)


def _medmcqa(row: Any, first: int) -> Question:
    options = [row.get(name) for name in ("opa", "opb", "opc", "opd")] if row else []
    answer = _number(_field(row, "cop"), first)
    subject = row.get("subject_name")
    return _question(row.get("id"), _field(row, "question"), options, answer, subject=subject)


def _first_answer(rows: Iterator[Row]) -> int:
    """1 where answers are numbered from 1 as in the published files, 0 as on the Hub."""
    found = {_number(row.get("cop"), -1) for _, row in rows if isinstance(row, dict)}
    if found <= {None}:
        return 1  # these are no such questions, and the first row's error says so best
    has_zero, has_four = 1 in found, 5 in found  # counted from -1, the Hub's hidden answer
    if has_zero != has_four:
        return 0 if has_zero else 1
    found_what = "both 0 and 4" if has_zero else "neither 0 nor 4"
    raise ValueError(
        f"the answers (cop) hold {found_what}, so whether they count from 0 or from 1 cannot be "
        "told; say it with --answers-from 0 or --answers-from 1"
    )


def _pubmedqa(row: Any) -> Question:
    """The published object of articles, or the Hub's rows."""
    contexts = row.get("CONTEXTS") if isinstance(row, dict) else None
    if contexts is None:
        context = _field(row, "context")
        contexts = _field(context, "contexts") if isinstance(context, dict) else context
    if not isinstance(contexts, list) or not all(isinstance(one, str) for one in contexts):
        raise BadRow("missing field", "the contexts are not a list of texts")
    options, decision = ("yes", "no", "maybe"), _field(row, "final_decision")
    return _question(
        _field(row, "id", "pubid"),
        _field(row, "QUESTION", "question"),
        options,
        options.index(decision) if decision in options else None,
        context="\n".join(contexts),
    )


def _mmlu_files(path: Path) -> list[Path]:
    """The clinical subjects' test tables of a folder, or the one file."""
    if path.is_file():
        return [path]
    folder = path / "test" if (path / "test").is_dir() else path
    files = [folder / f"{subject}_test.csv" for subject in CLINICAL_SUBJECTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)} of MMLU's clinical subjects")
    return files


def _is_clinical(row: Any) -> bool:
    return not isinstance(row, dict) or row.get("subject") in (None, *CLINICAL_SUBJECTS)


def _mmlu(row: Any, subject: str) -> Question:
    """A line of question, options and letter, or an object with an answer from 0 or a letter."""
    if isinstance(row, list):
        if len(row) < 4:
            raise BadRow(
                "missing field", f"{counted(len(row), 'column')}; a question, options and a letter"
            )
        return _question(None, row[0], row[1:-1], _letter(row[-1]), subject=subject)
    options = _field(row, "choices")
    if not isinstance(options, list):
        raise BadRow("missing field", "choices is not a list")
    given = _field(row, "answer")
    answer = _letter(given) if _letter(given) is not None else _number(given, 0)
    named = row.get("subject") or subject
    return _question(row.get("id"), _field(row, "question"), options, answer, subject=named)


def _read_usmle(reading: _Reading, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name the folder of step1.json to step3.json")
    steps = [step for step in USMLE_IMAGES if (folder / f"{step}.json").is_file()]
    if not steps:
        raise ValueError(f"{folder} holds none of step1.json, step2.json and step3.json")
    for step in steps:
        before = len(reading.questions)
        path = folder / f"{step}_solutions.json"
        try:
            # As every other file, so that it enters the fingerprint.
            solutions = json.loads(reading._content(path).decode())
        except ValueError:
            solutions = None
        if not isinstance(solutions, dict):
            raise ValueError(f"{path} is missing or not an object of number and letter")

        def is_wanted(row: Any, step: str = step) -> bool:
            if not isinstance(row, dict) or _number(row.get("no"), 0) not in USMLE_IMAGES[step]:
                return True
            reading.counts[f"{step} image questions"] += 1
            return False

        def convert(row: Any, step: str = step, solutions: dict = solutions) -> Question:
            number, given = _field(row, "no"), _field(row, "options")
            if not isinstance(given, dict):
                raise BadRow("missing field", "options are not an object")
            options: list[Any] = [None] * len(LETTERS)
            for letter, text in given.items():
                if (place := _letter(letter)) is None:
                    raise BadRow("missing field", "an option is not named by a letter")
                options[place] = text
            answer = _letter(solutions.get(str(number)))
            return _question(
                f"{step}-{number}", _field(row, "question"), options, answer, step=step
            )

        reading.read(folder / f"{step}.json", convert, is_wanted=is_wanted)
        reading.counts[f"{step} questions"] = len(reading.questions) - before
