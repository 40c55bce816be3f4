"""The LLaMA decoder (Touvron et al., arXiv 2302.13971): tokens in, one hidden row per token out.

Letters: M tokens of the stream, D width, N query heads, G key-value heads, H head width, F
feed-forward width. Parameters carry the names of Hugging Face checkpoints (`embed_tokens`,
`layers.0.self_attn.q_proj`, ...), and RoPE is half-split, so a checkpoint is read and written as
it is. The invariant: a row depends on its own segment up to itself and on nothing else in the
batch, neither the neighbours nor the packing.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from model.attention import attend
from model.batch import Chosen, TokenBatch
from model.cache import KVCache
from model.config import DecoderConfig, LinearScaling, Llama3Scaling
from model.linear import Linear, linear_group

Rope = tuple[Tensor, Tensor]  # cos and sin, each [M, H / 2]


def rope_tables(config: DecoderConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """cos and sin of each position's angles: position * theta^(-2i / H), i = 0 .. H / 2 - 1.

    Angles are float32 whatever `dtype` is, as checkpoints were trained, and float64 only for
    float64: rounding an angle of thousands of radians to bfloat16 would lose the position.

    Args:
        positions: [M] int64.

    Returns:
        Two [M, H / 2] tensors of `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, config.head_dim, 2, dtype=wide, device=positions.device)
    frequencies = 1.0 / config.rope_theta ** (steps / config.head_dim)
    if isinstance(config.rope_scaling, LinearScaling):
        frequencies = frequencies / config.rope_scaling.factor
    elif isinstance(config.rope_scaling, Llama3Scaling):
        frequencies = _llama3_frequencies(frequencies, config.rope_scaling)
    angles = positions[:, None].to(wide) * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend linearly between."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    ramp = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / ramp).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


class RMSNorm(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [M, D] -> [M, D]."""
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention: G of N key-value heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, query_width, bias=bias)
        self.k_proj = Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = Linear(query_width, config.hidden_size, bias=bias)

    def forward(
        self,
        x_MD: Tensor,
        batch: TokenBatch,
        rope: Rope,
        dropout_keys: Tensor | None,
        cache: KVCache | None,
        chosen: Chosen | None,
    ) -> Tensor:
        if chosen is not None:
            return self._of_chosen(x_MD, batch, rope, dropout_keys, chosen)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        flat = linear_group(projections, x_MD, dropout_keys)
        q_MNH, k_MGH, v_MGH = (x.unflatten(1, (-1, self.head_dim)) for x in flat)
        q_MNH, k_MGH = kernels.rope(q_MNH, k_MGH, *rope)
        if cache is None:
            o_MNH = attend(q_MNH, k_MGH, v_MGH, batch.segments)
        else:
            o_MNH = cache.attend(self.layer, q_MNH, k_MGH, v_MGH, batch)
        return self.o_proj(o_MNH.flatten(1), dropout_keys)

    def _of_chosen(
        self,
        x_MD: Tensor,
        batch: TokenBatch,
        rope: Rope,
        dropout_keys: Tensor | None,
        chosen: Chosen,
    ) -> Tensor:
        """The rows [n, D] of the segments' last tokens: their queries, and keys of all tokens."""
        rows = chosen.rows
        keys_of_rows = None if dropout_keys is None else dropout_keys[rows]
        flat = linear_group((self.k_proj, self.v_proj), x_MD, dropout_keys)
        k_MGH, v_MGH = (x.unflatten(1, (-1, self.head_dim)) for x in flat)
        q_nNH = self.q_proj(x_MD[rows], keys_of_rows).unflatten(1, (-1, self.head_dim))
        # Queries and keys are of different tokens, so each is rotated beside none of the other.
        k_MGH = kernels.rope(k_MGH, k_MGH[:, :0], *rope)[0]
        q_nNH = kernels.rope(q_nNH, q_nNH[:, :0], *(angles[rows] for angles in rope))[0]
        o_nNH = attend(q_nNH, k_MGH, v_MGH, batch.segments, queries=chosen.segments)
        return self.o_proj(o_nNH.flatten(1), keys_of_rows)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x_MD: Tensor, dropout_keys: Tensor | None) -> Tensor:
        gate_MF, up_MF = linear_group((self.gate_proj, self.up_proj), x_MD, dropout_keys)
        return self.down_proj(kernels.swiglu(gate_MF, up_MF), dropout_keys)


class Block(nn.Module):
    """One layer, normalised before each half: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x_MD: Tensor,
        batch: TokenBatch,
        rope: Rope,
        dropout_keys: Tensor | None,
        cache: KVCache | None,
        chosen: Chosen | None = None,
    ) -> Tensor:
        """x_MD: [M, D] -> [M, D], or [n, D] of the chosen tokens alone."""
        normed_MD = self.input_layernorm(x_MD)
        attended = self.self_attn(normed_MD, batch, rope, dropout_keys, cache, chosen)
        if chosen is not None:
            x_MD = x_MD[chosen.rows]
            dropout_keys = None if dropout_keys is None else dropout_keys[chosen.rows]
        x_MD = x_MD + attended
        return x_MD + self.mlp(self.post_attention_layernorm(x_MD), dropout_keys)


class Decoder(nn.Module):
    """Embedding, blocks and the last norm; heads stand on top of it (`model.heads`)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    @property
    def word_embedding(self) -> nn.Embedding:
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def forward(
        self,
        batch: TokenBatch,
        *,
        dropout_seed: int | None = None,
        checkpoint_blocks: bool = False,
        compute_dtype: torch.dtype | None = None,
        cache: KVCache | None = None,
        pool: bool = False,
    ) -> Tensor:
        """Hidden rows [M, D] after the last norm, in `compute_dtype`; with `pool` [n, D].

        Args:
            dropout_seed: switches the adapters' dropout on; one number per optimiser step.
            checkpoint_blocks: keep only each block's input for the backward pass and compute the
                rest again (Chen et al., arXiv 1604.06174). Same numbers, less memory.
            compute_dtype: of all activations; weights are cast to it where they are used. Default:
                that of the embedding.
            cache: earlier tokens of the same sequences; the batch's tokens are added to it.
            pool: of each segment the last token's row alone. The last block then computes no other
                query, output or MLP row: the same numbers for less.
        """
        assert cache is None or not (checkpoint_blocks or pool)
        positions = batch.positions if cache is None else cache.extend(batch)
        x_MD = F.embedding(batch.input_ids, self.embed_tokens.weight)
        if compute_dtype is not None:
            x_MD = x_MD.to(compute_dtype)
        rope = rope_tables(self.config, positions, x_MD.dtype)
        dropout_keys = None
        if dropout_seed is not None:
            dropout_keys = kernels.row_keys(dropout_seed, batch.sample_ids, positions)
        for i, block in enumerate(self.layers, start=1):
            chosen = batch.segments.ends() if pool and i == len(self.layers) else None
            if checkpoint_blocks:
                # The non-reentrant form: the older one gives adapters no gradient when the
                # embedding is frozen. No generator is restored, for dropout draws from keys.
                x_MD = checkpoint(
                    block,
                    x_MD,
                    batch,
                    rope,
                    dropout_keys,
                    None,
                    chosen,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_MD = block(x_MD, batch, rope, dropout_keys, cache, chosen)
        return self.norm(x_MD)


def init_weights(model: nn.Module, std: float, seed: int) -> None:
    """Fresh weights for a model on the CPU: normal with `std`, biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, Linear | nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std, generator=generator)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
