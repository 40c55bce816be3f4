"""One adapter for peft: its logits are the run's, whatever the two adapters were."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora.export
from lora.config import LoraConfig
from lora.export import export, main
from lora.parts import parts_of_run
from lora.peft_format import load_adapter
from model.batch import TokenBatch
from model.checkpoint import load_causal_lm
from model.files import open_safetensors
from model.heads import CausalLM, SequenceClassifier
from tests.lora.oracle import make_batch, oracle_logits, tiny_config
from tests.lora.runs import CLINICAL, DOWNSTREAM, LABELS, make_base, make_run

BATCH = make_batch(tiny_config(), 17, 1, 12)
SAME_LAYERS = LoraConfig(r=2, lora_alpha=32, target_modules=("q_proj", "v_proj"))
OTHER_LAYERS = LoraConfig(r=3, lora_alpha=1, use_rslora=True, target_modules=("o_proj",))
ONE_LAYER = LoraConfig(r=5, lora_alpha=2, target_modules=("layers.1.self_attn.q_proj",))
PAIRS = {
    "one adapter": {"clinical": DOWNSTREAM},
    "same layers": {"clinical": CLINICAL, "downstream": SAME_LAYERS},
    "other layers": {"clinical": CLINICAL, "downstream": OTHER_LAYERS},
    "one layer more": {"clinical": CLINICAL, "downstream": ONE_LAYER},
    "everything differs": {"clinical": CLINICAL, "downstream": DOWNSTREAM},
    "three": {"a": CLINICAL, "b": DOWNSTREAM, "c": OTHER_LAYERS},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def logits_with_peft(
    base: Path, adapter: Path, labels: int = 0, batch: TokenBatch = BATCH
) -> torch.Tensor:
    if labels:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels
        )
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return oracle_logits(peft.PeftModel.from_pretrained(model, adapter).eval(), batch)


def logits(model: CausalLM | SequenceClassifier) -> torch.Tensor:
    return model.logits(BATCH) if isinstance(model, CausalLM) else model.scores(BATCH)


@pytest.mark.parametrize("labels", [(), LABELS], ids=["language model", "classifier"])
@pytest.mark.parametrize("adapters", PAIRS.values(), ids=PAIRS)
@pytest.mark.filterwarnings("error:.*missing.*adapter keys")
def test_peft_gives_the_runs_logits(
    base: Path, tmp_path: Path, adapters: dict[str, LoraConfig], labels: tuple[str, ...]
) -> None:
    trained = make_run(tmp_path / "run", base, adapters, labels=labels)
    config = export(parts_of_run(tmp_path / "run"), tmp_path / "out")
    expected = logits(trained)
    found = logits_with_peft(base, tmp_path / "out", len(labels))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    keys = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert keys["lora_alpha"] == keys["r"]
    assert keys["alpha_pattern"] == keys["rank_pattern"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert keys["task_type"] == ("SEQ_CLS" if labels else "CAUSAL_LM")
    if isinstance(trained, SequenceClassifier):
        head = tensors.pop("base_model.model.score.weight")
        assert torch.equal(head, trained.score.weight)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        layer = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        expected_rank = sum(c.rank(layer) for c in adapters.values() if c.targets(layer))
        assert tensor.shape[0 if ".lora_A." in name else 1] == expected_rank
        assert config.scaling(layer) == 1.0


def test_the_settings_say_no_more_than_they_need(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, base, PAIRS["same layers"])
    config = export(parts_of_run(run), tmp_path / "a")
    assert (config.r, config.rank_pattern) == (6, {})
    assert config.target_modules == ("q_proj", "v_proj")
    shutil.rmtree(run)
    make_run(run, base, PAIRS["other layers"])
    config = export(parts_of_run(run), tmp_path / "b")
    assert (config.r, config.rank_pattern) == (4, {"o_proj": 3})
    shutil.rmtree(run)
    make_run(run, base, PAIRS["one layer more"])
    config = export(parts_of_run(run), tmp_path / "c")
    assert (config.r, config.rank_pattern) == (4, {"model.layers.1.self_attn.q_proj": 9})


def test_it_is_loaded_here_too(base: Path, tmp_path: Path) -> None:
    trained = make_run(tmp_path / "run", base, PAIRS["everything differs"])
    export(parts_of_run(tmp_path / "run"), tmp_path / "out")
    model = load_causal_lm(base)
    load_adapter(model, tmp_path / "out", "pair", trainable=False)
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["scaling", "adapter", "head"])
def test_the_comparison_sees_a_fault(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    adapters = PAIRS["everything differs"]
    trained = make_run(tmp_path / "run", base, adapters, labels=LABELS)
    if fault == "scaling":
        monkeypatch.setattr(LoraConfig, "scaling", lambda *_: 1.0)
    if fault == "adapter":
        stack = lora.export.stack
        monkeypatch.setattr(lora.export, "stack", lambda adapters, m: stack(adapters[:1], m))
    export(parts_of_run(tmp_path / "run"), tmp_path / "out")
    if fault == "head":
        file = tmp_path / "out" / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.score.weight"].zero_()
        save_file(tensors, file, {"format": "pt"})
    expected = logits(trained)
    found = logits_with_peft(base, tmp_path / "out", len(LABELS))
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


def test_files_that_do_not_fit_the_base_are_not_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", base, PAIRS["everything differs"])
    monkeypatch.setattr(lora.export, "rank_pattern", lambda *_: {})
    with pytest.raises(ValueError, match="tensors of another shape"):
        export(parts_of_run(tmp_path / "run"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_the_base_need_not_be_read(base: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", base, PAIRS["everything differs"])
    (base / "model.safetensors").unlink()
    export(parts_of_run(tmp_path / "run"), tmp_path / "out")


def test_the_command_says_what_peft_must_be_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", base, PAIRS["other layers"], labels=LABELS)
    arguments = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "clinical + downstream: rank 3, 4, scaling 1, head of 3 classes" in said
    assert "classes in order: home, ward, ICU; load the base with num_labels=3" in said
    with open_safetensors(tmp_path / "out" / "adapter_model.safetensors") as file:
        assert file.metadata()["adapter"] == "clinical-downstream"
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["config", "tensors", "head", "base"])
def test_damaged_runs_end_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = tmp_path / "run"
    make_run(run, base, PAIRS["everything differs"], labels=LABELS)
    path = {
        "config": run / "adapter" / "clinical" / "adapter_config.json",
        "tensors": run / "adapter" / "downstream" / "adapter_model.safetensors",
        "head": run / "head.safetensors",
        "base": base / "config.json",
    }[damage]
    path.write_bytes(path.read_bytes()[:-20])
    assert main(["--run", str(run), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert path.name in said
    assert not (tmp_path / "out").exists()


def test_real_weights_exported(real_data: Path, tmp_path: Path) -> None:
    base = real_data / "stories260k"
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    adapters = {"clinical": CLINICAL, "downstream": config}
    trained = make_run(tmp_path / "run", base, adapters, labels=LABELS, size=0.02)
    export(parts_of_run(tmp_path / "run"), tmp_path / "out")
    expected = logits(trained)
    found = logits_with_peft(base, tmp_path / "out", len(LABELS))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
