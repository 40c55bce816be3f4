"""Mix Medical Meadow's sources into the rows of an instruct run.

    python -m data.medical_meadow --out rows.json wikidoc=wikidoc.json flashcards=cards.json
    python -m data.medical_meadow --out rows.json medqa=train.jsonl cord19=metadata.csv:20000 \
        --test-sets medqa=test.jsonl usmle=self-assessment

Each source is NAME=PATH[:CAP] (`data.instruction_sources.SOURCES` has the names). Where MedAlpaca
trained on some rows of a source only, that number is the cap unless another or `all` is given. Rows
that hold a question of a test set are left out (`data.overlap`), repeated rows too. Beside
rows.json stands rows.manifest.json: of every file its SHA-256, what was read, dropped by reason and
kept, and where the published counts disagree.

Invariant: which rows are kept, and their order, follow from their content, the caps and the seed
alone: not from the order in which files are named, nor from the order of the rows in them.
"""

import hashlib
import heapq
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from data.conversations import BadRows
from data.instruction_sources import SOURCES, Instruction, read_source
from data.overlap import TestQuestions
from data.questions import QuestionSet, QuestionSetName, read_questions
from data.wording import counted
from model.ending import CommandParser, exit_code
from model.files import file_digest, write_json, write_whole

ALL = "all"
DUPLICATE, OVERLAP, OVER_CAP = "repeated rows", "rows that hold a test question", "over the cap"
_SAY_EVERY = 15.0  # seconds


class Request(NamedTuple):
    """A source that was asked for; cap None: every row."""

    name: str
    path: Path
    cap: int | None


class Mixed(NamedTuple):
    """The rows in their order, and what the manifest says of each source."""

    rows: list[Instruction]
    sources: list[dict[str, Any]]


def read_request(text: str) -> Request:
    """NAME=PATH[:CAP]; ValueError for what is none."""
    name, equals, rest = text.partition("=")
    if name not in SOURCES or not equals or not rest:
        raise ValueError(f"{text!r} is not NAME=PATH[:CAP]; the names are {', '.join(SOURCES)}")
    path, colon, cap = rest.rpartition(":")
    if not colon or (cap != ALL and not cap.isdecimal()):  # a colon of the path itself
        return Request(name, Path(rest), SOURCES[name].cap)
    if cap != ALL and not 1 <= int(cap) < 1 << 40:
        raise ValueError(f"the cap of {name} must be at least 1, or {ALL}, got {cap}")
    return Request(name, Path(path), None if cap == ALL else int(cap))


def read_test_set(text: str, bad_rows: BadRows) -> QuestionSet:
    """The questions of SET=PATH; ValueError for what is none."""
    name, equals, path = text.partition("=")
    names: tuple[QuestionSetName, ...] = get_args(QuestionSetName)
    for known in names:
        if name == known and equals and path:
            return read_questions(known, path, bad_rows=bad_rows)
    raise ValueError(f"--test-sets {text!r} is not SET=PATH; the sets are {', '.join(names)}")


