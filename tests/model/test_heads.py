"""The heads against transformers and torch's own losses, and the promises of their losses."""

import copy
import typing

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lora.attach import adapter_parameters, attach
from lora.config import LoraConfig
from model.activations import Activations
from model.batch import Segments, TokenBatch
from model.heads import IGNORE, CausalLM, SequenceClassifier, supervised_tokens
from tests.model.oracle import (
    CONFIGS,
    float64_twin,
    fused,
    gradients,
    hugging_face_twin,
    make_causal_lm,
    make_config,
    randomise,
    relative_error,
)

LENGTHS = (3, 17, 1, 30)


def make_classifier(
    num_labels: int, seed: int = 0, name: str = "grouped-query"
) -> SequenceClassifier:
    model = SequenceClassifier(CONFIGS[name], num_labels).double()
    randomise(model, seed)
    return model


def make_notes() -> tuple[list[Tensor], TokenBatch]:
    """Notes that hold the pad token in the middle and at the end: it is a token like any other."""
    generator = torch.Generator().manual_seed(2)
    notes = [torch.randint(1, 97, (length,), generator=generator) for length in LENGTHS]
    notes[1][5] = notes[3][-1] = make_config().pad_token_id
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    return notes, TokenBatch.from_arrays(torch.cat(notes), offsets)


def test_a_first_token_is_scored_only_behind_virtual_ones() -> None:
    labels, segments = torch.tensor([10, 11, IGNORE, 13, 20, 21, 30]), [0, 4, 6, 7]
    places, targets = supervised_tokens(labels, Segments.from_offsets(segments))
    assert places.tolist() == [1, 3, 5]
    assert targets.tolist() == [11, 13, 21]
    assert labels[0] == 10  # the caller's labels are left alone
    places, targets = supervised_tokens(labels, Segments.from_offsets(segments), first=True)
    assert places.tolist() == [0, 1, 3, 4, 5, 6]
    assert targets.tolist() == [10, 11, 13, 20, 21, 30]


def test_causal_loss_of_a_batch_without_scored_tokens_is_zero() -> None:
    model = make_causal_lm(make_config())
    batch = TokenBatch.from_arrays([4, 5, 6], [0, 1, 3])
    labels = torch.tensor([4, 5, IGNORE])  # scored are two first tokens, which nothing predicts
    loss = model(batch, labels)
    assert (loss.loss_sum.item(), loss.denominator, loss.aux) == (0.0, 0.0, {})
    loss.loss_sum.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_denominators_are_known_before_the_forward_pass() -> None:
    notes, batch = make_notes()
    labels = torch.cat(notes).clone()
    labels[::3] = IGNORE
    model = make_causal_lm(make_config())
    # 51 tokens, 17 of them ignored, and of the four first tokens one (at 20) is not among those.
    assert model(batch, labels).denominator == 33.0
    classifier = make_classifier(3)
    classes = torch.tensor([0, 2, 1, 2])
    weights = torch.tensor([0.5, 1.0, 4.0])
    assert classifier.denominator(classes) == 4.0
    assert classifier.denominator(classes, weights) == 9.5
    assert classifier.denominator(torch.zeros(4, 3)) == 12.0
    assert classifier(batch, classes, class_weights=weights).denominator == 9.5


