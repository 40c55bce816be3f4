"""What a run will need, before it begins: bytes at its peak and seconds, each with its parts.

Memory is counted from the tensors that the operations of `kernels.reference` and `model.attention`
keep for the backward pass. Seconds are floating-point operations over a rate that `measured_rate`
takes on the run's own device, from one block of the run's own shape. Letters: M tokens, D width,
N query heads, G key-value heads, H head width, F feed-forward width, V vocabulary, R rank, E
experts, J experts of one token. The router is taken to spread tokens evenly.

Invariant: the count follows the code. An operation that keeps another tensor changes
`_block_saved`, and a test compares it with what autograd really holds.
"""

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data.packing import PackedBatch
from kernels.reference import CHUNK_ELEMENTS
from lora.adapter import LoraAdapter
from lora.adaption_prompt import AdaptionPrompt
from model.activations import Activations, recomputes_blocks
from model.attention import WINDOW_BLOCK
from model.batch import Segments
from model.config import DecoderConfig
from model.decoder import Block, Decoder
from model.encoder import Encoder, Layer
from model.experts import SparseMLP
from model.heads import CausalLM, Model, Network
from model.linear import Linear
from training.objective import Objective

_PROBE_SECONDS = 0.5  # a timing shorter than this is made longer, if there are tokens for it
_PROBE_REPEATS = 3
_WIDE = 4  # bytes of the float32 in which norms and losses are computed
_INDEX = 8


class Memory(NamedTuple):
    """Bytes at the moment of a training step that needs most, by what they are for."""

    program: int  # this process before it holds a model; 0 for a GPU
    weights: int  # base, adapters and head
    optimiser: int  # AdamW's two moments of everything that trains
    activations: int  # kept by the forward pass of one micro-batch for its backward pass
    working: int  # gradients, and what operations need in passing

    @property
    def total(self) -> int:
        return sum(self)


class Work(NamedTuple):
    """What a run has to compute, in floating-point operations."""

    steps: int
    step: float  # operations of one optimiser step, on this rank
    validations: int
    validation: float

    def seconds(self, rate: float) -> float:
        return (self.steps * self.step + self.validations * self.validation) / rate


# Memory -------------------------------------------------------------------------------------------


