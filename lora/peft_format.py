"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, out and in.

The invariant: a folder is honoured whole or refused by name. PEFT itself loads without checking, so
an adapter under wrong keys leaves the base model as it was and says nothing; here the tensors of
the file and of the model match one to one, and every key of the configuration is
checked (`lora.peft_config`).
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from lora.adaption_prompt import AdaptionPromptConfig
from lora.attach import (
    HEADS,
    AdapterConfig,
    adapter_config,
    adapter_state,
    attach,
    check_same_tensors,
    decoder_of,
    load_adapter_state,
    state_shapes,
)
from lora.config import LoraConfig, name_matches, shorten
from lora.peft_config import (
    CLASSIFICATION_HEADS,
    CONFIG_FILE,
    check_sizes,
    peft_keys,
    read_adapter_config,
    read_peft_keys,
)
from model.files import (
    new_folder,
    open_safetensors,
    read_finite,
    sync,
    write_json,
    write_safetensors,
)

TENSORS_FILE = "adapter_model.safetensors"

# PEFT wraps a model twice, so its names stand behind this; with virtual tokens or a prefix once.
_PREFIX, _PROMPT_PREFIX = "base_model.model.", "base_model."
_EMBEDDINGS = "prompt_embeddings"  # and these stand alone
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

    config: AdapterConfig
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
        {
            _stored_name(key, stored.config): tensor.detach().float()
            for key, tensor in tensors.items()
        },
        # PEFT has no place for an adapter's name; the header of the tensor file has.
        metadata={"adapter": name},
    )
    modules_to_save = sorted({key.rpartition(".")[0] for key in stored.head})
    write_json(
        folder / CONFIG_FILE, peft_keys(stored.config, model, base_model_name, modules_to_save)
    )


def load_adapter(
    model: nn.Module, folder: Path, name: str, *, trainable: bool = True
) -> AdapterConfig:
    """Attach the adapter of a PEFT folder under `name` and return its settings.

    Of P-tuning and of a projected prefix the folder holds what their encoder gave, which goes on
    without it. Where the file holds the classification head, the model's head takes its values.
    `folder` may also be the parent of the one folder that holds an adapter (PEFT saves a named
    adapter in a sub-folder).

    Raises:
        ValueError: the files, a setting or a tensor cannot be honoured; the model is as before.
    """
    stored = read_adapter(model, folder)
    attach(model, name, stored.config, seed=0, trainable=trainable, encoded=True)
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
        if isinstance(config, LoraConfig):
            _check_matching_ends(config, model)
            config, heads = _fit(config, model)
        else:
            check_sizes(read_peft_keys(folder), config, decoder_of(model, config).config)
            held = {key.partition(".")[0] for key in stored_head(folder)}
            heads = {name: child for name, child in model.named_children() if name in held}
        update_shapes = state_shapes(model, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    head_shapes = {
        f"{head}.{key}": tuple(parameter.shape)
        for head, module in heads.items()
        for key, parameter in module.named_parameters()
    }
    tensors = _read_tensors(folder / TENSORS_FILE, config, {**update_shapes, **head_shapes})
    return StoredAdapter(
        config,
        update={key: tensors[key].float() for key in update_shapes},
        head={key: tensors[key] for key in head_shapes},
    )


def stored_head(folder: Path) -> dict[str, Tensor]:
    """The classification head of a PEFT folder under its names in the model; {} without one."""
    config = read_adapter_config(folder)
    names = {_stored_name(f"{head}.", config): f"{head}." for head in CLASSIFICATION_HEADS}
    with open_safetensors(folder / TENSORS_FILE) as file:
        return {
            key.replace(stored, name, 1): file.get_tensor(key)
            for key in sorted(file.keys())
            for stored, name in names.items()
            if key.startswith(stored)
        }


def _stored_name(key: str, config: AdapterConfig) -> str:
    """What PEFT calls a tensor of an adapter or a head in its files."""
    if isinstance(config, LoraConfig | AdaptionPromptConfig):
        return f"{_PREFIX}{key}"
    return key if key == _EMBEDDINGS else f"{_PROMPT_PREFIX}{key}"


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
        if module not in CLASSIFICATION_HEADS:
            raise ValueError(
                f"modules_to_save: {module!r} is not supported; only a classification head "
                f"({' or '.join(CLASSIFICATION_HEADS)}) can be saved beside an update"
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


def _read_tensors(
    path: Path, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
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
        stray = [key for key in found if not key.startswith((_PROMPT_PREFIX, _EMBEDDINGS))]
        if stray:
            raise ValueError(f"{path}: {stray[0]!r} does not begin with {_PREFIX!r}")
        check_same_tensors(
            str(path),
            expected={_stored_name(key, config): shape for key, shape in shapes.items()},
            found={key: tuple(tensor.get_shape()) for key, tensor in found.items()},
        )
        for key, tensor in found.items():
            if tensor.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{path}: {key} is {tensor.get_dtype()}; allowed: {', '.join(_FLOATS)}"
                )
        return {key: read_finite(file, _stored_name(key, config), path=path) for key in shapes}


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
