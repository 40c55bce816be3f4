"""Mixtral's router loss and training against transformers, and what packing leaves alone."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from model.batch import TokenBatch
from model.experts import load_balancing_loss
from model.heads import IGNORE, CausalLM
from tests.model.oracle import (
    CONFIGS,
    float64_twin,
    fused,
    gradients,
    hugging_face_twin,
    make_causal_lm,
    relative_error,
)

COEF = 0.02
LENGTHS = (31, 5, 18, 31)


def make_batch(vocab_size: int, seed: int = 0) -> tuple[TokenBatch, Tensor]:
    """Packed notes and labels, some of them not scored; no token is transformers' padding."""
    generator = torch.Generator().manual_seed(seed)
    offsets = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    ids = torch.randint(1, vocab_size, (offsets[-1],), generator=generator)
    is_scored = torch.rand(len(ids), generator=generator) > 0.3
    labels = ids.where(is_scored, IGNORE)
    labels[offsets[:-1]] = IGNORE
    return TokenBatch.from_arrays(ids, offsets), labels


def padded(batch: TokenBatch, labels: Tensor) -> dict[str, Tensor]:
    """The same notes as transformers takes them: rows padded on the right, and a mask."""
    lengths = batch.segments.lengths
    rows = {
        "input_ids": torch.zeros(len(lengths), max(lengths), dtype=torch.int64),
        "attention_mask": torch.zeros(len(lengths), max(lengths), dtype=torch.int64),
        "labels": torch.full((len(lengths), max(lengths)), IGNORE),
    }
    parts = zip(batch.input_ids.split(lengths), labels.split(lengths), strict=True)
    for row, (ids, scored) in enumerate(parts):
        rows["input_ids"][row, : len(ids)] = ids
        rows["attention_mask"][row, : len(ids)] = 1
        rows["labels"][row, : len(ids)] = scored
    return rows


def true_balance(router_logits: tuple[Tensor, ...], is_real: Tensor, top_k: int) -> Tensor:
    """The Switch loss of all layers' real tokens together, written from its formula."""
    logits = torch.cat([layer[is_real.flatten()] for layer in router_logits])
    experts = logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(top_k, -1).indices, 1.0)
    return experts * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()


def true_loss(twin: PreTrainedModel, rows: dict[str, Tensor], coef: float, top_k: int) -> Tensor:
    """Mean cross-entropy and `coef` times the balance, in the twin's dtype throughout."""
    out = twin(rows["input_ids"], rows["attention_mask"], output_router_logits=True)
    targets = rows["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )
    is_real = rows["attention_mask"].bool()
    return loss + coef * true_balance(out.router_logits, is_real, top_k)


def mean_loss(model: CausalLM, batch: TokenBatch, labels: Tensor) -> Tensor:
    loss = model(batch, labels)
    return loss.total / loss.denominator


def test_the_loss_is_that_of_transformers_for_the_same_notes_padded() -> None:
    ours = make_causal_lm(CONFIGS["mixtral"]).float()
    twin = hugging_face_twin(ours)
    batch, labels = make_batch(97)
    out = twin(**padded(batch, labels), output_router_logits=True)
    loss = ours(batch, labels)
    assert twin.router_aux_loss_coef == COEF
    torch.testing.assert_close(loss.aux["router"], COEF * out.aux_loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.total / loss.denominator, out.loss, rtol=1e-5, atol=1e-6)
    assert float(out.aux_loss.detach()) > 2.01  # not the balanced value, which says nothing


def test_loss_and_gradients_agree_in_float64() -> None:
    ours = make_causal_lm(CONFIGS["mixtral"])
    twin = float64_twin(ours)
    batch, labels = make_batch(97)
    found, truth = mean_loss(ours, batch, labels), true_loss(twin, padded(batch, labels), COEF, 2)
    assert relative_error(found, truth) < 1e-9
    found.backward()
    truth.backward()
    wanted = gradients(twin)
    for name, gradient in fused(gradients(ours)).items():
        assert relative_error(gradient, wanted[name]) < 1e-9, name
    without = make_causal_lm(dataclasses.replace(ours.config, router_aux_loss_coef=0.0))
    mean_loss(without, batch, labels).backward()
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert relative_error(gradients(without)[gate], gradients(ours)[gate]) > 1e-3


@pytest.mark.parametrize("name", ["mistral-window", "mixtral", "mixtral-window"])
def test_ten_steps_are_those_of_transformers(name: str) -> None:
    """AdamW on all weights, the router loss included, in float64."""
    ours = make_causal_lm(CONFIGS[name])
    twin = float64_twin(ours)
    sides = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (ours, twin)]
    coef, top_k = ours.config.router_aux_loss_coef, ours.config.num_experts_per_tok
    first = copy.deepcopy(ours.state_dict())
    for step in range(10):
        batch, labels = make_batch(97, seed=step)
        found, rows = mean_loss(ours, batch, labels), padded(batch, labels)
        if ours.config.num_local_experts:
            truth = true_loss(twin, rows, coef, top_k)
        else:
            logits = twin(rows["input_ids"], rows["attention_mask"]).logits[:, :-1]
            truth = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=IGNORE
            )
        assert relative_error(found, truth) < 1e-9, step
        for optimiser, loss in zip(sides, (found, truth), strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    wanted = twin.state_dict()
    for key, weight in fused(ours.state_dict()).items():
        assert relative_error(weight, wanted[key]) < 1e-9, key
    moved = [relative_error(first[key], weight) for key, weight in ours.state_dict().items()]
    assert min(moved) > 1e-4


def test_balance_is_that_of_transformers_with_all_its_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(50, 6, generator=generator) * (i + 1) for i in range(3)]
    found = load_balancing_loss(logits, 2)
    torch.testing.assert_close(found, load_balancing_loss_func(tuple(logits), 6, 2))
    equal = [torch.eye(6).repeat(2, 1) * 1e-6 + torch.roll(torch.eye(6), 1).repeat(2, 1) * 1e-6]
    assert float(load_balancing_loss(equal, 2)) == pytest.approx(2.0)
    same = [torch.tensor([[50.0, 49.0, 0.0, 0.0]]).expand(9, 4)]
    assert float(load_balancing_loss(same, 2)) == pytest.approx(4.0)


