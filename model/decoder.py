"""The decoder of LLaMA, Mistral and Mixtral: tokens in, one hidden row per token out.

LLaMA (Touvron et al., arXiv 2302.13971); Mistral (Jiang et al., arXiv 2310.06825) lets a token see
the `sliding_window` last keys alone; Mixtral has experts in place of the MLP (`model.experts`).
Letters: M tokens of the stream, D width, N query heads, G key-value heads, H head width, F
feed-forward width. Parameters carry the names of Hugging Face checkpoints (`embed_tokens`,
`layers.0.self_attn.q_proj`, ...), and RoPE is half-split, so a checkpoint is read and written as
it is. The invariant: a row depends on its own segment up to itself and on nothing else in the
batch, neither the neighbours nor the packing.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from model.activations import Activations, RowsOf, made_again, recomputes_blocks, run_block
from model.attention import attend
from model.batch import Behind, Chosen, Segments, TokenBatch
from model.cache import KVCache
from model.config import DecoderConfig, LinearScaling, Llama3Scaling
from model.experts import SparseMLP
from model.linear import Linear, linear_group

Rope = tuple[Tensor, Tensor]  # cos and sin, each [M, H / 2]


class InputModule(Protocol):
    """What stands between the embedding and the first block: virtual tokens, noise."""

    @property
    def virtual_tokens(self) -> int:
        """How many it puts in front of each segment."""
        ...

    def __call__(
        self, x: Tensor, batch: TokenBatch, dropout_seed: int | None
    ) -> tuple[Tensor, TokenBatch]:
        """The rows [M, D] of a batch, changed, and the batch with what was put in front of it.

        dropout_seed: of this step's randomness; None in evaluation.
        """
        ...


class PrefixModule(Protocol):
    """What gives every layer keys and values to stand in front of each segment's own."""

    @property
    def prefix_tokens(self) -> int: ...

    def __call__(self) -> Tensor:
        """[P, L, 2, G, H], of each layer the keys, then the values; no position is rotated in."""
        ...


class PromptModule(Protocol):
    """What a layer's tokens attend to besides their segment, with a softmax of its own."""

    @property
    def rows(self) -> Tensor:
        """[P, D], from which the layer's own projections make keys and values."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is added to the attention's output: q [M, N, H]; k, v [P, G, H] -> [M, N, H]."""
        ...