def mix(
    requests: Sequence[Request],
    *,
    seed: int = 0,
    bad_rows: BadRows = "refuse",
    tests: TestQuestions | None = None,
    keep_overlap: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Mixed:
    """Read, check, sample and shuffle the sources.

    They are read in the order of SOURCES, since a row of two of them counts for the first one read.
    Raises ValueError for a bad row (unless they are skipped), and where no row is left.
    """
    taken: set[bytes] = set()  # digests of the rows of the sources before
    kept: list[Instruction] = []
    told: list[dict[str, Any]] = []
    for request in sorted(requests, key=_rank):
        rows, counts = _sample(request, seed, bad_rows, tests, keep_overlap, taken, say)
        taken.update(map(_digest, rows))
        kept += rows
        told.append(_describe(request, counts, len(rows)))
    if not kept:
        raise ValueError("no row is left of the sources; the manifest was not written")
    kept.sort(key=lambda row: _drawn("order", seed, _digest(row)))
    return Mixed(kept, told)


def _rank(request: Request) -> tuple[int, str, float]:
    """By which sources are put in order: their name, of one name the files' content, the cap."""
    content = file_digest(request.path) if request.path.is_file() else ""
    cap = math.inf if request.cap is None else request.cap
    return list(SOURCES).index(request.name), content, cap


class Counts(NamedTuple):
    """What became of the records of a source, but those that were kept."""

    read: int
    usable: int  # rows, before repeated, overlapping and superfluous ones are taken out
    dropped: Mapping[str, int]
    overlapping: int


def _sample(
    request: Request,
    seed: int,
    bad_rows: BadRows,
    tests: TestQuestions | None,
    keep_overlap: bool,
    taken: set[bytes],
    say: Callable[[str], None],
) -> tuple[list[Instruction], Counts]:
    """At most `cap` rows of a source: those of the smallest digests, in whatever order they are."""
    name, path, cap = request
    dropped: Counter[str] = Counter()
    seen: set[bytes] = set()
    chosen: list[tuple[int, Instruction]] = []  # a heap, the largest digest on top
    read = usable = overlapping = 0
    spoke = time.monotonic()
    for read, record in enumerate(read_source(name, path, bad_rows), 1):
        if time.monotonic() - spoke > _SAY_EVERY:
            spoke = time.monotonic()
            say(f"{name}: {counted(read, 'record')} read")
        if record.row is None:
            if record.is_fault and bad_rows == "refuse":
                raise ValueError(
                    f"{path}: {record.where}: the row there has {record.reason}; correct it, or "
                    "let bad rows be counted and left out with --bad-rows skip"
                )
            dropped[record.reason] += 1
            continue
        usable += 1
        digest = _digest(record.row)
        if digest in seen or digest in taken:
            dropped[DUPLICATE] += 1
            continue
        seen.add(digest)
        if tests is not None and tests.overlaps(record.row.instruction, record.row.input):
            overlapping += 1
            if not keep_overlap:
                dropped[OVERLAP] += 1
                continue
        place = -_drawn("sample", seed, digest)
        if cap is None or len(chosen) < cap:
            heapq.heappush(chosen, (place, record.row))
        else:
            heapq.heappushpop(chosen, (place, record.row))
            dropped[OVER_CAP] += 1
    counts = Counts(read, usable, dict(sorted(dropped.items())), overlapping)
    return [row for _, row in chosen], counts


def _digest(row: Instruction) -> bytes:
    """Sixteen bytes by which a row is known."""
    return hashlib.sha256(json.dumps(row).encode()).digest()[:16]


def _drawn(purpose: str, seed: int, digest: bytes) -> int:
    """A random number of a row: by one the sample is taken, by another the rows are ordered."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} ".encode() + digest).digest()[:8])


def _describe(request: Request, counts: Counts, kept: int) -> dict[str, Any]:
    """What the manifest says of a source."""
    published = SOURCES[request.name].published
    agreeing = [document for document, n in published.items() if n in (counts.read, counts.usable)]
    return {
        "name": request.name,
        "file": str(request.path),
        "sha256": file_digest(request.path),
        "read": counts.read,
        "usable": counts.usable,
        "dropped": dict(counts.dropped),
        "hold_a_test_question": counts.overlapping,
        "cap": request.cap,
        "kept": kept,
        "published": dict(published),
        "published_conflicts": len(set(published.values())) > 1
        or (bool(published) and not agreeing),
    }


def write_rows(path: Path, rows: Sequence[Instruction]) -> None:
    """The rows as a JSON array with a row a line, or as JSON lines where the name ends so."""
    is_lines = path.suffix == ".jsonl"
    begin, between, end = ("", "\n", "\n") if is_lines else ("[\n", ",\n", "\n]\n")

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8") as file:
            file.write(begin)
            for number, row in enumerate(rows):
                file.write((between if number else "") + json.dumps(row._asdict()))
            file.write(end)

    write_whole(path, write)


def manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.manifest.json")


def _check_out(out: Path, sources: Sequence[Path], test_sets: Sequence[Path]) -> None:
    """Refuse to write over what is read, or among the files of a test set."""
    for written in (out, manifest_path(out)):
        place = written.resolve()
        for what, paths in (("sources", sources), ("test sets", test_sets)):
            for path in paths:
                if path.resolve() == place:
                    raise ValueError(
                        f"--out {out}: {written} is one of the {what}; name another file"
                    )
                if what == "test sets" and path.resolve() in place.parents:
                    raise ValueError(
                        f"--out {out}: {path} is the folder of a test set; name another folder"
                    )


def main(arguments: Sequence[str]) -> int:
    """Read the command line, mix, write, and return the exit code."""

    def work() -> None:
        parser = CommandParser(
            "data.medical_meadow", "Mix Medical Meadow's sources into the rows of an instruct run."
        )
        parser.add_argument(
            "sources", nargs="+", metavar="NAME=PATH[:CAP]", help=f"of {', '.join(SOURCES)}"
        )
        parser.add_argument("--out", required=True, type=Path, metavar="ROWS.json")
        parser.add_argument("--seed", type=int, default=0, help="of samples and order")
        parser.add_argument("--bad-rows", choices=get_args(BadRows), default="refuse")
        parser.add_argument(
            "--test-sets", nargs="+", default=[], metavar="SET=PATH", help="as for eval.py --mcq"
        )
        parser.add_argument(
            "--keep-overlap",
            action="store_true",
            help="count rows that hold a test question, and keep them",
        )
        given = parser.read(arguments)
        if given.out.suffix not in (".json", ".jsonl"):
            raise ValueError(f"--out {given.out}: name a .json or a .jsonl file")
        if not given.out.parent.is_dir():
            raise ValueError(f"--out {given.out}: the folder {given.out.parent} does not exist")
        if given.keep_overlap and not given.test_sets:
            raise ValueError("--keep-overlap has no effect without --test-sets")
        requests = [read_request(text) for text in given.sources]
        sets = [read_test_set(text, given.bad_rows) for text in given.test_sets]
        _check_out(
            given.out,
            [request.path for request in requests],
            [Path(text.partition("=")[2]) for text in given.test_sets],
        )
        tests = TestQuestions(sets) if sets else None
        mixed = mix(
            requests,
            seed=given.seed,
            bad_rows=given.bad_rows,
            tests=tests,
            keep_overlap=given.keep_overlap,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        write_rows(given.out, mixed.rows)
        manifest = {
            "rows": len(mixed.rows),
            "sha256": file_digest(given.out),
            "seed": given.seed,
            "bad_rows": given.bad_rows,
            "keep_overlap": given.keep_overlap,
            "sources": mixed.sources,
            "test_sets": [
                {
                    "name": one.name,
                    "fingerprint": one.fingerprint,
                    "questions": len(one.questions),
                    "held_by_rows": held,
                }
                for one, held in zip(sets, tests.held if tests else [], strict=True)
            ],
        }
        write_json(manifest_path(given.out), manifest)
        for line in summary(manifest):
            print(line)
        print(
            f"{given.out} has {counted(len(mixed.rows), 'row')}; "
            f"{manifest_path(given.out)} says of what"
        )

    return exit_code(
        "data.medical_meadow",
        arguments,
        work,
        interrupted="interrupted; rows whose SHA-256 is not in a manifest beside them are "
        "unfinished: give the same command again",
    )


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """What the manifest says, as lines for people."""
    lines = []
    for one in manifest["sources"]:
        lines.append(
            f"{one['name']}: {one['kept']:,} kept of {counted(one['read'], 'record')} read"
        )
        lines += [f"  {count:,} {reason}" for reason, count in one["dropped"].items()]
        if manifest["keep_overlap"] and one["hold_a_test_question"]:
            lines.append(f"  {one['hold_a_test_question']:,} {OVERLAP} are among those kept")
        if one["published_conflicts"]:
            said = ", ".join(f"{n:,} ({where})" for where, n in one["published"].items())
            lines.append(f"  published counts: {said}; {one['usable']:,} usable here")
    for one in manifest["test_sets"]:
        lines.append(
            f"test set {one['name']}: rows hold {one['held_by_rows']:,} of "
            f"{counted(one['questions'], 'question')}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
