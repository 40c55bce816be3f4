"""The adapters of a run as one adapter that peft loads, with the classifier's head in it.

    python -m lora.export --run runs/mor --out exported

A layer with the updates s1 B1 A1 + s2 B2 A2 has one update of rank r1 + r2: A is A1 above A2, B is
s1 B1 beside s2 B2. The scalings are in B, so the adapter's own is 1 (lora_alpha = r), whatever
ranks, alphas and rank stabilisation the two had. A layer that only one of them updates keeps that
one's rank, which `rank_pattern` and `alpha_pattern` tell.

Invariant: the product B A of a layer is the sum that the run ended with; nothing is trained,
rounded or dropped. For use, not for further training: the scalings inside B change what a learning
rate means, and dropout is off.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora.config import LoraConfig
from lora.parts import Parts, parts_of_run
from lora.peft_config import shortest_targets
from lora.peft_format import StoredAdapter, read_adapter, write_adapter
from model.ending import CommandParser, exit_code
from model.files import new_folder
from model.heads import Model


def export(parts: Parts, out: Path) -> LoraConfig:
    """Write the one adapter into the new folder `out` and return its settings.

    Raises:
        ValueError: an adapter does not fit the base's config.json, or `out` exists.
    """
    with new_folder(out) as folder:
        model = parts.empty_model()
        stacked = stack([read_adapter(model, adapter) for adapter in parts.adapters], model)
        stacked.head.update(parts.head)
        write_adapter(
            stacked,
            folder,
            model,
            name="-".join(parts.names),
            base_model_name=str(parts.base),
        )
        read_adapter(model, folder)  # the files fit the base one to one, or nothing is kept
        assert isinstance(stacked.config, LoraConfig)
    return stacked.config


def stack(adapters: Sequence[StoredAdapter], model: Model) -> StoredAdapter:
    """One adapter without head whose updates are the sums of the others'."""
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for adapter in adapters:
        assert isinstance(adapter.config, LoraConfig)  # `lora.parts` has refused the others
        for key, tensor in adapter.update.items():
            layer, _, matrix = key.removesuffix(".weight").rpartition(".")
            if matrix == "lora_A":
                downs.setdefault(layer, []).append(tensor)
            else:
                ups.setdefault(layer, []).append(tensor * adapter.config.scaling(layer))
    update: dict[str, Tensor] = {}
    for layer in downs:
        update[f"{layer}.lora_A.weight"] = torch.cat(downs[layer])
        update[f"{layer}.lora_B.weight"] = torch.cat(ups[layer], dim=1)
    ranks = {layer: sum(map(len, parts)) for layer, parts in downs.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = rank_pattern(ranks, r)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=tuple(shortest_targets(tuple(ranks), model)),
        rank_pattern=pattern,
        alpha_pattern=pattern,
    )
    return StoredAdapter(config, update, head={})


def rank_pattern(ranks: dict[str, int], r: int) -> dict[str, int]:
    """The ranks that are not `r`, by the last part of the layers' names where that is enough.

    Whole names stand there as they are, not escaped: older releases of peft look for them so, and
    their dots match in no other layer's name.
    """
    ranks_of: dict[str, set[int]] = {}
    for layer, rank in ranks.items():
        ranks_of.setdefault(layer.rpartition(".")[2], set()).add(rank)
    pattern: dict[str, int] = {}
    for layer, rank in ranks.items():
        short = layer.rpartition(".")[2]
        if rank != r:
            pattern[short if len(ranks_of[short]) == 1 else layer] = rank
    return pattern


def main(arguments: Sequence[str]) -> int:
    """Export, say what was written, and return the exit code."""

    def work() -> None:
        parser = CommandParser("python -m lora.export", "Write a run's adapters as one for peft.")
        parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a finished run")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
        flags = parser.read(arguments)
        parts = parts_of_run(flags.run)
        config = export(parts, flags.out)
        ranks = sorted({config.r, *config.rank_pattern.values()})
        head = f", head of {parts.num_labels} classes" if parts.head else ""
        print(f"{' + '.join(parts.names)}: rank {', '.join(map(str, ranks))}, scaling 1{head}")
        if parts.head:
            print(
                f"classes in order: {', '.join(parts.label_names)}; load the base with "
                f"num_labels={parts.num_labels}"
            )
        print(f"done: {flags.out}")

    return exit_code("lora.export", arguments, work, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
