"""One new token of every sequence in few operations: the decoder with a cache, for generation.

A small model spends its time between operations, not in them: `Decoder.forward` has for each token
what training needs (autograd's functions, segments, keys of dropout). A `Plan` is made once for a
generation and holds the blocks' weights, small ones of a common input as one matrix. It covers
dense decoders with floating weights and low-rank adapters; of others there is none, and generation
takes the forward pass itself. The invariant: a plan's rows are those of `Decoder.forward`.

Letters: n sequences, D width, N query heads, G key-value heads, H head width, K input width of a
layer, R rank.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from model.cache import KVCache
from model.decoder import Block, Decoder, RMSNorm, rope_tables
from model.linear import Linear

# Layers of one input up to this size become one matrix, a copy: fewer operations. Of larger ones
# reading the weights takes the time, and a copy would only take room.
_STACKED_BYTES = 1 << 20


class _Update(NamedTuple):
    """One adapter of one layer."""

    output: int  # which of the group's outputs it is added to
    columns: slice
    down: Tensor  # A^T [K, R]
    up: Tensor  # scaling B^T [R, N]


class _Group(NamedTuple):
    """Layers that read one input: matrices [K, N], each of one layer or of all together."""

    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    updates: tuple[_Update, ...]

    @classmethod
    def of(cls, layers: Sequence[Linear], dtype: torch.dtype) -> Self:
        operands = [layer.operands() for layer in layers]
        weights = [one.weight.to(dtype) for one in operands]
        biases = [None if one.bias is None else one.bias.to(dtype) for one in operands]
        is_stacked = len(layers) > 1 and sum(w.nbytes for w in weights) <= _STACKED_BYTES
        updates, start = [], 0
        for i, (one, weight) in enumerate(zip(operands, weights, strict=True)):
            columns = slice(start, start + len(weight)) if is_stacked else slice(None)
            for adapter in one.adapters:
                down, up = adapter.A.to(dtype).T, adapter.scaling * adapter.B.to(dtype).T
                updates.append(_Update(0 if is_stacked else i, columns, down, up))
            start += len(weight)
        if is_stacked:
            given = [bias for bias in biases if bias is not None]
            assert len(given) in (0, len(biases))
            weights, biases = [torch.cat(weights)], [torch.cat(given) if given else None]
        return cls(tuple(weight.T for weight in weights), tuple(biases), tuple(updates))

    def __call__(self, x: Tensor) -> list[Tensor]:
        outputs = [
            x @ matrix if bias is None else torch.addmm(bias, x, matrix)
            for matrix, bias in zip(self.matrices, self.biases, strict=True)
        ]
        return self._updated(x, outputs)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the one layer's output."""
        (matrix,), (bias,) = self.matrices, self.biases
        y = torch.addmm(residual, x, matrix)
        return self._updated(x, [y if bias is None else y.add_(bias)])[0]

    def _updated(self, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        for output, columns, down, up in self.updates:
            outputs[output][:, columns].addmm_(x @ down, up)
        return outputs


class _Layer(NamedTuple):
    """One block's weights."""

    before_attention: RMSNorm
    qkv: _Group
    output: _Group
    before_mlp: RMSNorm
    gate_up: _Group
    down: _Group


class Plan:
    """The steps of one generation after its prompts."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        """`capacity`: positions that the generation can reach."""
        self._embedding, self._norm = decoder.embed_tokens.weight, decoder.norm
        self._config = decoder.config
        dtype, device = self._embedding.dtype, self._embedding.device
        self._layers: list[_Layer] = []
        for block in decoder.layers:
            assert isinstance(block, Block)
            assert block.mlp is not None
            own, mlp = block.self_attn, block.mlp
            self._layers.append(
                _Layer(
                    block.input_layernorm,
                    _Group.of((own.q_proj, own.k_proj, own.v_proj), dtype),
                    _Group.of((own.o_proj,), dtype),
                    block.post_attention_layernorm,
                    _Group.of((mlp.gate_proj, mlp.up_proj), dtype),
                    _Group.of((mlp.down_proj,), dtype),
                )
            )
        # RoPE of a head (a, b) is (a, b) times (cos, cos) plus (b, a) times (-sin, sin).
        cos, sin = rope_tables(decoder.config, torch.arange(capacity, device=device), dtype)
        self._cos, self._sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    @classmethod
    def of(cls, decoder: Decoder, capacity: int) -> Self | None:
        """A plan, or None for a decoder that it does not cover."""
        layers = [module for module in decoder.modules() if isinstance(module, Linear)]
        is_covered = all(
            isinstance(block, Block) and block.mlp is not None and not block.self_attn.prompts
            for block in decoder.layers
        ) and all(layer.weight_scale is None for layer in layers)
        return cls(decoder, capacity) if is_covered else None

    def step(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """Rows [n, D] after the last norm, of the newest token of each sequence in the cache."""
        config, device = self._config, self._embedding.device
        positions = cache.advance()
        cos_n1H, sin_n1H = self._cos[positions, None], self._sin[positions, None]
        x_nD = F.embedding(torch.tensor(tokens, device=device), self._embedding)
        half, heads = config.head_dim // 2, config.num_attention_heads
        turned = heads + config.num_key_value_heads

        def rotated(x: Tensor) -> Tensor:
            """[n, heads x H] -> [n, heads, H]."""
            x_nNH = x.view(len(x), -1, config.head_dim)
            return torch.addcmul(x_nNH * cos_n1H, torch.roll(x_nNH, half, -1), sin_n1H)

        for i, layer in enumerate(self._layers):
            flat = layer.qkv(_normed(layer.before_attention, x_nD))
            if len(flat) == 1:
                together = flat[0].view(len(x_nD), -1, config.head_dim)
                qk = rotated(flat[0][:, : turned * config.head_dim])
                q, k, v = qk[:, :heads], qk[:, heads:], together[:, turned:]
            else:
                q, k = rotated(flat[0]), rotated(flat[1])
                v = flat[2].view(len(x_nD), -1, config.head_dim)
            x_nD = layer.output.added_to(x_nD, cache.attend_newest(i, q, k, v).flatten(1))
            flat = layer.gate_up(_normed(layer.before_mlp, x_nD))
            gate, up = flat if len(flat) == 2 else flat[0].chunk(2, -1)
            x_nD = layer.down.added_to(x_nD, F.silu(gate).mul_(up))
        return _normed(self._norm, x_nD)


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.eps)
    return kernels.rms_norm(x, norm.weight, norm.eps)  # where it rounds in between
