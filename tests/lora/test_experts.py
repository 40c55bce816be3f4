"""Adapters on Mixtral's experts: against peft, in training, merged."""

from pathlib import Path

import peft
import pytest
import torch
from torch.nn import functional as F

from lora.attach import adapted_layers, adapter_parameters, attach
from lora.config import LoraConfig
from lora.merge import merge
from lora.parts import parts_of_folders
from lora.peft_format import load_adapter, save_adapter
from model.batch import TokenBatch
from model.checkpoint import load_causal_lm, save_model
from model.heads import CausalLM
from tests.model.oracle import CONFIGS, float64_twin, make_causal_lm, relative_error

IDS = torch.arange(40) * 7 % 97
BATCH = TokenBatch.from_arrays(IDS, [0, 40])
EXPERTS = ("w1", "w2", "w3")


def make_adapted(targets: tuple[str, ...] | str, dropout: float = 0.0) -> CausalLM:
    """A frozen float64 Mixtral with an adapter of which no part is zero."""
    model = make_causal_lm(CONFIGS["mixtral"]).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    attach(model, "clinical", config, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(model, "clinical"):
        parameter.data.normal_(std=0.1, generator=generator)
    return model.double()


@pytest.mark.parametrize("targets", [("q_proj", *EXPERTS), ("w2",), "all-linear"], ids=str)
@pytest.mark.filterwarnings("ignore")  # peft's, about the patterns that it made itself
def test_peft_computes_the_same_with_our_file(
    targets: tuple[str, ...] | str, tmp_path: Path
) -> None:
    """Every expert has A and B under the names of the checkpoint, which peft stacks for itself."""
    ours = make_adapted(targets)
    save_adapter(ours, "clinical", tmp_path / "adapter")
    twin = float64_twin(ours_without_adapters())
    theirs = peft.PeftModel.from_pretrained(
        twin, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False
    ).double()
    logits, truth = ours.logits(BATCH), theirs(IDS[None]).logits[0]
    assert relative_error(logits, truth) < 1e-9
    assert relative_error(ours_without_adapters().logits(BATCH), truth) > 1e-2
    F.cross_entropy(logits[:-1], IDS[1:]).backward()
    F.cross_entropy(truth[:-1], IDS[1:]).backward()
    experts = len(ours.model.layers[1].block_sparse_moe.experts)
    down = theirs.base_model.model.model.layers[1].mlp.experts  # the outer of two wrappers
    stacked_A = down.lora_A["default"].weight.grad.unflatten(0, (experts, -1))
    stacked_B = down.lora_B["default"].weight.grad.unflatten(1, (-1, experts)).permute(2, 0, 1)
    for number, (true_A, true_B) in enumerate(zip(stacked_A, stacked_B, strict=True)):
        name = f"model.layers.1.block_sparse_moe.experts.{number}.w2"
        adapter = adapted_layers(ours, "clinical")[name]
        assert relative_error(adapter.lora_A.grad, true_A) < 1e-9
        assert relative_error(adapter.lora_B.grad, true_B) < 1e-9


def ours_without_adapters() -> CausalLM:
    return make_causal_lm(CONFIGS["mixtral"])


def test_a_saved_adapter_is_loaded_again(tmp_path: Path) -> None:
    ours = make_adapted(("v_proj", *EXPERTS))
    save_adapter(ours, "clinical", tmp_path / "adapter")
    other = ours_without_adapters()
    load_adapter(other, tmp_path / "adapter", "clinical")
    assert relative_error(other.logits(BATCH), ours.logits(BATCH)) < 1e-6  # the file is float32


def test_dropout_is_the_tokens_own_in_each_expert() -> None:
    """The same packed and alone, and different between the two experts of a token."""
    ours = make_adapted(EXPERTS, dropout=0.4)
    rows = ours.model(BATCH, dropout_seed=3)
    both = TokenBatch.from_arrays(torch.cat((IDS[:9], IDS)), [0, 9, 49], [5, 0])
    assert relative_error(ours.model(both, dropout_seed=3)[9:], rows) < 1e-12
    assert relative_error(ours.model(BATCH, dropout_seed=4), rows) > 1e-3
    sites = [adapter.site for adapter in adapted_layers(ours, "clinical").values()]
    assert len(set(sites)) == len(sites) == 2 * 4 * 3


def test_merged_experts_give_the_adapted_logits(tmp_path: Path) -> None:
    base = ours_without_adapters().float()
    save_model(base, tmp_path / "base")
    ours = make_adapted("all-linear").float()
    save_adapter(ours, "clinical", tmp_path / "adapter")
    parts = parts_of_folders(tmp_path / "base", [tmp_path / "adapter"])
    proof = merge(parts, tmp_path / "merged")
    assert proof.sums < 1e-6
    assert proof.effect > 1e-2
    merged = load_causal_lm(tmp_path / "merged")
    assert relative_error(merged.logits(BATCH), ours.logits(BATCH)) < 1e-4
