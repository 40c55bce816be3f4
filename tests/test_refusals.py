"""Bad input through the real commands: exit code 2, one line, no traceback, nothing written.

Every case breaks one thing of a base, a table or two finished runs that are whole, and types a
command. Notes and patients bear canaries, which may not appear in any message.
"""

import csv
import gzip
import io
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import data.notes
import eval as eval_command
import train
from lora.merge import merge
from lora.parts import parts_of_folders
from model.checkpoint import load_causal_lm, save_model
from tests.evaluation.conftest import (  # noqa: F401 (fixtures)
    CANARY_PATIENT,
    CANARY_TEXT,
    base,
    one_thread,
    write_notes,
)

CODE_DONE, CODE_WRONG_INPUT = 0, 2


class Place:
    """A folder of a test's own with a base, a table and finished runs, to be broken."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.notes, self.runs = root / "base", root / "notes.csv", root / "runs"
        self.out = root / "out"
        self.adapter = root / "adapter"  # as another tool would have written it
        self.clinical_run, self.label_run = self.runs / "clinical", self.runs / "label"

    def train(self, stage: str, *more: str, without: Sequence[str] = (), **values: object) -> list:
        """The words of a run of one step; `values` replace those of flags, by name."""
        flags = {
            "stage": stage,
            "model": self.base,
            "data": self.notes,
            "patient-column": "patient",
            "test-share": "0.3",
            "max-length": 32,
            "batch-tokens": 512,
            "steps": 1,
            "workers": 1,
            "device": "cpu",
            "lora.r": 2,
            "out": self.out,
        }
        if stage == "downstream":
            flags |= {"task": "label", "label-column": "label", "init-adapter": self.clinical_run}
        flags |= {name.replace("_", "-"): value for name, value in values.items()}
        kept = [(f"--{name}", str(value)) for name, value in flags.items() if name not in without]
        return [word for pair in kept for word in pair] + list(more)

    def score(self, *more: str) -> list[str]:
        return ["--run", str(self.label_run), "--device", "cpu", "--bootstrap", "2", *more]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What every test copies; its runs name the base and the notes here."""
    place = Place(tmp_path_factory.mktemp("whole"))
    shutil.copytree(base, place.base)
    write_notes(place.notes, patients=40, seed=0)
    for stage, out in (("clinical", place.clinical_run), ("downstream", place.label_run)):
        assert train.main(place.train(stage, out=out)) == CODE_DONE
    shutil.copytree(place.clinical_run / "adapter" / "clinical", place.adapter)
    return place.root


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    copy = Place(tmp_path / "place")
    shutil.copytree(whole, copy.root)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return copy


Refuse = Callable[..., str]


