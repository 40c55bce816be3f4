"""The M42 study: what each row stands on, the tokens it has seen, and that kills change nothing."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.general_text import write_general_text
from evaluation.study_m42 import (
    BASE,
    INSTRUCTED,
    NOISY,
    PRETRAINED,
    PROMPTED,
    Study,
    cells_of,
    main,
)
from tests.conftest import ROOT
from tests.evaluation.conftest import tables_of
from tests.evaluation.test_study_medalpaca import BAD_ROWS, write_rows
from training.run_folder import read_record

PRETRAIN = "max-length: 64\nbatch-tokens: 512\ndevice: cpu\nworkers: 1\n"
INSTRUCT = """prompt-format: plain
max-length: 64
batch-size: 8
steps: 2
lora: {r: 2}
device: cpu
workers: 1
"""
BUDGETS = (1000, 2048)  # two and four steps
ROWS = [
    (BASE, 0), (INSTRUCTED, 0), (PRETRAINED, 1000), (INSTRUCTED, 1000), (PRETRAINED, 2048),
    (INSTRUCTED, 2048), (NOISY, 2048), (PROMPTED, 2048),
]  # fmt: skip


def write_questions(folder: Path) -> dict[str, Path]:
    """A few questions of two sets, and solved ones of the first."""
    medqa, pubmedqa, solved = (folder / name for name in ("test.jsonl", "pub.json", "train.jsonl"))
    rows = [
        {
            "question": f"sign {i}?",
            "options": {"A": "pain", "B": "fever"},
            "answer_idx": "AB"[i % 2],
        }
        for i in range(14)
    ]
    medqa.write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    solved.write_text("".join(json.dumps(row) + "\n" for row in rows[10:]))
    article = {"CONTEXTS": ["seen daily"], "QUESTION": "better?", "final_decision": "yes"}
    pubmedqa.write_text(json.dumps({str(i): article for i in range(3)}))
    return {"medqa": medqa, "pubmedqa": pubmedqa, "solved": solved}


@pytest.fixture(scope="module")
def words(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command's arguments but for --out."""
    folder = tmp_path_factory.mktemp("m42")
    (folder / "pretrain.yaml").write_text(PRETRAIN)
    (folder / "instruct.yaml").write_text(INSTRUCT)
    for name, seed in (("notes", 0), ("general", 1)):
        write_general_text(folder / name, documents=60, seed=seed)
    texts = [f"notes={folder / 'notes'}:0.8", f"general={folder / 'general'}:0.2"]
    files = write_questions(folder)
    return [
        *("--models", f"tiny={base}", "--texts", *texts, "--tokens", *map(str, BUDGETS)),
        *("--data", str(write_rows(folder / "rows.json"))),
        *("--benchmarks", f"medqa={files['medqa']}", f"pubmedqa={files['pubmedqa']}"),
        *("--solved", f"medqa={files['solved']}", "--prompting", "answer", "--shots", "2"),
        *("--pretrain-config", str(folder / "pretrain.yaml"), "--bootstrap", "20"),
        *("--instruct-config", str(folder / "instruct.yaml")),
    ]


