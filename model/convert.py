"""Pickled weights to safetensors in Hugging Face layout: the one place that unpickles.

    python -m model.convert llama-7b-hf --out llama-7b    # pytorch_model.bin, or shards of it
    python -m model.convert biobert-hf --out biobert      # the same of a BERT
    python -m model.convert weights.pth --out llama-7b    # config.json stands beside the file
    python -m model.convert LLaMA/7B --out llama-7b       # Meta's consolidated.NN.pth, params.json

Values and number formats stay as they are. Meta's layout has other names, may be cut for tensor
parallelism (each file has some heads and some of the feed-forward width), and rotates neighbouring
pairs of a head's columns (2i, 2i + 1) where Hugging Face's rotates (i, i + H / 2), so the rows of
the query and key weights move.

A pickle can run code when it is read. torch.load is asked for weights only, on a torch that has the
known holes of that mode closed; still, convert only files from whom you trust, and nothing else of
this project reads a pickle. Invariant: the new folder holds exactly the tensors that its
config.json asks for, or there is no new folder.
"""

import dataclasses
import functools
import math
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import PASSED_OVER, check_checkpoint, copy_tokenizer, write_weights
from model.config import DecoderConfig, Llama3Scaling, read_config, write_config
from model.ending import CommandParser, exit_code
from model.files import copy_file, file_inside, is_finite, new_folder, read_json

_INDEX = "pytorch_model.bin.index.json"
_PICKLES = (".bin", ".pth", ".pt")
_CONSOLIDATED = re.compile(r"consolidated\.(\d\d)\.pth")
_FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Tensors = Mapping[str, Tensor]


