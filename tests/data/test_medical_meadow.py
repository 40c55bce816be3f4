"""Medical Meadow's sources become rows as published; what overlaps with test sets is left out."""

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

import data.medical_meadow
from data.conversations import Conversations
from data.instruction_sources import SOURCES, Instruction, plain_text, read_source
from data.medical_meadow import main, read_request
from data.prompts import unpack_turns

TRUTHFULLY = "Answer this question truthfully"
VIGNETTE = (
    "A 23-year-old pregnant woman at 22 weeks gestation presents with burning upon urination. She "
    "states it started 1 day ago and has been worsening despite drinking more water and taking "
    "cranberry extract. She otherwise feels well. Her temperature is 97.7 F and her pulse is "
    "80/min. Which of the following is the best treatment for this patient?"
)
OPTIONS = {
    "A": "Ampicillin",
    "B": "Ceftriaxone",
    "C": "Ciprofloxacin",
    "D": "Parkinson's drug",
    "E": "Nitrofurantoin",
}
MEDQA = {
    "question": VIGNETTE,
    "options": OPTIONS,
    "answer": "Nitrofurantoin",
    "answer_idx": "E",
    "meta_info": "step2&3",
}


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def read(name: str, path: Path) -> tuple[list[Instruction], list[tuple[str, bool]]]:
    records = list(read_source(name, path, "refuse"))
    rows = [record.row for record in records if record.row is not None]
    return rows, [(record.reason, record.is_fault) for record in records if record.row is None]


# Converters ---------------------------------------------------------------------------------------


def test_medqa_is_written_as_it_was_published(tmp_path: Path) -> None:
    rows, left = read("medqa", write_lines(tmp_path / "train.jsonl", [MEDQA]))
    assert not left and rows == [
        (
            "Please answer with one of the option in the bracket",
            f"Q:{VIGNETTE}? {{'A': 'Ampicillin', 'B': 'Ceftriaxone', 'C': 'Ciprofloxacin', "
            "'D': \"Parkinson's drug\", 'E': 'Nitrofurantoin'},",
            "E: Nitrofurantoin",
        )
    ]


def test_rows_of_the_published_schema_are_taken_as_they_are(tmp_path: Path) -> None:
    """Also a source's that has a layout of its own, such as the Hub's file of MedQA."""
    row = {"instruction": TRUTHFULLY, "input": None, "output": " kept \n", "id": 1, "extra": [2]}
    path = write_lines(tmp_path / "rows.jsonl.gz", [row, row | {"input": "Why?"}])
    for name in ("flashcards", "rows", "medqa"):
        rows, left = read(name, path)
        assert not left
        assert rows == [(TRUTHFULLY, "", " kept \n"), (TRUTHFULLY, "Why?", " kept \n")]