def test_the_loss_makes_no_tensor_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(vocab_size=4096)
    model = make_causal_lm(config).float()
    ids = torch.randint(4096, (512,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("kernels.reference.CHUNK_ELEMENTS", 64 * 4096)
    sizes = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Sizes():
        model(TokenBatch.from_arrays(ids, [0, 512]), ids).loss_sum.backward()
    assert max(sizes) == 64 * 4096 < 511 * 4096  # one chunk of logits; the weight is smaller


@pytest.mark.parametrize(
    ("name", "num_labels"),
    [("grouped-query", 2), ("grouped-query", 5), ("mistral-window", 2), ("mixtral-window", 3)],
)
def test_classifier_agrees_with_transformers(name: str, num_labels: int) -> None:
    ours = make_classifier(num_labels, name=name)
    twin = float64_twin(ours)
    notes, batch = make_notes()
    classes = torch.tensor([0, 1, 1, num_labels - 1])
    # transformers pools the last token of a note that comes alone, pad token or not, once it
    # knows of none; and its embedding gives that token no gradient.
    twin.config.pad_token_id = twin.model.embed_tokens.padding_idx = None
    results = [twin(note[None], labels=c[None]) for note, c in zip(notes, classes, strict=True)]
    assert relative_error(ours.scores(batch), torch.cat([r.logits for r in results])) < 1e-9
    loss = ours(batch, classes)
    true_loss = sum(result.loss for result in results)
    assert loss.denominator == 4.0
    assert relative_error(loss.loss_sum, true_loss) < 1e-9
    loss.loss_sum.backward()
    true_loss.backward()
    found = fused(gradients(ours))
    for parameter, gradient in gradients(twin).items():
        assert relative_error(found[parameter], gradient) < 1e-9, parameter


def test_classifier_agrees_with_a_padded_batch_of_transformers() -> None:
    ours = make_classifier(3)
    twin = float64_twin(ours)
    pad = ours.config.pad_token_id
    generator = torch.Generator().manual_seed(2)
    notes = [torch.randint(1, 97, (length,), generator=generator) for length in LENGTHS]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    batch = TokenBatch.from_arrays(torch.cat(notes), offsets)
    padded = nn.utils.rnn.pad_sequence(notes, batch_first=True, padding_value=pad)
    mask = torch.arange(padded.shape[1]) < torch.tensor(LENGTHS)[:, None]
    logits = twin(padded, attention_mask=mask).logits
    assert relative_error(ours.scores(batch), logits) < 1e-9


def test_classifier_in_float32_is_as_near_to_the_truth_as_transformers() -> None:
    exact = make_classifier(3)
    rounded = copy.deepcopy(exact).float()
    exact.load_state_dict({key: value.double() for key, value in rounded.state_dict().items()})
    twin, truth = hugging_face_twin(rounded), float64_twin(exact)
    notes, batch = make_notes()
    twin.config.pad_token_id = truth.config.pad_token_id = None
    true = torch.cat([truth(note[None]).logits for note in notes])
    oracle = torch.cat([twin(note[None]).logits for note in notes])
    assert relative_error(rounded.scores(batch), true) <= 2 * relative_error(oracle, true)


def test_weighted_and_multi_label_losses_are_torch_s_own() -> None:
    model = make_classifier(3)
    _, batch = make_notes()
    scores = model.scores(batch)
    classes, weights = torch.tensor([0, 2, 1, 2]), torch.tensor([0.5, 1.0, 4.0])
    loss = model(batch, classes, class_weights=weights)
    mean = nn.functional.cross_entropy(scores, classes, weight=weights.double())
    assert relative_error(loss.loss_sum / loss.denominator, mean) < 1e-12
    labels = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    loss = model(batch, labels)
    mean = nn.functional.binary_cross_entropy_with_logits(scores, labels.double())
    assert relative_error(loss.loss_sum / loss.denominator, mean) < 1e-12


def test_classifier_packed_equals_one_by_one() -> None:
    together = make_classifier(3)
    alone = copy.deepcopy(together)
    notes, batch = make_notes()
    classes = torch.tensor([0, 2, 1, 2])
    loss = together(batch, classes)
    loss.loss_sum.backward()
    total = torch.zeros((), dtype=torch.float64)
    for note, label in zip(notes, classes, strict=True):
        one = alone(TokenBatch.from_arrays(note, [0, len(note)]), label[None])
        one.loss_sum.backward()
        total += one.loss_sum.detach()
    assert relative_error(loss.loss_sum, total) < 1e-12
    for name, gradient in gradients(together).items():
        assert relative_error(gradient, gradients(alone)[name]) < 1e-12, name


@pytest.mark.parametrize("activations", typing.get_args(Activations))
@pytest.mark.parametrize("dropout_seed", [None, 5])
@pytest.mark.parametrize("name", ["grouped-query", "mistral-window", "mixtral-window"])
def test_pooling_early_changes_no_number(
    name: str, activations: Activations, dropout_seed: int | None
) -> None:
    """The last block for the last tokens alone, against all of its rows: logits and gradients."""
    model = make_classifier(3, name=name)
    settings = LoraConfig(r=3, lora_dropout=0.3, target_modules="all-linear")
    attach(model, "downstream", settings, seed=0)
    torch.manual_seed(0)
    for parameter in adapter_parameters(model, "downstream"):
        nn.init.normal_(parameter, std=0.2)
    model.double()
    whole = copy.deepcopy(model)
    _, batch = make_notes()
    classes = torch.tensor([0, 2, 1, 2])
    options = {"dropout_seed": dropout_seed, "activations": activations}
    pooled = model.model(batch, pool=True, **options)
    hidden = whole.model(batch, **options)[batch.segments.cu_seqlens[1:] - 1]
    assert relative_error(pooled, hidden) < 1e-12
    for one, rows in ((model, pooled), (whole, hidden)):
        nn.functional.cross_entropy(one.score(rows), classes).backward()
    assert gradients(model).keys() == gradients(whole).keys()
    for parameter, gradient in gradients(whole).items():
        if not gradient.any():  # of an expert that no note's last token chose
            assert not gradients(model)[parameter].any(), parameter
            continue
        assert relative_error(gradients(model)[parameter], gradient) < 1e-12, parameter


def test_pooling_early_saves_what_it_promises() -> None:
    """In the last block all products but those of keys and values go, for every row but one."""
    config = make_config(num_key_value_heads=4, num_hidden_layers=4)
    model = SequenceClassifier(config, 2)
    randomise(model, 0)
    batch = TokenBatch.from_arrays(torch.arange(96) % 97, [0, 96])
    counts = []
    for pool in (False, True):
        with FlopCounterMode(display=False) as counter:
            model.model(batch, pool=pool)
        counts.append(counter.get_total_flops())
    block = 96 * 2 * (4 * 32 * 32 + 3 * 32 * 56)
    saved = block - 96 * 2 * (2 * 32 * 32) - 2 * (2 * 32 * 32 + 3 * 32 * 56)
    # Attention is not counted on a CPU.
    assert counts[0] == 4 * block
    assert counts[0] - counts[1] == saved


def test_bfloat16_classifier_scores_in_float32() -> None:
    model = make_classifier(3).to(torch.bfloat16)
    _, batch = make_notes()
    assert model.scores(batch).dtype == torch.float32


def test_heads_recompute_blocks_on_demand() -> None:
    _, batch = make_notes()
    ids, classes = batch.input_ids, torch.tensor([0, 2, 1, 2])
    for model, labels in ((make_causal_lm(make_config()), ids), (make_classifier(3), classes)):
        other = copy.deepcopy(model)
        model(batch, labels).loss_sum.backward()
        other(batch, labels, activations="checkpoint").loss_sum.backward()
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, gradients(other)[name]), name


def test_a_tied_head_has_no_parameter_of_its_own() -> None:
    tied = CausalLM(make_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in tied.state_dict()
    assert tied.head_weight is tied.model.embed_tokens.weight
