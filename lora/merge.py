"""Adapters into the weights: a checkpoint of Hugging Face's layout that needs no adapter code.

    python -m lora.merge --run runs/mor --out merged
    python -m lora.merge --model llama-7b --adapter runs/clinical/adapter/clinical --out merged
    python -m lora.merge --run runs/mor --dtype float32 --out merged

W' = W + sum of scaling * B A over the adapters, in float32, rounded once to the output's dtype
(that of the base unless --dtype says otherwise). A classifier's head goes along, in float32, as
does the base's tokenizer.

Merged weights go wrong without a word: a scaling forgotten, one of two adapters left out, a head
lost, an update too small for bfloat16. So nothing is done before it is proved, on sample texts and
random tokens, in float64 arithmetic, which tells a wrong sum from the order of additions:

1. the sums give the logits of base and adapters, to 1e-5 of the largest logit;
2. the files, read again, give the logits of the weights in memory, to the same tolerance;
3. what rounding to the output's dtype moves is measured and said.

Invariant: the folder appears when all of it has been proved, or not at all. Memory: the base as it
is stored, its embedding in float64, and one block in float32; weights are replaced one by one.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.tokenizer import TOKENIZER_FILES, load_tokenizer
from lora.attach import without_adapters
from lora.parts import MERGED, Parts, check_base, parts_of_folders, parts_of_run
from lora.peft_format import load_adapter
from model.batch import TokenBatch
from model.checkpoint import (
    SHARD_BYTES,
    copy_tokenizer,
    load_causal_lm,
    load_classifier,
    load_head,
    stored_dtype,
    write_model,
)
from model.encoder import EncoderClassifier
from model.ending import CommandParser, RunFailed, exit_code
from model.files import new_folder
from model.heads import CausalLM, Classifier, Model, SequenceClassifier
from model.linear import Linear

TOLERANCE = 1e-5  # of the largest logit
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Made up; no row of a table and no patient.
_TEXTS = (
    "Chief complaint: shortness of breath. The patient was admitted with pneumonia and received "
    "antibiotics for seven days.",
    "MEDICATIONS ON ADMISSION: 1. Metoprolol 25 mg twice daily. 2. Aspirin 81 mg daily.",
    "Physical exam: afebrile, heart rate 88, blood pressure 132/78.\nDisposition: home",
    "Once upon a time there was a little boy who had a cough.",
)
_RANDOM_SEQUENCES, _LONGEST = 4, 48  # sequences, tokens in one


@dataclass(frozen=True)
class Proof:
    """What was measured on the sample tokens, each a share of the largest logit or of the tokens.

    For a classifier a token's logits are those of its head after that token.
    """

    dtype: str  # of the output
    tokens: int
    sums: float  # difference of the logits: float32 sums against base and adapters
    files: float  # the written files, read again, against the weights in memory
    rounding: float  # the output's dtype against base and adapters
    agreement: float  # tokens with the same largest logit as with base and adapters
    effect: float  # base alone against base and adapters


def merge(
    parts: Parts,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> Proof:
    """Write the merged checkpoint into the new folder `out` and return what proves it.

    Raises:
        ValueError: the parts do not belong together, `out` exists, or `dtype` is too narrow.
        RunFailed: the merged model is not the one that was trained.
    """
    with new_folder(out) as folder:
        check_base(parts)
        stored = stored_dtype(parts.base)
        if stored == torch.float64:
            stored = torch.float32
        dtype = dtype or stored
        model = _load(parts, parts.base, stored)
        for i, adapter in enumerate(parts.adapters):
            load_adapter(model, adapter, f"adapter-{i}", trainable=False)
        if isinstance(model, Classifier):
            head = {name: tensor.float() for name, tensor in parts.head.items()}
            load_head(model, head, parts.adapters[-1])
        batch = sample_tokens(parts.base, model.config.vocab_size, _longest(model))

        unmerged = _logits(model, batch)
        with without_adapters(model):
            effect = _difference(_logits(model, batch), unmerged)
        with merged_in_passing(model):
            sums = _checked("the merged weights", _logits(model, batch), unmerged)

        merge_weights(model, dtype)
        _to_dtype(model, dtype)
        write_model(
            model,
            folder,
            label_names=parts.label_names,
            max_shard_bytes=max_shard_bytes,
            metadata={MERGED: ", ".join(parts.names)},
        )
        copy_tokenizer(parts.base, folder)
        rounded = _logits(_in_float64(model), batch)
        del model  # two models are never in memory together
        files = _checked("the written files", _logits(_load(parts, folder, dtype), batch), rounded)
    return Proof(
        dtype=str(dtype).removeprefix("torch."),
        tokens=len(unmerged),
        sums=sums,
        files=files,
        rounding=_difference(rounded, unmerged),
        agreement=float((rounded.argmax(1) == unmerged.argmax(1)).double().mean()),
        effect=effect,
    )


# The sum ------------------------------------------------------------------------------------------


def merged_weight(layer: Linear) -> Tensor:
    """W + sum of scaling * B A over the layer's adapters: [N, K] float32."""
    total = layer.weight.to(torch.float32, copy=True)
    for adapter in layer.operands().adapters:
        total.addmm_(adapter.B.float(), adapter.A.float(), alpha=adapter.scaling)
    return total


