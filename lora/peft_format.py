"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, out and in.

The invariant: a folder is honoured whole or refused by name. PEFT itself loads without checking, so
an adapter under wrong keys leaves the base model as it was and says nothing; here the tensors of
the file and of the model match one to one, and every key of the configuration is one that is
implemented, one that changes no number, or one that is switched off.

What is written keeps to the keys that every release of PEFT since 0.5 reads, and `use_rslora` and
`use_dora`, so that older releases load it too.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora.attach import (
    HEADS,
    adapter_config,
    adapter_state,
    attach,
    check_same_tensors,
    load_adapter_state,
    targeted_layers,
)
from lora.config import LoraConfig, name_matches, shorten
from model.files import (
    new_folder,
    open_safetensors,
    read_finite,
    read_json,
    sync,
    write_json,
    write_safetensors,
)

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

# PEFT wraps a model twice, so its names stand behind this.
_PREFIX = "base_model.model."
# PEFT lists both under modules_to_save for a classifier; the head of a LLaMA is `score`.
_CLASSIFICATION_HEADS = ("classifier", "score")

_IMPLEMENTED = frozenset(
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
)
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
# Values, besides null, false and empty ones, that mean that a feature of PEFT is not in use. The
# other initialisations of PEFT (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base weights.
_NOT_IN_USE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
# Matches patterns with names, as `LoraConfig` does afterwards, and says nothing.
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
"""
_TRIAL_SECONDS = 5  # patterns in use take milliseconds

# Each fits into float32 without rounding.
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredAdapter:
    """What a PEFT folder holds: settings, update and head, named as in the model."""

    config: LoraConfig
    update: dict[str, Tensor]  # as by `lora.attach.adapter_state`, float32
    head: dict[str, Tensor]


def save_adapter(
    model: nn.Module,
    name: str,
    folder: Path,
    *,
    base_model_name: str | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter `name` as a PEFT folder, in float32.

    The folder appears complete or not at all. An existing folder is replaced only if it holds an
    adapter of the same name.

    Args:
        base_model_name: what PEFT's users would load the base model from.
        head: the classification head under its names in the model (`score.weight` [C, D]), to be
            written beside the update, where PEFT looks for it.

    Raises:
        ValueError: no such adapter; the folder holds something else.
    """
    config = adapter_config(model, name)
    folder = Path(folder)
    _check_replaceable(folder, name)
    stored = StoredAdapter(config, adapter_state(model, name), dict(head or {}))

    staged, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "replaced"))
    shutil.rmtree(staged, ignore_errors=True)  # what a killed writer left
    with new_folder(staged) as aside:
        write_adapter(stored, aside, model, name=name, base_model_name=base_model_name)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    staged.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_adapter(
    stored: StoredAdapter,
    folder: Path,
    model: nn.Module,
    *,
    name: str,
    base_model_name: str | None,
) -> None:
    """Write the two files of a PEFT folder; `model`, whose layers it names, may be without data."""
    tensors = {**stored.update, **stored.head}
    write_safetensors(
        folder / TENSORS_FILE,
        {f"{_PREFIX}{key}": tensor.detach().float() for key, tensor in tensors.items()},
        # PEFT has no place for an adapter's name; the header of the tensor file has.
        metadata={"adapter": name},
    )
    modules_to_save = sorted({key.rpartition(".")[0] for key in stored.head})
    write_json(
        folder / CONFIG_FILE, _peft_config(stored.config, model, base_model_name, modules_to_save)
    )


def load_adapter(
    model: nn.Module, folder: Path, name: str, *, trainable: bool = True
) -> LoraConfig:
    """Attach the adapter of a PEFT folder under `name` and return its settings.

    Where `modules_to_save` lists the classification head, the model's head takes the values in the
    file. `folder` may also be the parent of the one folder that holds an adapter (PEFT saves a
    named adapter in a sub-folder).

    Raises:
        ValueError: the files, a setting or a tensor cannot be honoured; the model is as before.
    """
    stored = read_adapter(model, folder)
    attach(model, name, stored.config, seed=0, trainable=trainable)
    load_adapter_state(model, name, stored.update)
    state = model.state_dict()
    for key, tensor in stored.head.items():
        state[key].copy_(tensor)
    return stored.config


