"""Conversion: the bits of transformers' and Meta's files, one line for bad ones, no code run."""

import ast
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import model.convert
from model.batch import TokenBatch
from model.checkpoint import load_causal_lm, load_classifier, save_model
from model.config import DecoderConfig, Llama3Scaling, read_config
from model.convert import convert, main
from model.heads import SequenceClassifier
from tests.data.conftest import train_sentencepiece
from tests.model.oracle import CONFIGS, make_causal_lm, make_config, randomise

IDS = torch.arange(40) * 7 % 97
LAYOUTS = ["grouped-query", "multi-head", "tied"]


def hugging_face_folder(folder: Path, config: DecoderConfig, *, shards: int = 1) -> dict:
    """A folder as transformers 4 wrote them, and its tensors."""
    ours = make_causal_lm(config).float()
    save_model(ours, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    weight_map = {
        name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin"
        for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        torch.save(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Meta's order of a head's rows, one by one: pair i is rows i and i + H / 2 of the half-split.

    Written as loops, not as the inverse of what is tested.
    """
    head_dim = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + i + head_dim // 2]
    return weight[rows]


def meta_folder(
    folder: Path,
    config: DecoderConfig,
    *,
    parts: int = 1,
    dtype: torch.dtype = torch.float32,
    cut_vocabulary: bool = False,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Meta's files for a model of ours, and the tensors as Hugging Face has them."""
    ours = make_causal_lm(config).to(dtype)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    whole: dict[str, tuple[Tensor, int | None]] = {
        "tok_embeddings.weight": (
            state["model.embed_tokens.weight"],
            0 if cut_vocabulary else 1,
        ),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (ours.head_weight.detach(), 0),
        "rope.freqs": (torch.ones(config.head_dim // 2), None),
    }
    for i in range(config.num_hidden_layers):
        theirs, here = f"layers.{i}", f"model.layers.{i}"
        q, k, v, o = (state[f"{here}.self_attn.{name}_proj.weight"] for name in "qkvo")
        whole |= {
            f"{theirs}.attention.wq.weight": (interleaved(q, config.num_attention_heads), 0),
            f"{theirs}.attention.wk.weight": (interleaved(k, config.num_key_value_heads), 0),
            f"{theirs}.attention.wv.weight": (v, 0),
            f"{theirs}.attention.wo.weight": (o, 1),
            f"{theirs}.feed_forward.w1.weight": (state[f"{here}.mlp.gate_proj.weight"], 0),
            f"{theirs}.feed_forward.w2.weight": (state[f"{here}.mlp.down_proj.weight"], 1),
            f"{theirs}.feed_forward.w3.weight": (state[f"{here}.mlp.up_proj.weight"], 0),
            f"{theirs}.attention_norm.weight": (state[f"{here}.input_layernorm.weight"], None),
            f"{theirs}.ffn_norm.weight": (state[f"{here}.post_attention_layernorm.weight"], None),
        }
    folder.mkdir(parents=True)
    for part in range(parts):
        torch.save(
            {
                name: tensor if dim is None else tensor.chunk(parts, dim)[part].clone()
                for name, (tensor, dim) in whole.items()
            },
            folder / f"consolidated.{part:02}.pth",
        )
    found = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "multiple_of": 256,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        found["n_kv_heads"] = config.num_key_value_heads
    (folder / "params.json").write_text(json.dumps(found | parameters))
    return state


def assert_same_bits(folder: Path, expected: dict[str, Tensor]) -> None:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# Hugging Face layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_bin_is_converted_bit_by_bit(name: str, shards: int, tmp_path: Path) -> None:
    tensors = hugging_face_folder(tmp_path / "in", CONFIGS[name], shards=shards)
    convert(tmp_path / "in", tmp_path / "out")
    assert_same_bits(tmp_path / "out", tensors)
    assert read_config(tmp_path / "out") == CONFIGS[name]
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    logits = load_causal_lm(tmp_path / "out").logits(TokenBatch.from_arrays(IDS, [0, 40]))
    torch.testing.assert_close(logits, theirs(IDS[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_formats_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = hugging_face_folder(tmp_path / "in", make_config())
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    torch.save(tensors, tmp_path / "in" / "pytorch_model.bin")
    convert(tmp_path / "in", tmp_path / "out")
    assert_same_bits(tmp_path / "out", tensors)


@pytest.mark.parametrize("name", ["weights.pth", "model.pt", "pytorch_model.bin"])
def test_one_file_with_its_config_beside_it(name: str, tmp_path: Path) -> None:
    tensors = hugging_face_folder(tmp_path / "in", make_config())
    (tmp_path / "in" / "pytorch_model.bin").rename(tmp_path / "in" / name)
    torch.save({"lr": 1.0}, tmp_path / "in" / "training_args.bin")
    convert(tmp_path / "in" / name, tmp_path / "file")
    convert(tmp_path / "in", tmp_path / "folder")
    assert_same_bits(tmp_path / "file", tensors)
    assert_same_bits(tmp_path / "folder", tensors)


def test_what_old_files_carry_along_is_left_out(tmp_path: Path) -> None:
    """RoPE's frequencies, the shared matrix twice, tensors that share memory or have strides."""
    config = CONFIGS["tied"]
    tensors = hugging_face_folder(tmp_path / "in", config)
    embedding = tensors["model.embed_tokens.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    strided = tensors[name].t().contiguous().t()
    assert not strided.is_contiguous()
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": embedding,
        name: strided,
    }
    file = tmp_path / "in" / "pytorch_model.bin"
    torch.save(tensors | old, file, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)  # torch before 1.6
    convert(tmp_path / "in", tmp_path / "out")
    assert_same_bits(tmp_path / "out", tensors)


def test_a_classifier_keeps_its_head_and_labels(tmp_path: Path) -> None:
    ours = SequenceClassifier(make_config(), 3)
    randomise(ours, 0)
    save_model(ours, tmp_path / "in", label_names=["home", "ward", "ICU"])
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "in" / "pytorch_model.bin")
    convert(tmp_path / "in", tmp_path / "out")
    assert torch.equal(load_classifier(tmp_path / "out", 3).score.weight, ours.score.weight)
    assert (tmp_path / "out" / "config.json").read_text() == (
        tmp_path / "in" / "config.json"
    ).read_text()


def test_the_tokenizer_goes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hugging_face_folder(tmp_path / "in", make_config())
    train_sentencepiece(tmp_path / "in" / "tokenizer.model")
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "copied tokenizer.model, tokenizer_config.json" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o600}


# Meta's layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("parts", "cut_vocabulary"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metas_layout_is_converted_bit_by_bit(
    name: str, parts: int, cut_vocabulary: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    fields = {"vocab_size": 96, "intermediate_size": 56}
    config = make_config(
        tie_word_embeddings=name == "tied",
        num_key_value_heads=CONFIGS[name].num_key_value_heads,
        **fields,
    )
    options = {"parts": parts, "cut_vocabulary": cut_vocabulary, "dtype": dtype}
    state = meta_folder(tmp_path / "in", config, **options)
    convert(tmp_path / "in", tmp_path / "out", max_positions=128)
    if name == "tied" and parts > 1 and not cut_vocabulary:
        # Cut in two ways, the two matrices cannot be compared: both are written.
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        config = make_config(**fields)
    assert_same_bits(tmp_path / "out", state)
    found = read_config(tmp_path / "out")
    for field in ("hidden_size", "intermediate_size", "vocab_size", "tie_word_embeddings",
                  "num_key_value_heads", "head_dim", "rms_norm_eps", "bos_token_id"):  # fmt: skip
        assert getattr(found, field) == getattr(config, field), field
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == str(dtype).removeprefix("torch.")


def test_metas_rope_is_the_same_rotation(tmp_path: Path) -> None:
    """Scores of Meta's published formula (complex pairs) on Meta's rows, and of transformers."""
    config = make_config(num_hidden_layers=1)
    meta_folder(tmp_path / "in", config)
    convert(tmp_path / "in", tmp_path / "out")
    theirs = torch.load(tmp_path / "in" / "consolidated.00.pth", weights_only=True)
    out = load_file(tmp_path / "out" / "model.safetensors")
    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    heads, width = config.num_attention_heads, config.head_dim
    angles = torch.outer(
        torch.arange(9.0), config.rope_theta ** (-torch.arange(0, width, 2) / width)
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def metas(weight: Tensor, count: int) -> Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(9, count, -1, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    def half_split(weight: Tensor, count: int) -> Tensor:
        a, b = (x @ weight.T).view(9, count, 2, -1).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    groups = config.num_key_value_heads
    expected = torch.einsum(
        "sgd,tgd->gst",
        metas(theirs["layers.0.attention.wq.weight"], heads)[:, :groups],
        metas(theirs["layers.0.attention.wk.weight"], groups),
    )
    found = torch.einsum(
        "sgd,tgd->gst",
        half_split(out["model.layers.0.self_attn.q_proj.weight"], heads)[:, :groups],
        half_split(out["model.layers.0.self_attn.k_proj.weight"], groups),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_params_json_tells_and_what_it_does_not(tmp_path: Path) -> None:
    config = make_config()
    options = {"rope_theta": 500_000.0, "use_scaled_rope": True, "ffn_dim_multiplier": 1.3}
    meta_folder(tmp_path / "3.1", config, **options)
    said = convert(tmp_path / "3.1", tmp_path / "a")
    found = read_config(tmp_path / "a")
    assert found.rope_theta == 500_000.0
    assert found.rope_scaling == Llama3Scaling(
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    assert found.max_position_embeddings == 131_072
    assert any("a guess" in line for line in said)
    meta_folder(tmp_path / "1", config)
    convert(tmp_path / "1", tmp_path / "b")
    assert read_config(tmp_path / "b").max_position_embeddings == 2048
    said = convert(tmp_path / "1", tmp_path / "c", max_positions=4096)
    assert read_config(tmp_path / "c").max_position_embeddings == 4096
    assert not any("a guess" in line for line in said)


def test_metas_tokenizer_stands_above(tmp_path: Path) -> None:
    meta_folder(tmp_path / "llama" / "7B", make_config())
    train_sentencepiece(tmp_path / "llama" / "tokenizer.model")
    convert(tmp_path / "llama" / "7B", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").is_file()


def test_real_weights_there_and_back(real_data: Path, tmp_path: Path) -> None:
    base = real_data / "stories260k"
    tensors = load_file(base / "model.safetensors")
    source = tmp_path / "in"
    source.mkdir()
    shutil.copyfile(base / "config.json", source / "config.json")
    shutil.copyfile(base / "tokenizer.model", source / "tokenizer.model")
    torch.save(tensors, source / "pytorch_model.bin")
    convert(source, tmp_path / "out")
    assert_same_bits(tmp_path / "out", tensors)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    expected = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert torch.equal(found, expected)


# Planted faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["no permutation", "wrong cut"])
def test_the_comparison_sees_a_fault(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(num_key_value_heads=4, vocab_size=96)
    state = meta_folder(tmp_path / "in", config, parts=2)
    if fault == "no permutation":
        monkeypatch.setattr(model.convert, "_half_split", lambda weight, heads: weight)
    else:
        block = dict(model.convert._BLOCK)
        block["attention.wv"] = ("self_attn.v_proj", 1)
        monkeypatch.setattr(model.convert, "_BLOCK", block)
    with pytest.raises((AssertionError, ValueError)):
        convert(tmp_path / "in", tmp_path / "out")
        assert_same_bits(tmp_path / "out", state)


# Refusals -----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    assert main([*(str(word) for word in arguments), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("model.convert: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not out.exists()
    assert not list(out.parent.glob(".*.partial"))
    assert ".partial" not in printed.err  # the folder that the user knows is the source
    return printed.err


def test_every_load_is_of_weights_only() -> None:
    loads = [
        {ast.unparse(keyword) for keyword in node.keywords}
        for node in ast.walk(ast.parse(Path(model.convert.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(loads) == 1
    assert "weights_only=True" in loads[0]


class Hostile:
    """Runs a command where pickles are trusted."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_no_pickle_runs_code(
    name: str, is_zip: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    hugging_face_folder(tmp_path / "in", make_config())
    (tmp_path / "in" / "pytorch_model.bin").unlink()
    hostile = {"model.norm.weight": torch.ones(3), "x": Hostile(canary)}
    if is_zip:
        torch.save(hostile, tmp_path / "in" / name)
    else:
        (tmp_path / "in" / name).write_bytes(pickle.dumps(hostile))
    said = refused(capsys, tmp_path / "out", tmp_path / "in")
    assert "holds more than weights" in said
    assert not canary.exists()


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "is damaged"),
    "text": (lambda f: (f / "pytorch_model.bin").write_text("version https://git"), "is damaged"),
    "truncated": (
        lambda f: os.truncate(
            f / "pytorch_model.bin", (f / "pytorch_model.bin").stat().st_size // 2
        ),
        "is damaged",
    ),
    "a list": (lambda f: torch.save([torch.ones(2)], f / "pytorch_model.bin"), "holds list"),
    "nothing": (lambda f: torch.save({}, f / "pytorch_model.bin"), "not tensors by their names"),
    "training checkpoint": (
        lambda f: rewrite(f, lambda t: t.update(step=3)), "holds int beside tensors"
    ),
    "nested": (
        lambda f: rewrite(f, lambda t: t.update(optimizer={"a": torch.ones(1)})),
        "holds dict beside tensors",
    ),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(NORM)), "lacks tensors"),
    "unknown tensor": (
        lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "rules out: extra"
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(7)})), "has the shape [7]"
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)})),
        "is stored as I64",
    ),
    "quantised": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e5m2)})),
        "quantised weights are not read",
    ),
    "not a number": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.full((32,), torch.nan)})),
        f"{NORM} holds a value that is not finite",
    ),
    "sparse": (
        lambda f: rewrite(f, lambda t: t.update({UP: torch.eye(3).to_sparse()})),
        "is not a plain tensor",
    ),
    "a terabyte of zeros": (
        lambda f: rewrite(f, lambda t: t.update({UP: torch.zeros(1, 1).expand(1 << 20, 1 << 18)})),
        "claims more values than the file holds",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "quantised config": (
        lambda f: (f / "config.json").write_text('{"quantization_config": {"bits": 4}}'),
        "quantised",
    ),
    "Meta's names": (
        lambda f: rewrite(f, lambda t: t.update({"tok_embeddings.weight": torch.ones(1)})),
        "put params.json",
    ),
    "shard missing": (
        lambda f: (f / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": {NORM: "pytorch_model.bin", UP: "pytorch_model-2.bin"}})
        ),
        "pytorch_model-2.bin is missing",
    ),
    "shard outside": (
        lambda f: (f / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": {NORM: "../pytorch_model.bin"}})
        ),
        "only plain file names are followed",
    ),
    "tensor in two shards": (
        lambda f: (
            shutil.copy(f / "pytorch_model.bin", f / "b.bin"),
            (f / "pytorch_model.bin.index.json").write_text(
                json.dumps({"weight_map": {NORM: "pytorch_model.bin", UP: "b.bin"}})
            ),
        ),
        "which another file holds too",
    ),
    "index without map": (
        lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"), "has no weight_map"
    ),
    "two files": (
        lambda f: shutil.copy(f / "pytorch_model.bin", f / "other.bin"), "name one file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_input_ends_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face_folder(tmp_path / "in", make_config())
    damage, message = DAMAGE[name]
    damage(tmp_path / "in")
    assert message in refused(capsys, tmp_path / "out", tmp_path / "in")


def parameters(folder: Path, **changes: object) -> None:
    found = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(found | changes))


def repickle(path: Path, change: Callable[[dict], object]) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


META_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "part missing": (lambda f: (f / "consolidated.00.pth").unlink(), "lacks a part"),
    "parts disagree": (
        lambda f: repickle(f / "consolidated.01.pth", lambda t: t["norm.weight"].add_(1)),
        "the files disagree about norm.weight",
    ),
    "other tensors in a part": (
        lambda f: repickle(f / "consolidated.01.pth", lambda t: t.pop("norm.weight")),
        "holds other tensors or shapes",
    ),
    "mixture of experts": (lambda f: parameters(f, moe={"num_experts": 8}), "'moe' is unknown"),
    "layers": (lambda f: parameters(f, n_layers=3), "lacks tensors"),
    "heads": (lambda f: parameters(f, n_heads=5), "not a multiple of n_heads 5"),
    "key heads": (lambda f: parameters(f, n_kv_heads=4), "the model that config.json describes"),
    "huge": (lambda f: parameters(f, n_layers=10**9), "n_layers"),
    "a word": (lambda f: parameters(f, dim="wide"), "dim is 'wide'"),
    "nothing": (lambda f: (f / "params.json").write_text("{}"), "dim is None"),
    "no JSON": (lambda f: (f / "params.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda f: (f / "params.json").write_text("[]"), "not a JSON object"),
    "scalar": (
        lambda f: [
            repickle(path, lambda t: t.update({"norm.weight": torch.ones([])}))
            for path in f.glob("*.pth")
        ],
        "lack norm.weight",
    ),
    "unknown tensor": (
        lambda f: [
            repickle(f / f"consolidated.0{i}.pth", lambda t: t.update(vision=torch.ones(2)))
            for i in range(2)
        ],
        "'vision' is unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", META_DAMAGE)
def test_bad_meta_files_end_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta_folder(tmp_path / "in", make_config(vocab_size=96), parts=2)
    damage, message = META_DAMAGE[name]
    damage(tmp_path / "in")
    assert message in refused(capsys, tmp_path / "out", tmp_path / "in")


def test_mistyped_commands_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    hugging_face_folder(tmp_path / "in", make_config())
    assert "does not exist" in refused(capsys, out, tmp_path / "absent")
    assert "is not one of .bin" in refused(capsys, out, tmp_path / "in" / "config.json")
    assert "config.json tells it here" in refused(
        capsys, out, tmp_path / "in", "--max-positions", "9"
    )
    assert "did you mean --max-positions?" in refused(capsys, out, "x", "--max-position", "9")
    meta_folder(tmp_path / "meta", make_config(vocab_size=96), parts=2)
    assert "one of several parts" in refused(capsys, out, tmp_path / "meta" / "consolidated.00.pth")
    assert "max_position_embeddings is 0" in refused(
        capsys, out, tmp_path / "meta", "--max-positions", "0"
    )
    safe = tmp_path / "safe"
    save_model(make_causal_lm(make_config()).float(), safe)
    assert "which are read as they are" in refused(capsys, out, safe)
    assert main([str(tmp_path / "in"), "--out", str(safe)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    hugging_face_folder(tmp_path / "in", make_config())
    monkeypatch.setattr(model.convert, "copy_file", full)
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