def program_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(
    model: Model,
    batch: PackedBatch,
    *,
    compute_dtype: torch.dtype,
    on_gpu: bool,
    activations: Activations,
    micro_batches: int,
    optimiser: int,
    program: int,
) -> Memory:
    """Bytes at the peak of a step whose largest micro-batch is `batch`.

    Args:
        model: on any device, also meta; its `requires_grad` says what trains.
        on_gpu: attention there works on the stream as it is, without padding.
        micro_batches: in the step; from the second on, the gradients of the first are there.
        optimiser: as from `training.optim.state_bytes`.
        program: as from `program_bytes`.
    """
    own, batch = batch, _behind_virtual_tokens(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    saved = saved_bytes(
        model, own, compute_dtype=compute_dtype, on_gpu=on_gpu, activations=activations
    )
    width = compute_dtype.itemsize
    tokens = len(batch.input_ids)
    blocks = _trained_blocks(model)
    config = model.config

    # In passing, when a block goes backward: the gradients of the stream and of the MLP's inner
    # rows (of h, of gate, of up, and one product of theirs), while h itself has just gone.
    inner = config.intermediate_size
    if isinstance(config, DecoderConfig) and config.num_local_experts:
        inner *= config.num_experts_per_tok
    passing = tokens * (2 * config.hidden_size + 3 * inner) * width
    if blocks and recomputes_blocks(activations):
        # Of a classifier the last block is the smallest.
        largest = blocks[0]
        recomputed = _block_saved(
            largest,
            batch,
            width,
            on_gpu,
            has_gradient=True,
            pools=_pools(model, largest),
            prefix=_prefix(model),
            selective=False,
        )
        # On a CPU about as much again was resident (measured; the cause was not traced).
        passing += recomputed * (1 if on_gpu else 2)
    passing += _largest_cast(model.network, compute_dtype)
    if any(isinstance(m, Linear) and m.weight.requires_grad for m in model.modules()):
        passing += max(p.nbytes for p in trained)  # a gradient before it is added

    at_head = _head_bytes(model, own, compute_dtype)
    before = gradients if micro_batches > 1 else 0
    # Weights' gradients grow while activations go: the peak is at one end of the backward pass.
    peak = max(saved + before + max(passing, at_head), gradients + passing)
    return Memory(
        program=program,
        weights=sum(p.nbytes for p in itertools.chain(model.parameters(), model.buffers())),
        optimiser=optimiser,
        activations=saved,
        working=peak - saved,
    )


def spread_bytes(model: Model, base: Set[nn.Parameter], ranks: int) -> int:
    """Bytes of weights on one of several ranks that share the base (`training.parallel.shard`).

    Whole for a moment are what stands outside of the blocks, and two blocks: the one at work and
    the next, which is fetched meanwhile.
    """
    blocks = [
        sum(p.nbytes for p in block.parameters() if p in base) for block in model.network.blocks
    ]
    shared = sum(p.nbytes for p in base)
    all_bytes = sum(p.nbytes for p in itertools.chain(model.parameters(), model.buffers()))
    outside, largest = shared - sum(blocks), sorted(blocks)[-2:]
    return all_bytes - shared + -(-shared // ranks) + outside + sum(largest)


def saved_bytes(
    model: Model,
    batch: PackedBatch,
    *,
    compute_dtype: torch.dtype,
    on_gpu: bool,
    activations: Activations,
) -> int:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass, without weights.

    On the device: what is held in the host's memory is counted by `offloaded_bytes`.
    """
    scored = _scored(batch) if isinstance(model, CausalLM) else 0
    batch = _behind_virtual_tokens(model, batch)
    width, tokens, config = compute_dtype.itemsize, len(batch.input_ids), model.config
    stream = tokens * config.hidden_size * width
    saved, has_gradient, prefix = 0, _input_trains(model), _prefix(model)
    if isinstance(model.network, Encoder) and has_gradient:
        dropped = model.network.config.hidden_dropout_prob > 0
        saved += stream + tokens * 2 * _WIDE + tokens * config.hidden_size * dropped
    if recomputes_blocks(activations):
        saved += prefix.tokens * prefix.columns * width  # of all layers, beside the blocks' inputs
    for block in model.network.blocks:
        if recomputes_blocks(activations):
            has_gradient = has_gradient or _trains(block) or prefix.trains
            saved += stream * (activations == "checkpoint" and has_gradient)
        else:
            pools = _pools(model, block)
            saved += _block_saved(
                block,
                batch,
                width,
                on_gpu,
                has_gradient=has_gradient,
                pools=pools,
                prefix=prefix,
                selective=activations == "selective",
            )
            has_gradient = has_gradient or _trains(block) or prefix.trains
    if has_gradient and isinstance(config, DecoderConfig):
        rows = tokens if isinstance(model, CausalLM) else len(batch.rows)
        saved += tokens * config.head_dim * width  # the angles' cosines and sines
        saved += rows * (config.hidden_size * width + _WIDE)  # the last norm
    if isinstance(model, CausalLM):
        saved += scored * config.hidden_size * width * has_gradient
        if isinstance(config, DecoderConfig) and config.router_aux_loss_coef and has_gradient:
            # The routers' probabilities, for their loss.
            saved += config.num_hidden_layers * tokens * config.num_local_experts * _WIDE
        if model.head_weight.requires_grad:
            saved += model.head_weight.nbytes
    else:
        pooled = len(batch.rows) * config.hidden_size
        saved += pooled * max(width, _WIDE)
        if isinstance(model.network, Encoder):
            dense, is_dropped = model.network.pooler.dense, model.network.config.head_dropout > 0
            saved += pooled * width * dense.weight.requires_grad
            saved += pooled * (width + 1) * (is_dropped and (has_gradient or _trains(dense)))
    return saved


def offloaded_bytes(model: Model, batch: PackedBatch, compute_dtype: torch.dtype) -> int:
    """Bytes of the blocks' inputs of a micro-batch, which "offload" holds in the host's memory."""
    tokens = len(_behind_virtual_tokens(model, batch).input_ids)
    return len(_trained_blocks(model)) * tokens * model.config.hidden_size * compute_dtype.itemsize


def _block_saved(
    block: nn.Module,
    batch: PackedBatch,
    width: int,
    on_gpu: bool,
    *,
    has_gradient: bool,
    pools: bool,
    prefix: "_Prefix",
    selective: bool,
) -> int:
    """Bytes that one block keeps; nothing while neither its input nor it has a gradient.

    pools: all but keys and values is of each segment's last token alone.
    """
    kept = _Kept(batch, width, on_gpu, has_gradient=has_gradient, pools=pools, selective=selective)
    if isinstance(block, Layer):
        reader = block.attention.self
        heads = reader.query.out_features // reader.head_dim
        kept.attention(reader.query, reader.key, reader.value, heads=heads)
        for output in (block.attention.output, block.output):
            if output is block.output:
                kept.linear(block.intermediate.dense, rows=kept.rows, is_kept=kept.made_again)
                kept.tensor(kept.rows, block.intermediate.dense.out_features)  # gelu's input
                kept.linear(output.dense, rows=kept.rows, is_kept=kept.made_again)
            else:
                kept.linear(output.dense, rows=kept.rows, is_kept=kept.is_output_kept)
            kept.mask(output.dropout, kept.rows, output.dense.out_features)
            kept.norm(output.LayerNorm, kept.rows, output.dense.out_features, statistics=2)
        return kept.bytes
    assert isinstance(block, Block)
    own, mlp, sparse = block.self_attn, block.mlp, block.block_sparse_moe
    dim = own.q_proj.in_features
    kept.norm(block.input_layernorm, kept.tokens, dim, statistics=1)
    heads = own.q_proj.out_features // own.head_dim
    kept.attention(
        own.q_proj,
        own.k_proj,
        own.v_proj,
        heads=heads,
        normed=True,
        window=own.window,
        prefix=prefix,
    )
    for prompt in own.prompts.values():
        assert isinstance(prompt, AdaptionPrompt)
        kept.prompt(prompt, own.q_proj, own.k_proj, heads=heads)
    kept.linear(own.o_proj, rows=kept.rows, is_kept=kept.is_output_kept)
    kept.norm(block.post_attention_layernorm, kept.rows, dim, statistics=1)
    if sparse is not None:
        kept.experts(sparse)
    else:
        assert mlp is not None
        kept.linear(mlp.gate_proj, mlp.up_proj, rows=kept.rows, is_kept=kept.made_again)
        kept.tensor(kept.rows, 2 * mlp.gate_proj.out_features)  # gate and up
        kept.linear(mlp.down_proj, rows=kept.rows, is_kept=kept.made_again)
    return kept.bytes


class _Kept:
    """Counts what a block's operations keep, one after the other, once a gradient flows."""

    def __init__(
        self,
        batch: PackedBatch,
        width: int,
        on_gpu: bool,
        *,
        has_gradient: bool,
        pools: bool,
        selective: bool,
    ) -> None:
        self.bytes = 0
        self.tokens = len(batch.input_ids)
        self.rows = len(batch.rows) if pools else self.tokens  # of all but keys and values
        self._batch, self._width, self._on_gpu, self._pools = batch, width, on_gpu, pools
        self._has_gradient, self._selective = has_gradient, selective
        self._keeps_queries = False  # the rows of all queries, as they come out of the rotation
        self.is_output_kept = False  # attention's, as its projection reads it

    @property
    def made_again(self) -> bool:
        """Whether the output of a norm or a gate that comes now is made again, not kept."""
        return self._selective and self._has_gradient

    def tensor(self, rows: int, columns: int) -> None:
        self.bytes += rows * columns * self._width * self._has_gradient

    def mask(self, dropout: float, rows: int, columns: int) -> None:
        self.bytes += rows * columns * (dropout > 0 and self._has_gradient)

    def norm(self, norm: nn.Module, rows: int, columns: int, *, statistics: int) -> None:
        """Its input, and its statistics of each row."""
        self._has_gradient = self._has_gradient or _trains(norm)
        self.tensor(rows, columns)
        self.bytes += rows * statistics * _WIDE * self._has_gradient

    def linear(self, *layers: Linear, rows: int, experts: int = 1, is_kept: bool = False) -> None:
        """The input that the layers share, if one trains that reads it; each adapter's S and mask.

        experts: share the rows, each with layers of its own.
        is_kept: the input is counted already, or made again.
        """
        self._has_gradient = self._has_gradient or any(_trains(layer) for layer in layers)
        adapters = list(itertools.chain(*(layer.adapters.values() for layer in layers)))
        readers = [layer.weight for layer in layers]
        readers += [adapter.lora_A for adapter in adapters if isinstance(adapter, LoraAdapter)]
        if not is_kept and any(reader.requires_grad for reader in readers):
            self.tensor(rows, layers[0].in_features)
        for adapter in adapters:
            assert isinstance(adapter, LoraAdapter)
            self.tensor(rows // experts, adapter.lora_A.shape[0])
            self.mask(adapter.dropout, rows // experts, layers[0].in_features)

    def experts(self, sparse: SparseMLP) -> None:
        """A router, and experts on copies of the tokens."""
        self.linear(sparse.gate, rows=self.rows, is_kept=self.made_again)
        into, out_of = (list(itertools.chain(*layers)) for layers in sparse.layers())
        copies, experts = self.rows * sparse.top_k, len(sparse.experts)
        self.linear(*into, rows=copies, experts=experts, is_kept=self.made_again)
        self.tensor(copies, 2 * into[0].out_features)  # gate and up
        self.linear(*out_of, rows=copies, experts=experts)
        self.tensor(copies, out_of[0].out_features)
        # The router's softmax and weights; its choice, and where the copies stand.
        of_router = (self.rows * experts + 2 * copies) * _WIDE + 4 * copies * _INDEX
        self.bytes += of_router * self._has_gradient

    def attention(
        self,
        query: Linear,
        key: Linear,
        value: Linear,
        *,
        heads: int,
        normed: bool = False,
        window: int | None = None,
        prefix: "_Prefix | None" = None,
    ) -> None:
        """normed: the block's own norm makes what the projections read."""
        is_input_kept = normed and self.made_again
        if self._pools:
            self.linear(key, value, rows=self.tokens, is_kept=is_input_kept)
            self.linear(query, rows=self.rows)
        else:
            self.linear(query, key, value, rows=self.tokens, is_kept=is_input_kept)
        if prefix is not None and prefix.tokens:
            self._attention_behind(prefix, query, key, heads=heads)
            return
        whole, padded, groups = (self.tokens, 0, 1) if self._on_gpu else _padding(self._batch)
        self._keeps_queries = self._has_gradient and (self._pools or whole > 0)
        self.tensor(whole + padded, 2 * key.out_features)  # k and v
        self.tensor(self.rows if self._pools else whole + padded, query.out_features)
        attended = self.rows
        if not self._pools and (groups > 1 or padded):
            attended = _attended(self._batch)
        self.bytes += attended * heads * _WIDE * self._has_gradient  # log-sum-exp
        mask = 0 if self._on_gpu or self._pools else _window_mask(self._batch, window)
        self.tensor(mask, 1)
        self._output(
            attended, query, ordered=groups > 1 or (padded and not self._pools) or mask > 0
        )

    def _output(self, rows: int, query: Linear, *, ordered: bool) -> None:
        """Attention's output; `ordered` where its projection reads a copy that is put in order."""
        self.tensor(rows, query.out_features)
        self.is_output_kept = self._has_gradient and not ordered

    def _attention_behind(
        self, prefix: "_Prefix", query: Linear, key: Linear, *, heads: int
    ) -> None:
        """Queries are of the tokens, keys and values also of a prefix in front of each segment."""
        self._has_gradient = self._has_gradient or prefix.trains
        own = Segments.from_offsets(self._batch.offsets.tolist())
        behind = own.behind(prefix.tokens).segments
        queries, keys, attended, mask = self.rows, behind.offsets[-1], self.rows, 0
        if not self._on_gpu:
            padded_queries, padded_keys, attended = 0, 0, 0
            whole_queries = whole_keys = False
            for group in behind.groups:
                length = 1 if self._pools else group.length - prefix.tokens
                attended += group.count * length
                is_even = group.index is None
                whole_keys, whole_queries = whole_keys or is_even, whole_queries or is_even
                padded_keys += 0 if is_even else group.count * group.length
                padded_queries += 0 if is_even else group.count * length
                if length > 1 or not is_even:
                    mask += group.count * length * group.length
            keys = keys * whole_keys + padded_keys
            if not self._pools:
                queries = queries * whole_queries + padded_queries
        self._keeps_queries = self._has_gradient and queries >= self.rows
        self.tensor(keys, 2 * key.out_features)
        self.tensor(queries, query.out_features)
        self.tensor(mask, 1)
        self.bytes += attended * heads * _WIDE * self._has_gradient  # log-sum-exp
        ordered = not self._on_gpu and (len(behind.groups) > 1 or attended > self.rows)
        self._output(attended, query, ordered=ordered)

    def prompt(self, prompt: AdaptionPrompt, query: Linear, key: Linear, *, heads: int) -> None:
        """Its keys and values, the queries unless attention has kept them, the output before its
        gate, and the log-sum-exp.
        """
        self.is_output_kept = False  # its projection reads the sum
        self._has_gradient = self._has_gradient or _trains(prompt)
        if not self._keeps_queries:
            self.tensor(self.rows, query.out_features)
        self._keeps_queries = self._has_gradient
        self.tensor(len(prompt.rows), 2 * key.out_features)
        self.tensor(self.rows, query.out_features)
        self.bytes += self.rows * heads * _WIDE * self._has_gradient


def _head_bytes(model: Model, batch: PackedBatch, compute_dtype: torch.dtype) -> int:
    """What the head and its loss need in passing."""
    width, tokens, dim = compute_dtype.itemsize, len(batch.input_ids), model.config.hidden_size
    if not isinstance(model, CausalLM):
        return 2 * len(batch.rows) * dim * width
    head, vocabulary, scored = model.head_weight, model.config.vocab_size, _scored(batch)
    rows = min(max(1, CHUNK_ELEMENTS // vocabulary), scored)
    chunk = rows * vocabulary * (width if width >= _WIDE else 2 * width + _WIDE)
    cast = 0 if head.dtype == compute_dtype else head.numel() * width
    gradient = head.numel() * max(width, _WIDE) if head.requires_grad else 0
    return (tokens + scored) * dim * width + chunk + cast + gradient


def _largest_cast(network: Network, compute_dtype: torch.dtype) -> int:
    """The largest weight in the compute dtype, where it is held in another one."""
    cast = [
        module.weight.numel()
        for module in network.modules()
        if isinstance(module, Linear) and module.weight.dtype != compute_dtype
    ]
    return max(cast, default=0) * compute_dtype.itemsize


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _trained_blocks(model: Model) -> list[nn.Module]:
    """The blocks that a gradient passes through."""
    if _input_trains(model) or _prefix(model).trains:
        return list(model.network.blocks)
    return list(itertools.dropwhile(lambda block: not _trains(block), model.network.blocks))


def _input_trains(model: Model) -> bool:
    """Whether the rows that enter the first block have a gradient."""
    network = model.network
    in_front = isinstance(network, Decoder) and _trains(network.input_modules)
    return _trains(network.word_embedding) or in_front


class _Prefix(NamedTuple):
    """Keys in front of each segment, in every layer."""

    tokens: int
    columns: int  # of one token's keys and values in all layers
    trains: bool


def _prefix(model: Model) -> _Prefix:
    network = model.network
    if not isinstance(network, Decoder):
        return _Prefix(0, 0, False)
    config = network.config
    columns = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return _Prefix(network.prefix_tokens, columns, _trains(network.prefixes))


def _behind_virtual_tokens(model: Model, batch: PackedBatch) -> PackedBatch:
    """The batch with the rows that virtual tokens add to every segment; the heads see none."""
    network = model.network
    count = network.virtual_tokens if isinstance(network, Decoder) else 0
    offsets = batch.offsets + count * np.arange(len(batch.offsets), dtype=batch.offsets.dtype)
    return batch._replace(offsets=offsets, input_ids=np.resize(batch.input_ids, int(offsets[-1])))


def _pools(model: Model, block: nn.Module) -> bool:
    """Whether a block computes the rows of the segments' pooled tokens alone."""
    return not isinstance(model, CausalLM) and block is model.network.blocks[-1]


def _scored(batch: PackedBatch) -> int:
    """Rows that the language-model head sees."""
    return len(batch.input_ids) - (len(batch.offsets) - 1)


def _padding(batch: PackedBatch) -> tuple[int, int, int]:
    """Attention's groups on a CPU: tokens kept as the stream, tokens gathered with padding, groups.

    Groups that need no padding are views of the stream, so one of them keeps all of it.
    """
    groups = Segments.from_offsets(batch.offsets.tolist()).groups
    has_view = any(group.index is None for group in groups)
    padded = sum(group.count * group.length for group in groups if group.index is not None)
    return len(batch.input_ids) * has_view, padded, len(groups)


def _window_mask(batch: PackedBatch, window: int | None) -> int:
    """Places of the masks that attention with a window keeps on a CPU, of all groups."""
    groups = Segments.from_offsets(batch.offsets.tolist()).groups
    total = 0
    for group in groups:
        if window is not None and group.length > window:
            step = min(WINDOW_BLOCK, window, group.length - window)
            total += step * (step + window - 1)
    return total


def _attended(batch: PackedBatch) -> int:
    """Rows of all groups, padding included."""
    groups = Segments.from_offsets(batch.offsets.tolist()).groups
    return sum(group.count * group.length for group in groups)


# Time ---------------------------------------------------------------------------------------------


def flops(model: Model, lengths: np.ndarray, *, trains: bool, checkpointing: bool = False) -> float:
    """Floating-point operations of segments of these lengths: 4 P + 7 s D per layer and so on.

    Of E experts J work for a token, so P counts J / E of their weights.

    A product with a weight costs two a weight and token forward, two for its input's gradient, and
    two for its own if it trains. Causal attention over s tokens costs 2 s N H a token forward and
    5 s N H backward, an encoder's twice that. Recomputing a block adds its forward pass. The last
    block of a classifier has one query, output and MLP row a segment, which sees all s tokens. What
    makes the rows of virtual tokens and prefixes is left out.

    Args:
        lengths: [n] tokens of each segment.
        trains: forward and backward; else forward alone.
    """
    scored = float(lengths.sum()) - len(lengths)
    config, prefix = model.config, _prefix(model)
    if isinstance(model.network, Decoder):
        lengths = lengths + model.network.virtual_tokens
    tokens = float(lengths.sum())
    window = config.sliding_window if isinstance(config, DecoderConfig) else None
    seen = lengths.astype(np.float64) if window is None else np.minimum(lengths, float(window))
    squares = float((seen * (2.0 * lengths - seen)).sum())  # s^2 where all keys are seen
    total = 0.0
    has_gradient = _input_trains(model)
    for block in model.network.blocks:
        pools, shares = _pools(model, block), {}
        if isinstance(block, Layer):
            own = block.attention.self
            readers, into_readers = (own.query, own.key, own.value), has_gradient
        else:
            assert isinstance(block, Block)
            readers = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
            into_readers = has_gradient or _trains(block.input_layernorm)
            shares = _expert_shares(block)
        has_gradient = has_gradient or _trains(block) or prefix.trains
        forward = backward = 0.0
        for layer in (module for module in block.modules() if isinstance(module, Linear)):
            rows = float(len(lengths)) if pools and layer not in readers[1:] else tokens
            rows *= shares.get(layer, 1.0)
            products = 2 * rows * layer.weight.numel()
            needs_input = into_readers or layer not in readers
            forward += products
            backward += products * (needs_input + layer.weight.requires_grad)
            for parameter in layer.adapters.parameters():
                products = 2 * rows * parameter.numel()
                forward += products
                backward += products * (1 + parameter.requires_grad)
        # Of causal attention only half of the pairs are computed.
        seen_by_last = float(seen.sum())
        pairs = seen_by_last if pools else squares if isinstance(block, Layer) else squares / 2
        in_front = prefix.tokens
        if isinstance(block, Block):
            prompts = block.self_attn.prompts.values()
            in_front += sum(len(p.rows) for p in prompts if isinstance(p, AdaptionPrompt))
        pairs += (len(lengths) if pools else tokens) * in_front
        attended = 2 * pairs * readers[0].out_features
        forward += 2 * attended
        backward += 5 * attended
        total += forward
        if trains and has_gradient:
            total += backward + (forward if checkpointing else 0.0)
    if isinstance(model.network, Encoder):
        dense = model.network.pooler.dense.weight
        products = 1 + trains * (has_gradient + dense.requires_grad)
        total += 2 * len(lengths) * dense.numel() * products
    if isinstance(model, CausalLM):
        products = 1 + trains + (trains and model.head_weight.requires_grad)
        total += 2 * scored * model.head_weight.numel() * products
    return total


def _expert_shares(block: Block) -> dict[nn.Module, float]:
    """The share of the tokens that pass through each layer of an expert."""
    sparse = block.block_sparse_moe
    if sparse is None:
        return {}
    share = sparse.top_k / len(sparse.experts)
    layers = (layer for layer in sparse.experts.modules() if isinstance(layer, Linear))
    return dict.fromkeys(layers, share)


def measured_rate(
    model: Model,
    make_objective: Callable[[Model], Objective],
    batch: PackedBatch,
    device: torch.device,
    *,
    checkpointing: bool,
) -> float:
    """Operations a second of a block or two and the head on the device, over a micro-batch.

    Args:
        model: the run's, on the meta device; its last blocks, which every adapter reaches, are
            built with random weights.
        make_objective: gives a model on the device its objective.
    """
    probe = copy.deepcopy(model)
    # The last block of a classifier is not like the others: there it needs one before it.
    del probe.network.blocks[: -1 if isinstance(model, CausalLM) else -2]
    probe = probe.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(std=0.02, generator=generator)
    objective = make_objective(probe)
    segments, best = 1, math.inf
    while True:
        part = _first_segments(batch, segments)
        best = min(_seconds(objective, part, device) for _ in range(_PROBE_REPEATS))
        if best * _PROBE_REPEATS >= _PROBE_SECONDS or segments >= len(batch.offsets) - 1:
            break
        segments *= 2
    operations = flops(probe, np.diff(part.offsets), trains=True, checkpointing=checkpointing)
    return operations / best


def _seconds(objective: Objective, batch: PackedBatch, device: torch.device) -> float:
    """One forward and backward pass."""
    began = time.perf_counter()
    objective.loss(batch, dropout_seed=0).loss_sum.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _first_segments(batch: PackedBatch, count: int) -> PackedBatch:
    offsets = batch.offsets[: count + 1]
    end = int(offsets[-1])
    return PackedBatch(
        batch.input_ids[:end],
        None if batch.labels is None else batch.labels[:end],
        offsets,
        batch.sample_ids[:count],
        None if batch.targets is None else batch.targets[:count],
        batch.rows[:count],
    )


class TimeLeft:
    """Seconds that a run still takes, from what its steps and validations have taken so far."""

    def __init__(
        self,
        *,
        total_steps: int,
        validate_every: int | None = None,
        validation_in_steps: float = 0.0,
    ) -> None:
        """Begin with the first step.

        validate_every: steps between two validations; None where there are none.
        validation_in_steps: how many steps' time one takes, used until one has been measured.
        """
        self._total_steps, self._validate_every = total_steps, validate_every
        self._validation_in_steps = validation_in_steps
        self._first: float | None = None  # seconds of the first step
        self._others, self._count = 0.0, 0  # seconds and number of the other steps
        self._between = 0.0  # seconds between them: checkpoints, and the reading of notes
        self._validation: float | None = None  # seconds of the last one

    def step(self, seconds: float, *, between: float) -> None:
        """A step took `seconds`, and since the last step or validation had ended, `between`."""
        self._between += between
        if self._first is None:
            self._first = seconds
        else:
            self._others += seconds
            self._count += 1

    def validation(self, seconds: float) -> None:
        """A validation took `seconds`."""
        self._validation = seconds

    def seconds(self, step: int) -> float:
        """What remains after `step`, which has just been taken."""
        if self._first is None:
            return 0.0
        # The first step is left out as soon as there is another, for it also warms up.
        mean = self._others / self._count if self._count else self._first
        left = (self._total_steps - step) * (mean + self._between / (self._count + 1))
        if self._validate_every:
            due = math.ceil(self._total_steps / self._validate_every) - step // self._validate_every
            measured = self._validation
            left += due * (mean * self._validation_in_steps if measured is None else measured)
        return left


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