def test_cord19_abstracts_are_asked_for_titles(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_text(
        "cord_uid,title,doi,abstract\n"
        'a,A title,1,"An abstract, in quotes\nand lines"\n'
        "b,No abstract,2,\n"
        "c,,3,No title\n",
        encoding="utf-8",
    )
    rows, left = read("cord19", path)
    assert rows == [
        (
            "Please summerize the given abstract to a title",
            "An abstract, in quotes\nand lines",
            "A title",
        )
    ]
    assert left == [("a paper without abstract", False), ("a paper without title", False)]


def post(kind: int, id: int, score: int, body: str, **more: object) -> str:
    values = {"Id": id, "PostTypeId": kind, "Score": score, "Body": body, **more}
    return "  <row " + " ".join(f"{k}={quoteattr(str(v))}" for k, v in values.items()) + " />\n"


def write_posts(path: Path, *posts: str) -> Path:
    head = '\ufeff<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'
    path.write_text(head + "".join(posts) + "</posts>\n", encoding="utf-8")
    return path


def test_stackexchange_questions_get_their_best_answer(tmp_path: Path) -> None:
    path = write_posts(
        tmp_path / "Posts.xml",
        post(2, 9, 30, "<p>before its question</p>", ParentId=10),
        post(1, 1, 3, "<p>Is 5 &lt; 6?</p>\n", Title="How & why?", AcceptedAnswerId=3),
        post(2, 3, 5, "<p>accepted</p>", ParentId=1),
        post(2, 4, 8, "<p>the <b>best</b>&nbsp;one</p><ul><li>é</li></ul>", ParentId=1),
        post(2, 5, 8, "<p>as good, but later</p>", ParentId=1),
        post(1, 6, 99, "<p>unloved</p>", Title="Nobody knows"),
        post(2, 7, 4, "<p>four are too few</p>", ParentId=6),
        post(4, 8, 1, "a tag's wiki"),
        post(1, 10, 0, "late", Title="Late"),
        post(2, 12, 7, "an orphan", ParentId=404),
    )
    rows, left = read("stackexchange-health", path)
    assert rows == [
        ("Answer this question", "How & why?\n\nIs 5 < 6?", "the best\xa0one\n\né"),
        ("Answer this question", "Late\n\nlate", "before its question"),
    ]
    assert left == [
        ("no answer with a score of at least 5", False),
        ("an answer to a question that the dump lacks", False),
    ]


def test_html_becomes_text_by_hand() -> None:
    html = "<p>a<br/>b &amp; c</p>\n<pre><code>x = 1\n  y</code></pre><ol><li>d<li>e</ol>"
    assert plain_text(html) == "a\nb & c\n\nx = 1\n  y\n\nd\ne"
    assert plain_text("<p>unclosed <b>tags & 1 < 2") == "unclosed tags & 1 < 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('<!DOCTYPE p [<!ENTITY a "aaaa">]><posts/>', "has a document type"),
        ('<!DOCTYPE p SYSTEM "file:///etc/passwd"><posts/>', "has a document type"),
        ("<posts>\n<row Id='1'\n", "line 2: not well-formed XML"),
        ("<posts>\n<row Id='1' Id='2'/></posts>", "line 2: not well-formed XML"),
    ],
)
def test_damaged_and_dangerous_xml_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "Posts.xml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read("stackexchange-biology", path)


