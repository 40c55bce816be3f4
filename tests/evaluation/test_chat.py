"""A chat: its tokens against loops written out, and that nothing of it is left anywhere."""

import contextlib
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.tokenizer import Tokenizer, load_tokenizer
from evaluation.chat import Conversation, PlainText, main
from model.batch import TokenBatch
from model.heads import CausalLM
from tests.conftest import ROOT
from tests.data.conftest import WORDS, CharacterTokenizer
from tests.evaluation.conftest import settings
from training.assemble import bare_settings, load_bare, restore
from training.config import LoraSettings
from training.run import run
from training.stages import instruct

CPU = torch.device("cpu")
SECRET = "zebrafinch"


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to end its answers."""
    folder, rng = tmp_path_factory.mktemp("tuned"), random.Random(0)
    rows = [
        {"instruction": " ".join(rng.choices(WORDS, k=4)), "input": "", "output": "seen in clinic"}
        for _ in range(200)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    config = settings(instruct(), base, folder / "rows.json", folder / "run")
    return run(
        replace(
            config,
            patient_column=None,
            prompt_format="llama-2",
            lora=LoraSettings(r=8, target_modules=("all-linear",)),
            max_length=64,
            steps=25,
        )
    )


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, said: str
) -> tuple[str, str]:
    """What the command answers to piped lines, and what it tells beside."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert main([*words, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def by_hand(model: CausalLM, ids: Sequence[int], end: int, most: int) -> list[int]:
    """Greedy tokens without their end, every token computed anew at each step."""
    ids, start = list(ids), len(ids)
    while len(ids) < start + most:
        with torch.no_grad():
            hidden = model.model(TokenBatch.from_arrays(ids, [0, len(ids)]))
            ids.append(int(model.head_logits(hidden[-1:]).argmax()))
        if ids[-1] == end:
            return ids[start:-1]
    return ids[start:]


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What a terminal may be shown of ids, some of which the untrained base makes up."""
    text = tokenizer.decode_continuation([id for id in ids if id < tokenizer.vocab_size])
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def test_two_turns_are_the_tokens_of_a_loop_written_out(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = restore(tuned, CPU)
    model, t = finished.model, finished.tokenizer
    assert isinstance(model, CausalLM)
    bos, eos = [t.bos_id], t.eos_id
    first = bos + t.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nfever and pain [/INST]")
    told = by_hand(model, first, eos, 20)
    assert 0 < len(told) < 20
    second = first + told + [eos] + bos + t.encode("[INST] aspirin daily [/INST]")
    again = by_hand(model, second, eos, 20)
    expected = [t.decode_continuation(one).removeprefix(" ") for one in (told, again)]
    options = ("--run", str(tuned), "--system", "Be brief.", "--max-new-tokens", "20")
    both = "fever and pain\naspirin daily\n/quit\nnever asked\n"
    out, _ = talk(monkeypatch, capsys, *options, said=both)
    assert out == "".join(f"{text}\n" for text in expected)
    # /reset forgets the first turn, but not the system.
    out, err = talk(monkeypatch, capsys, *options, said="aspirin daily\n/reset\nfever and pain\n")
    assert out.splitlines()[1] == expected[0] and "(begun anew)" in err


def test_a_merged_folder_is_asked_in_the_format_that_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, t = load_bare(bare_settings(base), CPU), load_tokenizer(base)
    told = by_hand(model, [t.bos_id, *t.encode("fever\nand pain\n")], t.eos_id, 9)
    options = ("--model", str(base), "--prompt-format", "plain", "--max-new-tokens", "9")
    out, err = talk(monkeypatch, capsys, *options, said='"""\nfever\nand pain\n"""\n')
    assert out == text_of(t, told) + "\n"
    assert "(--max-new-tokens 9 are written)" in err


def test_a_run_of_notes_continues_plain_text(
    clinical_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = restore(clinical_run, CPU)
    model, t = finished.model, finished.tokenizer
    assert isinstance(model, CausalLM)
    told = by_hand(model, [t.bos_id, *t.encode("the patient was")], t.eos_id, 6)
    text = t.decode_continuation([id for id in told if id < t.vocab_size])
    again = by_hand(model, [t.bos_id, *t.encode("the patient was" + text + " seen")], t.eos_id, 6)
    options = ("--run", str(clinical_run), "--max-new-tokens", "6")
    out, err = talk(monkeypatch, capsys, *options, said="the patient was\n seen\n")
    assert out == f"{text_of(t, told)}\n{text_of(t, again)}\n"
    assert "plain text is continued" in err


def test_drawn_answers_differ_by_seed_and_repeat(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--run", str(tuned), "--temperature", "5", "--top-p", "0.9", "--max-new-tokens", "8")
    first, again, other = (
        talk(monkeypatch, capsys, *options, "--seed", seed, said="fever\n")[0]
        for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_the_oldest_turns_are_dropped_aloud_and_the_system_stays() -> None:
    talk = Conversation(CharacterTokenizer(), "mistral", "system")
    ids, told = talk.ask("one", 100)
    assert told is None and talk.take("answer one", has_ended=True) is None
    ids, told = talk.ask("two", 50)
    assert told is not None and told.endswith("the first 1 question")
    text = "".join(chr(id) for id in ids[1:])
    assert text == "[INST] system\n\ntwo [/INST]"
    talk.take("answer two", has_ended=True)
    with pytest.raises(ValueError, match="room for 50"):
        talk.ask("x" * 60, 50)  # and is not taken in
    whole = "".join(chr(id) for id in talk.ask("three", 100)[0][1:])
    assert whole == "[INST] system\n\ntwo [/INST] answer two\x02[INST] three [/INST]"


def test_an_empty_answer_leaves_no_turn() -> None:
    talk = Conversation(CharacterTokenizer(), "mistral", None)
    talk.ask("one", 100)
    assert talk.take(" ", has_ended=True) == "no answer; the question is forgotten"
    assert talk.ask("two", 100)[0] == [1, *map(ord, "[INST] two [/INST]")]


def test_plain_text_loses_its_beginning_aloud_and_begins_anew_after_its_end() -> None:
    talk = PlainText(CharacterTokenizer())
    talk.ask("abcdef", 100)
    assert talk.take("ghi", has_ended=False) is None
    ids, told = talk.ask("jk", 5)
    assert ids == [1, *map(ord, "hijk")] and told is not None and "the first 7 tokens" in told
    assert talk.take("l", has_ended=True) is not None
    assert talk.ask("new", 100)[0] == [1, *map(ord, "new")]


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    files = [path for folder in folders for path in folder.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_nothing_is_written_and_ctrl_c_stops_an_answer(tuned: Path, tmp_path: Path) -> None:
    """On a terminal, where lines are edited; HOME and the run's folder stay as they were."""
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "evaluation.chat", "--run", str(tuned), "--device", "cpu"]
    command += ["--temperature", "9", "--max-new-tokens", "180"]  # long enough to be stopped
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "TERM": "dumb"}
    before = snapshot(tuned, home)
    terminal, its_end = os.openpty()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=its_end,
        stdout=its_end,
        stderr=subprocess.PIPE,
        # What a shell starts in the background ignores this signal, and so do its children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    os.close(its_end)
    os.set_blocking(terminal, False)
    assert process.stderr is not None
    while b"/reset begins anew" not in process.stderr.readline():
        assert process.poll() is None

    def wait_for(what: bytes) -> None:
        shown, deadline = b"", time.monotonic() + 60
        while what not in shown:
            assert time.monotonic() < deadline and process.poll() is None
            with contextlib.suppress(BlockingIOError):
                shown += os.read(terminal, 1 << 16)
            time.sleep(0.01)

    wait_for(b"> ")
    os.write(terminal, f"{SECRET} fever\n".encode())
    wait_for(b"fever\r\n")  # echoed, so the answer is on its way
    process.send_signal(signal.SIGINT)
    wait_for(b"> ")
    os.write(terminal, b"/quit\n")
    told = process.stderr.read()
    assert process.wait(60) == 0, told
    os.close(terminal)
    assert b"(stopped)" in told or b"(no answer" in told
    assert snapshot(tuned, home) == before
    assert SECRET.encode() not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "{downstream}"], "is a classifier"),
        (["--run", "{clinical}", "--system", "x"], "--system has no place in plain text"),
        (["--run", "{tuned}", "--prompt-format", "alpaca"], "was tuned in llama-2"),
        (["--run", "{tuned}", "--top-p", "0.5"], "--top-p would have no effect"),
        (["--run", "{tuned}", "--max-new-tokens", "256"], "leaves no room"),
        (["--run", "{tuned}", "--max-new-tokens", "0"], "at least 1"),
        (["--run", "{tuned}", "--temperature", "-1"], "temperature is -1.0"),
        (["--run", "{tuned}", "--model", "x"], "give either --run"),
        ([], "give either --run"),
        (["--run", "absent"], "absent holds no run"),
        (["--rum", "absent"], "did you mean --run?"),
        (["--model", "{base}", "--prompt-format", "llama-3"], "needs the token"),
    ],
)
def test_what_cannot_be_talked_to_is_refused_in_one_line(
    words: list[str],
    message: str,
    base: Path,
    tuned: Path,
    clinical_run: Path,
    downstream_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {
        "base": base, "tuned": tuned, "clinical": clinical_run, "downstream": downstream_run
    }  # fmt: skip
    assert main([word.format_map(folders) for word in words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
