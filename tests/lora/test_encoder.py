"""LoRA on a BERT against transformers + peft: logits, gradients, ten steps, files both ways."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.attach import adapter_parameters, adapter_state, attach
from lora.config import LoraConfig
from lora.peft_format import load_adapter, save_adapter, stored_head
from model.encoder import EncoderClassifier
from tests.lora.oracle import save_peft
from tests.model.bert import hugging_face_twin, make_classifier, make_notes, one_by_one
from tests.model.oracle import relative_error

CLASSES = torch.tensor([0, 2, 1, 2, 0])
ADAPTERS: dict[str, dict[str, Any]] = {
    "query and value": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "all-linear": {"r": 3, "use_rslora": True, "target_modules": "all-linear"},
    "dense, ranks": {"r": 2, "target_modules": ["dense"], "rank_pattern": {"intermediate.*": 5}},
}
every_case = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Pair:
    """The same float32 weights, adapter and head in transformers + peft and here."""

    def __init__(self, adapter: dict[str, Any], folder: Path) -> None:
        base = make_classifier().float()
        twin = hugging_face_twin(base)
        torch.manual_seed(1)
        settings = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **adapter)
        self.oracle = peft.get_peft_model(twin, settings).eval()
        self.ours = copy.deepcopy(base).requires_grad_(False)
        nn.init.normal_(self.ours.classifier.weight)  # the file's head takes its place
        save_peft(self.oracle, folder)
        load_adapter(self.ours, folder, "downstream")
        self.ours.classifier.requires_grad_(True)

    def to_float64(self) -> None:
        self.ours.double()
        self.oracle.double()

    def our_parameters(self) -> dict[str, Tensor]:
        keys = adapter_state(self.ours, "downstream")
        pairs = zip(keys, adapter_parameters(self.ours, "downstream"), strict=True)
        return {**dict(pairs), **dict(self.ours.classifier.named_parameters(prefix="classifier"))}

    def oracle_parameters(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("base_model.model.")
            .replace(".default", "")
            .replace(".modules_to_save", ""): parameter
            for name, parameter in self.oracle.named_parameters()
            if parameter.requires_grad
        }

    def results(self, of: str, seed: int) -> dict[str, Tensor]:
        """Logits, loss and the gradient of all that trains."""
        batch = make_notes(seed)
        if of == "ours":
            logits, parameters = self.ours.scores(batch), self.our_parameters()
        else:
            logits, parameters = one_by_one(self.oracle, batch), self.oracle_parameters()
        loss = F.cross_entropy(logits, CLASSES)
        found = torch.autograd.grad(loss, list(parameters.values()))
        return {"logits": logits.detach(), "loss": loss.detach()} | dict(
            zip(parameters, found, strict=True)
        )


@every_case
def test_logits_loss_and_gradients(adapter: dict[str, Any], tmp_path: Path) -> None:
    """float64: to 1e-9. float32: at most twice as far from float64, over 24 batches."""
    pair = Pair(adapter, tmp_path)
    rounded = [(pair.results("ours", seed), pair.results("theirs", seed)) for seed in range(24)]
    pair.to_float64()
    squares: dict[str, list[float]] = {}
    for seed, both in enumerate(rounded):
        ours, truths = pair.results("ours", seed), pair.results("theirs", seed)
        assert ours.keys() == truths.keys() == both[0].keys() == both[1].keys()
        for name, truth in truths.items():
            assert truth.any() and relative_error(ours[name], truth) < 1e-9, name
            totals = squares.setdefault(name, [0.0, 0.0])
            for i in (0, 1):
                totals[i] += relative_error(both[i][name], truth) ** 2
    for name, (our_total, their_total) in squares.items():
        assert our_total <= 4 * their_total, name


@every_case
def test_ten_training_steps(adapter: dict[str, Any], tmp_path: Path) -> None:
    pair = Pair(adapter, tmp_path)
    pair.to_float64()
    base = {name: p.clone() for name, p in pair.ours.named_parameters() if not p.requires_grad}
    losses: dict[str, list[float]] = {}
    for of, parameters in (("ours", pair.our_parameters()), ("theirs", pair.oracle_parameters())):
        optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
        losses[of] = []
        for step in range(10):
            found = pair.results(of, step % 2)
            losses[of].append(float(found["loss"]))
            for name, parameter in parameters.items():
                parameter.grad = found[name]
            optimiser.step()
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-9)
    assert losses["ours"][-1] < losses["ours"][0] - 0.1
    theirs = pair.oracle_parameters()
    for name, parameter in pair.our_parameters().items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-9, atol=1e-9)
    for name, parameter in pair.ours.named_parameters():
        assert name not in base or torch.equal(base[name], parameter)


@every_case
def test_adapters_made_here_load_in_peft(adapter: dict[str, Any], tmp_path: Path) -> None:
    ours = make_classifier().float().requires_grad_(False)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in adapter.items()}
    attach(ours, "downstream", LoraConfig(**settings), seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(ours, "downstream"):
            parameter.normal_(std=0.2)
    save_adapter(ours, "downstream", tmp_path / "ours", head=ours.head_state())
    assert stored_head(tmp_path / "ours").keys() == {"classifier.weight", "classifier.bias"}
    base = make_classifier().float()
    oracle = peft.PeftModel.from_pretrained(hugging_face_twin(base), tmp_path / "ours")
    batch = make_notes()
    found = one_by_one(oracle.double().eval(), batch)
    assert relative_error(ours.double().scores(batch), found) < 1e-9
    save_peft(oracle.float(), tmp_path / "peft")
    again = make_classifier().float().requires_grad_(False)
    assert isinstance(again, EncoderClassifier)
    load_adapter(again, tmp_path / "peft", "downstream")
    assert relative_error(again.double().scores(batch), found) < 1e-9


def test_packed_equals_one_by_one_with_dropout_of_the_adapter() -> None:
    together = make_classifier()
    settings = LoraConfig(r=3, lora_dropout=0.4, target_modules="all-linear")
    attach(together, "downstream", settings, seed=0)
    for parameter in adapter_parameters(together, "downstream"):
        nn.init.normal_(parameter, std=0.2)
    together.double()
    batch = make_notes()
    scores = together.scores(batch, dropout_seed=3)
    begins = batch.segments.offsets
    for i, note in enumerate(batch.input_ids.split(batch.segments.lengths)):
        alone = type(batch).from_arrays(note, [0, begins[i + 1] - begins[i]], sample_ids=[i])
        one = together.scores(alone, dropout_seed=3)
        assert relative_error(one, scores[i : i + 1]) < 1e-12


@pytest.mark.parametrize("target", ["classifier", "key_proj"])
def test_heads_and_unknown_layers_are_no_targets(target: str) -> None:
    message = "selects the head" if target == "classifier" else "fits no linear layer"
    with pytest.raises(ValueError, match=message):
        attach(make_classifier(), "a", LoraConfig(target_modules=(target,)), seed=0)
