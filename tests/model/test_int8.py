"""Linear layers held as int8: loading, memory, files, and what it costs in perplexity."""

import csv
import itertools
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.general_text import form, glossary, health_leaflet, story
from data.tokenizer import load_tokenizer
from kernels import dequantise, quantise_rows
from model.batch import TokenBatch
from model.checkpoint import (
    check_checkpoint,
    is_stored_int8,
    load_causal_lm,
    load_classifier,
    save_model,
    stored_dtype,
)
from model.config import DecoderConfig
from model.decoder import init_weights
from model.heads import CausalLM
from model.linear import Int8Compute, Linear
from tests.conftest import ROOT

EMBEDDED = ROOT / "data" / "embedded"
SHAPE = DecoderConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_ids=(2,),
)


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "floating"
    model = CausalLM(SHAPE)
    init_weights(model, 0.1, seed=0)
    save_model(model, folder, max_shard_bytes=40_000)  # scales may lie in another file
    return folder


def test_layers_are_quantised_and_nothing_else(floating: Path) -> None:
    float_model, model = load_causal_lm(floating), load_causal_lm(floating, int8="bf16")
    for (name, a), b in zip(float_model.named_modules(), model.modules(), strict=True):
        if not isinstance(a, Linear):
            continue
        assert isinstance(b, Linear) and b.weight_scale is not None
        q, scale = quantise_rows(a.weight.detach())
        assert torch.equal(b.weight, q) and torch.equal(b.weight_scale, scale), name
        assert not b.weight.requires_grad
    assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.float32
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, Linear))
    assert linear * 4 == sum(
        m.weight.nbytes for m in float_model.modules() if isinstance(m, Linear)
    )


def test_a_quantised_checkpoint_is_read_as_either(floating: Path, tmp_path: Path) -> None:
    model = load_causal_lm(floating, int8="bf16")
    save_model(model, tmp_path / "int8", max_shard_bytes=20_000)
    assert is_stored_int8(tmp_path / "int8") and not is_stored_int8(floating)
    assert stored_dtype(tmp_path / "int8") == torch.float32
    check_checkpoint(tmp_path / "int8")
    again = load_causal_lm(tmp_path / "int8", int8="bf16")
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    as_float = load_causal_lm(tmp_path / "int8")
    for layer, dense in zip(model.modules(), as_float.modules(), strict=True):
        if isinstance(layer, Linear):
            assert layer.weight_scale is not None
            truth = dequantise(layer.weight, layer.weight_scale, torch.float32)
            assert torch.equal(dense.weight, truth) and dense.weight_scale is None
    classifier = load_classifier(tmp_path / "int8", 3, int8="int8")
    assert classifier.model.layers[0].self_attn.q_proj.is_int8_math


@pytest.mark.parametrize(
    ("change", "said"),
    {
        "no scale": (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "beside a weight"),
        "long scale": (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(81)}),
            "has the shape",
        ),
        "floating weight": (
            lambda t: t.update(
                {
                    "model.layers.0.mlp.up_proj.weight": t[
                        "model.layers.0.mlp.up_proj.weight"
                    ].float()
                }
            ),
            "read are I8",
        ),
        "NaN scale": (
            lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill_(math.nan),
            "not finite",
        ),
        "scale of the norm": (
            lambda t: t.update({"model.norm.weight_scale": torch.ones(48)}),
            "rules out",
        ),
    }.values(),
)
def test_bad_quantised_files_are_refused(
    change: object, said: str, floating: Path, tmp_path: Path
) -> None:
    save_model(load_causal_lm(floating, int8="bf16"), tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)
    for int8 in (None, "bf16"):
        with pytest.raises(ValueError, match=said):
            load_causal_lm(tmp_path / "bad", int8=int8)


LOAD = """
import resource, sys
from pathlib import Path
import torch
from model.checkpoint import load_causal_lm
torch.set_num_threads(1)
folder, allowed, int8, small = sys.argv[1:]
load_causal_lm(Path(small), int8="bf16")  # what the libraries themselves take
held = next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]
limit = int(held) * 1024 + int(allowed)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
load_causal_lm(Path(folder), int8=int8 or None)
"""


def test_loading_needs_the_int8_model_and_one_tensor(tmp_path: Path) -> None:
    """A process that may only have so much memory loads it as int8, and cannot as float32."""
    shape = DecoderConfig(
        **{
            **{name: getattr(SHAPE, name) for name in SHAPE.__dataclass_fields__},
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 4,
            "head_dim": 64,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        }
    )
    model = CausalLM(shape)
    init_weights(model, 0.02, seed=0)
    save_model(model.bfloat16(), tmp_path / "base")
    layers = [m.weight.numel() for m in model.modules() if isinstance(m, Linear)]
    rest = 4 * (sum(p.numel() for p in model.parameters()) - sum(layers))
    # One tensor as stored and as float32 rows, and 8 MiB of what an allocator leaves over.
    allowed = sum(layers) + rest + 2 * max(layers) + (8 << 20)
    assert allowed < 0.5 * 4 * sum(layers)

    def load(int8: str) -> int:
        command = [
            sys.executable,
            "-c",
            LOAD,
            str(tmp_path / "base"),
            str(allowed),
            int8,
            str(EMBEDDED),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stderr[-300:])
        return done.returncode

    assert load("bf16") == 0
    assert load("") != 0


def perplexity(folder: Path, texts: Sequence[str], int8: Int8Compute | None) -> float:
    """Of whole texts, cut at 512 tokens, all of them in one stream a dozen at a time."""
    model, tokenizer = load_causal_lm(folder, int8=int8), load_tokenizer(folder)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(texts), 12):
            pieces = [
                [tokenizer.bos_id, *tokenizer.encode(text)][:512]
                for text in texts[start : start + 12]
            ]
            offsets = [0]
            for piece in pieces:
                offsets.append(offsets[-1] + len(piece))
            batch = TokenBatch.from_arrays(list(itertools.chain(*pieces)), offsets)
            loss = model(batch, batch.input_ids)
            total, count = total + float(loss.loss_sum), count + int(loss.denominator)
    return math.exp(total / count)


def assert_perplexity_holds(folder: Path, texts: Sequence[str]) -> None:
    before = perplexity(folder, texts, None)
    for int8, allowed in (("bf16", 0.0025), ("int8", 0.005)):
        after = perplexity(folder, texts, int8)  # type: ignore[arg-type]
        print(f"{folder.name} {int8}: {before:.4f} -> {after:.4f} ({after / before - 1:+.4%})")
        assert abs(after / before - 1) <= allowed


def test_the_embedded_base_keeps_its_perplexity() -> None:
    """On the kind of text that it was trained on."""
    rng = random.Random(11)
    texts = [draw(rng) for draw in (story, health_leaflet, glossary, form) for _ in range(12)]
    assert_perplexity_holds(EMBEDDED, texts)


def test_a_real_llama_keeps_its_perplexity_on_real_notes(real_data: Path) -> None:
    with open(real_data / "notes" / "medical_notes_500.csv", newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)][::10]
    assert_perplexity_holds(real_data / "stories260k", texts)
