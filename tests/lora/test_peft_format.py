"""Adapter folders go to peft and come from peft with every tensor and the same logits."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.attach import adapted_layers, adapter_names, adapter_state, attach, detach
from lora.config import LoraConfig
from lora.peft_config import read_adapter_config
from lora.peft_format import find_adapter, load_adapter, save_adapter
from model.decoder import init_weights
from model.heads import CausalLM, SequenceClassifier
from tests.lora.oracle import (
    make_batch,
    make_oracle,
    make_twin,
    oracle_logits,
    save_peft,
    tiny_config,
    to_float64,
)

CONFIG = tiny_config()
PREFIX = "base_model.model."
ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
Q_PROJ = "model.layers.0.self_attn.q_proj"

SETTINGS: dict[str, dict[str, Any]] = {
    "q and v": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rank pattern": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 6, "mlp.*": 3},
    },
    "alpha pattern": {
        "r": 4,
        "target_modules": ["q_proj", "gate_proj"],
        "alpha_pattern": {"q_proj": 3, "model.layers.1.mlp.gate_proj": 5},
    },
    "rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["k_proj", "up_proj"],
    },
    "pattern": {"r": 3, "target_modules": r"model\.layers\.(0\.mlp\.(gate|up)|1.*\.k)_proj"},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "excluded": {
        "r": 2,
        "target_modules": "all-linear",
        "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"],
    },
    "excluded by pattern": {
        "r": 2,
        "target_modules": ["q_proj", "o_proj"],
        "exclude_modules": r".*1\.self_attn\.o_proj",
    },
    "full names": {"r": 2, "target_modules": [Q_PROJ, "1.mlp.down_proj"]},
}


WITH_HEAD = ("q and v", "all-linear", "excluded")
every_case = pytest.mark.parametrize(
    ("settings", "classifier"),
    [(settings, False) for settings in SETTINGS.values()]
    + [(SETTINGS[name], True) for name in WITH_HEAD],
    ids=[*SETTINGS, *(f"{name}, classifier" for name in WITH_HEAD)],
)


# transformers' own, on which nothing here depends.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def our_config(settings: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in settings.items()
        }
    )


def make_pair(*, classifier: bool) -> tuple[nn.Module, CausalLM | SequenceClassifier]:
    oracle = make_oracle(CONFIG, classifier=classifier)
    return oracle, make_twin(CONFIG, oracle, classifier=classifier)


def randomise(model: nn.Module, name: str, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model, name).values():
        nn.init.normal_(tensor, std=0.3, generator=generator)


def our_logits(model: CausalLM | SequenceClassifier) -> Tensor:
    batch = make_batch(CONFIG, 5, 9)
    with torch.no_grad():
        model = model.double()
        return model.scores(batch) if isinstance(model, SequenceClassifier) else model.logits(batch)


def peft_logits(oracle: nn.Module) -> Tensor:
    to_float64(CONFIG, oracle)
    with torch.no_grad():
        return oracle_logits(oracle.eval(), make_batch(CONFIG, 5, 9))


def assert_same_logits(ours: CausalLM | SequenceClassifier, oracle: nn.Module) -> None:
    torch.testing.assert_close(our_logits(ours), peft_logits(oracle), rtol=1e-9, atol=1e-9)


@every_case
def test_adapters_of_peft_load_here(
    settings: dict[str, Any], classifier: bool, tmp_path: Path
) -> None:
    oracle, model = make_pair(classifier=classifier)
    base_logits = our_logits(make_twin(CONFIG, oracle, classifier=classifier))
    task = "SEQ_CLS" if classifier else "CAUSAL_LM"
    torch.manual_seed(1)
    oracle = peft.get_peft_model(
        oracle, peft.LoraConfig(task_type=task, init_lora_weights=False, **settings)
    )
    if classifier:
        with torch.no_grad():
            nn.init.normal_(oracle.base_model.model.score.modules_to_save["default"].weight)
    save_peft(oracle, tmp_path)

    config = load_adapter(model, tmp_path, "clinical", trainable=False)
    file = load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in adapter_state(model, "clinical").items():
        assert torch.equal(file.pop(PREFIX + key), tensor)
    if classifier:
        assert config.modules_to_save == ("score",)
        assert torch.equal(file.pop(f"{PREFIX}score.weight"), model.score.weight)
    assert not file
    assert not any(p.requires_grad for p in model.parameters())
    assert (our_logits(model) - base_logits).abs().max() > 0.1
    assert_same_logits(model, oracle)


@every_case
def test_adapters_made_here_load_in_peft_and_here(
    settings: dict[str, Any], classifier: bool, tmp_path: Path
) -> None:
    oracle, model = make_pair(classifier=classifier)
    attach(model, "clinical", our_config(settings), seed=0)
    randomise(model, "clinical")
    head = None
    if classifier:
        nn.init.normal_(model.score.weight)
        head = {"score.weight": model.score.weight}
    save_adapter(model, "clinical", tmp_path / "clinical", base_model_name="base", head=head)

    again = make_twin(CONFIG, oracle, classifier=classifier)
    load_adapter(again, tmp_path / "clinical", "downstream")
    before, after = adapter_state(model, "clinical"), adapter_state(again, "downstream")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    scalings = [
        {layer: adapter.scaling for layer, adapter in adapted_layers(model, name).items()}
        for model, name in ((model, "clinical"), (again, "downstream"))
    ]
    assert scalings[0] == scalings[1]
    assert torch.equal(our_logits(again), our_logits(model))

    oracle = peft.PeftModel.from_pretrained(oracle, tmp_path / "clinical")
    assert_same_logits(model, oracle)
    # From here to peft to here: the same bytes.
    save_peft(oracle.float(), tmp_path / "peft")
    names = ("clinical/adapter_model.safetensors", "peft/adapter_model.safetensors")
    ours, theirs = (load_file(tmp_path / name) for name in names)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.filterwarnings("ignore:Adapter name 'lora':UserWarning")
def test_a_named_adapter_of_peft_lies_in_a_sub_folder(tmp_path: Path) -> None:
    oracle, model = make_pair(classifier=False)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    oracle = peft.get_peft_model(oracle, settings, adapter_name="lora")
    save_peft(oracle, tmp_path)
    assert find_adapter(tmp_path) == tmp_path / "lora"
    load_adapter(model, tmp_path, "lora")
    assert_same_logits(model, oracle)

    shutil.copytree(tmp_path / "lora", tmp_path / "other")
    with pytest.raises(ValueError, match="found adapters in lora, other"):
        load_adapter(model, tmp_path, "second")


def test_two_adapters_saved_and_loaded_give_identical_outputs(tmp_path: Path) -> None:
    oracle, model = make_pair(classifier=True)
    attach(model, "clinical", LoraConfig(r=4, target_modules="all-linear"), seed=0)
    attach(model, "downstream", LoraConfig(r=2, use_rslora=True), seed=0)
    randomise(model, "clinical", 1), randomise(model, "downstream", 2)
    nn.init.normal_(model.score.weight)
    save_adapter(model, "clinical", tmp_path / "clinical")
    head = {"score.weight": model.score.weight}
    save_adapter(model, "downstream", tmp_path / "downstream", head=head)

    again = make_twin(CONFIG, oracle, classifier=True)
    load_adapter(again, tmp_path / "clinical", "clinical", trainable=False)
    load_adapter(again, tmp_path / "downstream", "downstream")
    assert adapter_names(again) == ["clinical", "downstream"]
    assert torch.equal(
        again.scores(make_batch(CONFIG, 5, 9)), model.scores(make_batch(CONFIG, 5, 9))
    )
    both = our_logits(again)
    for name in ("clinical", "downstream"):
        ups = [adapter.lora_B for adapter in adapted_layers(again, name).values()]
        values = [up.clone() for up in ups]
        for up in ups:
            nn.init.zeros_(up)
        assert (our_logits(again) - both).abs().max() > 0.1
        for up, value in zip(ups, values, strict=True):
            up.detach().copy_(value)
    assert torch.equal(our_logits(again), both)


# --- what is written ----------------------------------------------------------------------------


def make_model() -> CausalLM:
    model = CausalLM(CONFIG).requires_grad_(False)
    init_weights(model, std=0.2, seed=0)
    return model


@pytest.fixture
def model() -> CausalLM:
    model = make_model()
    attach(model, "clinical", LoraConfig(r=2, lora_alpha=4.0, target_modules=("q_proj",)), seed=0)
    randomise(model, "clinical")
    return model


@pytest.fixture
def folder(model: CausalLM, tmp_path: Path) -> Path:
    """A saved adapter; the model has it no more."""
    save_adapter(model, "clinical", tmp_path / "clinical")
    detach(model, "clinical")
    return tmp_path / "clinical"


def test_the_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["clinical"]
    # The keys of peft 0.5, use_rslora and use_dora.
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "adapter": "clinical"}
        assert sorted(file.keys()) == [
            f"{PREFIX}model.layers.{i}.self_attn.q_proj.lora_{x}.weight"
            for i in range(2)
            for x in "AB"
        ]


@pytest.mark.parametrize(
    ("targets", "excluded", "written"),
    [
        ("all-linear", (), ["down_proj", "gate_proj", *ATTENTION[:3], "up_proj", "v_proj"]),
        ("all-linear", r".*mlp.*", [*ATTENTION]),
        (("q_proj",), ("layers.1.self_attn.q_proj",), [Q_PROJ]),
    ],
)
def test_targets_are_written_as_a_list_that_every_release_reads(
    targets: Any, excluded: Any, written: list[str], tmp_path: Path
) -> None:
    model = make_model()
    config = LoraConfig(r=2, target_modules=targets, exclude_modules=excluded)
    attach(model, "clinical", config, seed=0)
    save_adapter(model, "clinical", tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"] == written


def test_the_same_adapter_replaces_itself(model: CausalLM, tmp_path: Path) -> None:
    for seed in (1, 2):
        randomise(model, "clinical", seed)
        save_adapter(model, "clinical", tmp_path / "run" / "clinical")
    saved = adapter_state(model, "clinical")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["clinical"]
    detach(model, "clinical")
    load_adapter(model, tmp_path / "run" / "clinical", "clinical")
    assert all(torch.equal(saved[k], t) for k, t in adapter_state(model, "clinical").items())


def test_nothing_else_is_replaced(model: CausalLM, tmp_path: Path) -> None:
    attach(model, "downstream", LoraConfig(r=2), seed=0)
    save_adapter(model, "clinical", tmp_path / "a")
    with pytest.raises(ValueError, match="does not hold the adapter 'downstream' but 'clinical'"):
        save_adapter(model, "downstream", tmp_path / "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "file.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists and does not hold the adapter 'clinical'"):
        save_adapter(model, "clinical", tmp_path / "notes")
    assert (tmp_path / "notes" / "file.txt").read_text() == "kept"
    with pytest.raises(ValueError, match="no adapter 'other' is attached"):
        save_adapter(model, "other", tmp_path / "b")


def test_a_failed_write_leaves_the_old_adapter(
    model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(model, "clinical", tmp_path / "a")
    before = load_file(tmp_path / "a/adapter_model.safetensors")
    randomise(model, "clinical", 9)

    def fail(path: Path, value: object) -> None:
        raise OSError("no space left on the disk")

    monkeypatch.setattr("lora.peft_format.write_json", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, "clinical", tmp_path / "a")
    after = load_file(tmp_path / "a/adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- what is refused ----------------------------------------------------------------------------


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change({key: tensor.clone() for key, tensor in tensors.items()}), path)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]},
        {"layers_to_transform": [0]},
        {"layers_pattern": "layers"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"use_qalora": True},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts"]},
        {"megatron_config": {"a": 1}},
        {"eva_config": {"rho": 2.0}},
        {"alora_invocation_tokens": [5]},
        {"qalora_group_size": 32},
        {"a_feature_of_tomorrow": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_implemented_is_refused_by_name(
    model: CausalLM, folder: Path, changes: dict[str, Any]
) -> None:
    rewrite_config(folder, **changes)
    key = next(iter(changes))
    with pytest.raises(ValueError, match=f"adapter_config.json: {key} = .* is not supported"):
        load_adapter(model, folder, "clinical")
    assert adapter_names(model) == []


def test_what_is_switched_off_is_ignored(model: CausalLM, folder: Path) -> None:
    rewrite_config(
        folder,
        a_feature_of_tomorrow=None,
        another=False,
        a_list=[],
        loftq_config={},
        megatron_core="megatron.core",
        qalora_group_size=16,
        init_lora_weights="gaussian",
        exclude_modules=None,
        peft_version="9.9",
        auto_mapping={"base_model_class": "LlamaForCausalLM"},
    )
    load_adapter(model, folder, "clinical")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be one of LORA, .*, found 'IA3'"),
        ({"peft_type": None}, "peft_type must be one of LORA"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["nothing"]}, "'nothing' fits no linear layer"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "'embed_tokens' fits no linear layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "selects the head 'lm_head'"),
        ({"target_modules": 5}, "target_modules must be names"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: 'embed_tokens' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head' is not supported"),
        ({"r": 0}, "r must be a whole number"),
        (
            {"r": 4},
            r"4 tensors of another shape: .*lora_A.weight is \[2, 32\] instead of \[4, 32\]",
        ),
        ({"r": 10**15}, "r must be a whole number from 1 to"),
        ({"lora_alpha": -1}, "lora_alpha must be a positive"),
        ({"lora_alpha": 1e999}, "adapter_config.json"),
        ({"alpha_pattern": {"v_proj": 4}}, "alpha_pattern: 'v_proj' fits none of the 2 adapted"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map"),
    ],
)
def test_wrong_settings_are_refused(
    model: CausalLM, folder: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, "clinical")
    assert adapter_names(model) == []


KEY = f"{PREFIX}{Q_PROJ}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {key.removeprefix("base_model."): t for key, t in tensors.items()},
            "does not begin with 'base_model.model.'",
        ),
        (
            lambda tensors: {k.replace("model.model.", "model."): t for k, t in tensors.items()},
            "4 tensors missing: .*; 4 tensors that fit nothing",
        ),
        (
            lambda tensors: {k.replace("lora_A", "lora_A.clinical"): t for k, t in tensors.items()},
            "2 tensors missing",
        ),
        (
            lambda tensors: {key: t for key, t in tensors.items() if key != KEY},
            f"1 tensors missing: {KEY}",
        ),
        (
            lambda tensors: {**tensors, f"{PREFIX}lm_head.weight": torch.zeros(61, 32)},
            f"1 tensors that fit nothing in this model and configuration: {PREFIX}lm_head.weight",
        ),
        (
            lambda tensors: {**tensors, f"{PREFIX}score.weight": torch.zeros(3, 32)},
            "fit nothing .*score.weight",
        ),
        (
            lambda tensors: {**tensors, KEY: tensors[KEY].T.contiguous()},
            r"1 tensors of another shape: .*lora_A.weight is \[32, 2\] instead of \[2, 32\]",
        ),
        (lambda tensors: {**tensors, KEY: tensors[KEY].double()}, "F64; allowed: F32, F16, BF16"),
        (lambda tensors: {**tensors, KEY: tensors[KEY].long()}, "is I64; allowed"),
        (lambda tensors: {**tensors, KEY: tensors[KEY] * math.nan}, "a value that is not finite"),
        (lambda tensors: {}, "4 tensors missing"),
    ],
)
def test_wrong_tensors_are_refused(
    model: CausalLM, folder: Path, change: Any, message: str
) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rewrite_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, "clinical")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_exactly(
    model: CausalLM, folder: Path, dtype: torch.dtype
) -> None:
    rewrite_tensors(folder, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    load_adapter(model, folder, "clinical")
    file = load_file(folder / "adapter_model.safetensors")
    for key, tensor in adapter_state(model, "clinical").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, file[PREFIX + key].float())


def test_wrong_files_are_refused(model: CausalLM, folder: Path, tmp_path: Path) -> None:
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a complete"):
        load_adapter(model, folder, "clinical")
    tensors.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors does not exist"):
        load_adapter(model, folder, "clinical")
    (folder / "adapter_model.bin").write_bytes(whole)
    with pytest.raises(ValueError, match="is a pickle, which is never read"):
        load_adapter(model, folder, "clinical")
    config.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        load_adapter(model, folder, "clinical")
    config.write_text('{"r": 2, "r": 3}')
    with pytest.raises(ValueError, match="a key occurs twice"):
        load_adapter(model, folder, "clinical")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"with adapter_config.json, or hold one such .* found none"
    ):
        load_adapter(model, tmp_path / "empty", "clinical")
    assert adapter_names(model) == []


def test_a_taken_name_is_refused(model: CausalLM, folder: Path) -> None:
    load_adapter(model, folder, "clinical")
    with pytest.raises(ValueError, match="'clinical' is already attached"):
        load_adapter(model, folder, "clinical")
    with pytest.raises(ValueError, match="an adapter cannot be called 'a/b'"):
        load_adapter(model, folder, "a/b")


def test_names_that_fit_nothing_may_stand_in_the_list_of_a_file(
    model: CausalLM, folder: Path
) -> None:
    rewrite_config(folder, target_modules=["q_proj", "query_key_value"])
    assert load_adapter(model, folder, "clinical").target_modules == ("q_proj",)
    assert read_adapter_config(folder).target_modules == ("q_proj", "query_key_value")


def test_a_head_needs_its_tensor_and_its_size(tmp_path: Path) -> None:
    classifier = SequenceClassifier(CONFIG, 3)
    init_weights(classifier, std=0.2, seed=0)
    attach(classifier, "a", LoraConfig(r=2), seed=0)
    save_adapter(classifier, "a", tmp_path / "a", head={"score.weight": classifier.score.weight})
    with pytest.raises(ValueError, match=r"score.weight is \[3, 32\] instead of \[5, 32\]"):
        load_adapter(SequenceClassifier(CONFIG, 5), tmp_path / "a", "a")
    with pytest.raises(ValueError, match=r"fit nothing .*score.weight"):
        load_adapter(CausalLM(CONFIG), tmp_path / "a", "a")
    rewrite_tensors(tmp_path / "a", lambda t: {k: v for k, v in t.items() if "score" not in k})
    before = classifier.score.weight.clone()
    with pytest.raises(ValueError, match=r"1 tensors missing: .*score.weight"):
        load_adapter(classifier, tmp_path / "a", "b")
    assert torch.equal(classifier.score.weight, before)


def test_the_head_of_a_classifier_of_an_older_release(tmp_path: Path) -> None:
    """It lies in the tensor file, though `modules_to_save` does not name it."""
    classifier = SequenceClassifier(CONFIG, 3)
    init_weights(classifier, std=0.2, seed=0)
    attach(classifier, "a", LoraConfig(r=2), seed=0)
    head = torch.randn(3, 32)
    save_adapter(classifier, "a", tmp_path / "a", head={"score.weight": head})
    rewrite_config(tmp_path / "a", modules_to_save=None)
    assert load_adapter(classifier, tmp_path / "a", "b").modules_to_save == ("score",)
    assert torch.equal(classifier.score.weight, head)


def test_a_stage_one_adapter_goes_under_a_classifier(folder: Path) -> None:
    classifier = SequenceClassifier(CONFIG, 3)
    init_weights(classifier, std=0.2, seed=0)
    before = classifier.score.weight.clone()
    assert load_adapter(classifier, folder, "clinical").modules_to_save == ()
    assert torch.equal(classifier.score.weight, before)


class Hostile(nn.Module):
    """Layers whose names contain the words that the keys are made of."""

    def __init__(self) -> None:
        from model.linear import Linear

        super().__init__()
        self.model = nn.Module()
        self.model.weight = Linear(4, 6)
        self.model.lora_A = Linear(4, 6)
        self.model.base_model = nn.ModuleDict({"lora_B_weight": Linear(4, 6)})


def test_hostile_layer_names(tmp_path: Path) -> None:
    model, again = Hostile(), Hostile()
    attach(model, "lora", LoraConfig(r=2, target_modules="all-linear"), seed=0)
    randomise(model, "lora")
    save_adapter(model, "lora", tmp_path / "lora")
    load_adapter(again, tmp_path / "lora", "weight")
    saved, loaded = adapter_state(model, "lora"), adapter_state(again, "weight")
    assert len(saved) == 6 and saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
