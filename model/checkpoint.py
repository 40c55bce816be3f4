"""Checkpoints of Hugging Face's layout in and out: config.json and one or many safetensors files.

Parameter names in the code are the names on the disk. The invariant: a model is filled by exactly
the tensors it has, name by name and shape by shape, or not at all; and everything is known to
match before memory is asked for.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import DecoderConfig, read_config, write_config
from model.files import (
    copy_file,
    file_inside,
    folder_digest,
    new_folder,
    open_safetensors,
    read_json,
    write_json,
    write_safetensors,
)
from model.heads import CausalLM, SequenceClassifier
from model.linear import Linear

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_SCORE = "score.weight"

# Older LLaMA files carry RoPE's frequencies, which follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

WEIGHT_FILES = (".json", ".safetensors")  # suffixes of the files that decide what a model computes
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
SHARD_BYTES = 5_000_000_000


def load_causal_lm(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CausalLM:
    """Load a LLaMA checkpoint; ValueError says what is wrong with a bad one."""
    folder = Path(folder)
    config = read_config(folder)
    places = _places(folder)
    with torch.device("meta"):
        model = CausalLM(config)
    if config.tie_word_embeddings and _HEAD in places:
        # Some writers store the shared matrix twice.
        _check_equal(places, _HEAD, _EMBEDDING)
        del places[_HEAD]
    _check_match(model, places, folder)
    model.load_state_dict(_read(places, dtype, device), strict=True, assign=True)
    return model


def load_classifier(
    folder: Path,
    num_labels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> SequenceClassifier:
    """Load a classifier, or a language model whose head gives way to a fresh `score`.

    `score.weight` trains and is float32 or wider whatever `dtype` is. A fresh one is a function
    of `seed` alone.
    """
    folder = Path(folder)
    config = read_config(folder)
    places = _places(folder)
    with torch.device("meta"):
        model = SequenceClassifier(config, num_labels)
    places.pop(_HEAD, None)
    wide = torch.promote_types(dtype, torch.float32)
    if _SCORE in places:
        _check_match(model, places, folder)
        score = _read({_SCORE: places.pop(_SCORE)}, wide, device)
    else:
        _check_match(model, {**places, _SCORE: None}, folder)
        score = {_SCORE: _fresh_score(config, num_labels, seed).to(device, wide)}
    model.load_state_dict(_read(places, dtype, device) | score, strict=True, assign=True)
    return model


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder whose weights are not those that its config.json asks for; reads headers."""
    config, places = read_config(folder), _places(folder)
    model: CausalLM | SequenceClassifier
    with torch.device("meta"):
        if _SCORE in places:
            with open_safetensors(places[_SCORE]) as file:
                labels = file.get_slice(_SCORE).get_shape()[0]
            model = SequenceClassifier(config, labels)
        else:
            model = CausalLM(config)
    _check_match(model, places, folder)


def base_fingerprint(folder: Path) -> str:
    """SHA-256 over config and weights of a base, by which a run knows it again."""
    return folder_digest(folder, WEIGHT_FILES)


def weights_metadata(folder: Path) -> dict[str, str]:
    """The entries in the header of a checkpoint's first file."""
    with open_safetensors(next(iter(_places(Path(folder)).values()))) as file:
        return dict(file.metadata() or {})


def stored_dtype(folder: Path) -> torch.dtype:
    """The widest number format among a checkpoint's tensors but a classifier's wide `score`."""
    formats: set[str] = set()
    for path, names in _by_file(_places(Path(folder))).items():
        with open_safetensors(path) as file:
            formats |= {file.get_slice(name).get_dtype() for name in names if name != _SCORE}
    if unknown := formats - set(_FLOATING):
        raise ValueError(f"{folder} holds {min(unknown)} tensors; read are {', '.join(_FLOATING)}")
    return functools.reduce(torch.promote_types, [_FLOATING[name] for name in formats])


def save_model(
    model: CausalLM | SequenceClassifier,
    folder: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    label_names: Sequence[str] = (),
) -> None:
    """Write config.json and the weights into a new folder, all of it or nothing.

    A file holds at most `max_shard_bytes` of tensors, or one larger tensor. Adapters are not part
    of a checkpoint: they are saved on their own, or merged first.
    """
    with new_folder(Path(folder)) as aside:
        write_model(model, aside, max_shard_bytes=max_shard_bytes, label_names=label_names)


