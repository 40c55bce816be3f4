"""Presets against the published files and numbers of parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import read_config
from model.heads import CausalLM
from model.presets import PRESETS

# Published, or counted from the published tensors' shapes.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
}
COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
MISTRAL = COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
}
LLAMA_3_2 = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
# The config.json files of the releases, as far as they decide the computation.
FILES: dict[str, dict[str, Any]] = {
    "mistral-7b-v0.1": MISTRAL
    | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}
    | {"transformers_version": "4.34.0.dev0"},
    "mistral-7b-v0.2": MISTRAL
    | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32000},
    "mistral-7b-v0.3": MISTRAL
    | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "mixtral-8x7b": MISTRAL
    | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    | {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False}
    | {"rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None}
    | {"vocab_size": 32000, "transformers_version": "4.36.0.dev0"},
    "llama-3.2-1b": LLAMA_3_2 | {"head_dim": 64, "hidden_size": 2048, "num_hidden_layers": 16},
    "llama-3.2-3b": LLAMA_3_2
    | {"head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28},
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = CausalLM(PRESETS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_two_of_eight_experts_are_active() -> None:
    config = PRESETS["mixtral-8x7b"]
    expert = 3 * config.hidden_size * config.intermediate_size
    idle = config.num_hidden_layers * (config.num_local_experts - config.num_experts_per_tok)
    assert PARAMETERS["mixtral-8x7b"] - idle * expert == 12_879_925_248


@pytest.mark.parametrize("name", FILES)
def test_the_published_file_is_read_as_the_preset(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FILES[name]))
    assert read_config(tmp_path) == PRESETS[name]
