"""Tiny LLaMAs of transformers and their twins here, for tests against transformers + peft.

transformers computes norms, angles and the loss in float32 even in a float64 model. `to_float64`
replaces the first two by torch's own, so that float64 is a truth that both sides are held to; the
tests take the loss from the logits.
"""

from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from model.batch import TokenBatch
from model.config import DecoderConfig
from model.heads import CausalLM, SequenceClassifier

NUM_LABELS = 3


def tiny_config(*, kv_heads: int = 2, tied: bool = False) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )


def make_oracle(
    config: DecoderConfig, *, classifier: bool = False, seed: int = 0
) -> transformers.PreTrainedModel:
    """A float32 model of transformers with random weights."""
    torch.manual_seed(seed)
    kind = (
        transformers.LlamaForSequenceClassification if classifier else transformers.LlamaForCausalLM
    )
    return kind(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            initializer_range=0.2,  # large enough for sharp attention and large logits
            num_labels=NUM_LABELS,
            attn_implementation="sdpa",
        )
    ).eval()


def make_twin(
    config: DecoderConfig, oracle: nn.Module, *, classifier: bool = False
) -> CausalLM | SequenceClassifier:
    """The same weights in our model, frozen."""
    twin = SequenceClassifier(config, NUM_LABELS) if classifier else CausalLM(config)
    weights = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    twin.load_state_dict(weights)
    return twin.requires_grad_(False)


class _Angles(nn.Module):
    """transformers' default rotary embedding, in the dtype of its input."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        head_dim = self.config.head_dim
        steps = torch.arange(0, head_dim, 2, dtype=x.dtype) / head_dim
        angles = position_ids[..., None].to(x.dtype) / self.config.rope_theta**steps
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def to_float64(config: DecoderConfig, oracle: nn.Module) -> None:
    """Turn a model of transformers (with peft on it or not) into a float64 one throughout."""
    for parent in list(oracle.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
                norm.weight = child.weight
                setattr(parent, name, norm)
            elif type(child).__name__ == "LlamaRotaryEmbedding":
                setattr(parent, name, _Angles(config))
    oracle.double()


def make_batch(config: DecoderConfig, *lengths: int, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (sum(lengths),), generator=generator)
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return TokenBatch.from_arrays(ids, offsets)


def oracle_logits(oracle: nn.Module, batch: TokenBatch) -> Tensor:
    """Every segment on its own: [M, V] of a language model, [n, C] of a classifier."""
    outputs = [
        oracle(input_ids=ids[None], use_cache=False).logits[0]
        for ids in batch.input_ids.split(batch.segments.lengths)
    ]
    return torch.cat(outputs) if outputs[0].dim() == 2 else torch.stack(outputs)


def oracle_loss(logits_MV: Tensor, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of every token but the segments' first."""
    lengths = batch.segments.lengths
    logits = torch.cat([part[:-1] for part in logits_MV.split(lengths)])
    targets = torch.cat([part[1:] for part in batch.input_ids.split(lengths)])
    return F.cross_entropy(logits, targets)


def loss(model: CausalLM, batch: TokenBatch) -> Tensor:
    """The same of our model."""
    loss_sum, denominator, _ = model(batch, batch.input_ids)
    return loss_sum / denominator


def save_peft(oracle: peft.PeftModel, folder: Path) -> None:
    # Otherwise peft looks for the base model's vocabulary on the network.
    oracle.save_pretrained(folder, save_embedding_layers=False)
