"""PEFT's `adapter_config.json`, read as settings and written from them, for every kind of adapter.

The invariant: every key that is read is one that is implemented, one that changes no number of a
trained adapter, or one that is switched off; any other is refused by name.

What is written keeps to the keys that every release of PEFT since 0.5 reads, and `use_rslora` and
`use_dora`, so that older releases load it too.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from lora.adaption_prompt import AdaptionPromptConfig
from lora.attach import AdapterConfig, decoder_of, targeted_layers
from lora.config import LoraConfig
from lora.p_tuning import PTuningConfig
from lora.prefix_tuning import PrefixTuningConfig
from lora.prompt_tuning import PromptTuningConfig
from model.config import DecoderConfig
from model.files import read_json

CONFIG_FILE = "adapter_config.json"
# PEFT lists both under modules_to_save for a classifier; the head of a LLaMA is `score`.
CLASSIFICATION_HEADS = ("classifier", "score")

_CHANGES_NO_NUMBER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
# Of virtual tokens and prefixes: sizes, which the base and the tensors decide (`check_sizes`).
_SIZES = frozenset({"num_attention_heads", "num_layers", "token_dim"})
# Implemented, by kind.
_IMPLEMENTED: dict[str, frozenset[str]] = {
    "LORA": frozenset(
        {
            "alpha_pattern",
            "exclude_modules",
            "lora_alpha",
            "lora_dropout",
            "modules_to_save",
            "r",
            "rank_pattern",
            "target_modules",
            "use_rslora",
        }
    ),
    "PROMPT_TUNING": _SIZES | {"num_virtual_tokens", "prompt_tuning_init"},
    "P_TUNING": _SIZES
    | {
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "num_virtual_tokens",
    },
    "PREFIX_TUNING": _SIZES | {"encoder_hidden_size", "num_virtual_tokens", "prefix_projection"},
    "ADAPTION_PROMPT": frozenset({"adapter_layers", "adapter_len"}),
}
# How a prompt began changes no number of it any more.
_BEGINNINGS = frozenset(
    {"init_weights", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
)
# Values, besides null, false and empty ones, that mean that a feature of PEFT is not in use. The
# other initialisations of PEFT (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base weights.
_NOT_IN_USE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core",),
    "num_transformer_submodules": (1,),
    "qalora_group_size": (16,),
}
_SELF_ATTENTION = "self_attn"  # what PEFT puts adaption prompts into


def read_peft_keys(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as it is, every key checked.

    Raises:
        ValueError: a key asks for what is not implemented.
    """
    path = Path(folder) / CONFIG_FILE
    keys = read_json(path)
    if not isinstance(keys, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(keys).__name__}")
    kind = keys.get("peft_type")
    if not isinstance(kind, str) or kind not in _IMPLEMENTED:
        raise ValueError(
            f"{path}: peft_type must be one of {', '.join(_IMPLEMENTED)}, found {kind!r}"
        )
    known = _IMPLEMENTED[kind] | _CHANGES_NO_NUMBER
    if kind != "LORA":
        known |= _BEGINNINGS
    for key, value in keys.items():
        if key in known:
            continue
        in_use = value is not None and value is not False and value not in ([], {})
        if not in_use or value in _NOT_IN_USE.get(key, ()):
            continue
        if kind == "ADAPTION_PROMPT" and (key, value) == ("target_modules", _SELF_ATTENTION):
            continue
        if kind != "LORA" and key == "modules_to_save" and _are_heads(value):
            continue
        raise ValueError(f"{path}: {key} = {json.dumps(value)} is not supported")
    return keys


