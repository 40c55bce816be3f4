"""Checkpoints of Hugging Face's layout in and out: config.json and one or many safetensors files.

Parameter names in the code are the names on the disk; BERT checkpoints have a few older spellings
besides, and heads of their pretraining, which `_name_in_model` knows. Mixtral's experts have the
names of the published files, which transformers 5 writes too; the stacks of experts that it has in
memory, and writes if asked to, are read as well, expert by expert. The invariant: a model is
filled by exactly the tensors it has, name by name and shape by shape, all of them finite, or not at
all; and everything is known to match before memory is asked for.

A weight may be stored as int8, `NAME.weight` [N, K], with `NAME.weight_scale` [N] in float32
(`kernels.reference_int8`). Either kind of file fills either kind of model: weights are quantised or
dequantised one by one as they are read, so the most that is held is the model and one tensor.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels import dequantise, quantise_rows
from model.config import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    read_config,
    read_decoder_config,
    write_config,
)
from model.encoder import EncoderClassifier
from model.files import (
    copy_file,
    file_inside,
    folder_digest,
    new_folder,
    open_safetensors,
    read_finite,
    read_json,
    write_json,
    write_safetensors,
)
from model.heads import CausalLM, Classifier, Model, SequenceClassifier
from model.linear import Int8Compute, Linear, hold_int8

_INT8, _SCALE = "I8", ".weight_scale"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"

# What no network here has: RoPE's frequencies in older LLaMA files and the numbers of positions in
# older BERT files, which follow from config.json, and the heads of BERT's pretraining.
PASSED_OVER = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|(bert\.)?embeddings\.position_ids|cls\.(predictions|seq_relationship)\..+"
)
_BARE_BERT = ("embeddings.", "encoder.", "pooler.")  # how names begin where BertModel was saved
_OLD_NORM = {"gamma": "weight", "beta": "bias"}
_FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

WEIGHT_FILES = (".json", ".safetensors")  # suffixes of the files that decide what a model computes
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt",
)  # fmt: skip
SHARD_BYTES = 5_000_000_000


# Experts as transformers 5 stacks them: [E, 2 F, D], gate above up, and [E, D, F].
_STACKED = re.compile(r"(model\.layers\.\d+)\.mlp\.(?:gate\.weight|experts\.(gate_up|down)_proj)")
_MOST_EXPERTS = 1 << 10  # a header can claim any number of empty matrices


class Place(NamedTuple):
    """Where a tensor lies: the file, its name in it, and its part of a stack."""

    file: Path
    key: str
    part: tuple[int, slice] | None = None

    def shape(self, file: Any) -> list[int]:
        """The tensor's shape, from the header of its open file."""
        whole: list[int] = file.get_slice(self.key).get_shape()
        if self.part is None:
            return whole
        rows = self.part[1]
        return [rows.stop - rows.start, *whole[2:]]


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    int8: Int8Compute | None = None,
) -> CausalLM:
    """Load a decoder's checkpoint; ValueError says what is wrong with a bad one.

    dtype: of all weights, or where `int8` says how linear layers compute, of all others.
    """
    folder = Path(folder)
    config = read_decoder_config(folder)
    places = _places(folder)
    with torch.device("meta"):
        model = CausalLM(config)
    if int8 is not None:
        hold_int8(model, int8)
    if config.tie_word_embeddings and _HEAD in places:
        # Some writers store the shared matrix twice.
        _check_equal(places, _HEAD, _EMBEDDING)
        del places[_HEAD]
    _check_match(model, places, folder)
    model.load_state_dict(_read(places, model, dtype, device), strict=True, assign=True)
    return model


