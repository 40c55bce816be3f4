"""A language model's linear layers as int8: half the bytes of bfloat16, and a quicker start.

    python -m model.quantise --model llama-7b --out llama-7b-int8

Weights are quantised by rows (`kernels.reference_int8`) as `--base-dtype int8` does while it loads,
so a run gives the same numbers from either folder. The invariant: the folder appears whole or not
at all, and no more is held than the int8 model and one tensor.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from model.checkpoint import copy_tokenizer, load_causal_lm, stored_dtype, write_model
from model.ending import CommandParser, exit_code
from model.files import new_folder


def quantise(source: Path, out: Path) -> None:
    """Write the checkpoint of `source` as int8 into the new folder `out`, tokenizer and all."""
    with new_folder(out) as aside:
        write_model(load_causal_lm(source, dtype=stored_dtype(source), int8="bf16"), aside)
        copy_tokenizer(source, aside)


def main(arguments: Sequence[str]) -> int:
    """Read the command line, quantise, and return the exit code."""

    def work() -> None:
        parser = CommandParser("python -m model.quantise", "Write a checkpoint as int8.")
        parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
        flags = parser.read(arguments)
        quantise(flags.model, flags.out)
        print(f"{flags.out} holds the linear layers of {flags.model} as int8")

    return exit_code("model.quantise", arguments, work, interrupted="interrupted; nothing written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
