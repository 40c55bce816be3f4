"""Every choice of what blocks keep gives the same gradients, bit for bit."""

import copy
import typing
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lora.adaption_prompt import AdaptionPromptConfig
from lora.attach import AdapterConfig, adapter_parameters, attach
from lora.config import LoraConfig
from lora.prefix_tuning import PrefixTuningConfig
from model import activations as module
from model.activations import Activations
from model.batch import TokenBatch
from model.heads import CausalLM, Model, SequenceClassifier
from tests.model import bert
from tests.model.oracle import CONFIGS, gradients, randomise

LORA = LoraConfig(r=3, lora_dropout=0.3, target_modules="all-linear")
OTHERS: tuple[Activations, ...] = tuple(a for a in typing.get_args(Activations) if a != "save")


def decoder(name: str, kind: type[CausalLM] | type[SequenceClassifier] = CausalLM) -> Model:
    config = CONFIGS[name]
    model = kind(config) if kind is CausalLM else SequenceClassifier(config, 3)
    randomise(model, 0)
    return model


def adapted(model: Model, settings: AdapterConfig = LORA) -> Model:
    model.requires_grad_(False)
    attach(model, "downstream", settings, seed=0)
    for parameter in adapter_parameters(model, "downstream"):
        nn.init.normal_(parameter, std=0.2)
    return model


CASES: dict[str, Callable[[], Model]] = {
    "dense": lambda: decoder("grouped-query"),
    "dense, LoRA": lambda: adapted(decoder("attention-bias")),
    "dense, LoRA on down_proj": lambda: adapted(
        decoder("grouped-query"), LoraConfig(r=3, target_modules=("down_proj",))
    ),
    "odd width": lambda: decoder("one-layer-odd-width"),
    "experts": lambda: decoder("mixtral-window"),
    "experts, LoRA": lambda: adapted(decoder("mixtral")),
    "prefix": lambda: adapted(decoder("grouped-query"), PrefixTuningConfig(num_virtual_tokens=3)),
    "adaption prompt": lambda: adapted(
        decoder("multi-head"), AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
    ),
    "classifier": lambda: decoder("grouped-query", SequenceClassifier),
    "classifier, LoRA": lambda: adapted(decoder("mistral-window", SequenceClassifier)),
    "classifier, experts, LoRA": lambda: adapted(decoder("mixtral", SequenceClassifier)),
    "encoder": lambda: bert.make_classifier(bert.make_config(hidden_dropout_prob=0.3)),
    "encoder, LoRA": lambda: adapted(bert.make_classifier(bert.make_config())),
}


def make_batch() -> TokenBatch:
    """Notes of four lengths, so that attention has padded groups, and more than one."""
    ids = torch.randint(3, 90, (61,), generator=torch.Generator().manual_seed(0))
    return TokenBatch.from_arrays(ids, [0, 9, 20, 31, 61])


def labels_of(model: Model, batch: TokenBatch) -> torch.Tensor:
    return batch.input_ids.clone() if isinstance(model, CausalLM) else torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bits(case: str) -> None:
    model, batch = CASES[case]().float(), make_batch()
    found = {}
    for activations in ("save", *OTHERS):
        one = copy.deepcopy(model)
        loss = one(batch, labels_of(one, batch), dropout_seed=3, activations=activations)
        loss.total.backward()
        found[activations] = gradients(one)
    assert found["save"]
    for activations in OTHERS:
        assert found[activations].keys() == found["save"].keys()
        for name, gradient in found["save"].items():
            assert torch.equal(found[activations][name], gradient), (activations, name)


@pytest.mark.parametrize("make", [CASES["dense, LoRA"], CASES["encoder, LoRA"]])
def test_offloading_holds_the_input_of_every_block_on_the_host(
    make: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many copies as there are blocks, of whole inputs; each comes back once."""
    model, batch = make().float(), make_batch()
    sizes, fetched = [], []

    class Counted(module._OnHost):
        def __new__(cls, copy: torch.Tensor, device: torch.device) -> "Counted":
            sizes.append(copy.nbytes)
            return super().__new__(cls, copy, device)

    monkeypatch.setattr(module, "_OnHost", Counted)
    loss = model(batch, labels_of(model, batch), dropout_seed=3, activations="offload")
    width = model.config.hidden_size
    assert sizes == [len(batch.input_ids) * width * 4] * len(model.network.blocks)
    real = torch.Tensor.to

    def to(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        fetched.extend([self.nbytes] * ("non_blocking" in options))
        return real(self, *args, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", to)
    loss.loss_sum.backward()
    assert fetched == sizes


def test_a_choice_without_gradients_keeps_nothing_and_copies_nothing() -> None:
    model, batch = CASES["dense, LoRA"]().float(), make_batch()
    with torch.no_grad():
        losses = [
            model(batch, labels_of(model, batch), activations=activations).loss_sum
            for activations in ("save", *OTHERS)
        ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