def convert(source: Path, out: Path, *, max_positions: int | None = None) -> list[str]:
    """Write what `source` holds into the new folder `out` and return what is to be said about it.

    Args:
        source: a folder, or one weights file with its configuration beside it.
        max_positions: the longest sequence that a Meta checkpoint was made for, which its
            params.json does not tell.

    Raises:
        ValueError: the files are damaged, are no LLaMA or BERT, or do not belong together.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    folder = source if source.is_dir() else source.parent
    files = _weight_files(source)
    with new_folder(out) as aside:
        if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
            said = _convert_meta(folder, files, aside, max_positions)
        else:
            if max_positions is not None:
                raise ValueError("--max-positions is for Meta's layout; config.json tells it here")
            said = _convert_hugging_face(folder, files, aside)
        try:
            check_checkpoint(aside)
        except ValueError as error:  # which names the folder that is about to vanish
            raise ValueError(str(error).replace(str(aside), str(source))) from error
    return said


def _weight_files(source: Path) -> list[Path]:
    """The pickles that make up a checkpoint, in order."""
    if source.is_file():
        match = _CONSOLIDATED.fullmatch(source.name)
        if match and len(list(source.parent.glob("consolidated.*.pth"))) > 1:
            raise ValueError(f"{source} is one of several parts; name the folder {source.parent}")
        if source.suffix not in _PICKLES:
            raise ValueError(f"{source} is not one of {', '.join(_PICKLES)}")
        return [source]
    if (source / _INDEX).is_file():
        index = read_json(source / _INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{source / _INDEX} has no weight_map from tensor names to files")
        return [file_inside(source, name) for name in dict.fromkeys(weight_map.values())]
    consolidated = sorted(source.glob("consolidated.*.pth"))
    if consolidated:
        names = [path.name for path in consolidated]
        if names != [f"consolidated.{i:02}.pth" for i in range(len(names))]:
            raise ValueError(
                f"{source} lacks a part: found {', '.join(names)}, counted from consolidated.00.pth"
            )
        return consolidated
    pickles = sorted(path for path in source.iterdir() if path.suffix in _PICKLES)
    # A trainer leaves its arguments beside the weights.
    pickles = [path for path in pickles if path.name != "training_args.bin"]
    if len(pickles) != 1:
        found = ", ".join(path.name for path in pickles) or "none"
        safe = " (it has safetensors, which are read as they are)"
        raise ValueError(
            f"{source} must hold {_INDEX}, consolidated.00.pth or one {' / '.join(_PICKLES)} "
            f"file, found {found}{safe if any(source.glob('*.safetensors')) else ''}; "
            "name one file"
        )
    return pickles


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped where its format allows it; nothing else in it is accepted."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy or download it again")
    is_zip = zipfile.is_zipfile(path)  # else a file of torch before 1.6, which cannot be mapped
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not is_zip:
            raise ValueError(f"{path} is damaged: its end is missing. Copy or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the pickle was written
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Whatever the unpickler trips over; its own advice is to allow more, which we never do.
        raise ValueError(
            f"{path} is damaged, or holds more than weights ({type(error).__name__}); it is not "
            "read. Copy or download it again"
        ) from error
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds {type(loaded).__name__}, not tensors by their names")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds {type(tensor).__name__} beside tensors (a training checkpoint?); "
                "convert the file that has the weights alone"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{path}: {name} is not a plain tensor")
        # An expanded tensor of a few bytes can claim any size.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims more values than the file holds")
        if tensor.is_floating_point() and tensor.dtype not in _FORMATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; quantised weights are not read")
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"{path}: {name} holds a value that is not finite; it is of no use")
    return loaded


# Hugging Face layout ------------------------------------------------------------------------------


def _convert_hugging_face(folder: Path, files: Sequence[Path], out: Path) -> list[str]:
    config = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in _read_pickle(path).items():
            if name in tensors:
                raise ValueError(f"{path} holds {name}, which another file holds too")
            tensors[name] = tensor
    if "tok_embeddings.weight" in tensors:
        raise ValueError(
            f"{files[0]} has Meta's names; put params.json, not config.json, beside it"
        )
    if isinstance(config, DecoderConfig) and config.tie_word_embeddings:
        head, embedding = (
            tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        if head is not None and embedding is not None and torch.equal(head, embedding):
            del tensors["lm_head.weight"]  # the shared matrix, stored twice
    kept = {name: tensor for name, tensor in tensors.items() if not PASSED_OVER.fullmatch(name)}
    write_weights(out, kept, lambda name: kept[name].clone(memory_format=torch.contiguous_format))
    copy_file(folder / "config.json", out / "config.json")
    said = [f"{len(kept)} tensors of {len(files)} files"]
    return said + _tokenizer(folder, out)


# Meta's layout ------------------------------------------------------------------------------------

# Names, and how the files of tensor parallelism cut a tensor: by rows (0), by columns (1), or not.
_ROWS, _COLUMNS, _WHOLE = 0, 1, None
_BLOCK = {
    "attention.wq": ("self_attn.q_proj", _ROWS),
    "attention.wk": ("self_attn.k_proj", _ROWS),
    "attention.wv": ("self_attn.v_proj", _ROWS),
    "attention.wo": ("self_attn.o_proj", _COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", _ROWS),
    "feed_forward.w2": ("mlp.down_proj", _COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", _ROWS),
    "attention_norm": ("input_layernorm", _WHOLE),
    "ffn_norm": ("post_attention_layernorm", _WHOLE),
}
_LLAMA3_VOCABULARY = 128_256
_PARAMETERS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size",
}  # fmt: skip


def _convert_meta(
    folder: Path, files: Sequence[Path], out: Path, max_positions: int | None
) -> list[str]:
    parts = [_read_pickle(path) for path in files]
    headers = [{key: (x.shape, x.dtype) for key, x in part.items()} for part in parts]
    for path, header in zip(files, headers, strict=True):
        if header != headers[0]:
            raise ValueError(f"{path} holds other tensors or shapes than {files[0].name}")
    try:
        config = _meta_config(_read_parameters(folder), parts, max_positions)
    except ValueError as error:
        raise ValueError(f"{folder / 'params.json'}: {error}") from None
    like: dict[str, Tensor] = {}
    reads: dict[str, Callable[[], Tensor]] = {}
    for name in parts[0]:
        if name == "rope.freqs":
            continue  # follows from the configuration
        target, cut, heads = _hugging_face_name(name, config)
        if target == "lm_head.weight" and config.tie_word_embeddings:
            continue
        pieces = [part[name] for part in parts]
        if target == "model.embed_tokens.weight":
            # Llama 3 cuts the vocabulary, its predecessors the width.
            cut = _ROWS if pieces[0].shape[-1] == config.hidden_size else _COLUMNS
        like[target] = torch.empty(
            _joined_shape(name, pieces, cut), dtype=pieces[0].dtype, device="meta"
        )
        reads[target] = functools.partial(_join, name, pieces, cut, heads)
    write_weights(out, like, lambda name: reads[name]())
    write_config(config, out, dtype=like["model.embed_tokens.weight"].dtype)
    said = [
        f"{len(like)} tensors of {len(files)} file{'s' if len(files) > 1 else ''} in Meta's layout",
        f"max_position_embeddings is {config.max_position_embeddings}"
        + (
            ""
            if max_positions is not None
            else ", a guess: params.json does not tell, --max-positions does"
        ),
    ]
    # Llama 3's tokenizer.model is of another kind; Hugging Face's release has it as a .json.
    wanted = "tokenizer.json" if config.vocab_size >= _LLAMA3_VOCABULARY else "tokenizer.model"
    places = [place for place in (folder, folder.parent) if (place / wanted).is_file()]
    return said + (_tokenizer(places[0], out) if places else [f"found no {wanted} to copy"])


def _read_parameters(folder: Path) -> dict[str, Any]:
    """params.json without what it does not set."""
    found = read_json(folder / "params.json")
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(found.keys() - _PARAMETERS):
        raise ValueError(f"the key {unknown[0]!r} is unknown; only dense LLaMAs are converted")
    return {key: value for key, value in found.items() if value is not None}


def _meta_config(
    parameters: Mapping[str, Any], parts: Sequence[Tensors], max_positions: int | None
) -> DecoderConfig:
    """What config.json says, from params.json and, where that is silent, from the tensors."""
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads"):
        value = parameters.get(key, 1 if key == "n_kv_heads" else None)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} is {value!r}; it is a whole number of at least 1")
    for key in ("norm_eps", "rope_theta"):
        value = parameters.get(key, 1.0)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{key} is {value!r}; it is a positive number")
    dim, heads = parameters["dim"], parameters["n_heads"]
    if dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of n_heads {heads}")
    needed = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "norm.weight")
    if absent := [name for name in needed if name not in parts[0] or parts[0][name].dim() == 0]:
        raise ValueError(f"the weights lack {absent[0]}; this is not a dense LLaMA of Meta's")
    embeddings = [part["tok_embeddings.weight"] for part in parts]
    outputs = [part["output.weight"] for part in parts if "output.weight" in part]
    is_cut_by_rows = embeddings[0].shape[-1] == dim
    vocab_size = sum(len(e) for e in embeddings) if is_cut_by_rows else len(embeddings[0])
    is_llama3 = vocab_size >= _LLAMA3_VOCABULARY
    scaling = None
    theta = float(parameters.get("rope_theta", 10_000.0))
    if parameters.get("use_scaled_rope"):
        # Meta's code sets these; the factor is 8 for Llama 3.1 and 32 for the small ones of 3.2.
        scaling = Llama3Scaling(
            factor=32.0 if dim <= 3072 else 8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    guess = 131_072 if scaling else 8192 if is_llama3 else 16_384 if theta > 10_000.0 else 2048
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=sum(len(part["layers.0.feed_forward.w1.weight"]) for part in parts),
        num_hidden_layers=parameters["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=parameters.get("n_kv_heads", heads),
        head_dim=dim // heads,
        max_position_embeddings=guess if max_positions is None else max_positions,
        rms_norm_eps=float(parameters.get("norm_eps", 1e-5)),
        rope_theta=theta,
        rope_scaling=scaling,
        bos_token_id=128_000 if is_llama3 else 1,
        eos_token_ids=(128_001,) if is_llama3 else (2,),
    )
    is_tied = not outputs or (
        is_cut_by_rows and all(torch.equal(*pair) for pair in zip(embeddings, outputs, strict=True))
    )
    return dataclasses.replace(config, tie_word_embeddings=is_tied)


def _hugging_face_name(name: str, config: DecoderConfig) -> tuple[str, int | None, int]:
    """Name, cut and, where rows must move for RoPE, the number of heads (else 0)."""
    match name:
        case "tok_embeddings.weight":
            return "model.embed_tokens.weight", _COLUMNS, 0
        case "norm.weight":
            return "model.norm.weight", _WHOLE, 0
        case "output.weight":
            return "lm_head.weight", _ROWS, 0
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if found is None or found[2] not in _BLOCK:
        raise ValueError(f"the tensor {name!r} is unknown; only dense LLaMAs are converted")
    target, cut = _BLOCK[found[2]]
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }.get(target, 0)
    return f"model.layers.{found[1]}.{target}.weight", cut, heads


def _joined_shape(name: str, pieces: Sequence[Tensor], cut: int | None) -> list[int]:
    shape = list(pieces[0].shape)
    if len(shape) != (1 if cut is _WHOLE else 2):
        raise ValueError(f"{name} has the shape {shape}, which no LLaMA has")
    if cut is not _WHOLE:
        shape[cut] *= len(pieces)
    return shape


def _join(name: str, pieces: Sequence[Tensor], cut: int | None, heads: int) -> Tensor:
    if cut is not _WHOLE:
        return _half_split(torch.cat(list(pieces), dim=cut), heads)
    if not all(torch.equal(piece, pieces[0]) for piece in pieces):
        raise ValueError(f"the files disagree about {name}, which each of them holds whole")
    return pieces[0].clone()


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (2i, 2i + 1) to halves (i, i + H / 2); no heads: as it is."""
    if heads == 0:
        return weight
    if len(weight) % (2 * heads):
        raise ValueError(f"a weight of {len(weight)} rows does not divide into {heads} heads")
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _tokenizer(source: Path, out: Path) -> list[str]:
    names = copy_tokenizer(source, out)
    return [f"copied {', '.join(names)}" if names else "found no tokenizer to copy"]


def main(arguments: Sequence[str]) -> int:
    """Convert, say what was written, and return the exit code."""

    def work() -> None:
        parser = CommandParser("python -m model.convert", "Convert pickled weights to safetensors.")
        parser.add_argument("source", type=Path, metavar="IN", help="a folder or a weights file")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
        parser.add_argument(
            "--max-positions",
            type=int,
            metavar="N",
            help="longest sequence of a Meta checkpoint (Llama 2: 4096)",
        )
        flags = parser.read(arguments)
        for line in convert(flags.source, flags.out, max_positions=flags.max_positions):
            print(line)
        print(f"done: {flags.out}")

    return exit_code(
        "model.convert", arguments, work, interrupted="interrupted; nothing was written"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