def read_adapter(model: nn.Module, folder: Path) -> StoredAdapter:
    """Read the adapter of a PEFT folder that fits `model`, which may be without data.

    Raises ValueError as `load_adapter` does.
    """
    folder = find_adapter(folder)
    config = read_adapter_config(folder)
    try:
        _check_matching_ends(config, model)
        config, heads = _fit(config, model)
        layers = targeted_layers(model, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    update_shapes: dict[str, tuple[int, ...]] = {}
    for layer_name, layer in layers.items():
        rank = config.rank(layer_name)
        update_shapes[f"{layer_name}.lora_A.weight"] = (rank, layer.in_features)
        update_shapes[f"{layer_name}.lora_B.weight"] = (layer.out_features, rank)
    head_shapes = {
        f"{head}.{key}": tuple(parameter.shape)
        for head, module in heads.items()
        for key, parameter in module.named_parameters()
    }
    tensors = _read_tensors(folder / TENSORS_FILE, {**update_shapes, **head_shapes})
    return StoredAdapter(
        config,
        update={key: tensors[key].float() for key in update_shapes},
        head={key: tensors[key] for key in head_shapes},
    )


def stored_head(folder: Path) -> dict[str, Tensor]:
    """The classification head of a PEFT folder under its names in the model; {} without one."""
    begins = tuple(f"{_PREFIX}{head}." for head in _CLASSIFICATION_HEADS)
    with open_safetensors(folder / TENSORS_FILE) as file:
        return {
            key.removeprefix(_PREFIX): file.get_tensor(key)
            for key in sorted(file.keys())
            if key.startswith(begins)
        }


def find_adapter(folder: Path) -> Path:
    """`folder` itself, or its only sub-folder that holds an adapter.

    Raises:
        ValueError: there is none, or there are several.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        return folder
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if len(inside) == 1:
        return inside[0]
    found = f"adapters in {', '.join(path.name for path in inside)}" if inside else "none"
    raise ValueError(
        f"{folder} must be a folder with {CONFIG_FILE}, or hold one such folder; found {found}"
    )


def read_adapter_config(folder: Path) -> LoraConfig:
    """The settings in a folder's `adapter_config.json`.

    Raises:
        ValueError: a key asks for what is not implemented, or has an impossible value.
    """
    path = Path(folder) / CONFIG_FILE
    keys = read_json(path)
    if not isinstance(keys, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(keys).__name__}")
    if keys.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, found {keys.get('peft_type')!r}")
    for key, value in keys.items():
        if key in _IMPLEMENTED or key in _CHANGES_NO_NUMBER:
            continue
        in_use = value is not None and value is not False and value not in ([], {})
        if in_use and value not in _NOT_IN_USE.get(key, ()):
            raise ValueError(f"{path}: {key} = {json.dumps(value)} is not supported")
    if keys.get("target_modules") is None:
        raise ValueError(f"{path}: target_modules is missing")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in keys.items()
        if key in _IMPLEMENTED and value is not None
    }
    if keys.get("task_type") == "SEQ_CLS" and "modules_to_save" not in settings:
        # PEFT adds them to every classifier; older releases did so without a word in the file.
        settings["modules_to_save"] = _CLASSIFICATION_HEADS
    try:
        return LoraConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _peft_config(
    config: LoraConfig,
    model: nn.Module,
    base_model_name: str | None,
    modules_to_save: list[str],
) -> dict[str, Any]:
    alpha = config.lora_alpha
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": None,
        "target_modules": _peft_targets(config, model),
        # PEFT expects a head in the file of every SEQ_CLS adapter.
        "task_type": "SEQ_CLS" if modules_to_save else "CAUSAL_LM",
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


def _check_matching_ends(config: LoraConfig, model: nn.Module) -> None:
    """Refuse regular expressions that take too long on the names of the model's modules.

    A match can take exponential time and cannot be interrupted, so it is tried in a process of its
    own, which can.
    """
    patterns = config.patterns()
    if not patterns:
        return
    names = [*HEADS, *(name for name, _ in model.named_modules())]
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([patterns, names]),
            text=True,
            check=True,
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"its regular expressions ({', '.join(map(shorten, patterns[:3]))}) take more than "
            f"{_TRIAL_SECONDS} seconds to match the names of the model's layers; list the names"
        ) from None


def _fit(config: LoraConfig, model: nn.Module) -> tuple[LoraConfig, dict[str, nn.Module]]:
    """Drop targets that PEFT lets stand without effect, and find the heads the file must hold too.

    Such a target fits no module, or only excluded ones. If something is missing, the tensors tell.
    """
    heads: dict[str, nn.Module] = {}
    children = dict(model.named_children())
    for module in config.modules_to_save:
        if module not in _CLASSIFICATION_HEADS:
            raise ValueError(
                f"modules_to_save: {module!r} is not supported; only a classification head "
                f"({' or '.join(_CLASSIFICATION_HEADS)}) can be saved beside an update"
            )
        if module in children:
            heads[module] = children[module]
    targets = config.target_modules
    if isinstance(targets, tuple):
        names = [name for name, _ in model.named_modules() if not config.excludes(name)]
        fitting = (t for t in targets if any(name_matches(t, name) for name in names))
        # If none fits, the error about the first tells the nearest names.
        targets = tuple(fitting) or targets
    return replace(config, target_modules=targets, modules_to_save=tuple(heads)), heads


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read exactly the tensors of `shapes`, which are named without PEFT's prefix.

    Names, shapes and dtypes are checked before any tensor is read.
    """
    if not path.is_file() and path.with_name("adapter_model.bin").exists():
        raise ValueError(
            f"{path} is missing, and adapter_model.bin beside it is a pickle, which is never read; "
            "save the adapter again as safetensors"
        )
    with open_safetensors(path) as file:
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        stray = [key for key in found if not key.startswith(_PREFIX)]
        if stray:
            raise ValueError(f"{path}: {stray[0]!r} does not begin with {_PREFIX!r}")
        check_same_tensors(
            str(path),
            expected={f"{_PREFIX}{key}": shape for key, shape in shapes.items()},
            found={key: tuple(tensor.get_shape()) for key, tensor in found.items()},
        )
        for key, tensor in found.items():
            if tensor.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{path}: {key} is {tensor.get_dtype()}; allowed: {', '.join(_FLOATS)}"
                )
        return {key: read_finite(file, f"{_PREFIX}{key}", path=path) for key in shapes}


def _check_replaceable(folder: Path, name: str) -> None:
    """Refuse to write over anything but an earlier state of the same adapter."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        with open_safetensors(folder / TENSORS_FILE) as file:
            holder = (file.metadata() or {}).get("adapter")
    except ValueError:
        holder = None
    if holder != name:
        raise ValueError(
            f"{folder} exists and does not hold the adapter {name!r}"
            f"{f' but {holder!r}' if holder else ''}; choose another folder or remove it"
        )
