"""transformers' models with the weights of one of ours, and how far two tensors differ.

transformers computes norms and RoPE's angles in float32 whatever the dtype. `float64_twin` lifts
both, so that it is a truth to measure against; the angles come from an own formula in Python
floats, written after Meta's published code.
"""

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from model.config import DecoderConfig, LinearScaling, Llama3Scaling, write_config
from model.decoder import RMSNorm
from model.heads import CausalLM, SequenceClassifier


def make_config(**changes: Any) -> DecoderConfig:
    """Grouped queries, a head of its own, no biases; `changes` replace fields."""
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": 0,
    }
    return DecoderConfig(**fields | changes)


LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
)

# Every feature of the decoder that changes a number, alone.
CONFIGS = {
    "multi-head": make_config(num_key_value_heads=4),
    "grouped-query": make_config(),
    "multi-query": make_config(num_key_value_heads=1),
    "tied": make_config(tie_word_embeddings=True),
    "attention-bias": make_config(attention_bias=True),
    "mlp-bias": make_config(mlp_bias=True),
    "llama3-rope": make_config(rope_theta=5000.0, rope_scaling=LLAMA3),
    "linear-rope": make_config(rope_scaling=LinearScaling(factor=4.0)),
    "wide-heads": make_config(head_dim=12),
    "one-layer-odd-width": make_config(hidden_size=36, intermediate_size=41, num_hidden_layers=1),
    "mistral": make_config(model_type="mistral"),
    "mistral-window": make_config(model_type="mistral", sliding_window=9),
    "mistral-window-of-two": make_config(model_type="mistral", sliding_window=2),
    "mixtral": make_config(
        model_type="mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        rope_theta=1e6,
    ),
    "mixtral-window": make_config(
        model_type="mixtral",
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=16,
    ),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Weights large enough that every part of the network matters."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
            if id(parameter) in norms:
                parameter.add_(1.0)


def make_causal_lm(config: DecoderConfig, seed: int = 0) -> CausalLM:
    model = CausalLM(config).double()
    randomise(model, seed)
    return model


def hugging_face_config(config: DecoderConfig, num_labels: int | None = None) -> PreTrainedConfig:
    """The config as transformers reads it from our file."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"LABEL_{i}" for i in range(num_labels or 0)]
        write_config(config, Path(folder), label_names=names)
        raw = json.loads((Path(folder) / "config.json").read_text())
    return CONFIG_MAPPING[raw.pop("model_type")](**raw)


# Its plain loop over experts, which has float64; without effect on a model without experts.
_EXPERTS = {"experts_implementation": "eager"}


def hugging_face_twin(ours: CausalLM | SequenceClassifier) -> PreTrainedModel:
    """transformers' model with the same weights in the same dtype."""
    state = fused(ours.state_dict())
    if isinstance(ours, SequenceClassifier):
        config = hugging_face_config(ours.config, ours.score.out_features)
        twin = AutoModelForSequenceClassification.from_config(config, **_EXPERTS)
    else:
        twin = AutoModelForCausalLM.from_config(hugging_face_config(ours.config), **_EXPERTS)
        state["lm_head.weight"] = ours.head_weight.detach()
    twin.to(ours.model.embed_tokens.weight.dtype)
    twin.load_state_dict(state)
    return twin.eval()


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours under the names that transformers 5 has in memory: experts stacked, w1 over w3."""
    out, experts = {}, defaultdict(dict)
    for name, tensor in tensors.items():
        block, is_sparse, rest = name.replace("block_sparse_moe.", "mlp.").partition(".experts.")
        if is_sparse:
            number, layer, _ = rest.split(".")
            experts[block][int(number), layer] = tensor
        else:
            out[block] = tensor
    for block, of in experts.items():
        count = 1 + max(number for number, _ in of)
        pairs = [torch.cat((of[i, "w1"], of[i, "w3"])) for i in range(count)]
        out[f"{block}.experts.gate_up_proj"] = torch.stack(pairs)
        out[f"{block}.experts.down_proj"] = torch.stack([of[i, "w2"] for i in range(count)])
    return out


def float64_twin(ours: CausalLM | SequenceClassifier) -> PreTrainedModel:
    """`hugging_face_twin` of a float64 model, with nothing in it rounded to float32."""
    twin = hugging_face_twin(ours)
    frequencies = torch.tensor(rope_frequencies(ours.config), dtype=torch.float64)
    for module in twin.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            module.inv_freq = frequencies
            module.forward = MethodType(_rotary, module)
        elif kind.endswith("TopKRouter"):
            module.forward = MethodType(_router, module)
    return twin


def _router(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = x.flatten(0, -2) @ self.weight.T
    chosen = logits.topk(self.top_k).indices
    weights = logits.gather(-1, chosen).softmax(-1)  # the same as both softmaxes of transformers
    return logits, weights, chosen


def _norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    half = position_ids[..., None].double() * self.inv_freq
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin()


def rope_frequencies(config: DecoderConfig) -> list[float]:
    frequencies = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        scaling = config.rope_scaling
        if isinstance(scaling, LinearScaling):
            frequency /= scaling.factor
        elif isinstance(scaling, Llama3Scaling):
            wavelength = 2 * math.pi / frequency
            original = scaling.original_max_position_embeddings
            if wavelength > original / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength > original / scaling.high_freq_factor:
                smooth = (original / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in the Euclidean norm, in float64."""
    found, truth = found.detach().double(), truth.detach().double()
    return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
