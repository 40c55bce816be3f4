"""Folders as finished runs leave them, without training: a base, adapters with updates, a head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora.attach import adapter_parameters, attach
from lora.config import LoraConfig
from lora.peft_format import save_adapter
from model.checkpoint import base_fingerprint, load_causal_lm, load_classifier, save_model
from model.files import describe_files, write_safetensors, write_sealed_json
from model.heads import CausalLM, SequenceClassifier
from tests.lora.oracle import make_oracle, make_twin, tiny_config

LABELS = ("home", "ward", "ICU")
# Ranks, alphas, scaling rules and layers differ.
CLINICAL = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
DOWNSTREAM = LoraConfig(
    r=2,
    lora_alpha=3,
    use_rslora=True,
    target_modules="all-linear",
    exclude_modules=r".*layers\.1\.self_attn\.q_proj",
    rank_pattern={"down_proj": 5},
    alpha_pattern={"layers.0.mlp.gate_proj": 7},
)


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    config = tiny_config(tied=tied)
    save_model(make_twin(config, make_oracle(config)).to(dtype), folder)
    return folder


def make_run(
    folder: Path,
    base: Path,
    adapters: Mapping[str, LoraConfig],
    *,
    labels: tuple[str, ...] = (),
    size: float = 0.1,
    record: Mapping[str, Any] | None = None,
) -> CausalLM | SequenceClassifier:
    """A run's folder, and the model as the run ended; `record` replaces entries of run.json."""
    model: CausalLM | SequenceClassifier
    model = load_classifier(base, len(labels), seed=3) if labels else load_causal_lm(base)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    head = None
    folder.mkdir()
    if isinstance(model, SequenceClassifier):
        model.score.weight.normal_(std=0.3, generator=generator)
        head = {"score.weight": model.score.weight}
        write_safetensors(folder / "head.safetensors", head)
    for name, config in adapters.items():
        attach(model, name, config, seed=0, trainable=False)
        for parameter in adapter_parameters(model, name):
            parameter.normal_(std=size, generator=generator)
        is_last = name == list(adapters)[-1]
        save_adapter(model, name, folder / "adapter" / name, head=head if is_last else None)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    found = {
        "finished": True,
        "config": {"model": str(base), "adapter": "lora"},
        "fingerprints": {"base": base_fingerprint(base)},
        "adapters": list(adapters),
        "labels": list(labels),
        "files": describe_files(folder, files),
    }
    write_sealed_json(folder / "run.json", found | dict(record or {}))
    return model
