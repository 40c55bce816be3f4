"""Every kind of adapter: published sizes, packing, cache, stacks, initial values, names."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lora.adaption_prompt import AdaptionPromptConfig
from lora.attach import (
    AdapterConfig,
    adapter_config,
    adapter_names,
    adapter_parameters,
    adapter_state,
    attach,
    detach,
    load_adapter_state,
    set_trainable,
    without_adapters,
)
from lora.config import LoraConfig
from lora.p_tuning import LSTMEncoder, PTuningConfig
from lora.prefix_tuning import PrefixTuningConfig
from lora.prompt_tuning import PromptTuningConfig, VirtualTokens
from model.batch import TokenBatch
from model.config import DecoderConfig
from model.generation import GenerationConfig, generate
from model.heads import CausalLM, SequenceClassifier
from tests.lora.oracle import make_batch, make_oracle, make_twin, tiny_config

KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=3, target_modules=("q_proj", "k_proj", "v_proj")),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "projected prefix": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "P-tuning, MLP": PTuningConfig(num_virtual_tokens=3, encoder_hidden_size=6),
    "P-tuning, LSTM": PTuningConfig(
        num_virtual_tokens=3, encoder="lstm", encoder_hidden_size=6, encoder_dropout=0.4
    ),
    "adaption prompt": AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
LLAMA_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)


def make_model(*kinds: str, classifier: bool = False) -> CausalLM | SequenceClassifier:
    """A float64 model with an adapter of each kind, no value of which is zero."""
    config = tiny_config()
    model = make_twin(config, make_oracle(config, classifier=classifier), classifier=classifier)
    for kind in kinds:
        attach(model, kind.replace(" ", "-").replace(",", ""), KINDS[kind], seed=0)
    generator = torch.Generator().manual_seed(1)
    for name in adapter_names(model):
        for parameter in adapter_parameters(model, name):
            if not parameter.any():
                parameter.data.normal_(std=0.5, generator=generator)
    return model.double()


def outputs(model: CausalLM | SequenceClassifier, batch: TokenBatch) -> Tensor:
    return model.logits(batch) if isinstance(model, CausalLM) else model.scores(batch)


def one_by_one(batch: TokenBatch) -> list[TokenBatch]:
    parts = batch.input_ids.split(batch.segments.lengths)
    return [TokenBatch.from_arrays(ids, [0, len(ids)], [i]) for i, ids in enumerate(parts)]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LoraConfig(r=16, lora_alpha=32), 8_388_608),
        (LoraConfig(r=4, lora_alpha=4), 2_097_152),
        (AdaptionPromptConfig(adapter_len=10, adapter_layers=30), 1_228_830),
        (PrefixTuningConfig(num_virtual_tokens=20), 5_242_880),
        (PrefixTuningConfig(num_virtual_tokens=10), 2_621_440),
        (PromptTuningConfig(num_virtual_tokens=15), 61_440),
        (
            PTuningConfig(
                num_virtual_tokens=20,
                encoder="lstm",
                encoder_hidden_size=256,
                encoder_num_layers=4,
            ),
            16_093_696,
        ),
        (PTuningConfig(num_virtual_tokens=1, encoder_hidden_size=256), 2_171_392),
    ],
    ids=lambda value: f"{value:,}" if isinstance(value, int) else "",
)
@pytest.mark.parametrize("classifier", [False, True])
def test_sizes_on_llama_7b_are_those_published(
    config: AdapterConfig, count: int, classifier: bool
) -> None:
    """Table 2 of Clinical LLaMA-LoRA (arXiv 2307.03042); a head counts apart."""
    with torch.device("meta"):
        model = SequenceClassifier(LLAMA_7B, 2) if classifier else CausalLM(LLAMA_7B)
    model.requires_grad_(False)
    attach(model, "clinical", config, seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert all(p.device.type == "meta" for p in adapter_parameters(model, "clinical"))


@every_kind
@pytest.mark.parametrize("classifier", [False, True])
def test_packed_equals_unpacked(kind: str, classifier: bool) -> None:
    model = make_model(kind, classifier=classifier)
    batch = make_batch(model.config, 9, 1, 14, 13)
    alone = torch.cat([outputs(model, part) for part in one_by_one(batch)])
    torch.testing.assert_close(outputs(model, batch), alone, rtol=1e-12, atol=1e-12)
    (name,) = adapter_names(model)

    def gradients(batches: Sequence[TokenBatch]) -> list[Tensor]:
        for i, part in enumerate(batches):
            labels = part.input_ids
            if classifier:
                labels = torch.arange(i, i + len(part.segments)) % 3
            model(part, labels, dropout_seed=5).loss_sum.backward()
        found = [p.grad for p in adapter_parameters(model, name)]
        for parameter in adapter_parameters(model, name):
            parameter.grad = None
        return found

    packed, unpacked = gradients([batch]), gradients(one_by_one(batch))
    for one, other in zip(packed, unpacked, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


@every_kind
@pytest.mark.parametrize("below", [(), ("lora",)], ids=["alone", "on a LoRA"])
def test_a_cache_changes_nothing(kind: str, below: tuple[str, ...]) -> None:
    model = make_model(*(name for name in below if name != kind), kind)
    assert isinstance(model, CausalLM)
    prompts = [[5, 9, 30], [7], [11, 12, 13, 14, 15, 16]]
    config = GenerationConfig(max_new_tokens=10, stop_ids=(1, 2))
    cached = generate(model, prompts, config)
    assert cached == generate(model, prompts, config, use_cache=False)
    with without_adapters(model):
        assert cached != generate(model, prompts, config)


@pytest.mark.parametrize("classifier", [False, True])
def test_all_kinds_stand_beside_each_other(classifier: bool) -> None:
    """Each of seven is active, comes off alone, and leaves the base as it was."""
    model, bare = make_model(*KINDS, classifier=classifier), make_model(classifier=classifier)
    batch = make_batch(model.config, 9, 1, 14)
    full = outputs(model, batch)
    alone = torch.cat([outputs(model, part) for part in one_by_one(batch)])
    torch.testing.assert_close(full, alone, rtol=1e-12, atol=1e-12)
    with without_adapters(model):
        assert adapter_names(model) == []
        assert torch.equal(outputs(model, batch), outputs(bare, batch))
    assert torch.equal(outputs(model, batch), full)
    names = adapter_names(model)
    assert len(names) == len(KINDS)
    for i, name in enumerate(names):
        others = make_model(*KINDS, classifier=classifier)
        detach(others, name)
        assert adapter_names(others) == [*names[:i], *names[i + 1 :]]
        change = (outputs(others, batch) - full).norm() / full.norm()
        assert change > 1e-3, name
    for name in names:
        detach(model, name)
    assert torch.equal(outputs(model, batch), outputs(bare, batch))
    assert model.state_dict().keys() == bare.state_dict().keys()


@every_kind
def test_frozen_and_trainable(kind: str) -> None:
    model = make_model("lora", kind) if kind != "lora" else make_model(kind)
    name = adapter_names(model)[-1]
    set_trainable(model, name, False)
    assert not any(p.requires_grad for p in adapter_parameters(model, name))
    set_trainable(model, name, True)
    assert all(p.requires_grad for p in adapter_parameters(model, name))


@every_kind
def test_initial_values_follow_from_seed_and_name(kind: str) -> None:
    def values(seed: int, name: str, first: str | None = None) -> list[Tensor]:
        model = make_model()
        if first is not None:
            attach(model, "first", KINDS[first], seed=9)
        torch.manual_seed(seed + 77)  # on which nothing depends
        attach(model, name, KINDS[kind], seed=seed)
        return [p.detach() for p in adapter_parameters(model, name) if p.any()]

    once, again = values(3, "clinical"), values(3, "clinical", first="lora")
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for other in (values(4, "clinical"), values(3, "downstream")):
        assert all(not torch.equal(a, b) for a, b in zip(once, other, strict=True))
    assert len({float(value.flatten()[0]) for value in once}) == len(once)


def test_a_new_adaption_prompt_changes_nothing() -> None:
    model = make_model()
    batch = make_batch(model.config, 9, 4)
    before = outputs(model, batch)
    attach(model, "clinical", KINDS["adaption prompt"], seed=0)
    assert torch.equal(outputs(model.double(), batch), before)


def test_a_text_repeats_until_it_is_long_enough() -> None:
    model = make_model()
    config = PromptTuningConfig(num_virtual_tokens=5, init="text", init_text="ab")
    attach(model, "clinical", config, seed=0, init_ids=[7, 9])
    rows = adapter_state(model, "clinical")["prompt_embeddings"]
    embedding = model.model.embed_tokens.weight
    assert torch.equal(rows, embedding[torch.tensor([7, 9, 7, 9, 7])].float())
    rows.add_(1.0)  # a copy: the base keeps its own
    assert not torch.equal(rows[0], embedding[7].float())
    with pytest.raises(ValueError, match="init text: the text has no tokens"):
        attach(model, "other", config, seed=0)
    assert adapter_names(model) == ["clinical"]


def test_the_encoder_drops_as_a_function_of_the_step() -> None:
    model = make_model("P-tuning, LSTM")
    (module,) = model.model.input_modules.values()
    assert isinstance(module, VirtualTokens)
    assert isinstance(module.encoder, LSTMEncoder)
    assert torch.equal(module.rows(4), module.rows(4))
    assert not torch.equal(module.rows(4), module.rows(5))
    assert not torch.equal(module.rows(4), module.rows())
    mean = torch.stack([module.rows(seed) for seed in range(400)]).mean(0)
    assert (mean - module.rows()).norm() < 0.1 * module.rows().norm()


def test_state_of_an_encoder_is_what_it_gives() -> None:
    model = make_model("P-tuning, MLP")
    (name,) = adapter_names(model)
    state = {key: tensor.clone() for key, tensor in adapter_state(model, name).items()}
    batch = make_batch(model.config, 9, 4)
    before = outputs(model, batch)
    detach(model, name)
    attach(model, name, KINDS["P-tuning, MLP"], seed=1, encoded=True)
    load_adapter_state(model.double(), name, state)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-12, atol=1e-12)
    assert adapter_config(model, name) == KINDS["P-tuning, MLP"]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            PromptTuningConfig,
            {"num_virtual_tokens": 0},
            "num_virtual_tokens must be a whole number",
        ),
        (PromptTuningConfig, {"init": "vocab"}, "init must be one of random, text, found 'vocab'"),
        (PromptTuningConfig, {"init": "text"}, "init text needs init_text"),
        (PTuningConfig, {"encoder": "gru"}, "encoder must be one of mlp, lstm, found 'gru'"),
        (PTuningConfig, {"encoder_dropout": 1.0}, "encoder_dropout must be at least 0 and below 1"),
        (PTuningConfig, {"encoder_num_layers": 2000}, "a whole number from 1 to 1024"),
        (PrefixTuningConfig, {"prefix_projection": "yes"}, "must be true or false"),
        (PrefixTuningConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size must be"),
        (AdaptionPromptConfig, {"adapter_layers": -1}, "adapter_layers must be a whole number"),
    ],
)
def test_impossible_settings(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_only_a_decoder_takes_what_is_no_lora() -> None:
    with pytest.raises(ValueError, match=r"PrefixTuning needs a decoder .* choose LoRA"):
        attach(torch.nn.Linear(2, 2), "clinical", KINDS["prefix"], seed=0)
