"""One new token of every sequence in few operations: the decoder with a cache, for generation.

A small model spends its time between operations, not in them: `Decoder.forward` has for each token
what training needs (autograd's functions, segments, keys of dropout). A larger one on a CPU spends
it in products of few rows, which reach a fraction of the memory's speed on weights as checkpoints
store them. A `Plan` is made once for a generation and holds the blocks' weights: small ones of a
common input as one matrix, large ones laid out for the rows of a step. It covers dense decoders and
low-rank adapters; of others there is none, and generation takes the forward pass itself. The
invariant: a plan's logits are those of `CausalLM`.

Letters: n sequences, D width, V vocabulary, N query heads, G key-value heads, H head width, K input
width of a layer, R rank.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from model.cache import KVCache
from model.decoder import Block, RMSNorm, rope_tables
from model.heads import CausalLM
from model.linear import Linear

# Layers of one input up to this size become one matrix, a copy: fewer operations.
_STACKED_BYTES = 1 << 20
# Larger ones are laid out anew, a copy too, where all weights together stay below this ...
_LAID_OUT_BYTES = 1 << 31
# ... and there are tokens enough to gain more than the copy costs.
_LAID_OUT_TOKENS = 64

# How large weights lie: as the checkpoint has them [N, K]; as [K, N], of which a product with one
# row is a sum of long rows; or in oneDNN's blocks, for several rows.
_Layout = Literal["stored", "transposed", "blocked"]


class _Update(NamedTuple):
    """One adapter of one layer."""

    output: int  # which of the group's outputs it is added to
    columns: slice
    down: Tensor  # A^T [K, R]
    up: Tensor  # scaling B^T [R, N]


class _Matrix(NamedTuple):
    """x W^T + bias, the weight in any strides."""

    matrix: Tensor  # W^T [K, N]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.matrix if self.bias is None else torch.addmm(self.bias, x, self.matrix)


class _Blocks(NamedTuple):
    """x W^T + bias, the weight in oneDNN's blocks, which serve any number of rows."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        # The number of rows is a hint: blocks for a few of them.
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, 8), bias)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def _product(weights: Sequence[Tensor], bias: Tensor | None, layout: _Layout) -> _Matrix | _Blocks:
    """With weights [N, K] of one input as one; only a wide one is worth another layout."""
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    is_wide = weight.shape[0] > weight.shape[1] and weight.nbytes > _STACKED_BYTES
    if layout == "stored" or not is_wide:
        return _Matrix(weight.T, bias)
    if layout == "blocked":
        return _Blocks.of(weight, bias)
    return _Matrix(weight.T.contiguous(), bias)


class _Group(NamedTuple):
    """Layers that read one input: products each of one layer, or one of all together."""

    products: tuple[_Matrix | _Blocks, ...]
    updates: tuple[_Update, ...]

    @classmethod
    def of(cls, layers: Sequence[Linear], dtype: torch.dtype, layout: _Layout) -> Self:
        operands = [layer.operands() for layer in layers]
        weights = [
            one.weight.to(dtype)
            if one.scale is None
            else kernels.dequantise(one.weight, one.scale, dtype)
            for one in operands
        ]
        biases = [None if one.bias is None else one.bias.to(dtype) for one in operands]
        is_small = sum(w.nbytes for w in weights) <= _STACKED_BYTES
        is_stacked = len(layers) > 1 and (is_small or layout != "stored")
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
            products = [_product(weights, torch.cat(given) if given else None, layout)]
        else:
            products = [_product([w], b, layout) for w, b in zip(weights, biases, strict=True)]
        return cls(tuple(products), tuple(updates))

    def __call__(self, x: Tensor) -> list[Tensor]:
        return self._updated(x, [product(x) for product in self.products])

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the one layer's output."""
        (product,) = self.products
        if isinstance(product, _Blocks):
            y = product(x).add_(residual)
        else:
            y = torch.addmm(residual, x, product.matrix)
            y = y if product.bias is None else y.add_(product.bias)
        return self._updated(x, [y])[0]

    def _updated(self, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        for output, columns, down, up in self.updates:
            outputs[output][:, columns].addmm_(x @ down, up)
        return outputs


class _Norm(NamedTuple):
    """`RMSNorm` in half the operations."""

    norm: RMSNorm
    weight: Tensor  # [D]
    eps: Tensor  # [1]

    @classmethod
    def of(cls, norm: RMSNorm, dtype: torch.dtype) -> Self:
        return cls(norm, norm.weight.to(dtype), norm.weight.new_full((1,), norm.eps, dtype=dtype))

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64):
            return kernels.rms_norm(x, self.weight, self.norm.eps)  # where it rounds in between
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * inverse).mul_(self.weight)