@pytest.fixture
def refuse(place: Place, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Type a command that must be refused; returns the line it says."""

    def check(arguments: Sequence[str], message: str = "", *, command: Any = train) -> str:
        capfd.readouterr()
        code = command.main(arguments)
        shown = capfd.readouterr()
        assert code == CODE_WRONG_INPUT, (code, shown.err)
        return check_line(shown.out, shown.err, message, place)

    return check


def check_line(out: str, err: str, message: str, place: Place) -> str:
    assert out == "" and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    assert "Traceback" not in err and message in err, err
    assert CANARY_TEXT not in err and CANARY_PATIENT not in err, err
    assert not place.out.exists(), "a refused run left files"
    assert not list(place.root.rglob("*.partial")) and not list(place.root.rglob("*.building-*"))
    assert list(Path.cwd().iterdir()) == []
    return err


# Bases --------------------------------------------------------------------------------------------


def rewrite_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a change to ... takes the key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({"vocab_size": ...}, "vocab_size is missing"),
    "text for a number": ({"hidden_size": "32"}, "hidden_size is '32'"),
    "half a layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"),
    "negative width": ({"hidden_size": -32}, "hidden_size"),
    "a list for a number": ({"intermediate_size": [48]}, "intermediate_size"),
    "uneven heads": ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    "odd heads": ({"head_dim": 7}, "head_dim is 7"),
    "epsilon 0": ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    "not a number": ({"rms_norm_eps": float("nan")}, "not valid JSON"),
    "10^400": ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
    "trillion words": ({"vocab_size": 10**12}, "vocab_size is 1000000000000; allowed"),
    "terabytes of words": ({"vocab_size": 1 << 22, "hidden_size": 1 << 17}, "131072]"),
    "other shapes": ({"intermediate_size": 64}, "needs [32, 64]"),
    "more layers": ({"num_hidden_layers": 3}, "lacks tensors"),
    "fewer layers": ({"num_hidden_layers": 1}, "rules out"),
    "one matrix for two": ({"tie_word_embeddings": True}, "differs"),
    "biases": ({"attention_bias": True}, "lacks tensors"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "none is ever run"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "another family": ({"model_type": "gpt2"}, "known are llama, mistral, mixtral and bert"),
    "family of no text": ({"model_type": ["llama"]}, "known are llama, mistral, mixtral and bert"),
    "unknown key": ({"sliding_window": 4096}, "'sliding_window' is unknown"),
    "strange rope": ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
    "rope of no group": ({"rope_parameters": 5}, "rope_parameters is int"),
    "token outside": ({"bos_token_id": 512}, "outside the vocabulary of 512"),
    "token of no number": ({"eos_token_id": {"id": 2}}, "eos_token_id"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "short positions": ({"max_position_embeddings": 16}, "--max-length is 32"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, place: Place, refuse: Refuse) -> None:
    changes, message = CONFIGS[case]
    rewrite_json(place.base / "config.json", **changes)
    refuse(place.train("clinical"), message)


def test_a_base_to_be_drawn_that_no_machine_could_hold(place: Place, refuse: Refuse) -> None:
    rewrite_json(place.base / "config.json", hidden_size=1 << 16, intermediate_size=1 << 20)
    words = place.train("pretrain", "--from-scratch", without=["lora.r"])
    refuse(words, "GiB of memory; choose smaller sizes")


def shard(place: Place) -> Path:
    """Put the base into two files and their index, and return the index."""
    model = load_causal_lm(place.base)
    tokenizer = (place.base / "tokenizer.model").read_bytes()
    shutil.rmtree(place.base)
    save_model(model, place.base, max_shard_bytes=100_000)
    (place.base / "tokenizer.model").write_bytes(tokenizer)
    return place.base / "model.safetensors.index.json"


def point_shards(index: Path, to: Callable[[str], Any]) -> None:
    weight_map = json.loads(index.read_text())["weight_map"]
    rewrite_json(index, weight_map={tensor: to(file) for tensor, file in weight_map.items()})


SHARDS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda index, first: first.unlink(), "does not exist"),
    "cut": (lambda index, first: first.write_bytes(first.read_bytes()[:-9]), "not a complete"),
    "lengthened": (lambda index, first: first.write_bytes(first.read_bytes() + b"x"), "not a"),
    "empty": (lambda index, first: first.write_bytes(b""), "not a complete"),
    "a folder": (lambda index, first: (first.unlink(), first.mkdir()), "is not a file"),
    "a pickle": (lambda index, first: first.write_bytes(b"\x80\x04K\x01."), "not a complete"),
    "above": (lambda index, first: point_shards(index, lambda f: f"../base/{f}"), "plain"),
    "from the root": (lambda index, first: point_shards(index, lambda f: f"/x/{f}"), "plain"),
    "dots": (lambda index, first: point_shards(index, lambda f: ".."), "plain file"),
    "no name": (lambda index, first: point_shards(index, lambda f: 7), "plain file"),
    "a pickle by name": (lambda index, first: point_shards(index, lambda f: "a.bin"), "only"),
    "all in one": (lambda index, first: point_shards(index, lambda f: first.name), "not of one"),
    "a link out": (
        lambda index, first: first.rename(index.parent.parent / "x") and first.symlink_to("../x"),
        "link out of its folder",
    ),
    "no map": (lambda index, first: index.write_text("{}"), "no weight_map"),
    "cut index": (lambda index, first: index.write_text(index.read_text()[:99]), "not valid JSON"),
    "both layouts": (
        lambda index, first: shutil.copy(first, index.parent / "model.safetensors"),
        "remove the stale one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDS)
def test_shards(case: str, place: Place, refuse: Refuse) -> None:
    damage, message = SHARDS[case]
    index = shard(place)
    damage(index, sorted(place.base.glob("model-*.safetensors"))[0])
    refuse(place.train("clinical"), message)


def poison(path: Path, value: float, dtype: torch.dtype = torch.float32) -> str:
    """Put one value into the first tensor of a file; returns the tensor's name."""
    tensors = {name: tensor.to(dtype).clone() for name, tensor in load_file(path).items()}
    name = min(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stage", ["clinical", "downstream"])
def test_weights_that_are_not_finite(
    stage: str, value: float, place: Place, refuse: Refuse
) -> None:
    shard(place)
    path = sorted(place.base.glob("model-*.safetensors"))[0]
    name = poison(path, value)
    words = place.train(stage, without=["init-adapter"])
    refuse(words, f"{path}: {name} holds a value that is not finite;")


def test_weights_too_large_for_the_format_they_are_read_in(place: Place, refuse: Refuse) -> None:
    name = poison(place.base / "model.safetensors", 1e300, torch.float64)
    refuse(place.train("clinical"), f"{name} holds a value that is not finite as float32;")


def test_an_infinite_matrix_that_is_stored_twice(place: Place, refuse: Refuse) -> None:
    path = place.base / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.embed_tokens.weight"][0] = math.nan
    rewrite_json(place.base / "config.json", tie_word_embeddings=True)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    refuse(place.train("clinical"), "holds a value that is not finite;")


def header_of(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def with_header(content: bytes, header: dict[str, Any], *, length: int | None = None) -> bytes:
    raw = json.dumps(header).encode()
    body = content[8 + struct.unpack("<Q", content[:8])[0] :]
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


NORM = "model.norm.weight"
HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "terabytes": lambda h: h[NORM].update(shape=[1 << 40]),
    "overflow": lambda h: h[NORM].update(shape=[1 << 62, 1 << 62]),
    "behind the end": lambda h: h[NORM].update(data_offsets=[0, 1 << 50]),
    "backwards": lambda h: h[NORM].update(data_offsets=[8, 0]),
    "negative": lambda h: h[NORM].update(data_offsets=[-8, 0]),
    "no such dtype": lambda h: h[NORM].update(dtype="F7"),
    "whole numbers": lambda h: h[NORM].update(dtype="I32"),
    "eight bits": lambda h: h[NORM].update(dtype="F8_E4M3", shape=[4 * h[NORM]["shape"][0]]),
    "no shape": lambda h: h[NORM].pop("shape"),
    "no tensor": lambda h: h.pop(NORM),
    "another name": lambda h: h.update({"norm.weight": h.pop(NORM)}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_weights(case: str, place: Place, refuse: Refuse) -> None:
    path = place.base / "model.safetensors"
    content = path.read_bytes()
    header = header_of(content)
    HEADERS[case](header)
    path.write_bytes(with_header(content, header))
    refuse(place.train("clinical"), str(place.base))


def test_a_header_of_terabytes(place: Place, refuse: Refuse) -> None:
    path = place.base / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(with_header(content, header_of(content), length=1 << 45))
    refuse(place.train("clinical"), "not a complete safetensors file")


# Tokenizers ---------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_size(place: Place, refuse: Refuse) -> None:
    model = load_causal_lm(place.base)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, place.base / "model.safetensors")
    rewrite_json(place.base / "config.json", vocab_size=300)
    refuse(place.train("clinical"), "they do not belong together")


# A tokenizer's piece whose text is a number: ten bytes that ask for 2**60 zeros.
BOMB_PIECE = bytes([0x0A, 10, 0x08, *[0x80] * 8, 0x10])
TOKENIZERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda model: b"", "not a sentencepiece model"),
    "cut": (lambda model: model[: len(model) // 2], "not a sentencepiece model"),
    "text": (lambda model: b"the patient", "not a sentencepiece model"),
    "number for a text": (lambda model: model + BOMB_PIECE, "not a sentencepiece model"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_sentencepiece_files(case: str, place: Place, refuse: Refuse) -> None:
    damage, message = TOKENIZERS[case]
    path = place.base / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    refuse(place.train("clinical"), message)


def test_a_tokenizer_of_a_terabyte(place: Place, refuse: Refuse) -> None:
    os.truncate(place.base / "tokenizer.model", 1 << 40)
    refuse(place.train("clinical"), "is it another file under this name")


def write_json_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "patient": 3}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")  # type: ignore[attr-defined]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


JSON_TOKENIZERS: dict[str, tuple[str, str, str]] = {
    "not JSON": ("tokenizer.json", "{", "not a tokenizer.json"),
    "no tokenizer": ("tokenizer.json", "{}", "not a tokenizer.json"),
    "nothing": ("tokenizer.json", "", "not a tokenizer.json"),
    "special, not JSON": ("tokenizer_config.json", "{", "not valid JSON"),
    "special, no object": ("tokenizer_config.json", "[]", "where a JSON object is expected"),
    "special, deep": ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
    "special, of another": ("tokenizer_config.json", '{"bos_token": "<b>"}', "not in tokenizer"),
    "special, no text": ("tokenizer_config.json", '{"bos_token": ["<s>"]}', "not in tokenizer"),
}


@pytest.mark.parametrize("case", JSON_TOKENIZERS)
def test_json_tokenizers(case: str, place: Place, refuse: Refuse) -> None:
    file, content, message = JSON_TOKENIZERS[case]
    write_json_tokenizer(place.base)
    (place.base / file).write_text(content)
    refuse(place.train("clinical"), message)


# Tables of notes ----------------------------------------------------------------------------------

Rows = list[list[str]]


def read_rows(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def csv_text(rows: Rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def json_lines(rows: Rows) -> str:
    return "".join(json.dumps(dict(zip(rows[0], row, strict=True))) + "\n" for row in rows[1:])


ROW = f"{CANARY_TEXT} sleeps,{CANARY_PATIENT}-9,yes\n"
# name: file, its content from the whole table's text, part of the message
TABLES: dict[str, tuple[str, Callable[[str], str | bytes], str]] = {
    "cut in a quote": ("n.csv", lambda t: t + f'"{CANARY_TEXT} the', "not valid CSV"),
    "cut in a row": ("n.csv", lambda t: t + f"{CANARY_TEXT},{CANARY_PATIENT}", "has 2 fields"),
    "a field too many": ("n.csv", lambda t: t + ROW[:-1] + ",x\n", "has 4 fields"),
    "NUL": ("n.csv", lambda t: t + ROW.replace("sleeps", "\0"), "NUL character"),
    "NUL in a patient": ("n.csv", lambda t: t + ROW.replace("-9", "\0"), "NUL character"),
    "no patient": ("n.csv", lambda t: t + f"{CANARY_TEXT},,yes\n", "has no patient"),
    "lone CR": ("n.csv", lambda t: t.replace("\n", "\r"), "n.csv"),
    "Latin-1": ("n.csv", lambda t: (t + ROW.replace("sleeps", "né")).encode("latin1"), "UTF-8"),
    "UTF-16": ("n.csv", lambda t: t.encode("utf-16"), "UTF-8"),
    "a missing column": ("n.csv", lambda t: t.replace("text,", "note,", 1), "no text column"),
    "no header": ("n.csv", lambda t: t.split("\n", 1)[1], "the first line must be the header"),
    "a doubled column": ("n.csv", lambda t: t.replace("label", "text", 1), "the same name"),
    "header alone": ("n.csv", lambda t: t.split("\n", 1)[0] + "\n", "no notes in it"),
    "blank lines": ("n.csv", lambda t: "\n" * 9, "the file is empty"),
    "nothing": ("n.csv", lambda t: "", "the file is empty"),
    "one note": ("n.csv", lambda t: "text,patient,label\n" + ROW, "has 1 label in 1 note; a"),
    "one class": ("n.csv", lambda t: t.replace(",no\n", ",yes\n"), "has 1 label in"),
    "no labels": ("n.csv", lambda t: t.replace(",no\n", ",\n").replace(",yes\n", ",\n"), "has 0"),
    "a note without": ("n.csv", lambda t: t + ROW.replace("yes", ""), "without a label"),
    "a class of none": ("n.csv", lambda t: t + ROW.replace("9,yes", "1,maybe"), "without a note"),
    "texts for labels": ("n.csv", lambda t: t + ROW.replace("yes", ROW[:-1] * 9), "n.csv"),
    "a long label": (
        "n.csv",
        lambda t: t + ROW.replace("yes", f"{CANARY_TEXT} " * 50),
        "is the label column the right one",
    ),
    "gzip, cut": ("n.csv.gz", lambda t: gzip.compress(t.encode())[:-20], "cut off or damaged"),
    "gzip, flipped": (
        "n.csv.gz",
        lambda t: bytes(b ^ (i == 900) for i, b in enumerate(gzip.compress(t.encode()))),
        "cut off or damaged",
    ),
    "gzip by name alone": ("n.csv.gz", lambda t: t, "not a gzip file"),
    "an unknown format": ("n.xlsx", lambda t: t, "this format is not known"),
    "columns of text": ("n.txt", lambda t: t, "text files have no column"),
    "JSON, cut": ("n.jsonl", lambda t: json_lines(list(csv.reader(t.splitlines())))[:-9], "line"),
    "JSON, one document": ("n.jsonl", lambda t: json.dumps([t]), "is a JSON list"),
    "JSON, key twice": ("n.jsonl", lambda t: '{"text": "a", "text": "b"}', "a key twice"),
    "JSON, deep": ("n.jsonl", lambda t: "[" * 100_000, "is not valid JSON"),
    "JSON, long number": ("n.jsonl", lambda t: '{"text": ' + "9" * 9000 + "}", "is not valid JSON"),
    "JSON, no text": (
        "n.jsonl",
        lambda t: '{"text": null, "patient": "1", "label": "a"}',
        "a null in column 'text'",
    ),
    "JSON, broken character": (
        "n.jsonl",
        lambda t: '{"text": "\\ud800", "patient": "1", "label": "a"}',
        "surrogate",
    ),
    "JSON, share for a label": (
        "n.jsonl",
        lambda t: '{"text": "a", "patient": "1", "label": 0.5}',
        "a float in column 'label'",
    ),
    "Parquet, of text": ("n.parquet", lambda t: t, "not a Parquet file"),
    "Parquet, cut": ("n.parquet", lambda t: b"PAR1" + t.encode() + b"\xff\0\0\0PAR1", "Parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_tables(case: str, place: Place, refuse: Refuse) -> None:
    name, damaged, message = TABLES[case]
    content = damaged(place.notes.read_text())
    path = place.root / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(place.train("downstream", data=path), message)


@pytest.mark.parametrize("kind", ["BOM", "CRLF", "a note of 2 MB", "empty texts"])
def test_tables_that_are_right(kind: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """What looks odd and is not wrong: accepted, no note lost."""
    rows = read_rows(place.notes)
    if kind == "a note of 2 MB":
        rows.append([f"{CANARY_TEXT}, \n" * 180_000, f"{CANARY_PATIENT}-9", "yes"])
    if kind == "empty texts":
        rows[1][0] = rows[2][0] = ""
    content = csv_text(rows).encode()
    if kind == "BOM":
        content = b"\xef\xbb\xbf" + content
    if kind == "CRLF":
        content = content.replace(b"\n", b"\r\n")
    place.notes.write_bytes(content)
    assert train.main(place.train("downstream")) == CODE_DONE
    shown = capfd.readouterr()
    assert CANARY_TEXT not in shown.out + shown.err
    counts = json.loads((place.out / "run.json").read_text())["counts"]
    held = ("train", "validation", "test")
    used = sum(counts[f"{part}_notes"] for part in held)
    left_out = sum(counts[f"{part}_notes_left_out"] for part in held[1:])
    assert used + left_out == len(rows) - 1 and counts["unlisted_notes"] == 0


def test_a_gzip_bomb(place: Place, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.notes, "BOMB_BYTES", 1 << 20)
    path = place.root / "n.csv.gz"
    path.write_bytes(gzip.compress(b"text,patient,label\n" + b"a,1,x\n" * 300_000))
    refuse(place.train("downstream", data=path), "unpacks to more than 200 times its size")


def test_a_text_of_a_terabyte(place: Place, refuse: Refuse) -> None:
    folder = place.root / "texts"
    folder.mkdir()
    (folder / "a.txt").touch()
    os.truncate(folder / "a.txt", 1 << 40)
    words = place.train("clinical", without=["patient-column"], data=folder)
    refuse(words, "a text file is one note")


def ids(*numbers: int) -> str:
    return "patient\n" + "".join(f"{CANARY_PATIENT}-0-{number}\n" for number in numbers)


THIRDS = {"train": ids(*range(20)), "validation": ids(*range(20, 30)), "test": ids(*range(30, 40))}
LISTS: dict[str, tuple[dict[str, str | bytes | None], str]] = {
    "one missing": ({"test": None}, "none of test.csv"),
    "one twice": ({"val": ids(20)}, "more than one of"),
    "patient in two": ({"test": ids(3, 30)}, "1 patient is both in train.csv and in test.csv"),
    "of other notes": ({"train": ids(99), "validation": ids(98), "test": ids(97)}, "none of the"),
    "nobody trains": ({"train": "patient\n"}, "no note"),
    "empty": ({"train": ""}, "an empty file"),
    "two columns": ({"train": "a,b\n1,2\n"}, "one column of patient identifiers"),
    "cut": ({"train": f'patient\n"{CANARY_PATIENT}'}, "not CSV in UTF-8"),
    "Latin-1": ({"train": "é\n".encode("latin1")}, "not CSV in UTF-8"),
    "no header": ({"train": "17\n18\n"}, "not a header"),
}


@pytest.mark.parametrize("case", LISTS)
def test_split_lists(case: str, place: Place, refuse: Refuse) -> None:
    changes, message = LISTS[case]
    folder = place.root / "splits"
    folder.mkdir()
    for name, content in (THIRDS | changes).items():
        if content is not None:
            raw = content if isinstance(content, bytes) else content.encode()
            (folder / f"{name}.csv").write_bytes(raw)
    refuse(place.train("downstream", without=["test-share"], splits=folder), message)


# Adapters and flags -------------------------------------------------------------------------------

ADAPTER_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"r": 0}, "r must be a whole number from 1"),
    "another rank": ({"r": 3}, "tensors of another shape"),
    "a rank of terabytes": ({"r": 10**12}, "r must be a whole number from 1"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "lora_alpha must be"),
    "alpha of text": ({"lora_alpha": "4"}, "lora_alpha must be"),
    "dropout 1": ({"lora_dropout": 1}, "lora_dropout must be"),
    "no targets": ({"target_modules": ...}, "target_modules is missing"),
    "unknown target": ({"target_modules": ["q_prj"]}, "the nearest names are q_proj"),
    "another target": ({"target_modules": ["k_proj", "v_proj"]}, "does not match"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "does not match"),
    "a pattern without end": ({"target_modules": r"(.*)*(.*)*(.*)*x"}, "5 seconds to match"),
    "a pattern of a book": ({"target_modules": ".*q_proj|" * 20_000}, "180,000 characters"),
    "broken pattern": ({"target_modules": "(q_proj"}, "not a regular expression"),
    "endless pattern": ({"target_modules": "q{99999999999}"}, "not a regular expression"),
    "pattern with a flag": ({"rank_pattern": {"(?i)q_proj": 4}}, "not a regular expression"),
    "DoRA": ({"use_dora": True}, "use_dora = true is not supported"),
    "biases": ({"bias": "all"}, "bias ="),
    "unknown key": ({"magic": {"a": 1}}, "magic"),
    "another method": ({"peft_type": "IA3"}, "peft_type must be one of LORA, "),
    "an embedding": ({"modules_to_save": ["embed_tokens"]}, "is not supported"),
}


@pytest.mark.parametrize("case", ADAPTER_CONFIGS)
def test_adapter_configs(case: str, place: Place, refuse: Refuse) -> None:
    changes, message = ADAPTER_CONFIGS[case]
    rewrite_json(place.adapter / "adapter_config.json", **changes)
    refuse(place.train("downstream", init_adapter=place.adapter), message)


Tensors = dict[str, torch.Tensor]
ADAPTER_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "wrong prefix": (lambda t: {k.removeprefix("base_model."): v for k, v in t.items()}, "begin"),
    "one missing": (lambda t: dict(list(t.items())[1:]), "1 tensors missing"),
    "one more": (lambda t: t | {"base_model.model.x": torch.ones(1)}, "fit nothing"),
    "other shapes": (lambda t: {k: v.T.contiguous() for k, v in t.items()}, "another shape"),
    "whole numbers": (lambda t: {k: v.int() for k, v in t.items()}, "I32; allowed"),
    "not a number": (lambda t: {k: v * torch.nan for k, v in t.items()}, "not finite"),
}


@pytest.mark.parametrize("case", ADAPTER_TENSORS)
def test_adapter_tensors(case: str, place: Place, refuse: Refuse) -> None:
    change, message = ADAPTER_TENSORS[case]
    path = place.adapter / "adapter_model.safetensors"
    # Copies: what load_file gives is a window on the file that is about to be written.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)
    refuse(place.train("downstream", init_adapter=place.adapter), message)


def test_an_adapter_without_the_one_below_it(place: Place, refuse: Refuse) -> None:
    above, below = (place.label_run / "adapter" / name for name in ("downstream", "clinical"))
    link = place.root / "link"
    link.symlink_to(above)
    for named in (above, link):
        refuse(
            place.train("downstream", init_adapter=named),
            f"{named} was trained on top of {below} and means nothing alone",
        )


def test_an_adapter_of_unknown_origin_on_a_merged_base(place: Place, refuse: Refuse) -> None:
    merged = place.root / "merged"
    parts = parts_of_folders(place.base, [place.adapter])
    merge(parts, merged, None)
    words = place.train("downstream", model=merged, init_adapter=place.adapter)
    refuse(words, "is already merged (with adapter)")
    refuse([*words, "--dry-run"], "is already merged (with adapter)")


def test_a_first_adapter_of_a_downstream_run_is_whole(place: Place) -> None:
    """Without an init adapter the downstream adapter stands on the base itself."""
    first = place.root / "first"
    words = place.train("downstream", without=["init-adapter"], out=first)
    assert train.main(words) == CODE_DONE
    words = place.train("downstream", init_adapter=first / "adapter" / "downstream")
    assert train.main(words) == CODE_DONE


def test_of_two_adapters_none_is_taken_in_silence(place: Place, refuse: Refuse) -> None:
    words = place.train("downstream", init_adapter=place.label_run)
    first = place.label_run / "adapter" / "clinical"
    said = "is a run of 2 adapters, clinical and downstream, which work together; give the first "
    refuse(words, f"{said}alone: {first}\n")
    assert train.main(place.train("downstream", init_adapter=first)) == CODE_DONE


LONG = "x" * 300
FLAGS: dict[str, tuple[dict[str, object], str]] = {
    "unknown target": ({"lora.target-modules": "q_prj"}, "the nearest names are q_proj"),
    "the head as a target": ({"lora.target-modules": "lm_head"}, "is trained whole"),
    "rank 0": ({"lora.r": 0}, "--lora.r must be"),
    "rank of 400 digits": ({"lora.r": "9" * 400}, "--lora.r must be"),
    "alpha 1e308": ({"lora.alpha": "1e308"}, "--lora.alpha must be"),
    "endless": ({"steps": 10**30}, "--steps must be below 2**31"),
    "many ends": ({"eval-tokens": "9" * 400}, "--eval-tokens must be"),
    "long notes": ({"max-length": 10**30}, "--max-length must be"),
    "beyond the base": ({"max-length": 512}, "at most 256 positions"),
    "wide steps": ({"batch-tokens": 10**30}, "--batch-tokens must be"),
    "a crowd": ({"workers": 10**9}, "--workers must be from 1 to 1024"),
    "infinite share": ({"test-share": "inf"}, "--test-share must be"),
    "no such base": ({"model": "nowhere"}, "config.json does not exist"),
    "a table for a base": ({"model": "/dev/null"}, "config.json does not exist"),
    "a base of 300 letters": ({"model": LONG}, "name too long"),
    "no such data": ({"data": "nowhere"}, "no such file or folder"),
    "data of 300 letters": ({"data": LONG}, "name too long"),
    "data of NUL": ({"data": "a\0b"}, ""),
    "out of 300 letters": ({"out": LONG}, "name too long"),
    "a cache in a file": ({"cache-dir": "/dev/null"}, "/dev/null cannot be used"),
    "a cache below a file": ({"cache-dir": "/dev/null/x"}, "cannot be used"),
    "lists nowhere": ({"splits": "nowhere"}, "--test-share would have no effect"),
    "no such preset": ({"tokenizer-preset": "gpt"}, "tokenizer preset 'gpt' is not known"),
    "no such adapter": ({"adapter": "none", "init-adapter": "nowhere"}, "--lora.r would have no"),
    "no such column": ({"text-column": "Text"}, "the nearest is 'text'"),
    "a column for two": ({"text-column": "patient"}, "named for two purposes"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, place: Place, refuse: Refuse) -> None:
    values, message = FLAGS[case]
    refuse(place.train("clinical", **values), message)


YAML: dict[str, tuple[str, str]] = {
    "an explosion": ("a: &a [x, x]\nb: &b [*a, *a]\nlr: [*b, *b]", "aliases are not read"),
    "in base sixty": ("steps: 1:30", "--steps must be a whole number or None, got '1:30'"),
    "hexadecimal": ("steps: 0x10", "--steps must be a whole number"),
    "a date": ("seed: 2024-13-45", "--seed must be a whole number"),
    "infinity": ("lr: .inf", "--lr must be a number"),
    "bytes": ("lr: !!binary aGVsbG8=", "--lr must be a number"),
    "code": ("lr: !!python/name:os.system", "cannot be read as YAML"),
    "a key of a list": ("? [a, b]\n: c", "cannot be read as YAML"),
    "two documents": ("--- 1\n--- 2", "cannot be read as YAML"),
    "a bell": ("lr: \x07", "cannot be read as YAML"),
    "a group too deep": ("lora: {r: {a: 1}}", "--lora.r does not take a group"),
    "no group": ("optim: null", "--optim is not a flag"),
    "a flag as a value": ("text_column: --data", "cannot be read"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml(case: str, place: Place, refuse: Refuse) -> None:
    content, message = YAML[case]
    path = place.root / "run.yaml"
    path.write_text(content)
    words = place.train("clinical", without=["steps", "lr", "seed", "lora.r"], config=path)
    refuse(words, message)


def test_numbers_of_yaml_are_read_as_typed(place: Place) -> None:
    path = place.root / "run.yaml"
    path.write_text("lr: 1e-4\nseed: 0377\noptim: {clip: null}\n")
    config = train.read_command(place.train("clinical", config=path)).config
    assert (config.lr, config.seed, config.optim.clip) == (1e-4, 377, None)


# Finished runs ------------------------------------------------------------------------------------

RECORDS: dict[str, Any] = {
    "format": [..., 2, None],
    "config": [..., None, [], {}],
    "fingerprints": [..., None, {}, {"base": 1}, [1]],
    "labels": [..., None, 5, [1, 2], ["only one"]],
    "adapters": [..., None, True, [1], ["../../clinical"], ["clinical"]],
    "began": [...],
    "finished": [..., False, "yes"],
    "total_steps": [..., "1"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in RECORDS.items() for value in values]
)
def test_damaged_records_of_runs(key: str, value: Any, place: Place, refuse: Refuse) -> None:
    rewrite_json(place.label_run / "run.json", **{key: value})
    if (key, value) != (
        "adapters",
        ["clinical"],
    ):  # a smaller network than trained, but a whole one
        refuse(place.score(), command=eval_command)
    if (key, value) != ("finished", False):
        refuse(["--resume", "--out", str(place.label_run)])


SCORING: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "no run": (lambda place: ["--run", str(place.root)], "holds no run"),
    "no such run": (lambda place: ["--run", LONG], "name too long"),
    "many resamples": (lambda place: place.score("--bootstrap", "9" * 30), "given twice"),
    "no data": (lambda place: place.score("--data", "nowhere"), "no such file"),
    "over the notes": (
        lambda place: place.score("--data", str(place.notes), "--predict", str(place.notes)),
        "lies in, the data",
    ),
    "no folder": (lambda place: place.score("--predict", "nowhere/x.csv"), "make it first"),
    "a long name": (
        lambda place: place.score("--data", str(place.notes), "--predict", f"{LONG}.csv"),
        "name too long",
    ),
    "a column of nothing": (lambda place: place.score("--text-column", "x"), "not given"),
}


@pytest.mark.parametrize("case", SCORING)
def test_scoring(case: str, place: Place, refuse: Refuse) -> None:
    words, message = SCORING[case]
    before = place.notes.read_bytes()
    refuse(words(place), message, command=eval_command)
    assert place.notes.read_bytes() == before


HEADS: dict[str, tuple[Tensors, str]] = {
    "another shape": ({"score.weight": torch.ones(3, 32)}, "head.safetensors"),
    "another name": ({"weight": torch.ones(2, 32)}, "head.safetensors"),
    "whole numbers": ({"score.weight": torch.ones(2, 32).int()}, "head.safetensors"),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str, place: Place, refuse: Refuse) -> None:
    tensors, message = HEADS[case]
    save_file(tensors, place.label_run / "head.safetensors")
    refuse(place.score(), message, command=eval_command)


def test_other_notes_than_the_run_can_answer(place: Place, refuse: Refuse) -> None:
    path = place.root / "other.csv"
    for label, message in (("maybe", "none of the 2 known ones"), ("", "without a label")):
        path.write_text("text,patient,label\n" + ROW.replace("yes", label))
        refuse(place.score("--data", str(path)), message, command=eval_command)


# Generated ----------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    | st.floats(allow_subnormal=False)
    | st.sampled_from([0, -1, 10**30, 10**400, "llama", "../x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
GENERATED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def accept_or_refuse(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., None]]:
    """Type a command with generated input: it works, or it is refused as every other."""

    def check(arguments: Sequence[str], *, command: Any = train) -> None:
        shutil.rmtree(place.out, ignore_errors=True)
        capfd.readouterr()
        code = command.main(arguments)
        shown = capfd.readouterr()
        assert CANARY_TEXT not in shown.out + shown.err and CANARY_PATIENT not in shown.err
        if code != CODE_DONE:
            assert code == CODE_WRONG_INPUT, (code, shown.err)
            check_line(shown.out, shown.err, "", place)

    yield check


@pytest.mark.parametrize("file", ["base", "adapter", "run"])
@GENERATED
@given(choice=st.integers(0, 99), value=JSON_VALUES)
def test_any_value_of_any_key(
    file: str, choice: int, value: Any, place: Place, accept_or_refuse: Callable[..., None]
) -> None:
    path, arguments, command = {
        "base": (place.base / "config.json", place.train("clinical"), train),
        "adapter": (
            place.adapter / "adapter_config.json",
            place.train("downstream", init_adapter=place.adapter),
            train,
        ),
        "run": (place.label_run / "run.json", place.score(), eval_command),
    }[file]
    before = path.read_text()
    keys = sorted(json.loads(before))
    try:
        rewrite_json(path, **{keys[choice % len(keys)]: value})
        accept_or_refuse(arguments, command=command)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("file", ["notes.csv", "base/model.safetensors", "base/tokenizer.model"])
@GENERATED
@given(seed=st.integers(0, 2**32))
def test_any_damage(
    file: str, seed: int, place: Place, accept_or_refuse: Callable[..., None]
) -> None:
    """Bytes changed, cut off or put in; of weights in their header, for any number is a weight."""
    path, chance = place.root / file, random.Random(seed)
    before = path.read_bytes()
    damaged = bytearray(before)
    reach = 2000 if file.endswith("safetensors") else len(before)
    at = chance.randrange(reach)
    kind = chance.choice(["change", "cut", "insert", "delete"])
    if kind == "change":
        for _ in range(chance.choice([1, 3, 9])):
            damaged[chance.randrange(reach)] = chance.choice([0, 10, 13, 34, 44, 255, 123])
    elif kind == "cut":
        del damaged[at:]
    elif kind == "insert":
        damaged[at:at] = chance.randbytes(5)
    else:
        del damaged[at : at + 9]
    try:
        path.write_bytes(damaged)
        accept_or_refuse(place.train("downstream"))
    finally:
        path.write_bytes(before)


# In a process of its own --------------------------------------------------------------------------


def test_as_typed_in_a_shell(place: Place, repository_root: Path) -> None:
    """What only a process shows: no second line from a library, no traceback at exit."""
    (place.base / "tokenizer.model").write_bytes(b"the patient")
    for arguments in (
        ["train.py", *place.train("clinical")],
        ["eval.py", "--run", str(place.root)],
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=repository_root, capture_output=True, text=True
        )
        assert done.returncode == CODE_WRONG_INPUT
        check_line(done.stdout, done.stderr, arguments[0], place)