def _are_heads(names: object) -> bool:
    return isinstance(names, list) and all(name in CLASSIFICATION_HEADS for name in names)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings in a folder's `adapter_config.json`.

    Raises:
        ValueError: a key asks for what is not implemented, or has an impossible value.
    """
    path, keys = Path(folder) / CONFIG_FILE, read_peft_keys(folder)
    try:
        return _settings(keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _settings(keys: dict[str, Any]) -> AdapterConfig:
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in keys.items()
        if key in _IMPLEMENTED[keys["peft_type"]] - _SIZES and value is not None
    }
    match keys["peft_type"]:
        case "LORA":
            if "target_modules" not in given:
                raise ValueError("target_modules is missing")
            if keys.get("task_type") == "SEQ_CLS" and "modules_to_save" not in given:
                # PEFT adds them to every classifier; older releases did so without a word.
                given["modules_to_save"] = CLASSIFICATION_HEADS
            return LoraConfig(**given)
        case "PROMPT_TUNING":
            text = keys.get("prompt_tuning_init_text")
            is_text = given.pop("prompt_tuning_init", "RANDOM") == "TEXT" and bool(text)
            init: dict[str, Any] = {"init": "text", "init_text": text} if is_text else {}
            return PromptTuningConfig(**_with(given, "num_virtual_tokens"), **init)
        case "P_TUNING":
            encoder = given.pop("encoder_reparameterization_type", "MLP")
            return PTuningConfig(**_with(given, "num_virtual_tokens"), encoder=str(encoder).lower())
        case "PREFIX_TUNING":
            return PrefixTuningConfig(**_with(given, "num_virtual_tokens"))
        case _:
            return AdaptionPromptConfig(**_with(given, "adapter_len", "adapter_layers"))


def _with(given: dict[str, Any], *needed: str) -> dict[str, Any]:
    for key in needed:
        if key not in given:
            raise ValueError(f"{key} is missing")
    return given


def check_sizes(keys: dict[str, Any], config: AdapterConfig, base: DecoderConfig) -> None:
    """Refuse virtual tokens or a prefix of a base of another shape.

    Raises:
        ValueError: naming the size.
    """
    if isinstance(config, LoraConfig | AdaptionPromptConfig):
        return
    for key, size in _sizes(config, base).items():
        if keys.get(key, size) not in (size, None):
            raise ValueError(f"{key} is {keys[key]!r}, but of this base it is {size}")


def _sizes(config: AdapterConfig, base: DecoderConfig) -> dict[str, int]:
    if isinstance(config, PrefixTuningConfig):  # a key, not a token
        heads, width = base.num_key_value_heads, base.num_key_value_heads * base.head_dim
    else:
        heads, width = base.num_attention_heads, base.hidden_size
    return {
        "num_attention_heads": heads,
        "num_layers": base.num_hidden_layers,
        "token_dim": width,
    }


def peft_keys(
    config: AdapterConfig,
    model: nn.Module,
    base_model_name: str | None,
    modules_to_save: list[str],
) -> dict[str, Any]:
    """What `adapter_config.json` says about an adapter of `model`, which may be without data.

    modules_to_save: the classification head, where the folder holds one.
    """
    common: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "revision": None,
        # PEFT expects a head in the file of every SEQ_CLS adapter.
        "task_type": "SEQ_CLS" if modules_to_save else "CAUSAL_LM",
    }
    if isinstance(config, LoraConfig):
        return common | _lora_keys(config, model, modules_to_save)
    if isinstance(config, AdaptionPromptConfig):
        return common | {
            "adapter_layers": config.adapter_layers,
            "adapter_len": config.adapter_len,
            "peft_type": "ADAPTION_PROMPT",
            "target_modules": _SELF_ATTENTION,
        }
    base = decoder_of(model, config).config
    common |= _sizes(config, base) | {
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.num_virtual_tokens,
    }
    if isinstance(config, PromptTuningConfig):
        # PEFT wants to know the tokenizer of an init text, even of one that it never reads again.
        is_text = config.init == "text" and base_model_name is not None
        return common | {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "TEXT" if is_text else "RANDOM",
            "prompt_tuning_init_text": config.init_text,
            "tokenizer_name_or_path": base_model_name if is_text else None,
        }
    if isinstance(config, PTuningConfig):
        return common | {
            "encoder_dropout": config.encoder_dropout,
            "encoder_hidden_size": config.encoder_hidden_size or base.hidden_size,
            "encoder_num_layers": config.encoder_num_layers,
            "encoder_reparameterization_type": config.encoder.upper(),
            "peft_type": "P_TUNING",
        }
    return common | {
        "encoder_hidden_size": config.encoder_hidden_size or common["token_dim"],
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": config.prefix_projection,
    }


def _lora_keys(config: LoraConfig, model: nn.Module, modules_to_save: list[str]) -> dict[str, Any]:
    alpha = config.lora_alpha
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": _peft_targets(config, model),
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def _peft_targets(config: LoraConfig, model: nn.Module) -> list[str] | str:
    """The targets without "all-linear" and `exclude_modules`, which older releases do not know."""
    if not config.is_all_linear and not config.exclude_modules:
        targets = config.target_modules
        return targets if isinstance(targets, str) else list(targets)
    return shortest_targets(tuple(targeted_layers(model, config)), model)


def shortest_targets(layers: tuple[str, ...], model: nn.Module) -> list[str]:
    """The last parts of the layers' names where these select no other layer; else whole names."""
    short_names = tuple(sorted({name.rpartition(".")[2] for name in layers}))
    by_short_names = targeted_layers(model, LoraConfig(target_modules=short_names))
    return list(short_names if by_short_names.keys() == set(layers) else layers)
