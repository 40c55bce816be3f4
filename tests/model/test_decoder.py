"""The decoder against transformers, and its own promises: packing, recomputation, dropout keys."""

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import kernels
from model.batch import TokenBatch
from model.decoder import init_weights, rope_tables
from model.heads import IGNORE, CausalLM
from model.linear import Linear
from tests.model.oracle import (
    CONFIGS,
    LLAMA3,
    float64_twin,
    fused,
    gradients,
    hugging_face_config,
    hugging_face_twin,
    make_causal_lm,
    make_config,
    relative_error,
)

LENGTHS = (1, 23, 40, 7, 40)


def make_notes(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each note; a third of the labels is not scored."""
    generator = torch.Generator().manual_seed(5)
    notes = []
    for length in lengths:
        ids = torch.randint(vocab_size, (length,), generator=generator)
        is_scored = torch.rand(length, generator=generator) > 0.33
        notes.append((ids, ids.where(is_scored, IGNORE)))
    return notes


def packed(notes: list[tuple[Tensor, Tensor]]) -> tuple[TokenBatch, Tensor]:
    offsets = torch.tensor([0, *(len(ids) for ids, _ in notes)]).cumsum(0).tolist()
    batch = TokenBatch.from_arrays(torch.cat([ids for ids, _ in notes]), offsets)
    return batch, torch.cat([labels for _, labels in notes])


def run_ours(model: CausalLM, notes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits [M, V] and the summed loss, whose gradients are left on the parameters."""
    batch, labels = packed(notes)
    loss = model(batch, labels)
    loss.loss_sum.backward()
    with torch.no_grad():
        return model.logits(batch), loss.loss_sum.detach()


def run_oracle(twin: nn.Module, notes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The same of transformers, one note after another."""
    logits, loss_sum = [], torch.zeros((), dtype=torch.float64)
    for ids, labels in notes:
        logits_TV = twin(ids[None]).logits[0]
        logits.append(logits_TV.detach())
        loss = nn.functional.cross_entropy(
            logits_TV[:-1], labels[1:], ignore_index=IGNORE, reduction="sum"
        )
        loss.backward()
        loss_sum += loss.detach()
    return torch.cat(logits), loss_sum


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers_in_float64(name: str) -> None:
    ours = make_causal_lm(CONFIGS[name])
    twin = float64_twin(ours)
    notes = make_notes(ours.config.vocab_size)
    logits, loss_sum = run_ours(ours, notes)
    true_logits, true_loss = run_oracle(twin, notes)
    assert relative_error(logits, true_logits) < 1e-9
    assert relative_error(loss_sum, true_loss) < 1e-9
    found, truth = fused(gradients(ours)), gradients(twin)
    assert found.keys() == truth.keys() == fused(dict(ours.named_parameters())).keys()
    for parameter, gradient in found.items():
        assert relative_error(gradient, truth[parameter]) < 1e-9, parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_as_near_to_the_truth_as_transformers(name: str) -> None:
    """Errors are root mean squares over four models: one may round well or badly by luck."""
    ours: dict[str, float] = defaultdict(float)
    theirs: dict[str, float] = defaultdict(float)
    for seed in range(4):
        exact = make_causal_lm(CONFIGS[name], seed=seed)
        rounded = copy.deepcopy(exact).float()
        exact.load_state_dict({key: value.double() for key, value in rounded.state_dict().items()})
        twin = hugging_face_twin(rounded)
        notes = make_notes(exact.config.vocab_size)
        true_logits, true_loss = run_oracle(truth := float64_twin(exact), notes)
        logits, loss = run_ours(rounded, notes)
        twin_logits, twin_loss = run_oracle(twin, notes)
        true = {"logits": true_logits, "loss": true_loss} | gradients(truth)
        found = {"logits": logits, "loss": loss} | fused(gradients(rounded))
        oracle = {"logits": twin_logits, "loss": twin_loss} | gradients(twin)
        for what, exactly in true.items():
            ours[what] += relative_error(found[what], exactly) ** 2
            theirs[what] += relative_error(oracle[what], exactly) ** 2
    # The loss is a single number: a few roundings of it are always allowed.
    theirs["loss"] = max(theirs["loss"], 1e-12)
    for what, error in ours.items():
        assert error <= 4 * theirs[what], what


@pytest.mark.parametrize("name", ["grouped-query", "llama3-rope", "linear-rope", "wide-heads"])
def test_rope_tables_are_the_bits_of_transformers(name: str) -> None:
    config = CONFIGS[name]
    positions = torch.arange(4096)
    oracle = LlamaRotaryEmbedding(hugging_face_config(config))
    for dtype in (torch.float32, torch.bfloat16):
        found = rope_tables(config, positions, dtype)
        expected = oracle(torch.empty(0, dtype=dtype), positions[None])
        for table, twice in zip(found, expected, strict=True):
            assert torch.equal(table, twice[0, :, : config.head_dim // 2])


def test_llama3_scaling_reaches_all_three_of_its_ranges() -> None:
    """Else the agreement above would not have seen the ramp."""
    config = CONFIGS["llama3-rope"]
    plain = make_config(rope_theta=config.rope_theta)
    one = torch.ones(1, dtype=torch.int64)
    ratio = torch.atan2(*rope_tables(config, one, torch.float64)[::-1]) / torch.atan2(
        *rope_tables(plain, one, torch.float64)[::-1]
    )
    assert ratio.max() == pytest.approx(1.0)
    assert ratio.min() == pytest.approx(1.0 / LLAMA3.factor)
    assert ((ratio > 1.01 / LLAMA3.factor) & (ratio < 0.99)).any()


@pytest.mark.parametrize("name", ["grouped-query", "llama3-rope"])
def test_packed_notes_equal_notes_one_by_one(name: str) -> None:
    notes = make_notes(97)
    together = make_causal_lm(CONFIGS[name])
    alone = copy.deepcopy(together)
    logits, loss_sum = run_ours(together, notes)
    one_by_one = [run_ours(alone, [note]) for note in notes]
    assert relative_error(logits, torch.cat([logits for logits, _ in one_by_one])) < 1e-12
    assert relative_error(loss_sum, sum(loss for _, loss in one_by_one)) < 1e-12
    for parameter, gradient in gradients(together).items():
        assert relative_error(gradient, gradients(alone)[parameter]) < 1e-12, parameter


class Adapter(nn.Module):
    """The least that a linear layer's slot takes."""

    def __init__(self, layer: Linear, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(3, layer.in_features, dtype=torch.float64))
        self.lora_B = nn.Parameter(torch.randn(layer.out_features, 3, dtype=torch.float64))
        self.dropout = dropout

    def low_rank(self) -> kernels.LowRank:
        return kernels.LowRank(self.lora_A, self.lora_B, 0.1, self.dropout, 7)


def make_adapted(dropout: float) -> CausalLM:
    """A frozen base, its embedding included, with an adapter on every linear layer."""
    torch.manual_seed(0)
    model = make_causal_lm(make_config()).requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Linear):
            module.adapters["clinical"] = Adapter(module, dropout)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_a_frozen_base_the_same_adapter_gradients(dropout: float) -> None:
    batch, labels = packed(make_notes(97))
    kept, recomputed = make_adapted(dropout), make_adapted(dropout)
    losses = []
    for model, activations in ((kept, "save"), (recomputed, "checkpoint")):
        loss = model(batch, labels, dropout_seed=3, activations=activations)
        loss.loss_sum.backward()
        losses.append(loss.loss_sum.detach())
    assert torch.equal(*losses)
    found = gradients(recomputed)
    assert len(found) == 2 * 7 * 2  # A and B of seven layers in two blocks
    for parameter, gradient in found.items():
        assert gradient.count_nonzero() > 0, parameter
        assert torch.equal(gradient, gradients(kept)[parameter]), parameter


def test_recomputed_blocks_keep_less_for_the_backward_pass() -> None:
    batch, labels = packed(make_notes(97))
    kept_bytes = []
    for activations in ("save", "checkpoint"):
        model, sizes = make_adapted(0.0), {}

        def count(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch, labels, activations=activations)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept_bytes.append(sum(size for place, size in sizes.items() if place not in weights))
    assert kept_bytes[1] < 0.5 * kept_bytes[0]


def test_dropout_follows_the_sample_not_its_place_in_the_batch() -> None:
    model = make_adapted(0.3)
    notes = make_notes(97, (9, 14))
    ids = [ids for ids, _ in notes]
    forward = TokenBatch.from_arrays(torch.cat(ids), [0, 9, 23], [70, 71])
    backward = TokenBatch.from_arrays(torch.cat(ids[::-1]), [0, 14, 23], [71, 70])
    rows = model.model(forward, dropout_seed=11)
    swapped = model.model(backward, dropout_seed=11)
    assert relative_error(torch.cat([swapped[14:], swapped[:14]]), rows) < 1e-12
    assert relative_error(model.model(forward, dropout_seed=12), rows) > 1e-3
    assert relative_error(model.model(forward), rows) > 1e-3


@pytest.mark.parametrize(
    "layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
)
def test_dropout_reaches_every_layer(layer: str) -> None:
    model = make_causal_lm(make_config())
    chosen = model.get_submodule(f"model.layers.1.{layer}")
    chosen.adapters["clinical"] = Adapter(chosen, 0.3)
    batch, _ = packed(make_notes(97))
    rows = model.model(batch)
    assert relative_error(model.model(batch, dropout_seed=1), rows) > 1e-3


def test_bfloat16_weights_compute_in_bfloat16() -> None:
    model = make_causal_lm(make_config()).to(torch.bfloat16)
    batch, labels = packed(make_notes(97))
    assert model.model(batch).dtype == torch.bfloat16
    loss = model(batch, labels)
    assert loss.loss_sum.dtype == torch.float32
    exact = make_causal_lm(make_config())
    assert relative_error(loss.loss_sum, exact(batch, labels).loss_sum) < 0.05


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    states = []
    for seed in (1, 1, 2):
        model = CausalLM(make_config(attention_bias=True, hidden_size=64))
        init_weights(model, 0.02, seed)
        states.append(model.state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert float(first["model.embed_tokens.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert not first["model.layers.0.self_attn.q_proj.bias"].any()
    assert (first["model.norm.weight"] == 1.0).all()
