"""config.json of transformers 4 and 5 in, one file for both out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from model.config import DecoderConfig, LinearScaling, Llama3Scaling, read_config, write_config
from model.files import MAX_JSON_BYTES
from tests.model.oracle import CONFIGS, make_config

# Llama-2-7b as transformers 4.31 wrote it.
LLAMA_2 = {
    "_name_or_path": "llama-2-7b",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
# What transformers has no default for that would be small.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
}
# The RoPE of Llama-3.1-8B, as transformers 4 wrote it and as transformers 5 does.
LLAMA_3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_ROPE_4 = {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_SCALING}
LLAMA_3_ROPE_5 = {"rope_parameters": {"rope_theta": 500000.0, **LLAMA_3_SCALING}}


def read(folder: Path, raw: Any) -> DecoderConfig:
    text = raw if isinstance(raw, str) else json.dumps(raw)
    (folder / "config.json").write_text(text)
    return read_config(folder)


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_reads_a_file_of_transformers_4(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_2) == DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_reads_the_first_llama_files(tmp_path: Path) -> None:
    """No num_key_value_heads, a length under another name, and -1 for a token that is not there."""
    raw = without(LLAMA_2, "num_key_value_heads", "max_position_embeddings", "rope_scaling")
    config = read(tmp_path, raw | {"max_sequence_length": 2048, "pad_token_id": -1})
    assert (config.num_key_value_heads, config.max_position_embeddings) == (32, 2048)
    assert (config.rope_theta, config.rope_scaling, config.pad_token_id) == (10000.0, None, None)


@pytest.mark.parametrize(
    "rope",
    [LLAMA_3_ROPE_4, LLAMA_3_ROPE_5, LLAMA_3_ROPE_4 | LLAMA_3_ROPE_5],
    ids=["4", "5", "both"],
)
def test_reads_the_rope_of_both_versions(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = read(tmp_path, without(LLAMA_2, "rope_scaling") | rope | {"eos_token_id": [7, 9]})
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert config.eos_token_ids == (7, 9)


def test_reads_the_older_word_for_the_type_of_scaling(tmp_path: Path) -> None:
    raw = LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert read(tmp_path, raw).rope_scaling == LinearScaling(factor=4.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back_and_read_by_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    write_config(config, tmp_path, dtype=torch.bfloat16, label_names=["no", "yes"])
    assert read_config(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, CONFIG_MAPPING[config.model_type])
    assert (theirs.dtype, theirs.id2label) == (torch.bfloat16, {0: "no", 1: "yes"})
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    for field in without(DecoderConfig.__dataclass_fields__, "rope_theta", "rope_scaling"):
        expected: Any = getattr(config, field)
        if field == "eos_token_ids":
            field, (expected,) = "eos_token_id", expected
        elif not hasattr(theirs, field):  # of another model_type
            assert expected == DecoderConfig.__dataclass_fields__[field].default
            continue
        assert getattr(theirs, field) == expected
    theirs.save_pretrained(tmp_path)  # the file as transformers 5 writes it
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("model_type", ["mistral", "mixtral"])
def test_absent_keys_are_what_transformers_takes_for_them(model_type: str, tmp_path: Path) -> None:
    config = read(tmp_path, {"model_type": model_type, "vocab_size": 97, **SIZES})
    theirs = AutoConfig.from_pretrained(tmp_path)
    fields = without(DecoderConfig.__dataclass_fields__, "rope_theta", "rope_scaling", "head_dim")
    for field in fields:
        if hasattr(theirs, field):
            assert getattr(config, field) == getattr(theirs, field), field
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.eos_token_ids == (theirs.eos_token_id,)
    assert config.head_dim == 8


def test_a_window_of_null_is_no_window(tmp_path: Path) -> None:
    raw = {"model_type": "mistral", "vocab_size": 97, **SIZES, "num_key_value_heads": 2}
    assert read(tmp_path, raw).sliding_window == 4096
    assert read(tmp_path, raw | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; it is a number of tokens"),
        ("mistral", {"sliding_window": "all"}, "sliding_window is 'all'; it is a whole number"),
        ("mistral", {"attention_bias": True}, "the key 'attention_bias' is unknown"),
        ("mistral", {"num_local_experts": 8}, "the key 'num_local_experts' is unknown"),
        ("mistral", {"layer_types": ["sliding_attention"]}, "the key 'layer_types' is unknown"),
        ("mixtral", {"num_local_experts": 0}, "num_experts_per_tok 2 of num_local_experts 0"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 of num_local_experts 8"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok 0 of num_local_experts 8"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts 1000000: allowed are"),
        ("mixtral", {"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1.0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"mlp_bias": True}, "the key 'mlp_bias' is unknown"),
    ],
)
def test_what_one_kind_of_decoder_does_not_honour_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {"model_type": model_type, "vocab_size": 97, **SIZES} | changes)


def test_a_llama_has_neither_window_nor_experts() -> None:
    with pytest.raises(ValueError, match="a llama has no sliding_window; found 4"):
        make_config(sliding_window=4)
    with pytest.raises(ValueError, match="a mistral has no num_local_experts; found 8"):
        make_config(model_type="mistral", num_local_experts=8)


def test_several_end_tokens_are_kept(tmp_path: Path) -> None:
    for ids in ((), (2,), (2, 5)):
        config = make_config(eos_token_ids=ids)
        write_config(config, tmp_path)
        assert read_config(tmp_path) == config


def test_switched_off_and_harmless_keys_are_passed_over(tmp_path: Path) -> None:
    harmless = {"quantization_config": None, "some_feature": False, "unsloth_version": "2025.1"}
    assert read(tmp_path, LLAMA_2 | harmless) == read(tmp_path, LLAMA_2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map asks for code"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"sliding_window": 4096}, "the key 'sliding_window' is unknown"),
        ({"_attn_implementation_internal": "a/b"}, "'_attn_implementation_internal' is unknown"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; allowed are 1 to"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it is a whole number"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0; it is a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; allowed are 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; allowed are 1 to"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"num_attention_heads": 0}, "head_dim is not given"),
        ({"num_attention_heads": 33}, "hidden_size 4096 is not a multiple"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        ({"head_dim": 33}, "head_dim is 33; RoPE rotates halves"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps is \[1\]; it is a number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*; it is a number"),
        ({"initializer_range": 2.0}, "initializer_range is 2.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"bos_token_id": 32000}, "the id 32000, outside the vocabulary of 32000"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is 'x'"),
        ({"rope_scaling": [1]}, "rope_scaling is list, not an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn'; known are default"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn"}}, "both rope_type 'linear' and"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "linear RoPE scaling is 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "unknown key 'x'"),
        ({"rope_scaling": LLAMA_3_SCALING | {"high_freq_factor": 1.0}}, "not a llama3 RoPE"),
        ({"rope_scaling": without(LLAMA_3_SCALING, "low_freq_factor")}, "low_freq_factor is miss"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "whole head"),
        (LLAMA_3_ROPE_5 | {"rope_theta": 1e4}, "rope_parameters contradicts rope_theta"),
    ],
)
def test_what_the_decoder_does_not_honour_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, LLAMA_2 | changes)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{'a': 1}", "is not valid JSON"),
        ("[1]", "does not hold a JSON object"),
        ('{"vocab_size": 5, "vocab_size": 6}', "a key occurs twice"),
        ('{"rms_norm_eps": NaN}', "the number NaN is not allowed"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_damaged_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_missing_and_oversized_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_config(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ValueError, match="67,108,865 bytes; at most"):
        read_config(tmp_path)
