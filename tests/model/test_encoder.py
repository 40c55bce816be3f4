"""The encoder against transformers' BERT: logits, gradients, training, packing, dropout."""

import copy
import typing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.activations import Activations
from model.batch import TokenBatch
from tests.model.bert import (
    hugging_face_twin,
    make_classifier,
    make_config,
    make_notes,
    one_by_one,
    padding_trains,
)
from tests.model.oracle import gradients, relative_error

CLASSES = torch.tensor([0, 2, 1, 2, 0])
LABELS = torch.tensor(
    [[0.0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64
)
CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "one layer": {"num_hidden_layers": 1},
    "one head, odd width": {"num_attention_heads": 1, "hidden_size": 33, "intermediate_size": 41},
    "one token type": {"type_vocab_size": 1},
    "another epsilon": {"layer_norm_eps": 1e-2},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("labels", [CLASSES, LABELS], ids=["classes", "several labels"])
def test_logits_loss_and_every_gradient_are_transformers(
    changes: dict[str, Any], labels: Tensor
) -> None:
    ours = make_classifier(make_config(**changes))
    twin = hugging_face_twin(ours)
    padding_trains(twin)
    batch = make_notes()
    logits = one_by_one(twin, batch)
    assert relative_error(ours.scores(batch), logits) < 1e-9
    loss = ours(batch, labels)
    true_loss = (
        nn.functional.binary_cross_entropy_with_logits(logits, labels)
        if labels.is_floating_point()
        else nn.functional.cross_entropy(logits, labels)
    )
    assert loss.denominator == (15.0 if labels.is_floating_point() else 5.0)
    assert relative_error(loss.loss_sum / loss.denominator, true_loss) < 1e-9
    (loss.loss_sum / loss.denominator).backward()
    true_loss.backward()
    truths = gradients(twin)
    assert gradients(ours).keys() == truths.keys() == dict(ours.named_parameters()).keys()
    for name, truth in truths.items():
        if name.endswith("self.key.bias"):  # softmax does not see it: zero, up to rounding
            assert gradients(ours)[name].abs().max() < 1e-12 > truth.abs().max()
            continue
        assert truth.any(), name
        assert relative_error(gradients(ours)[name], truth) < 1e-9, name


def test_a_padded_batch_of_transformers_gives_the_same_logits() -> None:
    ours = make_classifier()
    batch = make_notes()
    notes = batch.input_ids.split(batch.segments.lengths)
    padded = nn.utils.rnn.pad_sequence(notes, batch_first=True, padding_value=0)
    mask = torch.arange(padded.shape[1]) < torch.tensor(batch.segments.lengths)[:, None]
    logits = hugging_face_twin(ours)(input_ids=padded, attention_mask=mask.long()).logits
    assert relative_error(ours.scores(batch), logits) < 1e-9


def test_float32_is_as_near_to_the_truth_as_transformers() -> None:
    """Logits and every gradient, root mean square over 24 batches."""
    rounded = make_classifier().float()
    exact = copy.deepcopy(rounded).double()
    twin = hugging_face_twin(rounded)
    padding_trains(twin)
    squares: dict[str, list[float]] = {}
    for seed in range(24):
        batch = make_notes(seed)
        found = []
        for model in (exact, rounded, twin):
            model.zero_grad()
            logits = one_by_one(model, batch) if model is twin else model.scores(batch)
            nn.functional.cross_entropy(logits, CLASSES).backward()
            found.append({"logits": logits.detach(), **gradients(model)})
        for name, truth in found[0].items():
            if name.endswith("self.key.bias"):
                continue
            totals = squares.setdefault(name, [0.0, 0.0])
            for i in (0, 1):
                totals[i] += relative_error(found[1 + i][name], truth) ** 2
    for name, (ours_total, oracle_total) in squares.items():
        assert ours_total <= 4 * oracle_total, name  # squared: twice the error


def test_ten_training_steps_are_transformers() -> None:
    ours = make_classifier()
    twin = hugging_face_twin(ours)
    padding_trains(twin)
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    optimisers = [
        torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1) for model in (ours, twin)
    ]
    for step in range(10):
        batch = make_notes(step % 2)
        loss = ours(batch, CLASSES)
        pair = (
            loss.loss_sum / loss.denominator,
            nn.functional.cross_entropy(one_by_one(twin, batch), CLASSES),
        )
        for optimiser, value, name in zip(optimisers, pair, losses, strict=True):
            optimiser.zero_grad()
            value.backward()
            losses[name].append(value.item())
        for model in (ours, twin):  # Adam would make a step of size lr out of a rounding error
            for name, parameter in model.named_parameters():
                if name.endswith("self.key.bias"):
                    assert parameter.grad is not None
                    parameter.grad.zero_()
        for optimiser in optimisers:
            optimiser.step()
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-9)
    assert losses["ours"][-1] < losses["ours"][0] - 0.3
    theirs = dict(twin.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout_seed", [None, 7])
def test_packed_equals_one_by_one(dropout_seed: int | None) -> None:
    together = make_classifier(make_config(classifier_dropout=0.4))
    alone = copy.deepcopy(together)
    batch = make_notes()
    loss = together(batch, CLASSES, dropout_seed=dropout_seed)
    loss.loss_sum.backward()
    total = torch.zeros((), dtype=torch.float64)
    notes = batch.input_ids.split(batch.segments.lengths)
    for sample, (note, label) in enumerate(zip(notes, CLASSES, strict=True)):
        packed = TokenBatch.from_arrays(note, [0, len(note)], sample_ids=[sample])
        one = alone(packed, label[None], dropout_seed=dropout_seed)
        one.loss_sum.backward()
        total += one.loss_sum.detach()
    assert relative_error(loss.loss_sum, total) < 1e-12
    for name, gradient in gradients(together).items():
        if not name.endswith("self.key.bias"):
            assert relative_error(gradient, gradients(alone)[name]) < 1e-12, name


@pytest.mark.parametrize("activations", typing.get_args(Activations))
@pytest.mark.parametrize("dropout_seed", [None, 5])
def test_pooling_early_changes_no_number(
    activations: Activations, dropout_seed: int | None
) -> None:
    """The last layer for [CLS] alone, against all of its rows: pooled rows and gradients."""
    model = make_classifier(make_config(hidden_dropout_prob=0.3))
    whole = copy.deepcopy(model)
    batch = make_notes()
    options: dict[str, Any] = {"dropout_seed": dropout_seed, "activations": activations}
    pooled = model.bert(batch, pool=True, **options)
    hidden = whole.bert(batch, **options)[batch.segments.cu_seqlens[:-1]]
    expected = whole.bert.pooler(hidden)
    assert relative_error(pooled, expected) < 1e-12
    for one, rows in ((model, pooled), (whole, expected)):
        nn.functional.cross_entropy(one.classifier(rows), CLASSES).backward()
    assert gradients(model).keys() == gradients(whole).keys()
    for name, gradient in gradients(whole).items():
        if not name.endswith("self.key.bias"):
            assert relative_error(gradients(model)[name], gradient) < 1e-12, name


def test_dropout_is_a_function_of_the_seed_and_drops_its_share() -> None:
    model = make_classifier(make_config(hidden_dropout_prob=0.25))
    batch = make_notes()
    one = model.scores(batch, dropout_seed=3)
    assert torch.equal(one, model.scores(batch, dropout_seed=3))
    assert (one - model.scores(batch, dropout_seed=4)).abs().max() > 1e-3
    assert (one - model.scores(batch)).abs().max() > 1e-3
    embedded = model.bert.embeddings(batch, torch.float64, torch.arange(80, dtype=torch.int32))
    assert float((embedded == 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    still = make_classifier(make_config(hidden_dropout_prob=0.0))
    assert torch.equal(still.scores(batch, dropout_seed=3), still.scores(batch))


def test_bfloat16_weights_compute_in_what_is_asked_for() -> None:
    model = make_classifier().to(torch.bfloat16)
    batch = make_notes()
    truth = make_classifier().scores(batch)
    assert model.scores(batch).dtype == torch.float32
    assert model.scores(batch, compute_dtype=torch.float64).dtype == torch.float64
    assert relative_error(model.scores(batch, compute_dtype=torch.float32), truth) < 0.2