def write_model(
    model: CausalLM | SequenceClassifier,
    folder: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    label_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`save_model` into a folder that is there, as one of several things that belong into it.

    metadata: entries of the weights' headers.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.adapters:
            raise ValueError(
                f"{name} carries the adapter {next(iter(module.adapters))!r}; merge or detach "
                "adapters before the model is saved"
            )
    tensors = model.state_dict()
    write_weights(
        folder, tensors, tensors.__getitem__, max_shard_bytes=max_shard_bytes, metadata=metadata
    )
    kind = "ForCausalLM" if isinstance(model, CausalLM) else "ForSequenceClassification"
    write_config(
        model.config,
        folder,
        architecture=f"Llama{kind}",
        dtype=model.model.embed_tokens.weight.dtype,
        label_names=label_names or _default_labels(model),
    )


def write_weights(
    folder: Path,
    like: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the weights of a checkpoint as one file, or as several and their index.

    Args:
        like: every tensor's shape and dtype under its name; it may be on the meta device.
        read: gives a tensor by its name; one file's tensors are held at a time.
    """
    shards = _shards(like, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = _SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, {key: read(key) for key in shard}, metadata)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        totals = {
            "total_parameters": sum(tensor.numel() for tensor in like.values()),
            "total_size": sum(tensor.nbytes for tensor in like.values()),
        }
        write_json(folder / _INDEX, {"metadata": totals, "weight_map": weight_map})


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's files of one checkpoint to another and return their names."""
    names = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        copy_file(source / name, folder / name)
    return names


def _default_labels(model: nn.Module) -> list[str]:
    """transformers reads the number of classes from the label names alone."""
    if not isinstance(model, SequenceClassifier):
        return []
    return [f"LABEL_{i}" for i in range(model.score.out_features)]


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Tensor names in order, cut so that each part holds at most `max_bytes` or one tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _places(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor. Every file is opened once: it is whole and holds no others."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder} has both {_SINGLE} and {_INDEX}; remove the stale one")
    if index.exists():
        expected_of: Mapping[Path, set[str] | None] = _read_index(index)
    elif single.exists():
        expected_of = {file_inside(folder, _SINGLE): None}
    else:
        raise ValueError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; convert other formats to safetensors"
        )
    places: dict[str, Path] = {}
    for path, expected in expected_of.items():
        with open_safetensors(path) as file:
            found = set(file.keys())
        if expected is not None and found != expected:
            raise ValueError(
                f"{path} does not hold the tensors that {_INDEX} gives it: "
                f"{_some(found ^ expected)}; the files are not of one checkpoint"
            )
        places |= dict.fromkeys(found, path)
    return {name: path for name, path in places.items() if not _DERIVED.fullmatch(name)}


def _read_index(path: Path) -> dict[Path, set[str]]:
    """The files that the index names, each with its tensors."""
    raw = read_json(path)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map from tensor names to files")
    tensors_of: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        shard = file_inside(path.parent, name)
        if shard.suffix != ".safetensors":
            raise ValueError(f"{path} names {name!r}; only .safetensors files are read")
        tensors_of.setdefault(shard, set()).add(tensor)
    return tensors_of


def _check_match(model: nn.Module, places: Mapping[str, Path | None], folder: Path) -> None:
    """Refuse a checkpoint whose names, shapes or number formats are not those of the model.

    A name whose place is None is filled from elsewhere.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := wanted.keys() - places.keys():
        raise ValueError(f"{folder} lacks tensors that its config.json asks for: {_some(missing)}")
    if unknown := places.keys() - wanted.keys():
        raise ValueError(f"{folder} has tensors that its config.json rules out: {_some(unknown)}")
    for path, names in _by_file(places).items():
        with open_safetensors(path) as file:
            for name in names:
                header = file.get_slice(name)
                if header.get_shape() != wanted[name]:
                    raise ValueError(
                        f"{path}: {name} has the shape {header.get_shape()}; the model "
                        f"that config.json describes needs {wanted[name]}"
                    )
                if header.get_dtype() not in _FLOATING:
                    raise ValueError(
                        f"{path}: {name} is stored as {header.get_dtype()}; read are "
                        f"{', '.join(_FLOATING)}"
                    )


def _check_equal(places: Mapping[str, Path], a: str, b: str) -> None:
    if b not in places:
        return  # missing tensors are reported together
    found = []
    for name in (a, b):
        with open_safetensors(places[name]) as file:
            found.append(file.get_tensor(name))
    if not torch.equal(*found):
        raise ValueError(
            f"{places[a]} holds {a} and it differs from {b}, but config.json ties them; set "
            "tie_word_embeddings to false if the checkpoint has a head of its own"
        )


def _read(
    places: Mapping[str, Path], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    is_meta = torch.device(device).type == "meta"  # shapes are in the headers
    tensors: dict[str, Tensor] = {}
    for path, names in _by_file(places).items():
        with open_safetensors(path) as file:
            for name in names:
                tensors[name] = (
                    torch.empty(file.get_slice(name).get_shape(), dtype=dtype, device=device)
                    if is_meta
                    else file.get_tensor(name).to(device, dtype)
                )
    return tensors


def _by_file(places: Mapping[str, Path | None]) -> dict[Path, list[str]]:
    """The names each file holds, in the same order every time (a header has its own)."""
    names_of: dict[Path, list[str]] = {}
    for name, path in sorted(places.items()):
        if path is not None:
            names_of.setdefault(path, []).append(name)
    return names_of


def _fresh_score(config: DecoderConfig, num_labels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight_CD = torch.empty(num_labels, config.hidden_size)
    return weight_CD.normal_(std=config.initializer_range, generator=generator)


def _some(names: set[str]) -> str:
    """The first three names, and how many more there are."""
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
