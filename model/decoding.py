"""One new token of every sequence in few operations: the decoder with a cache, for generation.

A small model spends its time between operations, not in them: `Decoder.forward` has for each token
what training needs (autograd's functions, segments, keys of dropout). A larger one on a CPU spends
it in products of few rows, which reach a fraction of the memory's speed on weights as checkpoints
store them. A `Plan` is made once for a generation and holds the blocks' weights: small ones of a
common input as one matrix, large ones in float16 where that is exact (published checkpoints are
float16 or bfloat16, whatever they are computed in), others laid out for the rows of a step. It
covers dense decoders and low-rank adapters; of others there is none, and generation takes the
forward pass itself. The invariant: a plan's logits are those of `CausalLM`.

Letters: n sequences, D width, V vocabulary, N query heads, G key-value heads, H head width, K input
width of a layer, R rank.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from model.cache import KVCache
from model.decoder import Block, RMSNorm, rope_tables
from model.heads import CausalLM
from model.linear import Linear

# Layers of one input up to this size become one matrix, a copy: fewer operations.
_STACKED_BYTES = 1 << 20
# Larger ones are held anew, a copy too, where all weights together stay below this ...
_LAID_OUT_BYTES = 1 << 31
# ... and there are tokens enough to gain more than the copy costs.
_LAID_OUT_TOKENS = 64

# Weights that are packed at once, each with copies of its own beside it.
_PACKERS = 4

# How large weights lie that float16 does not hold: as the checkpoint has them [N, K]; as [K, N], of
# which a product with one row is a sum of long rows; or in oneDNN's blocks, for several rows.
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


class _Halves(NamedTuple):
    """x W^T + bias in float32, sums included, of a weight that is read as float16.

    The weight is packed times a power of two, so nothing is rounded: float16 has three bits of
    precision more than bfloat16, and thirty powers of two below the largest weight.
    """

    packed: torch.ScriptObject
    scale: float  # the weight is what is packed times this
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        if self.bias is not None:
            return torch.add(self.bias, y, alpha=self.scale)
        return y if self.scale == 1.0 else y.mul_(self.scale)


class _Packed(NamedTuple):
    """What became of some weights."""

    weights: tuple[Tensor, ...]
    states: tuple[tuple[int, int], ...]  # the weights' addresses and versions then
    halves: tuple[torch.ScriptObject, float] | None  # None where float16 is not exact


# Packing takes as long as some fifty steps, so it is kept with the first layer of a group, or with
# the model for its head, for as long as the weights are what they were.
_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


@torch.no_grad()
def _halves(owner: nn.Module, weights: Sequence[Tensor]) -> tuple[torch.ScriptObject, float] | None:
    """Float32 weights [N, K] of one input as one in float16, and its scale; kept by `owner`.

    None where they are too small to gain, where float16 is not exact, where torch has no such
    product, or where it does not count their changes: of weights made in inference mode.
    """
    has_products = torch.backends.quantized.engine in ("fbgemm", "x86")
    is_large = sum(weight.nbytes for weight in weights) >= _STACKED_BYTES
    is_known = all(w.dtype == torch.float32 and not w.is_inference() for w in weights)
    if not (has_products and is_large and is_known):
        return None
    states = tuple((weight.data_ptr(), weight._version) for weight in weights)
    kept = _packed.get(owner)
    if (
        kept is not None
        and kept.states == states
        and all(one is other for one, other in zip(kept.weights, weights, strict=True))
    ):
        return kept.halves
    halves = None
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    largest = max(-float(weight.min()), float(weight.max()))
    # The scale is a normal float32 from 2**-126 on, and runs flush those that are not.
    for exponent in (0, min(max(0, 15 - math.frexp(largest)[1]), 126)):
        scaled = weight * 2.0**exponent if exponent else weight
        if torch.equal(scaled.half().float(), scaled):
            halves = torch.ops.quantized.linear_prepack_fp16(scaled, None), 2.0**-exponent
            break
    _packed[owner] = _Packed(tuple(weights), states, halves)
    return halves


def _product(
    owner: nn.Module | None, weights: Sequence[Tensor], bias: Tensor | None, layout: _Layout
) -> _Matrix | _Blocks | _Halves:
    """With weights [N, K] of one input as one; only a wide one is worth a layout of float32.

    owner: where the weights are a checkpoint's, the module that keeps their float16 form.
    """
    if layout != "stored" and owner and (halves := _halves(owner, weights)) is not None:
        return _Halves(*halves, bias)
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    is_wide = weight.shape[0] > weight.shape[1] and weight.nbytes > _STACKED_BYTES
    if layout == "stored" or not is_wide:
        return _Matrix(weight.T, bias)
    if layout == "blocked":
        return _Blocks.of(weight, bias)
    return _Matrix(weight.T.contiguous(), bias)


class _Group(NamedTuple):
    """Layers that read one input: products each of one layer, or one of all together."""

    products: tuple[_Matrix | _Blocks | _Halves, ...]
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
        is_as_loaded = all(w is one.weight for w, one in zip(weights, operands, strict=True))
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
            bias = torch.cat(given) if given else None
            owner = layers[0] if is_as_loaded else None
            products = [_product(owner, weights, bias, layout)]
        else:
            products = [
                _product(layer if is_as_loaded else None, [weight], bias, layout)
                for layer, weight, bias in zip(layers, weights, biases, strict=True)
            ]
        return cls(tuple(products), tuple(updates))

    def __call__(self, x: Tensor) -> list[Tensor]:
        return self._updated(x, [product(x) for product in self.products])

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the one layer's output."""
        (product,) = self.products
        if isinstance(product, _Matrix):
            y = torch.addmm(residual, x, product.matrix)
            y = y if product.bias is None else y.add_(product.bias)
        else:
            y = product(x).add_(residual)
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