class Prefix(NamedTuple):
    """One layer's keys and values in front of each segment: k, v [P, G, H]."""

    k: Tensor
    v: Tensor
    behind: Behind

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same before each segment of k and v [M, G, H]."""
        return self.behind.join(self.k, k), self.behind.join(self.v, v)

    @classmethod
    def of_layers(cls, modules: Sequence[PrefixModule], behind: Behind, like: Tensor) -> list[Self]:
        """The prefixes of all layers, several modules' one after the other, in `like`'s dtype."""
        rows = torch.cat([module() for module in modules]).to(like.dtype)
        return [cls(layer[:, 0], layer[:, 1], behind) for layer in rows.unbind(1)]


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

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum: all [M, D]."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def rows_of(self, x: Tensor) -> RowsOf:
        """The norm of chosen rows of x [M, D]."""
        return lambda rows: self(x[rows])


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention: G of N key-value heads.

    prompts: name -> module that is a `PromptModule`; filled by `lora.attach`.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, query_width, bias=bias)
        self.k_proj = Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = Linear(query_width, config.hidden_size, bias=bias)
        self.prompts = nn.ModuleDict()

    def forward(
        self,
        x_MD: Tensor,
        batch: TokenBatch,
        rope: Rope,
        dropout_keys: Tensor | None,
        cache: KVCache | None,
        chosen: Chosen | None,
        prefix: Prefix | None,
    ) -> Tensor:
        if chosen is not None:
            return self._of_chosen(x_MD, batch, rope, dropout_keys, chosen, prefix)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        flat = linear_group(projections, x_MD, dropout_keys)
        q_MNH, k_MGH, v_MGH = (x.unflatten(1, (-1, self.head_dim)) for x in flat)
        q_MNH, k_MGH = kernels.rope(q_MNH, k_MGH, *rope)
        queries, keys = None, batch.segments
        if prefix is not None:
            queries, keys = keys, prefix.behind.segments
            k_MGH, v_MGH = prefix.join(k_MGH, v_MGH)
        if cache is None:
            o_MNH = attend(q_MNH, k_MGH, v_MGH, keys, queries=queries, window=self.window)
        else:
            o_MNH = cache.attend(self.layer, q_MNH, k_MGH, v_MGH, keys, queries=queries)
        return self.o_proj(self._prompted(o_MNH, q_MNH).flatten(1), dropout_keys)

    def _of_chosen(
        self,
        x_MD: Tensor,
        batch: TokenBatch,
        rope: Rope,
        dropout_keys: Tensor | None,
        chosen: Chosen,
        prefix: Prefix | None,
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
        keys = batch.segments
        if prefix is not None:
            keys = prefix.behind.segments
            k_MGH, v_MGH = prefix.join(k_MGH, v_MGH)
        o_nNH = attend(q_nNH, k_MGH, v_MGH, keys, queries=chosen.segments, window=self.window)
        return self.o_proj(self._prompted(o_nNH, q_nNH).flatten(1), keys_of_rows)

    def _prompted(self, o_MNH: Tensor, q_MNH: Tensor) -> Tensor:
        """The output and what each prompt adds to it."""
        for prompt in cast(Sequence[PromptModule], self.prompts.values()):
            # Without dropout: the rows belong to no sample.
            flat = linear_group((self.k_proj, self.v_proj), prompt.rows.to(q_MNH.dtype))
            k_PGH, v_PGH = (x.unflatten(1, (-1, self.head_dim)) for x in flat)
            o_MNH = o_MNH + prompt(q_MNH, k_PGH, v_PGH)
        return o_MNH


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(
        self, x_MD: Tensor, dropout_keys: Tensor | None, *, selective: bool = False
    ) -> Tensor:
        gate_MF, up_MF = linear_group((self.gate_proj, self.up_proj), x_MD, dropout_keys)
        h_MF = kernels.swiglu(gate_MF, up_MF)
        with made_again(
            h_MF, lambda rows: kernels.swiglu(gate_MF[rows], up_MF[rows]), selective=selective
        ):
            return self.down_proj(h_MF, dropout_keys)


class Block(nn.Module):
    """One layer, normalised before each half: x + attention(norm(x)), then x + mlp(norm(x)).

    The second half is one MLP, or Mixtral's sparse one under its own name.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        is_sparse = config.num_local_experts > 0
        self.mlp = None if is_sparse else MLP(config)
        self.block_sparse_moe = SparseMLP(config) if is_sparse else None

    def forward(
        self,
        x_MD: Tensor,
        batch: TokenBatch,
        rope: Rope,
        dropout_keys: Tensor | None,
        cache: KVCache | None,
        chosen: Chosen | None = None,
        prefix: Prefix | None = None,
        *,
        selective: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x_MD: [M, D] -> [M, D], or [n, D] of the chosen tokens alone; and a router's logits.

        selective: what the norms and the gate give is not kept but made again (`Activations`).
        """
        normed_MD = self.input_layernorm(x_MD)
        with made_again(normed_MD, self.input_layernorm.rows_of(x_MD), selective=selective):
            attended = self.self_attn(normed_MD, batch, rope, dropout_keys, cache, chosen, prefix)
        if chosen is not None:
            x_MD = x_MD[chosen.rows]
            dropout_keys = None if dropout_keys is None else dropout_keys[chosen.rows]
        normed_MD, x_MD = self.post_attention_layernorm.of_sum(attended, x_MD)
        rows_of = self.post_attention_layernorm.rows_of(x_MD)
        with made_again(normed_MD, rows_of, selective=selective):
            if self.block_sparse_moe is None:
                assert self.mlp is not None
                return x_MD + self.mlp(normed_MD, dropout_keys, selective=selective), None
            out_MD, router_logits_ME = self.block_sparse_moe(
                normed_MD, dropout_keys, rows_of, selective=selective
            )
        return x_MD + out_MD, router_logits_ME


class Decoder(nn.Module):
    """Embedding, blocks and the last norm; heads stand on top of it (`model.heads`).

    Two slots are empty until adapters fill them (`lora.attach`), each name -> module: of
    `input_modules` (`InputModule`) each takes the rows that the one before has made, so what comes
    later stands further in front; `prefixes` are `PrefixModule`s.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.input_modules = nn.ModuleDict()
        self.prefixes = nn.ModuleDict()

    @property
    def virtual_tokens(self) -> int:
        """Rows that stand in front of each segment and pass through every block."""
        return sum(module.virtual_tokens for module in self._input_modules())

    @property
    def prefix_tokens(self) -> int:
        """Keys that stand in front of each segment in every layer."""
        return sum(module.prefix_tokens for module in self._prefix_modules())

    def _input_modules(self) -> Sequence[InputModule]:
        return cast(Sequence[InputModule], tuple(self.input_modules.values()))

    def _prefix_modules(self) -> Sequence[PrefixModule]:
        return cast(Sequence[PrefixModule], tuple(self.prefixes.values()))

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
        activations: Activations = "save",
        compute_dtype: torch.dtype | None = None,
        cache: KVCache | None = None,
        pool: bool = False,
        predicting: Tensor | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden rows [M, D] after the last norm, in `compute_dtype`; with `pool` [n, D].

        Virtual tokens have no row in the result, but the last of them predicts its segment's first
        token (see `predicting`).

        Args:
            dropout_seed: switches the adapters' dropout on; one number per optimiser step.
            activations: what blocks keep for the backward pass. Same numbers, less memory.
            compute_dtype: of all activations; weights are cast to it where they are used. Default:
                that of the embedding.
            cache: earlier tokens of the same sequences; the batch's tokens are added to it.
            pool: of each segment the last token's row alone. The last block then computes no other
                query, output or MLP row: the same numbers for less.
            predicting: [K] int64, tokens of the batch; of each the row that predicts it, the one
                before it in its segment: [K, D].
            router_logits: takes those of each block of experts, [M, E].
        """
        assert cache is None or not (recomputes_blocks(activations) or pool)
        assert predicting is None or not pool
        x_MD = F.embedding(batch.input_ids, self.embed_tokens.weight)
        if compute_dtype is not None:
            x_MD = x_MD.to(compute_dtype)
        own, before = batch.segments, self.prefix_tokens
        if cache is None or cache.is_empty:
            for module in self._input_modules():
                x_MD, batch = module(x_MD, batch, dropout_seed)
        else:
            before = 0  # virtual tokens and prefixes are in the cache
        prefixes: list[Prefix] = []
        behind = batch.segments.behind(before) if before else None
        if behind is not None:
            prefixes = Prefix.of_layers(self._prefix_modules(), behind, x_MD)
        positions = batch.positions + before
        if cache is not None:
            positions = positions + cache.extend(behind.segments if behind else batch.segments)
        rope = rope_tables(self.config, positions, x_MD.dtype)
        dropout_keys = None
        if dropout_seed is not None:
            dropout_keys = kernels.row_keys(dropout_seed, batch.sample_ids, positions)
        for i, block in enumerate(self.layers, start=1):
            chosen = batch.segments.ends() if pool and i == len(self.layers) else None
            prefix = prefixes[i - 1] if prefixes else None
            x_MD, logits_ME = run_block(
                block, activations, x_MD, batch, rope, dropout_keys, cache, chosen, prefix
            )
            if router_logits is not None and logits_ME is not None:
                router_logits.append(logits_ME)
        x_MD = self.norm(x_MD)
        if pool:
            return x_MD
        return _own_rows(x_MD, own, batch.segments, predicting)


def _own_rows(x: Tensor, own: Segments, wide: Segments, predicting: Tensor | None) -> Tensor:
    """Of the rows of `wide` segments those of their own tokens, or those that predict some."""
    if wide is own:
        return x if predicting is None else x[predicting - 1]
    tokens = own.behind(wide.lengths[0] - own.lengths[0]).tokens
    return x[tokens] if predicting is None else x[tokens[predicting] - 1]


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
