"""The tiny LLaMA in data/embedded, made from nothing.

    python -m data.embedded_base --out NEW_FOLDER

Texts for the public (data/general_text.py), a tokenizer that knows the words of notes as LLaMA's
does, a shape, then `train.py --stage pretrain --from-scratch`, and the weights stored in bfloat16.
About ten minutes on one core. `recipe.json` records what was run and what came out.

The tokenizer is the same bytes every time. The weights are not: the order of floating-point sums
differs between machines, and one run of this recipe gives a base as good as another. Invariant: the
base has read no note. Notes of another cohort (another seed) only decide the tokenizer's pieces.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.general_text import write_general_text
from data.mimic import open_mimic
from data.notes import open_notes
from data.synthetic import make_cohort

DOCUMENTS = 8000
TEXT_SEED = 0
# Of the texts only a part, and all of a small cohort that nobody trains on: BPE learns the pieces
# of what it sees most, and the notes are what the demonstration spends its time on.
TOKENIZER = {"vocab_size": 2048, "documents": 300, "patients": 400, "cohort_seed": 1}
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": TOKENIZER["vocab_size"],
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRETRAIN = (
    *("--stage", "pretrain", "--from-scratch", "--epochs", "2", "--batch-tokens", "8192"),
    *("--lr", "4e-3", "--optim.warmup-steps", "20"),
)
FILES = ("config.json", "model.safetensors", "tokenizer.model")
ROOT = Path(__file__).resolve().parent.parent


def train_tokenizer(texts: Iterator[str], path: Path, vocab_size: int) -> None:
    """Write a sentencepiece model of LLaMA's kind: BPE, single digits, bytes for the rest.

    No normalisation, whose table of 240 kB would be most of the file.
    """
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines() if line.strip())
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def tokenizer_texts(texts: Path, work: Path) -> Iterator[str]:
    """Some texts for the public, then every admission note and every note of a small cohort."""
    for path in sorted(texts.iterdir())[: TOKENIZER["documents"]]:
        yield path.read_text(encoding="utf-8")
    cohort = make_cohort(
        work / "cohort", patients=TOKENIZER["patients"], seed=TOKENIZER["cohort_seed"]
    )
    for source in (open_mimic(cohort / "mimic-iii"), open_notes(cohort / "mimic-iv-note")):
        for note in source:
            yield note.text


def make_base(out: Path) -> None:
    """Make the base in the new folder `out`. Raises ValueError for a folder that holds anything."""
    import torch
    from safetensors.torch import load_file, save_file

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder for the base")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = write_general_text(work / "texts", documents=DOCUMENTS, seed=TEXT_SEED)
        shape = work / "shape"
        shape.mkdir()
        (shape / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        train_tokenizer(
            tokenizer_texts(texts, work), shape / "tokenizer.model", TOKENIZER["vocab_size"]
        )
        command = [sys.executable, "train.py", *PRETRAIN]
        command += ["--model", str(shape), "--data", str(texts), "--out", str(work / "run")]
        subprocess.run(command, cwd=ROOT, check=True)

        trained = work / "run" / "model"
        weights = load_file(trained / "model.safetensors")
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = config["torch_dtype"] = "bfloat16"
        _write_json(out / "config.json", config)
        shutil.copyfile(trained / "tokenizer.model", out / "tokenizer.model")
        _write_json(out / "recipe.json", recipe(work / "run" / "run.json", out))


def recipe(run_file: Path, out: Path) -> dict[str, Any]:
    """What was run, on what, and what came out."""
    run = json.loads(run_file.read_text(encoding="utf-8"))
    return {
        "command": "python -m data.embedded_base --out NEW_FOLDER",
        "texts": {"generator": "data/general_text.py", "documents": DOCUMENTS, "seed": TEXT_SEED},
        "tokenizer": TOKENIZER,
        "pretrain": "python train.py " + " ".join(PRETRAIN),
        "steps": run["kept"]["step"],
        "tokens": run["kept"]["tokens"],
        "validation": run["kept"]["best"]["metrics"],
        "parameters": run["parameters"]["all"],
        "versions": run["environment"]["versions"],
        "sha256": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES},
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.embedded_base",
        description="Make the tiny base of the embedded runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    arguments = parser.parse_args(argv)
    try:
        make_base(arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