def test_posts_are_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that never ends is refused before the file has been taken in."""
    monkeypatch.setattr("data.instruction_sources.LINE_LIMIT", 1 << 14)
    path = tmp_path / "Posts.xml"
    path.write_text("<posts><row Body='" + "word\n" * 20_000, encoding="utf-8")
    with pytest.raises(ValueError, match="an element of more than"):
        read("stackexchange-biology", path)


def test_openassistant_prompts_get_the_reply_that_was_ranked_best(tmp_path: Path) -> None:
    def reply(text: str, rank: int | None, **more: object) -> dict[str, object]:
        return {"text": text, "role": "assistant", "rank": rank, "replies": [], **more}

    def tree(text: str, *replies: object, lang: str = "en", **more: object) -> dict[str, object]:
        prompt = {"text": text, "role": "prompter", "lang": lang, "replies": list(replies)}
        return {"message_tree_id": "x", "tree_state": "ready_for_export", "prompt": prompt, **more}

    trees = [
        tree("Hi?", reply("second", 1), reply("first", 0), reply("gone", -1, deleted=True)),
        tree("Alone?", reply("only", None)),
        tree("Unranked?", reply("a", None), reply("b", None)),
        tree("Hallo?", reply("ja", 0), lang="de"),
        tree("Early?", reply("a", 0), tree_state="growing"),
        {"prompt": {"text": "No replies"}},
    ]
    rows, left = read("openassistant", write_lines(tmp_path / "trees.jsonl", trees))
    assert rows == [("Hi?", "", "first"), ("Alone?", "", "only")]
    assert [is_fault for _, is_fault in left] == [False, False, False, True]


def test_dialogues_are_asked_for_a_section(tmp_path: Path) -> None:
    path = tmp_path / "mts.csv"
    path.write_text(
        "ID,section_header,section_text,dialogue\n"
        '0,GENHX,A woman of 76.,"Doctor: Hello?\r\nPatient: I am 76."\n'
        "1,NEWHX,a,b\n",
        encoding="utf-8",
        newline="",
    )
    rows, left = read("mts-dialog", path)
    assert rows == [
        (
            'Write the section "History of present illness" of a clinical note from this '
            "conversation",
            "Doctor: Hello?\nPatient: I am 76.",
            "A woman of 76.",
        )
    ]
    assert left == [("a section that is not known", True)]


def test_real_files_are_read_whole(real_data: Path) -> None:
    counts = {}
    for name, path in {
        "wikidoc-patient-information": "instruct/medical_meadow_small.json",
        "mts-dialog": "dialogues/mts_dialog_train.csv",
        "medmcqa": "mcq/medmcqa_dev.jsonl",
        "pubmedqa": "mcq/pubmedqa_dev.json",
    }.items():
        rows, left = read(name, real_data / path)
        counts[name] = len(rows)
        assert not left
    assert counts == {
        "wikidoc-patient-information": 5942, "mts-dialog": 1201, "medmcqa": 4183, "pubmedqa": 500,
    }  # fmt: skip


# The command --------------------------------------------------------------------------------------

Mix = Callable[..., tuple[list[dict[str, str]], dict[str, Any]]]


@pytest.fixture
def mix(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Mix:
    """Run the command; the rows and the manifest that it wrote."""

    def mix(*words: object, out: str = "mixed.json"):  # type: ignore[no-untyped-def]
        path = tmp_path / out
        code = main(["--out", str(path), *map(str, words)])
        assert code == 0, capfd.readouterr().err
        text = path.read_text(encoding="utf-8")
        is_lines = path.suffix == ".jsonl"
        rows = [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
        manifest = json.loads((tmp_path / f"{path.stem}.manifest.json").read_text())
        assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert manifest["rows"] == len(rows)
        return rows, manifest

    return mix


def refused(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) == 2
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1
    return shown.err


def card(i: int, output: str = "So.") -> dict[str, str]:
    return {"instruction": TRUTHFULLY, "input": f"What is number {i}?", "output": output}


def test_caps_seeds_and_order(tmp_path: Path, mix: Mix) -> None:
    cards = write_lines(tmp_path / "cards.jsonl", [card(i) for i in range(300)])
    wiki = write_lines(tmp_path / "wiki.jsonl", [card(i) for i in range(200, 600)])
    ask = [f"flashcards={cards}:100", f"wikidoc={wiki}"]
    rows, manifest = mix(*ask)
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    first, second = manifest["sources"]
    assert (first["read"], first["usable"], first["kept"], first["cap"]) == (300, 300, 100, 100)
    assert first["dropped"] == {"over the cap": 200}
    # Of the other source rows that were taken already are repeated ones, whoever comes first.
    repeated = second["dropped"]["repeated rows"]
    assert 15 < repeated < 55 and second["kept"] == 400 - repeated and second["cap"] == 10_000
    assert len({row["input"] for row in rows}) == len(rows) == 500 - repeated
    assert first["sha256"] == hashlib.sha256(cards.read_bytes()).hexdigest()
    # Shuffled, and a sample from all over the file.
    numbers = [int(row["input"].split()[-1][:-1]) for row in rows]
    assert numbers != sorted(numbers) and min(numbers) < 30 and max(numbers) > 570
    halves = [sum(n < 200 for n in half) for half in (numbers[::2], numbers[1::2])]
    assert abs(halves[0] - halves[1]) < 25
    # The same rows in the same order, however the file is ordered; others with another seed.
    lines = cards.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    cards.write_text("".join(lines))
    assert mix(*ask)[0] == rows
    other = mix(*ask, "--seed", 1)[0]
    assert other != rows and {row["input"] for row in other} != {row["input"] for row in rows}
    assert len(mix(f"wikidoc={wiki}:all", out="all.jsonl")[0]) == 400


def test_the_order_of_the_sources_changes_nothing(tmp_path: Path, mix: Mix) -> None:
    """Neither of two names nor of two files of one name, though a cap comes after repeated rows."""
    few = write_lines(tmp_path / "few.jsonl", [card(i) for i in range(3)])
    more = write_lines(tmp_path / "more.jsonl", [card(i) for i in range(4)])
    for sources in (
        [f"flashcards={few}:2", f"wikidoc={more}"],
        [f"flashcards={few}:2", f"flashcards={more}"],
        [f"flashcards={few}:2", f"flashcards={few}:1", f"mediqa={more}:1", f"rows={more}:3"],
    ):
        mixed = mix(*sources)
        for other in (sources[::-1], sources[1:] + sources[:1]):
            assert mix(*other) == mixed


def test_published_counts_and_their_conflicts_are_told(
    tmp_path: Path, mix: Mix, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert SOURCES["health-advice"].published == {"README": 10_178, "DATA_DESCRIPTION": 8_676}
    assert {name: source.cap for name, source in SOURCES.items() if source.cap} == {
        "wikidoc": 10_000, "cord19": 50_000, "chatdoctor": 10_000,
    }  # fmt: skip
    rows = write_lines(tmp_path / "rows.jsonl", [card(i) for i in range(3)])
    _, manifest = mix(f"health-advice={rows}")
    (source,) = manifest["sources"]
    assert source["published"] == {"README": 10_178, "DATA_DESCRIPTION": 8_676}
    assert source["published_conflicts"]
    shown = capfd.readouterr().out
    assert "published counts: 10,178 (README), 8,676 (DATA_DESCRIPTION); 3 usable here" in shown
    monkeypatch.setitem(SOURCES["mediqa"].published, "README", 3)  # type: ignore[arg-type]
    assert not mix(f"mediqa={rows}")[1]["sources"][0]["published_conflicts"]


SHORT = "Which of the following is not true?"
TELLING = "Which nerve carries taste from the tongue's tip?"  # nine words, four shingles


def planted(tmp_path: Path) -> tuple[list[dict[str, str]], list[dict[str, str]], list[str]]:
    """Rows that hold a test question, rows that nearly do, and the test sets."""
    write_lines(
        tmp_path / "test.jsonl",
        [
            MEDQA,
            {"question": SHORT, "options": {"A": "Gout", "B": "Fever"}, "answer_idx": "A"},
            {"question": TELLING, "options": {"A": "Facial", "B": "Vagus"}, "answer_idx": "A"},
        ],
    )
    (tmp_path / "usmle").mkdir()
    question = {"no": 1, "question": "What does the scan show?", "options": {"A": "x", "B": "y"}}
    (tmp_path / "usmle" / "step1.json").write_text(json.dumps([question]))
    (tmp_path / "usmle" / "step1_solutions.json").write_text(json.dumps({"1": "A"}))
    words = VIGNETTE.split()
    shuffled = "{'A': 'Nitrofurantoin', 'B': 'Ampicillin'},"

    def row(text: str, instruction: str = "Answer") -> dict[str, str]:
        return {"instruction": instruction, "input": text, "output": "E: Nitrofurantoin"}

    held = [
        row(f"Q:{VIGNETTE}? {shuffled}"),  # the whole question among other options
        row(" ".join(words[:40]).upper() + " What now?"),  # two thirds of it
        row(f"It was said: {' '.join(words[5:])}"),
        row("A: fever\nB: gout\n\n" + SHORT.replace(" ", "  ")),  # short, with all its options
        row("", instruction="what does the SCAN show"),  # the question and nothing else
        row(f"Q:{TELLING}? {{'A': 'Optic', 'B': 'Vagus'}}"),  # short, and tells itself from others
    ]
    near = [
        row(" ".join([*words[:15], *(f"word{i}" for i in range(50))])),  # its beginning alone
        row(f"{SHORT} {{'A': 'Cough', 'B': 'Fever'}}"),  # a short one with another option
        row("What does the scan of a heart show?"),
        row(f"{TELLING.replace('tip', 'root')} {{'A': 'Facial', 'B': 'Vagus'}}"),
        row(f"{TELLING.removesuffix(' tip?')} back? {{'A': 'Facial', 'B': 'Vagus'}}"),
        row(" ".join(random.Random(0).sample(words, len(words)))),  # its words, not in its order
    ]
    return held, near, [f"medqa={tmp_path}/test.jsonl", f"usmle={tmp_path}/usmle"]


def test_planted_overlaps_are_found_and_removed_and_near_misses_kept(
    tmp_path: Path, mix: Mix, capfd: pytest.CaptureFixture[str]
) -> None:
    held, near, sets = planted(tmp_path)
    cards = [card(i) for i in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", [*cards[:10], *held, *near, *cards[10:]])
    clean = write_lines(tmp_path / "clean.jsonl", [card(i) for i in range(20, 30)])
    ask = [f"rows={path}", f"flashcards={clean}"]
    rows, manifest = mix(*ask, "--test-sets", *sets)
    texts = {(row["instruction"], row["input"]) for row in rows}
    assert not texts & {(row["instruction"], row["input"]) for row in held}
    assert texts >= {(row["instruction"], row["input"]) for row in near}
    assert len(rows) == 36
    first, second = manifest["sources"]
    assert first["dropped"] == {"rows that hold a test question": 6}
    assert (first["hold_a_test_question"], second["hold_a_test_question"]) == (6, 0)
    found = [(one["name"], one["questions"], one["held_by_rows"]) for one in manifest["test_sets"]]
    assert found == [("medqa", 3, 3), ("usmle", 1, 1)]
    assert "test set medqa: rows hold 3 of 3 questions" in capfd.readouterr().out
    # Only reported, where that is asked for.
    rows, manifest = mix(*ask, "--keep-overlap", "--test-sets", *sets, out="kept.json")
    assert len(rows) == 42 and manifest["sources"][0]["hold_a_test_question"] == 6
    assert not manifest["sources"][0]["dropped"] and manifest["keep_overlap"]
    assert "6 rows that hold a test question are among those kept" in capfd.readouterr().out


def test_every_real_question_is_found_in_its_own_row(
    real_data: Path, tmp_path: Path, mix: Mix
) -> None:
    lines = (real_data / "mcq" / "medmcqa_dev.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines[::5]), encoding="utf-8")
    small = real_data / "instruct" / "medical_meadow_small.json"
    rows, manifest = mix(
        f"medmcqa={path}", f"wikidoc-patient-information={small}", "--test-sets", f"medmcqa={path}"
    )
    meadow, asked = manifest["sources"]  # in the order in which sources are read
    assert asked["kept"] == 0
    assert manifest["test_sets"][0]["held_by_rows"] == len(lines[::5]) == 837
    assert meadow["hold_a_test_question"] == 0
    assert len(rows) == 5942 - 92  # 92 rows stand twice in the published file


BAD: list[tuple[str, str, bytes, str]] = [
    ("rows", "a.jsonl", b'{"instruction": "a", "output": "b"}', "line 2: .*no input"),
    (
        "rows", "a.jsonl", b'{"instruction": "zebrafinch", "input": "", "output": " "}',
        "line 2: .*an empty output",
    ),
    (
        "rows", "a.jsonl", b'{"instruction": "zebrafinch", "input": "", "output": "\xe9"}',
        "line 2: .*not UTF-8",
    ),
    (
        "chatdoctor", "a.jsonl", b'{"instruction": "a", "input": ["zebrafinch"], "output": "b"}',
        "line 2: .*input that is no string",
    ),
    ("rows", "a.jsonl", b'{"instruction": "zebrafinch', "line 2: .*no valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD)
def test_bad_rows_are_refused_with_their_line_or_counted(
    name: str, file: str, content: bytes, message: str, tmp_path: Path, mix: Mix,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / file
    path.write_bytes(json.dumps(card(0)).encode() + b"\n" + content + b"\n")
    with pytest.raises(ValueError, match=message):
        from data.medical_meadow import mix as mix_sources

        mix_sources([read_request(f"{name}={path}")])
    told = refused(capfd, "--out", tmp_path / "x.json", f"{name}={path}")
    assert "zebrafinch" not in told and "--bad-rows skip" in told
    assert not (tmp_path / "x.json").exists()
    rows, manifest = mix(f"{name}={path}", "--bad-rows", "skip")
    assert len(rows) == 1 and sum(manifest["sources"][0]["dropped"].values()) == 1


def test_bad_records_of_other_layouts_are_refused_with_their_line_or_counted(
    tmp_path: Path, mix: Mix, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "mts.csv"
    table.write_bytes(
        b"ID,section_header,section_text,dialogue\n0,CC,text,talk\n1,CC,caf\xe9,talk\n2,CC,talk\n"
    )
    posts = write_posts(
        tmp_path / "Posts.xml",
        post(1, 1, 1, "why", Title="Why?"),
        post(2, 2, 9, "so", ParentId=1),
        post(2, 3, 9, "so", ParentId="many"),
    )
    questions = write_lines(tmp_path / "q.jsonl", [MEDQA, MEDQA | {"answer_idx": "Z"}])
    for source, line, bad in (
        (f"mts-dialog={table}", "line 3", 2),
        (f"stackexchange-health={posts}", "line 5", 1),
        (f"medqa={questions}", "line 2", 1),
    ):
        assert line in refused(capfd, "--out", tmp_path / "x.json", source)
        rows, manifest = mix(source, "--bad-rows", "skip")
        assert len(rows) == 1 and sum(manifest["sources"][0]["dropped"].values()) == bad


def test_what_is_written_is_what_an_instruct_run_reads(tmp_path: Path, mix: Mix) -> None:
    odd = card(0, "E: fièvre \u2028 </s>\n\n<eos>")
    path = write_lines(tmp_path / "cards.jsonl", [odd, *(card(i) for i in range(1, 9))])
    for out in ("mixed.json", "mixed.jsonl"):
        rows, _ = mix(f"flashcards={path}", out=out)
        read_again = [unpack_turns(note.text) for note in Conversations(tmp_path / out)]
        assert [(t[0].text, t[0].input, t[1].text) for t in read_again] == [
            (row["instruction"], row["input"], row["output"]) for row in rows
        ]
        assert odd in rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cards=a.json"], "'cards=a.json' is not NAME=PATH"),
        (["wikidoc"], "is not NAME=PATH"),
        (["wikidoc=a.json:0"], "the cap of wikidoc must be at least 1, or all, got 0"),
        (["wikidoc=nowhere.json"], "nowhere.json: no such file"),
        (["wikidoc=nowhere.json", "--test-sets", "medqa"], "is not SET=PATH"),
        (["wikidoc=nowhere.json", "--test-sets", "medqua=a"], "is not SET=PATH"),
        (["wikidoc=nowhere.json", "--keep-overlap"], "has no effect without --test-sets"),
        (["wikidoc=a.json", "--bad-row", "skip"], "did you mean --bad-rows?"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capfd, "--out", tmp_path / "x.json", *words)


def test_a_source_is_not_written_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "rows.json", [card(0)])
    before = path.read_bytes()
    assert "is one of the sources" in refused(
        capfd, "--out", tmp_path / "." / "rows.json", f"rows={path}"
    )
    assert path.read_bytes() == before


def test_nothing_that_is_read_is_written_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Test sets, what lies in their folders, and a source where the manifest would stand."""
    planted(tmp_path)
    write_lines(tmp_path / "b.jsonl", [card(0)])
    (tmp_path / "b.manifest.json").write_text(json.dumps([card(1)]))
    (tmp_path / "t.manifest.json").write_bytes((tmp_path / "test.jsonl").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    medqa, usmle = f"medqa={tmp_path}/test.jsonl", f"usmle={tmp_path}/usmle"
    for out, source, test_set, said in (
        ("test.jsonl", "b.jsonl", medqa, "test.jsonl is one of the test sets"),
        ("t.json", "b.jsonl", f"medqa={tmp_path}/t.manifest.json", "one of the test sets"),
        ("usmle/step1.json", "b.jsonl", usmle, "usmle is the folder of a test set"),
        ("usmle/new.json", "b.jsonl", usmle, "usmle is the folder of a test set"),
        ("b.json", "b.manifest.json", medqa, "b.manifest.json is one of the sources"),
    ):
        words = ["--out", tmp_path / out, f"rows={tmp_path / source}", "--test-sets", test_set]
        assert said in refused(capfd, *words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_interrupted_command_says_which_rows_are_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data.medical_meadow, "write_json", interrupt)
    path = write_lines(tmp_path / "rows.jsonl", [card(0)])
    assert main(["--out", str(tmp_path / "x.json"), f"rows={path}"]) == 130
    assert "rows whose SHA-256 is not in a manifest" in capfd.readouterr().err
    assert (tmp_path / "x.json").exists() and not (tmp_path / "x.manifest.json").exists()


def test_posts_are_utf8_whatever_they_say(tmp_path: Path) -> None:
    path = write_posts(
        tmp_path / "Posts.xml", post(1, 1, 1, "é", Title="Q"), post(2, 2, 9, "ü", ParentId=1)
    )
    text = path.read_text(encoding="utf-8").replace('encoding="utf-8"', 'encoding="latin-1"')
    path.write_text(text, encoding="utf-8")
    assert read("stackexchange-fitness", path)[0] == [("Answer this question", "Q\n\né", "ü")]


def test_a_colon_may_be_part_of_a_path() -> None:
    assert read_request("rows=a:b.json").path == Path("a:b.json")
    assert read_request("wikidoc=a:b.json:7")[1:] == (Path("a:b.json"), 7)
    assert read_request("wikidoc=b.json")[2] == 10_000 and read_request("wikidoc=b:all")[2] is None
