"""Checkpoints in and out: bit for bit, readable by transformers, and refused when they are bad."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import model.files
from model.batch import TokenBatch
from model.checkpoint import (
    check_checkpoint,
    load_causal_lm,
    load_classifier,
    save_model,
    stored_dtype,
)
from model.files import new_folder, write_json, write_safetensors
from model.heads import CausalLM, SequenceClassifier
from tests.model.oracle import CONFIGS, make_causal_lm, make_config, randomise

INDEX = "model.safetensors.index.json"
IDS = torch.arange(40) * 7 % 97


def make_classifier(num_labels: int) -> SequenceClassifier:
    classifier = SequenceClassifier(make_config(), num_labels)
    randomise(classifier, 0)
    return classifier


# Configurations whose files go to transformers and come from it.
SHARED = (
    *("grouped-query", "tied", "mlp-bias", "llama3-rope", "wide-heads"),
    *("mistral-window", "mixtral", "mixtral-window"),
)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["grouped-query", "tied", "attention-bias", "mixtral"])
def test_saved_and_loaded_is_the_same_bits(
    name: str, dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path
) -> None:
    saved = make_causal_lm(CONFIGS[name]).to(dtype)
    save_model(saved, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    loaded = load_causal_lm(tmp_path / "model", dtype=dtype)
    assert_same_weights(loaded, saved)
    assert loaded.config == saved.config
    batch = TokenBatch.from_arrays(IDS, [0, 13, 40])
    assert torch.equal(loaded.logits(batch), saved.logits(batch))
    assert all(parameter.requires_grad for parameter in loaded.parameters())

    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    if max_shard_bytes == 1 << 30:
        assert [shard.name for shard in shards] == ["model.safetensors"]
        assert not (tmp_path / "model" / INDEX).exists()
    else:
        sizes = [[tensor.nbytes for tensor in load_file(shard).values()] for shard in shards]
        assert len(shards) > 1
        assert all(sum(size) <= max_shard_bytes or len(size) == 1 for size in sizes)
        index = json.loads((tmp_path / "model" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize("name", SHARED)
def test_transformers_loads_what_is_saved(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    ours = make_causal_lm(CONFIGS[name]).float()
    save_model(ours, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info.values())
    expected = theirs(IDS[None]).logits[0]
    found = ours.logits(TokenBatch.from_arrays(IDS, [0, 40]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("stacks_experts", [False, True])
def test_what_transformers_saves_is_loaded(name: str, stacks_experts: bool, tmp_path: Path) -> None:
    ours = make_causal_lm(CONFIGS[name]).float()
    save_model(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(
        tmp_path / "theirs", max_shard_size="20KB", save_original_format=not stacks_experts
    )
    assert (tmp_path / "theirs" / INDEX).exists()
    assert_same_weights(load_causal_lm(tmp_path / "theirs"), ours)
    check_checkpoint(tmp_path / "theirs")
    assert stored_dtype(tmp_path / "theirs") == torch.float32


GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), r"lacks .*: model.layers.1.block_sparse_moe.experts.0.w2.weight"),
        (lambda t: t.update({GATE_UP: t[GATE_UP][:3].clone()}), "lacks .*experts.3.w1.weight"),
        (lambda t: t.update({DOWN: t[DOWN].repeat(2, 1, 1)}), "rules out: .*experts.4.w2.weight"),
        (
            lambda t: t.update({GATE_UP: t[GATE_UP][:, 1:].clone()}),
            r"experts.0.w1.weight has the shape \[55, 32\]; .* needs \[56, 32\]",
        ),
        (lambda t: t.update({DOWN: torch.ones(4, 32)}), "lacks .*experts.0.w2.weight"),
        (lambda t: t.update({DOWN: torch.ones(10**6, 0, 56)}), "lacks .*experts.0.w2.weight"),
        (lambda t: t[DOWN][2].fill_(float("nan")), "down_proj holds a value that is not finite"),
        (
            lambda t: t.update({"model.layers.1.block_sparse_moe.gate.weight": torch.ones(4, 32)}),
            "is the same tensor",
        ),
    ],
)
def test_stacks_of_experts_that_do_not_match_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path
) -> None:
    ours = make_causal_lm(CONFIGS["mixtral"]).float()
    save_model(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    change_weights(tmp_path / "theirs", change)
    with pytest.raises(ValueError, match=message):
        load_causal_lm(tmp_path / "theirs")


def test_a_classifier_goes_to_transformers_and_back(tmp_path: Path) -> None:
    ours = make_classifier(3)
    save_model(ours, tmp_path / "model", label_names=["home", "ward", "ICU"])
    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path / "model")
    assert theirs.config.id2label == {0: "home", 1: "ward", 2: "ICU"}
    scores = ours.scores(TokenBatch.from_arrays(IDS[1:], [0, 39]))
    torch.testing.assert_close(scores, theirs(IDS[None, 1:]).logits, rtol=1e-4, atol=1e-4)
    assert_same_weights(load_classifier(tmp_path / "model", 3), ours)
    with pytest.raises(ValueError, match=r"score.weight has the shape \[3, 32\]"):
        load_classifier(tmp_path / "model", 2)


def test_a_classifier_without_label_names_keeps_its_size(tmp_path: Path) -> None:
    save_model(make_classifier(5), tmp_path / "model")
    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path / "model")
    assert theirs.score.weight.shape == (5, 32)


def test_a_language_model_becomes_a_classifier_with_a_seeded_head(tmp_path: Path) -> None:
    base = make_causal_lm(make_config()).float()
    save_model(base, tmp_path / "model")
    first = load_classifier(tmp_path / "model", 2, dtype=torch.bfloat16, seed=1)
    same = load_classifier(tmp_path / "model", 2, dtype=torch.bfloat16, seed=1)
    other = load_classifier(tmp_path / "model", 2, seed=2)
    assert_same_weights(first, same)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.dtype == torch.float32
    assert first.model.norm.weight.dtype == torch.bfloat16
    assert_same_weights(first.model, base.model.to(torch.bfloat16))
    assert 0.5 < float(first.score.weight.detach().std()) / base.config.initializer_range < 1.5


def test_the_real_checkpoint_in_three_shards_is_the_single_file(real_data: Path) -> None:
    single = load_causal_lm(real_data / "stories260k")
    assert_same_weights(load_causal_lm(real_data / "stories260k-sharded"), single)
    theirs = LlamaForCausalLM.from_pretrained(real_data / "stories260k")
    ours, expected = single.state_dict(), theirs.state_dict()
    assert ours.keys() | {"lm_head.weight"} == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


# --- files that carry more than the model -------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint in several shards."""
    save_model(make_causal_lm(make_config()).float(), tmp_path / "model", max_shard_bytes=20_000)
    return tmp_path / "model"


