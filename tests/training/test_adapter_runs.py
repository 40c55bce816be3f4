"""Whole runs of the four methods besides LoRA: resumed, evaluated, stacked, refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evaluation.metrics import headline_metrics
from evaluation.score import ScoreConfig, score_run
from lora.attach import adapter_config, adapter_names, adapter_parameters, detach
from lora.export import main as export
from lora.merge import main as merge
from lora.prompt_tuning import PromptTuningConfig
from model.batch import TokenBatch
from model.files import read_json
from tests.training.test_run import Dies, die_at, metrics_of, weights_and_states
from training.assemble import restore
from training.config import (
    AdaptionPromptSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
    RunConfig,
)
from training.run import run

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": PromptSettings(num_virtual_tokens=5, init="text", init_text="pain")},
    "prefix": {"prefix": PrefixSettings(num_virtual_tokens=5, projection=True)},
    "p-tuning": {
        "p_tuning": PTuningSettings(
            num_virtual_tokens=5, encoder_hidden_size=8, encoder_layers=2, encoder_dropout=0.2
        )
    },
    "adaption-prompt": {"adaption_prompt": AdaptionPromptSettings(adapter_len=3)},
}
every_method = pytest.mark.parametrize("method", METHODS)


def batch() -> TokenBatch:
    return TokenBatch.from_arrays(torch.arange(3, 40), [0, 10, 37])


@every_method
def test_a_resumed_run_ends_in_the_same_bytes(
    method: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several micro-batches, with an encoder's dropout, checkpointing every second step."""
    config = make_config(
        "clinical", adapter=method, lr=3e-2, steps=6, micro_tokens=128, **METHODS[method]
    )
    whole = run(replace(config, out=str(tmp_path / "whole")))
    broken = replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(Dies):
        die_at(3, patch)
        run(broken)
    out = run(broken, resume=True)
    assert metrics_of(out) == metrics_of(whole)
    assert weights_and_states(out) == weights_and_states(whole)
    again = run(replace(config, out=str(tmp_path / "blocks"), activations="checkpoint"))
    for name, tensor in load_file(again / "adapter/clinical/adapter_model.safetensors").items():
        torch.testing.assert_close(
            tensor, load_file(whole / "adapter/clinical/adapter_model.safetensors")[name]
        )


@every_method
def test_two_stages(method: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """The method as stage 1 under LoRA, then over LoRA: each is active, saved and restored."""
    settings = METHODS[method]
    clinical = run(
        make_config("clinical", adapter=method, steps=4, lr=3e-2, out=tmp_path / "one", **settings)
    )
    results = score_run(ScoreConfig(run=str(clinical), bootstrap=20))
    assert results["perplexity"] != results["perplexity_base"]
    stack = make_config(
        "downstream", init_adapter=str(clinical), freeze_init_adapter=True, steps=4, lr=3e-2
    )
    out = run(replace(stack, out=str(tmp_path / "two")), score=headline_metrics)
    assert read_json(out / "run.json")["adapters"] == ["clinical", "downstream"]
    frozen, before = (
        load_file(folder / "adapter/clinical/adapter_model.safetensors")
        for folder in (out, clinical)
    )
    assert all(torch.equal(frozen[name], tensor) for name, tensor in before.items())
    finished = restore(out, CPU)
    logits = finished.model.scores(batch())
    for name in ("clinical", "downstream"):
        other = restore(out, CPU).model
        detach(other, name)
        assert not torch.allclose(other.scores(batch()), logits, atol=1e-4), name
    assert 0 <= score_run(ScoreConfig(run=str(out), bootstrap=20))["auroc"] <= 1

    lora = run(make_config("clinical", steps=4, lr=3e-2, out=tmp_path / "lora"))
    over = make_config(
        "downstream", init_adapter=str(lora), adapter=method, steps=4, lr=3e-2, **settings
    )
    out = run(replace(over, out=str(tmp_path / "over")), score=headline_metrics)
    model = restore(out, CPU).model
    assert adapter_names(model) == ["clinical", "downstream"]
    logits = model.scores(batch())
    for parameter in adapter_parameters(model, "clinical"):
        parameter.zero_()
    assert not torch.allclose(model.scores(batch()), logits, atol=1e-4)


@every_method
def test_stage_two_trains_the_init_adapter_further(
    method: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    """As the rows that its encoder gave, where it had one."""
    clinical = run(
        make_config("clinical", adapter=method, steps=2, out=tmp_path / "one", **METHODS[method])
    )
    config = make_config("downstream", adapter="none", init_adapter=str(clinical), steps=4, lr=3e-2)
    out = run(replace(config, out=str(tmp_path / "two")), score=headline_metrics)
    after, before = (
        load_file(folder / "adapter/clinical/adapter_model.safetensors")
        for folder in (out, clinical)
    )
    assert before.keys() <= after.keys()  # and the head
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_prompt_begins_as_its_text(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = PromptSettings(num_virtual_tokens=4, init="text", init_text="pain")
    out = run(make_config("clinical", adapter="prompt", steps=1, lr=1e-9, prompt=settings))
    finished = restore(out, CPU)
    ids = [finished.tokenizer.bos_id, *finished.tokenizer.encode("pain")]
    repeated = (ids * 4)[:4]
    rows = load_file(out / "adapter/clinical/adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(
        rows, finished.model.network.word_embedding.weight[torch.tensor(repeated)]
    )
    config = adapter_config(finished.model, "clinical")
    assert config == PromptTuningConfig(num_virtual_tokens=4, init="text", init_text="pain")


def test_what_updates_no_weight_is_neither_merged_nor_exported(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(make_config("clinical", adapter="prefix", steps=1))
    capsys.readouterr()
    for command in (merge, export):
        assert command(["--run", str(out), "--out", str(tmp_path / "x")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "clinical is of the kind PREFIX_TUNING, which updates no weight; only LoRA" in said
        assert not (tmp_path / "x").exists()


def test_segments_and_what_stands_in_front_must_fit_the_base(make_config: MakeConfig) -> None:
    config = make_config(
        "clinical", adapter="prompt", prompt=PromptSettings(num_virtual_tokens=250)
    )
    with pytest.raises(ValueError, match="and the adapters put 250 in front of them, but the base"):
        run(config)


def test_layers_that_the_base_does_not_have(make_config: MakeConfig) -> None:
    settings = AdaptionPromptSettings(adapter_layers=3)
    with pytest.raises(ValueError, match="adapter_layers is 3, but the base has 2 layers"):
        run(make_config("clinical", adapter="adaption-prompt", adaption_prompt=settings))