@torch.no_grad()
def merge_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each adapted layer's weight by its sum in `dtype`, and take its adapters off."""
    for layer in _adapted(model):
        layer.weight = _frozen(_narrowed(merged_weight(layer), dtype))
        layer.adapters = nn.ModuleDict()


@contextmanager
def merged_in_passing(model: Model) -> Iterator[None]:
    """While the `with` block runs, each decoder block computes with its float32 sums.

    They exist during that block's forward pass alone, so the sums are tried before they are
    rounded, without room for all of them.
    """
    kept: dict[Linear, tuple[nn.Parameter, nn.ModuleDict]] = {}

    def enter(block: nn.Module, _: Any) -> None:
        for layer in _adapted(block):
            kept[layer] = (layer.weight, layer.adapters)
            layer.weight, layer.adapters = _frozen(merged_weight(layer)), nn.ModuleDict()

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        for layer, (weight, adapters) in kept.items():
            layer.weight, layer.adapters = weight, adapters
        kept.clear()

    handles = [
        handle
        for block in model.network.blocks
        for handle in (
            block.register_forward_pre_hook(enter),
            block.register_forward_hook(leave, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapted(module: nn.Module) -> list[Linear]:
    return [part for part in module.modules() if isinstance(part, Linear) and part.adapters]


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = weight.to(dtype)
    if not narrow.isfinite().all():
        raise ValueError(
            f"a weight is too large for {str(dtype).removeprefix('torch.')}; "
            "choose --dtype bfloat16 or float32"
        )
    return narrow


def _to_dtype(model: Model, dtype: torch.dtype) -> None:
    """Round what no adapter touched. A classifier's head keeps its bits: it is small."""
    for name, parameter in model.named_parameters():
        is_of_head = isinstance(model, Classifier) and name in model.head_state()
        if not is_of_head and parameter.dtype != dtype:
            parameter.data = _narrowed(parameter.data, dtype)


# The proof ----------------------------------------------------------------------------------------


def sample_tokens(base: Path, vocab_size: int, longest: int) -> TokenBatch:
    """Made-up texts through the base's tokenizer, if it has one, and random tokens.

    Raises:
        ValueError: the tokenizer has more pieces than the base has embeddings.
    """
    sequences: list[list[int]] = []
    if any((base / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(base)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer of {base} has {tokenizer.vocab_size} pieces, but the base has "
                f"embeddings for {vocab_size}; they do not belong together"
            )
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        sequences = [[*begin, *tokenizer.encode(text)][:longest] for text in _TEXTS]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(vocab_size, (_RANDOM_SEQUENCES, longest), generator=generator)
    sequences += random.tolist()
    offsets = [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence))
    return TokenBatch.from_arrays([token for ids in sequences for token in ids], offsets)


def _longest(model: Model) -> int:
    return min(_LONGEST, model.config.max_position_embeddings)


def _load(parts: Parts, folder: Path, dtype: torch.dtype) -> Model:
    """A model whose weights are held in `dtype` and whose arithmetic is float64."""
    model: Model
    if parts.head:
        model = load_classifier(folder, parts.num_labels, dtype=dtype)
    else:
        model = load_causal_lm(folder, dtype=dtype)
    return _in_float64(model.requires_grad_(False))


def _in_float64(model: Model) -> Model:
    """Activations have the embedding's dtype, and weights are cast to it where they are used."""
    model.network.word_embedding.double()
    return model


@torch.no_grad()
def _logits(model: Model, batch: TokenBatch) -> Tensor:
    """[M, V], or a classifier's [M, C] as if its note ended at each token; float64.

    An encoder has one pooled row a note: [n, C].
    """
    if isinstance(model, EncoderClassifier):
        return model.scores(batch)
    assert isinstance(model, CausalLM | SequenceClassifier)
    return model.head_logits(model.model(batch))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())


def _checked(what: str, found: Tensor, expected: Tensor) -> float:
    difference = _difference(found, expected)
    if not difference <= TOLERANCE:  # so that a nan is refused
        raise RunFailed(
            f"{what} do not give the logits of the trained model: they differ by up to "
            f"{difference:.1e} of the largest logit, allowed is {TOLERANCE:.0e}; nothing is kept"
        )
    return difference


# The command --------------------------------------------------------------------------------------


def report(parts: Parts, proof: Proof) -> list[str]:
    """The proof in words."""
    unit = "class" if parts.head else "token"
    lines = [
        f"merged {' + '.join(parts.names)} into {parts.base}",
        f"proof on {proof.tokens} tokens: the float32 sums give the unmerged logits to "
        f"{proof.sums:.1e} of the largest logit, the written files those in memory to "
        f"{proof.files:.1e} (allowed {TOLERANCE:.0e})",
        f"in {proof.dtype} logits are off by up to {proof.rounding:.1e} of the largest, and the "
        f"likeliest {unit} agrees on {proof.agreement:.2%} of the tokens; the adapters move "
        f"logits by up to {proof.effect:.1e}",
    ]
    if proof.effect == 0.0:
        lines.append("warning: the adapters change nothing; were they trained?")
    elif proof.rounding > 0.1 * proof.effect:
        lines.append(
            f"warning: rounding to {proof.dtype} hides part of what the adapters do; choose "
            "--dtype float32, or keep them as adapters"
        )
    if parts.trained_on is None:
        lines.append(
            "note: the adapters lie in no run's folder, so nothing tells whether this is their base"
        )
    return lines


def read_command(arguments: Sequence[str]) -> tuple[Parts, Path, torch.dtype | None]:
    """The parts, the folder to write and its dtype; ValueError for what is wrong."""
    parser = CommandParser(
        "python -m lora.merge", "Merge adapters into a checkpoint of Hugging Face's layout."
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="a finished run")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a base, with --adapter")
    parser.add_argument(
        "--adapter", type=Path, nargs="+", metavar="DIR", help="PEFT folders, in order of training"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as the base is stored")
    flags = parser.read(arguments)
    if flags.run is not None and (flags.model is not None or flags.adapter is not None):
        raise ValueError(
            "--run names its base and adapters itself; leave --model and --adapter out"
        )
    if flags.run is None and (flags.model is None or flags.adapter is None):
        raise ValueError("name what to merge: --run DIR, or --model DIR and --adapter DIR")
    parts = (
        parts_of_folders(flags.model, flags.adapter)
        if flags.run is None
        else parts_of_run(flags.run)
    )
    return parts, flags.out, None if flags.dtype is None else DTYPES[flags.dtype]


def main(arguments: Sequence[str]) -> int:
    """Merge, say what was proved, and return the exit code."""

    def work() -> None:
        parts, out, dtype = read_command(arguments)
        proof = merge(parts, out, dtype)
        for line in report(parts, proof):
            print(line)
        print(f"done: {out}")

    return exit_code("lora.merge", arguments, work, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