def _sharing_an_input(block: Block) -> tuple[tuple[Linear, ...], ...]:
    """A dense block's layers: of q, k and v; of the output; of gate and up; of down."""
    own, mlp = block.self_attn, block.mlp
    assert mlp is not None
    return (
        (own.q_proj, own.k_proj, own.v_proj),
        (own.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def _pack(model: CausalLM) -> None:
    """`_halves` of all weights, which a plan then finds: several at once, each takes one thread."""
    owned: list[tuple[nn.Module, list[Tensor]]] = [(model, [model.head_weight])]
    for block in model.model.layers:
        assert isinstance(block, Block)
        owned += [
            (group[0], [layer.weight for layer in group]) for group in _sharing_an_input(block)
        ]
    with ThreadPoolExecutor(min(_PACKERS, torch.get_num_threads())) as pool:
        for job in [pool.submit(_halves, owner, weights) for owner, weights in owned]:
            job.result()


class Plan:
    """The steps of one generation after its prompts."""

    def __init__(self, model: CausalLM, capacity: int, layout: _Layout) -> None:
        """`capacity`: positions that the generation can reach."""
        decoder, self.layout = model.model, layout
        self._config, self._embedding = decoder.config, decoder.embed_tokens.weight
        dtype, device = self._embedding.dtype, self._embedding.device
        self._norm = _Norm.of(decoder.norm, dtype)
        if layout != "stored":
            _pack(model)
        self._layers: list[_Layer] = []
        for block in decoder.layers:
            assert isinstance(block, Block)
            qkv, output, gate_up, down = (
                _Group.of(layers, dtype, layout) for layers in _sharing_an_input(block)
            )
            before_attention = _Norm.of(block.input_layernorm, dtype)
            before_mlp = _Norm.of(block.post_attention_layernorm, dtype)
            self._layers.append(_Layer(before_attention, qkv, output, before_mlp, gate_up, down))
        head = model.head_weight
        owner = model if head.dtype == dtype else None
        self._head = _product(owner, [head.to(dtype)], None, layout)
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