def test_every_row_stands_on_what_it_names(whole: Path, base: Path) -> None:
    tables = json.loads((whole / "study.json").read_text())
    assert [(row["variant"], row["tokens"]) for row in tables["rows"]] == ROWS
    for tokens in BUDGETS:
        pretrained = read_record(whole / "pretrain" / "tiny" / f"tokens-{tokens}")
        assert pretrained["total_steps"] == -(-tokens // 512)
        assert pretrained["kept"]["step"] == pretrained["kept"]["last_step"]
        tuned = read_record(whole / "instruct" / "tiny" / f"tokens-{tokens}")
        assert tuned["config"]["model"] == str(
            whole / "pretrain" / "tiny" / f"tokens-{tokens}" / "model"
        )
        assert tuned["fingerprints"]["base"] != pretrained["fingerprints"]["base"]
    alone = read_record(whole / "instruct" / "tiny" / "tokens-0")
    assert alone["config"]["model"] == str(base) and alone["config"]["neftune_alpha"] is None
    noisy = read_record(whole / "neftune" / "tiny" / "tokens-2048")
    assert noisy["config"]["neftune_alpha"] == 5.0
    assert noisy["fingerprints"]["base"] == tuned["fingerprints"]["base"]
    seen = [row["tokens_seen"] for row in tables["rows"] if row["variant"] == PRETRAINED]
    # Two steps and four of 512 tokens, each without the piece of at most 64 that had no room.
    for tokens, steps in zip(seen, (2, 4), strict=True):
        assert steps * (512 - 64) < tokens <= steps * 512
    last = [row for row in tables["rows"] if row["variant"] == PRETRAINED][-1]["sources"]
    assert last["notes"]["tokens"] + last["general"]["tokens"] == seen[1]
    assert last["notes"]["tokens"] == pytest.approx(0.8 * seen[1], abs=130)  # two pieces
    for row in tables["rows"]:
        assert ("peak_memory" in row) == (row["variant"] != BASE)
        # No solved questions of PubMedQA, so it is not asked with them.
        shown = {"medqa", "pubmedqa"} - ({"pubmedqa"} if row["variant"] == PROMPTED else set())
        assert set(row["benchmarks"]) == shown
        assert row["benchmarks"]["medqa"]["n"] == 10
        if row["variant"] != PROMPTED:  # the untrained base writes no answer that can be read
            assert len(row["benchmarks"]["medqa"]["accuracy_ci"]) == 2
    (kept,) = whole.rglob("prompting-2048/medqa.json")
    asked = json.loads(kept.read_text())["asked"]
    assert (asked["prompt"], asked["shots"]) == ("answer", 2)
    assert asked["run"] == str(whole / "neftune" / "tiny" / "tokens-2048")


def test_the_tables_are_readable(whole: Path) -> None:
    text = (whole / "study.md").read_text()
    stacked, curve = text.split("## Accuracy against")
    for name in (BASE, PRETRAINED, INSTRUCTED, NOISY, PROMPTED):
        assert stacked.count(f"| tiny | {name} | ") == 1
    for tokens in ("0", "1,000", "2,048"):
        assert f"| tiny | {tokens} | as it is |" in curve
        assert f"| tiny | {tokens} | instructed |" in curve
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


@pytest.mark.usefixtures("nothing_made")
def test_a_finished_study_makes_nothing_again(words: list[str], whole: Path) -> None:
    before = tables_of(whole)
    assert main([*words, "--out", str(whole)]) == 0
    assert tables_of(whole) == before


@pytest.mark.slow
def test_killed_and_called_again_it_ends_in_the_same_tables(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    command = [sys.executable, "-m", "tests.evaluation.kill_study", "evaluation.study_m42"]
    command += [str(out), "5,40,90,150,60,100", *words, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.stdout.split()[:6] == [str(-signal.SIGKILL)] * 6, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "0", done.stderr[-2000:]
    assert tables_of(out) == tables_of(whole)


@pytest.mark.slow
def test_the_last_row_is_medprompt_unless_it_is_said_otherwise(
    words: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other rows are there already."""
    at = words.index("--prompting")
    assert main([*words[:at], *words[at + 2 :], "--out", str(whole)]) == 0
    *others, last = tables_of(whole)["rows"]
    assert last["variant"] == PROMPTED and last["benchmarks"]["medqa"]["n"] == 10
    (kept,) = whole.rglob("prompting-2048/medqa.json")
    results = json.loads(kept.read_text())["results"]
    assert (results["strategy"], results["settings"]["votes"]) == ("medprompt", 5)
    assert main([*words, "--out", str(whole)]) == 0
    assert tables_of(whole)["rows"][:-1] == others


def test_pretraining_may_train_an_adapter_which_instruction_then_stands_on(tmp_path: Path) -> None:
    study = Study(
        out=tmp_path, models={"a": "base"}, texts=("t",), tokens=(10,), data="d", benchmarks={}
    )
    pretrained = tmp_path / "pretrain" / "a" / "tokens-10"
    starts = [cell.config and cell.config.model for cell in cells_of(study)]
    full = str(pretrained / "model")
    assert starts == [None, "base", "base", full, full, full]
    (tmp_path / "lora.yaml").write_text("adapter: lora\n")
    study = replace(study, pretrain_config=str(tmp_path / "lora.yaml"))
    tuned = list(cells_of(study))[-1].config
    assert tuned is not None and (tuned.model, tuned.init_adapter) == ("base", str(pretrained))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--tokens": "1.5"}, "--tokens takes whole numbers"),
        ({"--benchmarks": "medqb=x"}, "medqb is no question set"),
        ({"--solved": "medqa=/nowhere"}, "there is no /nowhere"),
        ({"--solved": None}, "name their files with --solved"),
        ({"--pretrain-config": None}, None),
        ({"--neftune-alpha": "0"}, "--neftune-alpha must be above 0"),
        ({"--texts": "a=/nowhere:1"}, "--texts: there is no /nowhere"),
        ({"--texts": "a=x:-1"}, "its weight must be a number above 0"),
        ({"--data": "/nowhere.json"}, "/nowhere.json: no such file"),
        ({"--data": "BAD"}, "line 2: the row that begins there has no valid JSON"),
        ({"--shots": "5"}, "--shots 5: "),  # there are four
        ({"--solved": "ASKED"}, "a question of --shots-data is among those of --data"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(
    change: dict[str, str | None],
    said: str | None,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            given[word] = []
        else:
            given[list(given)[-1]].append(word)
    (tmp_path / "bad.jsonl").write_text(BAD_ROWS)
    files = {"BAD": str(tmp_path / "bad.jsonl"), "ASKED": given["--benchmarks"][0]}
    for flag, value in change.items():
        given.pop(flag, None)
        value = files.get(value or "", value)
        if value is not None:
            given[flag] = [value]
    if said is None:  # the steps of such a file have no number of tokens
        (tmp_path / "rows.yaml").write_text(PRETRAIN.replace("batch-tokens: 512", "batch-size: 8"))
        given["--pretrain-config"], said = [str(tmp_path / "rows.yaml")], "need --batch-tokens"
    out = tmp_path / "out"
    typed = [word for flag, values in given.items() for word in (flag, *values)]
    assert main([*typed, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not out.exists()
