"""Numbers of transformers + peft: logits, loss, every adapter gradient, ten training steps."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lora.attach import adapter_parameters, adapter_state, attach
from lora.config import LoraConfig
from lora.peft_format import load_adapter
from model.batch import TokenBatch
from model.config import DecoderConfig
from model.heads import CausalLM
from tests.lora.oracle import (
    loss,
    make_batch,
    make_oracle,
    make_twin,
    oracle_logits,
    oracle_loss,
    save_peft,
    tiny_config,
    to_float64,
)

CONFIGS = {
    "multi-head": tiny_config(kv_heads=4),
    "grouped-query": tiny_config(kv_heads=2),
    "multi-query, tied": tiny_config(kv_heads=1, tied=True),
    "multi-head, tied": tiny_config(kv_heads=4, tied=True),
}
ADAPTERS = {
    "q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {
        "r": 3,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"mlp.*": 5},
    },
}
every_case = pytest.mark.parametrize(
    ("config", "adapter"),
    [(config, adapter) for config in CONFIGS.values() for adapter in ADAPTERS.values()],
    ids=[f"{config}, {adapter}" for config in CONFIGS for adapter in ADAPTERS],
)
# transformers' own, on which nothing here depends.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Pair:
    """The same weights and adapter in transformers + peft and here."""

    def __init__(self, config: DecoderConfig, adapter: dict, folder: Path) -> None:
        base = make_oracle(config)
        self.config = config
        self.ours = make_twin(config, base)
        torch.manual_seed(1)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **adapter)
        self.oracle = peft.get_peft_model(base, settings).eval()
        save_peft(self.oracle, folder)
        load_adapter(self.ours, folder, "clinical")

    def to_float64(self) -> None:
        self.ours.double()
        to_float64(self.config, self.oracle)

    def oracle_parameters(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("base_model.model.").replace(".default", ""): parameter
            for name, parameter in self.oracle.named_parameters()
            if "lora_" in name
        }

    def our_parameters(self) -> dict[str, Tensor]:
        keys = adapter_state(self.ours, "clinical")
        return dict(zip(keys, adapter_parameters(self.ours, "clinical"), strict=True))


def gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.any(), name
        found[f"gradient of {name}"] = parameter.grad
        parameter.grad = None
    return found


def our_results(pair: Pair, batch: TokenBatch) -> dict[str, Tensor]:
    logits, value = pair.ours.logits(batch).detach(), loss(pair.ours, batch)
    value.backward()
    return {"logits": logits, "loss": value.detach(), **gradients(pair.our_parameters())}


def oracle_results(pair: Pair, batch: TokenBatch) -> dict[str, Tensor]:
    logits = oracle_logits(pair.oracle, batch)
    value = oracle_loss(logits, batch)
    value.backward()
    return {
        "logits": logits.detach(),
        "loss": value.detach(),
        **gradients(pair.oracle_parameters()),
    }


@every_case
def test_logits_loss_and_gradients(config: DecoderConfig, adapter: dict, tmp_path: Path) -> None:
    """float64: equal to 1e-9. float32: at most twice as far from float64 as the oracle is.

    One float32 result can be near the truth by luck, so an error is the root mean square of the
    relative errors on eight batches.
    """
    pair = Pair(config, adapter, tmp_path)
    batches = [make_batch(config, 17, 1, 12, seed=seed) for seed in range(8)]
    float32 = [(our_results(pair, batch), oracle_results(pair, batch)) for batch in batches]
    pair.to_float64()
    squares: dict[str, list[float]] = {}
    for batch, (ours_32, oracle_32) in zip(batches, float32, strict=True):
        ours, truths = our_results(pair, batch), oracle_results(pair, batch)
        assert ours.keys() == truths.keys() == ours_32.keys() == oracle_32.keys()
        for name, truth in truths.items():
            assert ours[name].dtype == truth.dtype == torch.float64
            torch.testing.assert_close(ours[name], truth, rtol=1e-9, atol=1e-9)
            totals = squares.setdefault(name, [0.0, 0.0])
            for i, result in enumerate((ours_32[name], oracle_32[name])):
                assert result.dtype == torch.float32
                error = torch.linalg.vector_norm(result.double() - truth)
                totals[i] += (error / torch.linalg.vector_norm(truth)).item() ** 2
    for name, (ours_total, oracle_total) in squares.items():
        assert ours_total <= 4 * oracle_total, name  # squared: twice the error


@every_case
def test_ten_training_steps(config: DecoderConfig, adapter: dict, tmp_path: Path) -> None:
    pair = Pair(config, adapter, tmp_path)
    pair.to_float64()
    ours, oracle = pair.our_parameters(), pair.oracle_parameters()
    first = {name: parameter.detach().clone() for name, parameter in ours.items()}
    base = {name: p.clone() for name, p in pair.ours.named_parameters() if not p.requires_grad}

    def train(
        parameters: dict[str, Tensor], loss_of: Callable[[TokenBatch], Tensor]
    ) -> list[float]:
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
        losses = []
        for step in range(10):
            value = loss_of(make_batch(config, 9, 14, seed=step % 2))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    our_losses = train(ours, lambda batch: loss(pair.ours, batch))
    oracle_losses = train(
        oracle, lambda batch: oracle_loss(oracle_logits(pair.oracle, batch), batch)
    )
    assert our_losses[-1] < our_losses[0] - 0.3
    assert our_losses == pytest.approx(oracle_losses, rel=1e-9, abs=1e-9)
    assert ours.keys() == oracle.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, oracle[name], rtol=1e-9, atol=1e-9)
        assert not torch.equal(parameter, first[name])
    for name, parameter in pair.ours.named_parameters():
        assert name not in base or torch.equal(base[name], parameter)


def test_every_part_learns_from_peft_s_starting_point() -> None:
    """B starts at zero: it moves in step one, A in step two, and all that was frozen stays."""
    config = CONFIGS["grouped-query"]
    model = make_twin(config, make_oracle(config))
    attach(model, "clinical", LoraConfig(r=2, target_modules="all-linear"), seed=0, trainable=False)
    for up in adapter_parameters(model, "clinical")[1::2]:
        nn.init.normal_(up, std=0.1)
    attach(model, "downstream", LoraConfig(r=2, target_modules="all-linear"), seed=0)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    downs, ups = (adapter_parameters(model, "downstream")[i::2] for i in (0, 1))
    optimizer = torch.optim.SGD([*downs, *ups], lr=0.1)
    first_downs = [down.detach().clone() for down in downs]
    for step in range(2):
        optimizer.zero_grad()
        loss(model, make_batch(config, 9, 14)).backward()
        optimizer.step()
        assert all(up.any() for up in ups)
        for first, down in zip(first_downs, downs, strict=True):
            assert torch.equal(first, down) == (step == 0)
    assert any("clinical" in name for name in frozen)
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(frozen[name], parameter)


def test_two_adapters_are_peft_s_sum(tmp_path: Path) -> None:
    """Both active in peft: the logits, and the gradients of each."""
    config = CONFIGS["grouped-query"]
    base = make_oracle(config)
    ours = make_twin(config, base)
    torch.manual_seed(1)
    oracle = peft.get_peft_model(
        base,
        peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
        adapter_name="clinical",
    )
    oracle.add_adapter(
        "downstream", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    save_peft(oracle, tmp_path)
    for name in ("clinical", "downstream"):
        load_adapter(ours, tmp_path / name, name)
    oracle.base_model.set_adapter(["clinical", "downstream"])
    to_float64(config, oracle)
    ours.double()
    batch = make_batch(config, 7, 12)
    torch.testing.assert_close(ours.logits(batch), oracle_logits(oracle, batch), rtol=0, atol=1e-9)
    loss(ours, batch).backward()
    oracle_loss(oracle_logits(oracle, batch), batch).backward()
    theirs = dict(oracle.named_parameters())
    for name in ("clinical", "downstream"):
        keys = adapter_state(ours, name)
        for key, parameter in zip(keys, adapter_parameters(ours, name), strict=True):
            their_key = f"base_model.model.{key.removesuffix('weight')}{name}.weight"
            torch.testing.assert_close(parameter.grad, theirs[their_key].grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["clinical", "downstream"])
def test_zeroing_either_adapter_changes_the_logits(name: str) -> None:
    config = CONFIGS["grouped-query"]
    model = make_twin(config, make_oracle(config))
    assert isinstance(model, CausalLM)
    for adapter in ("clinical", "downstream"):
        attach(model, adapter, LoraConfig(r=2), seed=0)
        for up in adapter_parameters(model, adapter)[1::2]:
            nn.init.normal_(up, std=0.1)
    batch = make_batch(config, 9)
    before = model.logits(batch)
    for up in adapter_parameters(model, name)[1::2]:
        nn.init.zeros_(up)
    assert (model.logits(batch) - before).abs().max() > 0.01


def test_dropout_is_a_function_of_the_seed_and_the_sample() -> None:
    config = CONFIGS["grouped-query"]
    model = make_twin(config, make_oracle(config))
    attach(model, "clinical", LoraConfig(r=2, lora_dropout=0.5), seed=0)
    for up in adapter_parameters(model, "clinical")[1::2]:
        nn.init.normal_(up)
    together = make_batch(config, 9, 14)
    second = TokenBatch.from_arrays(together.input_ids[9:], [0, 14], sample_ids=[1])
    hidden = model.model(together, dropout_seed=3)
    torch.testing.assert_close(hidden[9:], model.model(second, dropout_seed=3), rtol=0, atol=1e-4)
    for other in (model.model(second, dropout_seed=4), model.model(second)):
        assert (hidden[9:] - other).abs().max() > 0.01