class _Layer(NamedTuple):
    """One block's weights."""

    before_attention: _Norm
    qkv: _Group
    output: _Group
    before_mlp: _Norm
    gate_up: _Group
    down: _Group


class Plan:
    """The steps of one generation after its prompts."""

    def __init__(self, model: CausalLM, capacity: int, layout: _Layout) -> None:
        """`capacity`: positions that the generation can reach."""
        decoder, self.layout = model.model, layout
        self._config, self._embedding = decoder.config, decoder.embed_tokens.weight
        dtype, device = self._embedding.dtype, self._embedding.device
        self._norm = _Norm.of(decoder.norm, dtype)
        self._layers: list[_Layer] = []
        for block in decoder.layers:
            assert isinstance(block, Block)
            assert block.mlp is not None
            own, mlp = block.self_attn, block.mlp
            self._layers.append(
                _Layer(
                    _Norm.of(block.input_layernorm, dtype),
                    _Group.of((own.q_proj, own.k_proj, own.v_proj), dtype, layout),
                    _Group.of((own.o_proj,), dtype, layout),
                    _Norm.of(block.post_attention_layernorm, dtype),
                    _Group.of((mlp.gate_proj, mlp.up_proj), dtype, layout),
                    _Group.of((mlp.down_proj,), dtype, layout),
                )
            )
        self._head = _product([model.head_weight.to(dtype)], None, layout)
        # RoPE of a head (a, b) is (a, b) times (cos, cos) plus (b, a) times (-sin, sin).
        cos, sin = rope_tables(decoder.config, torch.arange(capacity, device=device), dtype)
        self._cos, self._sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    @classmethod
    @torch.no_grad()
    def of(cls, model: CausalLM, capacity: int, *, count: int, tokens: int) -> Self | None:
        """A plan, or None for a model that it does not cover.

        Args:
            count: sequences at the start.
            tokens: that each of them is to get.
        """
        decoder = model.model
        layers = [module for module in decoder.modules() if isinstance(module, Linear)]
        layout = _layout(model, count, tokens)
        is_covered = all(
            isinstance(block, Block) and block.mlp is not None and not block.self_attn.prompts
            for block in decoder.layers
        ) and all(
            layer.weight_scale is None or (layout != "stored" and not layer.is_int8_math)
            for layer in layers
        )
        return cls(model, capacity, layout) if is_covered else None

    def step(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """Logits [n, V] of the newest token of each sequence in the cache."""
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
            flat = layer.qkv(layer.before_attention(x_nD))
            if len(flat) == 1:
                together = flat[0].view(len(x_nD), -1, config.head_dim)
                qk = rotated(flat[0][:, : turned * config.head_dim])
                q, k, v = qk[:, :heads], qk[:, heads:], together[:, turned:]
            else:
                q, k = rotated(flat[0]), rotated(flat[1])
                v = flat[2].view(len(x_nD), -1, config.head_dim)
            x_nD = layer.output.added_to(x_nD, cache.attend_newest(i, q, k, v).flatten(1))
            flat = layer.gate_up(layer.before_mlp(x_nD))
            gate, up = flat if len(flat) == 2 else flat[0].chunk(2, -1)
            x_nD = layer.down.added_to(x_nD, F.silu(gate).mul_(up))
        return self._head(self._norm(x_nD))


def _layout(model: CausalLM, count: int, tokens: int) -> _Layout:
    """How a plan's large weights lie, by device, type and sizes."""
    weight = model.model.embed_tokens.weight
    elements = sum(parameter.numel() for parameter in model.parameters())
    if (
        weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
        or tokens < _LAID_OUT_TOKENS
        or elements * weight.element_size() > _LAID_OUT_BYTES
    ):
        return "stored"
    return "transposed" if count == 1 else "blocked"