def load_classifier(
    folder: Path,
    num_labels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    int8: Int8Compute | None = None,
) -> Classifier:
    """Load a classifier, or a base whose pretraining head gives way to a fresh one.

    The head trains and is float32 or wider whatever `dtype` is. A fresh one is a function of
    `seed` alone. `dtype` and `int8` as in `load_causal_lm`.
    """
    folder = Path(folder)
    config = read_config(folder)
    places = _places(folder)
    model = empty_classifier(config, num_labels)
    if int8 is not None:
        hold_int8(model, int8)
    places.pop(_HEAD, None)
    wide = torch.promote_types(dtype, torch.float32)
    names = model.head_state().keys()
    if names & places.keys():
        _check_match(model, places, folder)
        head = _read({name: places.pop(name) for name in names}, model, wide, device)
    else:
        _check_match(model, {**places, **dict.fromkeys(names)}, folder)
        head = _fresh_head(model, seed)
        head = {name: tensor.to(device, wide) for name, tensor in head.items()}
    model.load_state_dict(_read(places, model, dtype, device) | head, strict=True, assign=True)
    return model


def empty_classifier(config: ModelConfig, num_labels: int) -> Classifier:
    """The classifier of a base's family, without data."""
    with torch.device("meta"):
        if isinstance(config, EncoderConfig):
            return EncoderClassifier(config, num_labels)
        return SequenceClassifier(config, num_labels)


