"""The four other methods against transformers + peft: logits, loss, gradients, ten steps, files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import peft
import peft.tuners.adaption_prompt.layer as peft_adaption_prompt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora.adaption_prompt import AdaptionPromptConfig
from lora.attach import AdapterConfig, adapter_modules, adapter_names, attach
from lora.p_tuning import PTuningConfig
from lora.peft_format import load_adapter, save_adapter
from lora.prefix_tuning import PrefixTuningConfig
from lora.prompt_tuning import PromptTuningConfig
from model.batch import TokenBatch
from model.config import DecoderConfig
from model.heads import CausalLM, SequenceClassifier
from tests.lora.oracle import (
    NUM_LABELS,
    make_batch,
    make_oracle,
    make_twin,
    save_peft,
    tiny_config,
    to_float64,
)

METHODS: dict[str, tuple[AdapterConfig, peft.PeftConfig]] = {
    "prompt tuning": (
        PromptTuningConfig(num_virtual_tokens=3),
        peft.PromptTuningConfig(num_virtual_tokens=3),
    ),
    "prefix tuning": (
        PrefixTuningConfig(num_virtual_tokens=3),
        peft.PrefixTuningConfig(num_virtual_tokens=3),
    ),
    "prefix tuning, projected": (
        PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
        peft.PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5
        ),
    ),
    "P-tuning, MLP": (
        PTuningConfig(num_virtual_tokens=4, encoder="mlp", encoder_hidden_size=6),
        peft.PromptEncoderConfig(
            num_virtual_tokens=4, encoder_reparameterization_type="MLP", encoder_hidden_size=6
        ),
    ),
    "P-tuning, LSTM": (
        PTuningConfig(
            num_virtual_tokens=4, encoder="lstm", encoder_hidden_size=6, encoder_num_layers=2
        ),
        peft.PromptEncoderConfig(
            num_virtual_tokens=4,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=6,
            encoder_num_layers=2,
        ),
    ),
    "adaption prompt": (
        AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
    ),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_task = pytest.mark.parametrize("task", ["language", "classes"])
CLASSES = torch.tensor([2, 0, 1])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*encoder_num_layers"),
]


@pytest.fixture(autouse=True)
def softmax_of_its_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """peft's softmax is float32 even in a float64 model; with it float64 is no truth."""

    def softmax(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return F.softmax(x, dim, dtype=torch.promote_types(x.dtype, dtype))

    monkeypatch.setattr(peft_adaption_prompt, "F", SimpleNamespace(softmax=softmax))
    yield


class Pair:
    """The same weights and adapter in transformers + peft and here."""

    def __init__(
        self, method: str, task: str, config: DecoderConfig | None = None, layers: int = 2
    ) -> None:
        self.config = config or tiny_config(kv_heads=2)
        self.method, self.is_classifier = method, task == "classes"
        base = make_oracle(self.config, classifier=self.is_classifier)
        self.ours = make_twin(self.config, base, classifier=self.is_classifier)
        settings, theirs = METHODS[method]
        torch.manual_seed(1)
        theirs = type(theirs)(**{**theirs.to_dict(), "task_type": self.task_type})
        self.oracle = peft.get_peft_model(base, theirs).eval()
        if method == "adaption prompt":  # whose gates of zero would hide the rest
            for name, parameter in self.oracle.named_parameters():
                if "adaption_gate" in name:
                    torch.nn.init.constant_(parameter, 0.7)
        attach(self.ours, "clinical", settings, seed=0)
        if self.is_classifier:
            self.ours.score.requires_grad_(True)
            for name, parameter in self.oracle.named_parameters():
                if "score" in name and "original_module" not in name:
                    parameter.requires_grad_(True)
                    self.ours.score.weight.data.copy_(parameter)
        theirs_by_name = self.oracle_parameters()
        assert theirs_by_name.keys() == self.our_parameters().keys()
        for name, parameter in self.our_parameters().items():
            parameter.data.copy_(theirs_by_name[name])

    @property
    def task_type(self) -> str:
        return "SEQ_CLS" if self.is_classifier else "CAUSAL_LM"

    def to_float64(self) -> None:
        self.ours.double()
        to_float64(self.config, self.oracle)

    def our_parameters(self) -> dict[str, Tensor]:
        (prefix,) = {
            name.partition("clinical")[0]
            for name, _ in self.ours.named_parameters()
            if "clin" in name
        }
        found = {}
        for name, parameter in self.ours.named_parameters():
            if parameter.requires_grad:
                found[name.removeprefix(f"{prefix}clinical.")] = parameter
        return found

    def oracle_parameters(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.oracle.named_parameters():
            if not parameter.requires_grad:
                continue
            if "score" in name:
                name = "score.weight"
            elif "adaption_" in name:
                name = name.rpartition(".")[2]
            else:
                name = name.removeprefix("prompt_encoder.default.")
                name = name.replace("embedding.weight", "embedding").replace("transform", "encoder")
                name = name.replace("mlp_head", "encoder.mlp_head")
                if name.startswith("lstm_head"):
                    layer = name.partition("_l")[2][0]
                    name = name.replace(f"_l{layer}", "_l0")
                    name = name.replace("lstm_head", f"encoder.lstm_head.{layer}")
            found[name] = parameter
        return found

    def our_results(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Logits of every token (every segment), and the loss."""
        if isinstance(self.ours, SequenceClassifier):
            loss = self.ours(batch, CLASSES)
            return self.ours.scores(batch), loss.loss_sum / loss.denominator
        loss = self.ours(batch, batch.input_ids)
        return self.ours.logits(batch), loss.loss_sum / loss.denominator

    def oracle_logits(self, ids: Tensor) -> Tensor:
        if self.is_classifier and "prefix" in self.method:
            # peft does not find transformers 5.23's word for a cache in a classifier; what it
            # would have done with it:
            base, cache = self.oracle.get_base_model(), self.oracle.get_prompt(1)
            return base(input_ids=ids[None], cache=cache).logits[0]
        return self.oracle(input_ids=ids[None]).logits[0]

    def oracle_results(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Every segment on its own. The loss is torch's, which is float64 of float64 logits."""
        logits, scored, targets = [], [], []
        for ids in batch.input_ids.split(batch.segments.lengths):
            out = self.oracle_logits(ids)
            if self.is_classifier:
                logits.append(out[None])
                continue
            virtual = len(out) - len(ids)
            logits.append(out[virtual:])
            first = 0 if virtual else 1  # the last virtual token predicts the first token
            scored.append(out[virtual + first - 1 : -1])
            targets.append(ids[first:])
        if self.is_classifier:
            return torch.cat(logits), F.cross_entropy(torch.cat(logits), CLASSES)
        return torch.cat(logits), F.cross_entropy(torch.cat(scored), torch.cat(targets))


def results(found: tuple[Tensor, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    logits, loss = found
    loss.backward()
    named = {"logits": logits.detach(), "loss": loss.detach()}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.any(), name
        named[f"gradient of {name}"] = parameter.grad
        parameter.grad = None
    return named


@every_task
@every_method
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_logits_loss_and_gradients(method: str, task: str, kv_heads: int) -> None:
    """float64: equal to 1e-9. float32: at most twice as far from float64 as the oracle is.

    One float32 result can be near the truth by luck, so an error is that of eight batches' results
    together; a gate's gradient is a single number, which takes more of them.
    """
    pair = Pair(method, task, tiny_config(kv_heads=kv_heads))
    count = 64 if method == "adaption prompt" else 8
    batches = [make_batch(pair.config, 17, 1, 12, seed=seed) for seed in range(count)]

    def both(batch: TokenBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return (
            results(pair.our_results(batch), pair.our_parameters()),
            results(pair.oracle_results(batch), pair.oracle_parameters()),
        )

    float32 = [both(batch) for batch in batches]
    pair.to_float64()
    squares: dict[str, list[float]] = {}  # summed over the batches
    for batch, (ours_32, oracle_32) in zip(batches, float32, strict=True):
        ours, truths = both(batch)
        assert ours.keys() == truths.keys() == ours_32.keys() == oracle_32.keys()
        for name, truth in truths.items():
            assert ours[name].dtype == truth.dtype == torch.float64
            torch.testing.assert_close(ours[name], truth, rtol=1e-9, atol=1e-9, msg=name)
            totals = squares.setdefault(name, [0.0, 0.0])
            for i, result in enumerate((ours_32[name], oracle_32[name])):
                assert result.dtype == torch.float32
                totals[i] += float((result.double() - truth).square().sum())
    for name, (ours_total, oracle_total) in squares.items():
        assert ours_total <= 4 * oracle_total, name  # squared: twice the error


@every_method
def test_the_labels_are_those_of_peft(method: str) -> None:
    """transformers' own loss, with the labels that peft puts before the user's."""
    pair = Pair(method, "language")
    batch = make_batch(pair.config, 15)
    loss = pair.oracle(input_ids=batch.input_ids[None], labels=batch.input_ids[None]).loss
    torch.testing.assert_close(pair.our_results(batch)[1], loss, rtol=1e-5, atol=1e-5)


@every_task
@every_method
def test_ten_training_steps(method: str, task: str) -> None:
    pair = Pair(method, task)
    pair.to_float64()
    ours, oracle = pair.our_parameters(), pair.oracle_parameters()
    first = {name: parameter.detach().clone() for name, parameter in ours.items()}

    def train(
        parameters: dict[str, Tensor], loss_of: Callable[[TokenBatch], tuple[Tensor, Tensor]]
    ) -> list[float]:
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
        losses = []
        for step in range(10):
            _, loss = loss_of(make_batch(pair.config, 9, 14, 2, seed=step % 2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    our_losses = train(ours, pair.our_results)
    oracle_losses = train(oracle, pair.oracle_results)
    assert our_losses[-2:] < our_losses[:2]
    assert our_losses == pytest.approx(oracle_losses, rel=1e-9, abs=1e-9)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, oracle[name], rtol=1e-9, atol=1e-9)
        assert not torch.equal(parameter, first[name])


@every_task
@every_method
def test_a_folder_of_peft_gives_its_logits(method: str, task: str, tmp_path: Path) -> None:
    pair = Pair(method, task)
    save_peft(pair.oracle, tmp_path)
    base = make_oracle(pair.config, classifier=pair.is_classifier)
    ours = make_twin(pair.config, base, classifier=pair.is_classifier)
    load_adapter(ours, tmp_path, "clinical")
    if method == "adaption prompt" and isinstance(ours, SequenceClassifier):
        ours.score.weight.copy_(pair.ours.score.weight)  # peft does not save it
    batch = make_batch(pair.config, 12, 5, 1)
    pair.ours = ours
    logits, _ = pair.oracle_results(batch)
    torch.testing.assert_close(pair.our_results(batch)[0], logits, rtol=1e-5, atol=1e-5)
    (module,) = adapter_modules(ours, "clinical")
    assert getattr(module, "encoder", None) is None
    assert all(p.requires_grad for p in module.parameters())
    assert type(module.config) is type(METHODS[method][0])


@every_task
@every_method
def test_peft_loads_our_folder(method: str, task: str, tmp_path: Path) -> None:
    pair = Pair(method, task)
    head = None
    if isinstance(pair.ours, SequenceClassifier):
        head = {"score.weight": pair.ours.score.weight.detach()}
    save_adapter(pair.ours, "clinical", tmp_path / "clinical", head=head)
    base = make_oracle(pair.config, classifier=pair.is_classifier)
    pair.oracle = peft.PeftModel.from_pretrained(base, tmp_path / "clinical").eval()
    batch = make_batch(pair.config, 12, 5, 1)
    ours, _ = pair.our_results(batch)
    logits, _ = pair.oracle_results(batch)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    base = make_oracle(pair.config, classifier=pair.is_classifier)
    pair.ours = make_twin(pair.config, base, classifier=pair.is_classifier)
    load_adapter(pair.ours, tmp_path / "clinical", "clinical")
    assert adapter_names(pair.ours) == ["clinical"]
    torch.testing.assert_close(pair.our_results(batch)[0], ours, rtol=1e-5, atol=1e-5)


# Stacks -------------------------------------------------------------------------------------------


@every_task
@every_method
def test_a_method_on_a_clinical_lora_is_peft_on_the_merged_base(
    method: str, task: str, tmp_path: Path
) -> None:
    """peft runs one of the two at a time, so its LoRA goes into the weights first."""
    pair = Pair(method, task)
    base = make_oracle(pair.config, classifier=pair.is_classifier)
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    settings = peft.LoraConfig(init_lora_weights=False, r=3, target_modules=targets)
    on_base = peft.get_peft_model(base, settings).eval()
    save_peft(on_base, tmp_path)
    load_adapter(pair.ours, tmp_path, "lora", trainable=False)
    merged = on_base.merge_and_unload().state_dict()
    own = pair.oracle.get_base_model()
    state = own.state_dict()
    for name, tensor in merged.items():
        # peft's adaption prompt wraps the attention, and its classifiers wrap the head.
        stored = name if name in state else name.replace("self_attn.", "self_attn.model.")
        if "score" not in name:
            state[stored].copy_(tensor)
    pair.to_float64()
    batch = make_batch(pair.config, 12, 5, 1)
    ours, _ = pair.our_results(batch)
    logits, _ = pair.oracle_results(batch)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)


def test_labels_are_scored_from_virtual_tokens_alone_where_there_are_some() -> None:
    batch = make_batch(tiny_config(), 7, 4)
    for method, scored in (("prompt tuning", 11.0), ("prefix tuning", 9.0)):
        pair = Pair(method, "language")
        assert isinstance(pair.ours, CausalLM)
        assert pair.ours(batch, batch.input_ids).denominator == scored
    assert NUM_LABELS == 3