def test_packed_notes_equal_notes_one_by_one() -> None:
    """Rows and router logits do not depend on the packing; the balance is that of all together."""
    ours = make_causal_lm(CONFIGS["mixtral"])
    batch, labels = make_batch(97)
    lengths = batch.segments.lengths
    together: list[Tensor] = []
    rows = ours.model(batch, router_logits=together)
    alone: list[list[Tensor]] = []
    for i, ids in enumerate(batch.input_ids.split(lengths)):
        alone.append([])
        one = TokenBatch.from_arrays(ids, [0, len(ids)])
        own = ours.model(one, router_logits=alone[-1])
        assert relative_error(own, rows.split(lengths)[i]) < 1e-12
    joined = [torch.cat(layer) for layer in zip(*alone, strict=True)]
    for found, expected in zip(together, joined, strict=True):
        assert relative_error(found, expected) < 1e-12
    balance = ours(batch, labels).aux["router"] / COEF
    assert relative_error(balance, load_balancing_loss(joined, 2)) < 1e-12


@pytest.mark.parametrize("name", ["mixtral", "mixtral-window"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    kept, recomputed = make_causal_lm(CONFIGS[name]), make_causal_lm(CONFIGS[name])
    batch, labels = make_batch(97)
    kept(batch, labels).total.backward()
    recomputed(batch, labels, activations="checkpoint").total.backward()
    for parameter, gradient in gradients(kept).items():
        assert torch.equal(gradient, gradients(recomputed)[parameter]), parameter


def test_an_idle_expert_gets_a_gradient_of_zeros() -> None:
    """As a slice of transformers' stack does, so an optimiser treats both alike."""
    ours = make_causal_lm(CONFIGS["mixtral"])
    with torch.no_grad():
        ours.model.layers[1].block_sparse_moe.gate.weight[2:] *= 1e-3  # two are mostly behind
    ids = torch.tensor([5, 5, 5])
    batch = TokenBatch.from_arrays(ids, [0, 3])
    ours(batch, ids).loss_sum.backward()
    experts = ours.model.layers[1].block_sparse_moe.experts
    found = [expert.w2.weight.grad for expert in experts]
    assert any(not gradient.any() for gradient in found)
    assert any(gradient.any() for gradient in found)


def test_bfloat16_routes_in_float32() -> None:
    exact = make_causal_lm(CONFIGS["mixtral"])
    batch, labels = make_batch(97)
    narrow = copy.deepcopy(exact).to(torch.bfloat16)
    loss = narrow(batch, labels)
    assert loss.loss_sum.dtype == loss.aux["router"].dtype == torch.float32
    assert relative_error(loss.total, exact(batch, labels).total) < 0.1