def load_head(model: Classifier, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors of the file `path` into a classifier's head.

    Raises ValueError where they are not the head's, one by one, in float32.
    """
    state = model.head_state()
    found = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    expected = {name: (tuple(x.shape), torch.float32) for name, x in state.items()}
    if found != expected:
        raise ValueError(f"{path} holds {_heads(found)}; the head is {_heads(expected)}")
    for name, tensor in state.items():
        tensor.copy_(tensors[name])


def _heads(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in tensors.items())


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder whose weights are not those that its config.json asks for; reads headers."""
    config, places = read_config(folder), _places(folder)
    classifier = empty_classifier(config, 1)
    name = next(iter(classifier.head_state()))
    model: Model
    if name in places:
        with open_safetensors(places[name].file) as file:
            labels = places[name].shape(file)[0]
        model = empty_classifier(config, labels)
    elif isinstance(config, DecoderConfig):
        with torch.device("meta"):
            model = CausalLM(config)
    else:  # an encoder without a head, as most are published
        _check_match(classifier, {**places, **dict.fromkeys(classifier.head_state())}, folder)
        return
    _check_match(model, places, folder)


def base_fingerprint(folder: Path) -> str:
    """SHA-256 over config and weights of a base, by which a run knows it again."""
    return folder_digest(folder, WEIGHT_FILES)


def weights_metadata(folder: Path) -> dict[str, str]:
    """The entries in the header of a checkpoint's first file."""
    with open_safetensors(next(iter(_places(Path(folder)).values())).file) as file:
        return dict(file.metadata() or {})


def is_stored_int8(folder: Path) -> bool:
    """Whether a checkpoint's linear layers are stored as int8."""
    return any(name.endswith(_SCALE) for name in _places(Path(folder)))


def stored_dtype(folder: Path) -> torch.dtype:
    """The widest floating format among a checkpoint's tensors but a classifier's wide head and
    what belongs to int8 weights.
    """
    heads = (f"{SequenceClassifier.head_name}.", f"{EncoderClassifier.head_name}.")
    formats: set[str] = set()
    for path, names in _by_file(_places(Path(folder))).items():
        with open_safetensors(path) as file:
            formats |= {
                file.get_slice(place.key).get_dtype()
                for name, place in names.items()
                if not name.startswith(heads) and not name.endswith(_SCALE)
            }
    formats.discard(_INT8)
    if unknown := formats - set(_FLOATING):
        raise ValueError(f"{folder} holds {min(unknown)} tensors; read are {', '.join(_FLOATING)}")
    return functools.reduce(torch.promote_types, [_FLOATING[name] for name in formats])


def save_model(
    model: Model,
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
    model: Model,
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
    write_config(
        model.config,
        folder,
        head="CausalLM" if isinstance(model, CausalLM) else "SequenceClassification",
        dtype=model.network.word_embedding.weight.dtype,
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
    if not isinstance(model, Classifier):
        return []
    return [f"LABEL_{i}" for i in range(model.head.out_features)]


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


def _places(folder: Path) -> dict[str, Place]:
    """Where each tensor of the model lies; every file is opened, and is whole and no other's."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder} has both {_SINGLE} and {_INDEX}; remove the stale one")
    if index.exists():
        expected_of: Mapping[Path, set[str] | None] = _read_index(index)
    elif single.exists():
        expected_of = {file_inside(folder, _SINGLE): None}
    else:
        raise ValueError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; convert others: python -m model.convert"
        )
    places: dict[str, Place] = {}
    for path, expected in expected_of.items():
        with open_safetensors(path) as file:
            found = set(file.keys())
            of_file = {key: list(_of_key(file, path, key)) for key in found}
        if expected is not None and found != expected:
            raise ValueError(
                f"{path} does not hold the tensors that {_INDEX} gives it: "
                f"{_some(found ^ expected)}; the files are not of one checkpoint"
            )
        for name, place in itertools.chain(*of_file.values()):
            if name in places:
                raise ValueError(
                    f"{path} holds {place.key}, and {places[name].key} is the same tensor"
                )
            places[name] = place
    return {name: place for name, place in places.items() if not PASSED_OVER.fullmatch(name)}


def _of_key(file: Any, path: Path, key: str) -> Iterator[tuple[str, Place]]:
    """The tensors of the model that a stored one holds, and where they lie."""
    stacked = _STACKED.fullmatch(key)
    if stacked is None:
        yield _name_in_model(key), Place(path, key)
        return
    sparse = f"{stacked[1]}.block_sparse_moe"
    if stacked[2] is None:
        yield f"{sparse}.gate.weight", Place(path, key)
        return
    shape = file.get_slice(key).get_shape()
    if len(shape) != 3 or shape[0] > _MOST_EXPERTS:
        yield key, Place(path, key)  # no such tensor is known, which is then said
        return
    experts, rows, _ = shape
    for expert in range(experts):
        if stacked[2] == "down":
            yield f"{sparse}.experts.{expert}.w2.weight", Place(path, key, (expert, slice(0, rows)))
        else:
            halves = {"w1": slice(0, rows // 2), "w3": slice(rows // 2, rows)}
            for layer, half in halves.items():
                name = f"{sparse}.experts.{expert}.{layer}.weight"
                yield name, Place(path, key, (expert, half))


def _name_in_model(key: str) -> str:
    """The name of a stored tensor in the model: the same, but for spellings of older BERT files."""
    if key.startswith(_BARE_BERT):
        key = f"bert.{key}"
    module, _, name = key.rpartition(".")
    return f"{module}.{_OLD_NORM.get(name, name)}" if module.endswith("LayerNorm") else key


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


def _check_match(model: nn.Module, places: Mapping[str, Place | None], folder: Path) -> None:
    """Refuse a checkpoint whose names, shapes or number formats are not those of the model.

    A name whose place is None is filled from elsewhere.
    """
    wanted = {
        name: list(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(_SCALE)
    }
    if missing := wanted.keys() - places.keys():
        raise ValueError(f"{folder} lacks tensors that its config.json asks for: {_some(missing)}")
    # Stored scales come with the weights of linear layers, whether the model's are int8 or not.
    layers = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    scaled = {
        name for name in places if name.endswith(_SCALE) and name.removesuffix(_SCALE) in layers
    }
    wanted |= {name: wanted[_weight_of(name)][:1] for name in scaled}
    if unknown := places.keys() - wanted.keys():
        raise ValueError(f"{folder} has tensors that its config.json rules out: {_some(unknown)}")
    for path, names in _by_file(places).items():
        with open_safetensors(path) as file:
            for name, place in names.items():
                shape, form = place.shape(file), file.get_slice(place.key).get_dtype()
                if shape != wanted[name]:
                    raise ValueError(
                        f"{path}: {name} has the shape {shape}; the model that config.json "
                        f"describes needs {wanted[name]}"
                    )
                is_scaled = name.endswith(".weight") and _scale_of(name) in scaled
                if (form == _INT8) if is_scaled else (form in _FLOATING):
                    continue
                allowed = _INT8 if is_scaled else ", ".join(_FLOATING)
                more = f", and {_INT8} beside a weight_scale" if form == _INT8 else ""
                raise ValueError(f"{path}: {name} is stored as {form}; read are {allowed}{more}")


def _check_equal(places: Mapping[str, Place], a: str, b: str) -> None:
    if b not in places:
        return  # missing tensors are reported together
    found = []
    for place in (places[a], places[b]):
        with open_safetensors(place.file) as file:
            found.append(read_finite(file, place.key, path=place.file))
    if not torch.equal(*found):
        raise ValueError(
            f"{places[a].file} holds {a} and it differs from {b}, but config.json ties them; set "
            "tie_word_embeddings to false if the checkpoint has a head of its own"
        )


def _read(
    places: Mapping[str, Place],
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The tensors as the model holds them: int8 with its scale where it does, else `dtype`."""
    of_model = model.state_dict()
    read: dict[str, Tensor] = {}
    for path, names in _by_file(places).items():
        with open_safetensors(path) as file:
            for name, place in names.items():
                if not name.endswith(_SCALE):
                    as_int8 = of_model[name].dtype == torch.int8
                    scale = places.get(_scale_of(name))
                    read |= _read_one(name, place, scale, file, as_int8, dtype, device)
    return read


def _read_one(
    name: str,
    place: Place,
    scale_place: Place | None,
    file: Any,
    as_int8: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """One tensor of an open file; a weight that is int8 there or in the model with its scale."""
    if torch.device(device).type == "meta":  # shapes are in the headers
        shape = place.shape(file)
        tensor = torch.empty(shape, dtype=torch.int8 if as_int8 else dtype, device="meta")
        return {name: tensor} | ({_scale_of(name): tensor[:, 0].float()} if as_int8 else {})
    is_stored_int8 = scale_place is not None and name.endswith(".weight")
    tensor = read_finite(
        file,
        place.key,
        path=place.file,
        part=place.part,
        dtype=None if is_stored_int8 or as_int8 else dtype,
        device=device,
    )
    if is_stored_int8:
        assert scale_place is not None
        with open_safetensors(scale_place.file) as own:
            scale = read_finite(
                own, scale_place.key, path=scale_place.file, dtype=torch.float32, device=device
            )
        if not as_int8:
            return {name: dequantise(tensor, scale, dtype)}
    elif as_int8:
        tensor, scale = _quantised(tensor)
    else:
        return {name: tensor}
    return {name: tensor, _scale_of(name): scale}


_QUANTISED_ROWS = 256  # at a time: their intermediates are wider than the weight itself


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), device=weight.device)
    for start in range(0, len(weight), _QUANTISED_ROWS):
        rows = slice(start, start + _QUANTISED_ROWS)
        q[rows], scale[rows] = quantise_rows(weight[rows])
    return q, scale


def _scale_of(weight: str) -> str:
    return weight.removesuffix(".weight") + _SCALE


def _weight_of(scale: str) -> str:
    return scale.removesuffix(_SCALE) + ".weight"


def _by_file(places: Mapping[str, Place | None]) -> dict[Path, dict[str, Place]]:
    """Each file's tensors under their names in the model, in the same order every time."""
    names_of: dict[Path, dict[str, Place]] = {}
    for name, place in sorted(places.items()):
        if place is not None:
            names_of.setdefault(place.file, {})[name] = place
    return names_of


def _fresh_head(model: Classifier, seed: int) -> dict[str, Tensor]:
    """Weights of a head as the base's own were drawn, and no bias."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for name, tensor in model.head_state().items():
        fresh[name] = torch.zeros(tensor.shape)
        if tensor.dim() == 2:
            fresh[name].normal_(std=model.config.initializer_range, generator=generator)
    return fresh


def _some(names: set[str]) -> str:
    """The first three names, and how many more there are."""
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
