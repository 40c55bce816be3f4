"""Attaching adapters: which layers, how several add up, what is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

from lora.adapter import LoraAdapter
from lora.attach import (
    adapted_layers,
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
from model.linear import Linear

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = Linear(8, 8), Linear(8, 4)
        self.v_proj, self.o_proj = Linear(8, 4), Linear(8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()


class Toy(nn.Module):
    """Linear layers under the names of a LLaMA, with a head that is no place for adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 16, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x_MD: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        for block in self.model.layers:
            x_MD = x_MD + block.self_attn.q_proj(x_MD, dropout_keys)
        return self.lm_head(x_MD)


@pytest.fixture
def toy() -> Toy:
    return Toy()


def layer_names(*names: str) -> list[str]:
    return [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in names]


def fill(model: nn.Module, name: str, seed: int = 1) -> None:
    """Give B random values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapted_layers(model, name).values():
        nn.init.normal_(adapter.lora_B, generator=generator)


# --- which layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "v_proj"), layer_names("q_proj", "v_proj")),
        (("self_attn.k_proj",), layer_names("k_proj")),
        (("model.layers.1.self_attn.o_proj",), ["model.layers.1.self_attn.o_proj"]),
        ("all-linear", layer_names(*NAMES)),
        (r".*\.layers\.0\..*(q|k)_proj", layer_names("q_proj", "k_proj")[:2]),
    ],
)
def test_targets(toy: Toy, targets: tuple[str, ...] | str, expected: list[str]) -> None:
    attached = attach(toy, "clinical", LoraConfig(target_modules=targets), seed=0)
    assert attached == expected
    assert list(adapted_layers(toy, "clinical")) == expected


def test_a_name_ends_at_a_dot(toy: Toy) -> None:
    with pytest.raises(ValueError, match="'proj' fits no linear layer"):
        attach(toy, "clinical", LoraConfig(target_modules=("proj",)), seed=0)


@pytest.mark.parametrize("exclude", [("layers.1.self_attn.q_proj", "v_proj"), r".*(1.*q|v)_proj"])
def test_excluded_layers(toy: Toy, exclude: tuple[str, ...] | str) -> None:
    config = LoraConfig(target_modules="all-linear", exclude_modules=exclude)
    expected = [n for n in layer_names(*NAMES) if "v_proj" not in n and "1.self_attn.q" not in n]
    assert attach(toy, "clinical", config, seed=0) == expected


def test_rank_and_alpha_patterns(toy: Toy) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=("q_proj", "v_proj"),
        use_rslora=True,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 3},
        alpha_pattern={"(k|v)_proj": 6},
    )
    attach(toy, "clinical", config, seed=0)
    numbers = {
        name.removeprefix("model.layers."): (adapter.lora_A.shape[0], adapter.scaling)
        for name, adapter in adapted_layers(toy, "clinical").items()
    }
    assert numbers == {
        "0.self_attn.q_proj": (2, 8 / math.sqrt(2)),
        "0.self_attn.v_proj": (4, 6 / math.sqrt(4)),
        "1.self_attn.q_proj": (3, 8 / math.sqrt(3)),
        "1.self_attn.v_proj": (4, 6 / math.sqrt(4)),
    }


# --- values -------------------------------------------------------------------------------------


def test_initial_values() -> None:
    adapter = LoraAdapter(LoraConfig(r=64), 100, 30, adapter="a", layer="l", seed=0)
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32
    assert adapter.lora_A.abs().max().item() <= 0.1
    assert adapter.lora_A.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    assert not adapter.lora_B.any()


def test_initial_values_depend_on_seed_and_names_alone() -> None:
    def first_values(*others: str, name: str = "clinical", seed: int = 0) -> dict[str, Tensor]:
        model = Toy()
        for other in others:
            attach(model, other, LoraConfig(target_modules="all-linear"), seed=seed)
        torch.rand(3)
        attach(model, name, LoraConfig(), seed=seed)
        return {k: t for k, t in adapter_state(model, name).items() if "lora_A" in k}

    plain, after_others = first_values(), first_values("x", "y")
    assert all(torch.equal(plain[key], after_others[key]) for key in plain)
    for changed in (first_values(seed=1), first_values(name="downstream")):
        assert not any(torch.equal(plain[key], changed[key]) for key in plain)
    assert len({tensor.sum().item() for tensor in plain.values()}) == len(plain)


def test_sites_are_stable_and_apart(toy: Toy) -> None:
    for name in ("clinical", "downstream"):
        attach(toy, name, LoraConfig(target_modules="all-linear"), seed=0)
    sites = {
        (name, layer): adapter.site
        for name in adapter_names(toy)
        for layer, adapter in adapted_layers(toy, name).items()
    }
    assert len(set(sites.values())) == len(sites) == 16
    assert all(0 <= site < 2**31 for site in sites.values())
    # A run is resumed by another process: the number may never change.
    assert sites["clinical", "model.layers.0.self_attn.q_proj"] == 691240307


def test_a_new_adapter_changes_no_output(toy: Toy) -> None:
    x_MD = torch.randn(5, 8)
    before = toy(x_MD)
    attach(toy, "clinical", LoraConfig(), seed=0)
    assert torch.equal(toy(x_MD), before)


def test_adapters_are_summed(toy: Toy) -> None:
    layer = toy.model.layers[0].self_attn.q_proj
    attach(toy, "clinical", LoraConfig(r=3, lora_alpha=5), seed=0)
    attach(toy, "downstream", LoraConfig(r=2, use_rslora=True), seed=0)
    fill(toy, "clinical"), fill(toy, "downstream", 2)
    toy.double()
    x_MD = torch.randn(5, 8, dtype=torch.float64)
    weight = layer.weight.clone()
    for name, scaling in (("clinical", 5 / 3), ("downstream", 8 / math.sqrt(2))):
        adapter = layer.adapters[name]
        weight = weight + scaling * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(layer(x_MD), x_MD @ weight.T, rtol=0, atol=1e-12)


def test_dropout_scales_what_it_keeps(toy: Toy) -> None:
    attach(toy, "clinical", LoraConfig(lora_dropout=0.25), seed=0)
    fill(toy, "clinical")
    x_MD = torch.randn(1, 8).repeat(20_000, 1)
    keys_M = torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int32)
    layer = toy.model.layers[0].self_attn.q_proj
    dropped, plain = layer(x_MD, keys_M), layer(x_MD)
    assert not torch.equal(dropped, plain)
    torch.testing.assert_close(dropped.mean(0), plain[0], rtol=0.1, atol=0.1)


# --- freezing, taking off, taking out ------------------------------------------------------------


def test_each_adapter_is_frozen_or_trained_on_its_own(toy: Toy) -> None:
    attach(toy, "clinical", LoraConfig(), seed=0, trainable=False)
    attach(toy, "downstream", LoraConfig(), seed=0)
    fill(toy, "clinical"), fill(toy, "downstream")
    frozen = {key: tensor.clone() for key, tensor in adapter_state(toy, "clinical").items()}
    trained = {key: tensor.clone() for key, tensor in adapter_state(toy, "downstream").items()}
    optimizer = torch.optim.AdamW(
        [*adapter_parameters(toy, "clinical"), *adapter_parameters(toy, "downstream")]
    )
    for _ in range(3):
        toy(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    q_proj_only = [key for key in trained if "q_proj" in key]
    assert all(torch.equal(frozen[k], t) for k, t in adapter_state(toy, "clinical").items())
    assert not any(
        torch.equal(trained[k], adapter_state(toy, "downstream")[k]) for k in q_proj_only
    )

    set_trainable(toy, "clinical", True)
    set_trainable(toy, "downstream", False)
    assert all(p.requires_grad for p in adapter_parameters(toy, "clinical"))
    assert not any(p.requires_grad for p in adapter_parameters(toy, "downstream"))
    assert all(p.grad is None for p in adapter_parameters(toy, "downstream"))


def test_attaching_leaves_the_others_trainable(toy: Toy) -> None:
    base = toy.lm_head.weight.requires_grad_(False)
    attach(toy, "clinical", LoraConfig(), seed=0)
    attach(toy, "downstream", LoraConfig(), seed=0, trainable=False)
    assert all(p.requires_grad for p in adapter_parameters(toy, "clinical"))
    assert not base.requires_grad


def test_base_names_stay(toy: Toy) -> None:
    before = set(toy.state_dict())
    attach(toy, "clinical", LoraConfig(), seed=0)
    added = set(toy.state_dict()) - before
    assert before <= set(toy.state_dict())
    assert added == {
        f"{layer}.adapters.clinical.lora_{x}"
        for layer in layer_names("q_proj", "v_proj")
        for x in "AB"
    }


def test_names_come_in_the_order_of_attaching(toy: Toy) -> None:
    """Also where the first layer of the model has only the second adapter."""
    for name, targets in (("z", ("v_proj",)), ("y", ("q_proj", "v_proj")), ("x", ("q_proj",))):
        attach(toy, name, LoraConfig(target_modules=targets), seed=0)
    assert adapter_names(toy) == ["z", "y", "x"]
    detach(toy, "y")
    attach(toy, "a", LoraConfig(), seed=0)
    assert adapter_names(toy) == ["z", "x", "a"]


def test_the_base_alone(toy: Toy) -> None:
    x_MD = torch.randn(5, 8)
    base = toy(x_MD)
    attach(toy, "clinical", LoraConfig(), seed=0)
    fill(toy, "clinical")
    adapted = toy(x_MD)
    with pytest.raises(KeyError), without_adapters(toy):
        assert torch.equal(toy(x_MD), base)
        assert adapter_names(toy) == []
        raise KeyError
    assert torch.equal(toy(x_MD), adapted)
    assert not torch.equal(adapted, base)


def test_detach_restores_the_model(toy: Toy) -> None:
    x_MD, names = torch.randn(5, 8), set(toy.state_dict())
    before = toy(x_MD)
    for name in ("clinical", "downstream"):
        attach(toy, name, LoraConfig(), seed=0)
        fill(toy, name)
    detach(toy, "clinical")
    assert adapter_names(toy) == ["downstream"]
    detach(toy, "downstream")
    assert torch.equal(toy(x_MD), before)
    assert set(toy.state_dict()) == names
    with pytest.raises(ValueError, match="no adapter 'clinical' is attached; attached: none"):
        detach(toy, "clinical")


def test_state_goes_out_and_in(toy: Toy) -> None:
    config = LoraConfig(r=3)
    attach(toy, "clinical", config, seed=0)
    fill(toy, "clinical")
    state = adapter_state(toy, "clinical")
    assert adapter_config(toy, "clinical") == config
    assert set(state) == {
        f"{layer}.lora_{x}.weight" for layer in layer_names("q_proj", "v_proj") for x in "AB"
    }
    other = Toy()
    attach(other, "clinical", config, seed=9)
    load_adapter_state(other, "clinical", state)
    assert all(torch.equal(state[k], t) for k, t in adapter_state(other, "clinical").items())
    assert (
        adapter_parameters(other, "clinical")[0].data_ptr() != state[next(iter(state))].data_ptr()
    )

    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    for broken, message in (
        ({k: t for k, t in state.items() if k != key}, f"1 tensors missing: {key}"),
        ({**state, "lora_C": torch.zeros(1)}, "1 tensors that fit nothing .*: lora_C"),
        (
            {**state, key: torch.zeros(8, 3)},
            r"q_proj.lora_A.weight is \[8, 3\] instead of \[3, 8\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter_state(other, "clinical", broken)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lora", "weight", "default", "lora_A", "base_model", "7", "a-b_c"]
)
def test_hostile_names_work(toy: Toy, name: str) -> None:
    attach(toy, name, LoraConfig(), seed=0)
    fill(toy, name)
    assert adapter_names(toy) == [name]
    assert len(adapter_state(toy, name)) == 8


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a b", "-x", "keys", "items", "pop", "x" * 65])
def test_unusable_names(toy: Toy, name: str) -> None:
    with pytest.raises(ValueError, match="an adapter cannot be called"):
        attach(toy, name, LoraConfig(), seed=0)


def test_a_name_is_taken_once(toy: Toy) -> None:
    attach(toy, "clinical", LoraConfig(target_modules=("q_proj",)), seed=0)
    with pytest.raises(ValueError, match="'clinical' is already attached"):
        attach(toy, "clinical", LoraConfig(target_modules=("v_proj",)), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_proj", "qproj")}, "'qproj' fits no .* nearest names are q_proj"),
        ({"target_modules": ("query_key_value",)}, "nearest names are"),
        ({"target_modules": "q_proj"}, r"write the list \['q_proj'\] or the pattern '.\*q_proj'"),
        ({"target_modules": "nothing"}, "selects no linear layer; names look like model.layers.0"),
        ({"target_modules": ("q_proj", "lm_head")}, "selects the head 'lm_head'"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "selects the head 'lm_head'"),
        ({"exclude_modules": ("q_proj",)}, "exclude_modules leaves nothing of .*'q_proj'"),
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' fits none of the 4 adapted"),
        ({"alpha_pattern": {"layers.7.*": 2}}, "alpha_pattern: 'layers.7.*' fits none"),
    ],
)
def test_what_fits_nothing_is_refused(toy: Toy, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(toy, "clinical", LoraConfig(**settings), seed=0)
    assert adapter_names(toy) == []


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="selects no linear layer"):
        attach(nn.Linear(2, 2), "clinical", LoraConfig(target_modules="all-linear"), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number from 1 to 65536, found 0"),
        ({"r": -4}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": 2.0}, "r must be"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a positive number of at most .*, found nan"),
        ({"lora_alpha": math.inf}, "lora_alpha must be"),
        ({"lora_alpha": 0}, "lora_alpha must be"),
        ({"lora_alpha": "16"}, "lora_alpha must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, found 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout must be"),
        ({"lora_dropout": math.nan}, "lora_dropout must be"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": "(q_proj"}, "target_modules: .* is not a regular expression"),
        ({"target_modules": 3}, "target_modules must be names"),
        ({"target_modules": ("q_proj", "")}, "target_modules must be names"),
        ({"exclude_modules": "*"}, "exclude_modules: .* is not a regular expression"),
        ({"modules_to_save": "score"}, "modules_to_save must be names of modules, found 'score'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a whole number"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern: .* is not a regular expression"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map patterns to values"),
        ({"alpha_pattern": {"q_proj": math.nan}}, r"alpha_pattern\['q_proj'\] must be"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)