@pytest.fixture
def tied_folder(tmp_path: Path) -> Path:
    """A sound checkpoint with a tied head, in one file."""
    config = make_config(tie_word_embeddings=True)
    save_model(make_causal_lm(config).float(), tmp_path / "tied")
    return tmp_path / "tied"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_rope_frequencies_of_older_files_are_passed_over(tied_folder: Path) -> None:
    before = load_causal_lm(tied_folder)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_weights(tied_folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert_same_weights(load_causal_lm(tied_folder), before)


def test_a_tied_head_may_be_stored_twice_if_it_is_the_same(tied_folder: Path) -> None:
    before = load_causal_lm(tied_folder)
    embedding = before.head_weight.detach()
    change_weights(tied_folder, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert_same_weights(load_causal_lm(tied_folder), before)
    change_weights(tied_folder, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight and it differs .* config.json ties"):
        load_causal_lm(tied_folder)


# --- bad checkpoints ----------------------------------------------------------------------------


def test_missing_files_are_refused(folder: Path) -> None:
    (shard := folder / sorted(os.listdir(folder))[-2]).unlink()
    with pytest.raises(ValueError, match=f"{shard.name} does not exist"):
        load_causal_lm(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor .*index.json"):
        load_causal_lm(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_refused(tied_folder: Path, keep: int) -> None:
    path = tied_folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:keep])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_causal_lm(tied_folder)


def test_other_formats_under_this_name_are_refused(tied_folder: Path) -> None:
    path = tied_folder / "model.safetensors"
    path.unlink()
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_causal_lm(tied_folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "", 3, None],
)
def test_shard_names_that_leave_the_folder_are_refused(folder: Path, name: Any) -> None:
    change_json(folder / INDEX, lambda raw: raw["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(ValueError, match="only plain file names are followed"):
        load_causal_lm(folder)


def test_shards_of_another_suffix_are_refused(folder: Path) -> None:
    change_json(folder / INDEX, lambda raw: raw["weight_map"].update({"lm_head.weight": "a.bin"}))
    with pytest.raises(ValueError, match=r"only .safetensors files are read"):
        load_causal_lm(folder)


def test_links_out_of_the_folder_are_refused(tied_folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.move(tied_folder / "model.safetensors", outside)
    (tied_folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load_causal_lm(tied_folder)


@pytest.mark.parametrize("raw", [[], {}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_refused(folder: Path, raw: Any) -> None:
    (folder / INDEX).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="has no weight_map"):
        load_causal_lm(folder)


def test_an_index_that_its_shards_contradict_is_refused(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.safetensors"))

    def swap(raw: dict[str, Any]) -> None:
        raw["weight_map"]["lm_head.weight"] = names[0]

    change_json(folder / INDEX, swap)
    with pytest.raises(ValueError, match=r"does not hold the tensors .*: lm_head.weight"):
        load_causal_lm(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    both = load_file(first) | load_file(second)
    second.unlink()
    save_file(both, second)
    with pytest.raises(ValueError, match="does not hold the tensors that"):
        load_causal_lm(folder)


def test_two_sets_of_weights_in_a_folder_are_refused(folder: Path, tied_folder: Path) -> None:
    shutil.copy(tied_folder / "model.safetensors", folder)
    with pytest.raises(ValueError, match="remove the stale one"):
        load_causal_lm(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"lacks tensors that its config.json asks for: model.norm.weight$",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "mlp" in name],
            r"gate_proj.weight, .* and 3 more",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
            r"rules out: model.layers.2.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"model.norm.weight has the shape \[33\]; .* needs \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model.norm.weight is stored as I8; read are F64, F32, F16, BF16",
        ),
    ],
)
def test_weights_that_do_not_match_the_config_are_refused(
    tied_folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    change_weights(tied_folder, change)
    for load in (load_causal_lm, lambda folder: load_classifier(folder, 2)):
        with pytest.raises(ValueError, match=message):
            load(tied_folder)


def test_a_config_of_terabytes_is_refused_before_memory_is_asked_for(tied_folder: Path) -> None:
    huge = {"hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_attention_heads": 1 << 10}
    change_json(tied_folder / "config.json", lambda raw: raw.update(huge, head_dim=1 << 10))
    with pytest.raises(ValueError, match=r"has the shape .* needs"):
        load_causal_lm(tied_folder)


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    save_model(make_classifier(2), tmp_path / "model")
    with pytest.raises(ValueError, match=r"lacks tensors .*: lm_head.weight"):
        load_causal_lm(tmp_path / "model")


# --- writing ------------------------------------------------------------------------------------


def test_files_are_for_the_owner_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        write_json(folder / "a.json", {})
        write_safetensors(folder / "a.safetensors", {"a": torch.ones(2, 3).T})
    finally:
        os.umask(before)
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_adapters_are_not_dropped_in_silence(tmp_path: Path) -> None:
    ours = CausalLM(make_config())
    ours.model.layers[1].mlp.up_proj.adapters["clinical"] = nn.Identity()
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj carries the adapter 'clinical'"):
        save_model(ours, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_in_use_is_not_written_over(folder: Path) -> None:
    with pytest.raises(ValueError, match="already exists; remove it or choose another"):
        save_model(CausalLM(make_config()), folder)
    empty = folder / "empty"
    empty.mkdir()
    save_model(CausalLM(make_config()), empty)
    assert (empty / "config.json").exists()


@pytest.mark.parametrize("fault", ["save_file", "write_config"])
def test_a_failed_save_leaves_nothing(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    module = "model.files" if fault == "save_file" else "model.checkpoint"
    monkeypatch.setattr(f"{module}.{fault}", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(CausalLM(make_config()), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})

    def fail_half_way(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(model.files, "sync", fail_half_way)
    with pytest.raises(OSError, match="Input/output error"):
        write_safetensors(path, {"a": torch.zeros(2)})
    assert load_file(path)["a"].tolist() == [1.0, 1.0]
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".a.json.partial").write_text("half")
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").write_text("half")
    write_json(tmp_path / "a.json", [1])
    with new_folder(tmp_path / "model") as aside:
        write_json(aside / "b.json", [2])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "b.json", "model"]


def test_a_file_can_be_written_over_while_its_tensors_are_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.arange(1000.0)})
    with model.files.open_safetensors(path) as file:
        tensor = file.get_tensor("a")
        write_safetensors(path, {"a": tensor})
        assert torch.equal(tensor, torch.arange(1000.0))
    assert torch.equal(load_file(path)["a"], torch.arange(1000.0))
