"""What a merge or an export puts together: a base, adapters and a head, found in a run's folder.

The invariant: adapters are only put on the base that they were trained on, and only together with
those that they were trained on top of. A run's folder vouches for both (`run.json` has the base's
fingerprint, the adapters in their order and the SHA-256 of their files, which are compared before
they are used); a PEFT folder that lies in none vouches for nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.config import LoraConfig
from lora.peft_config import read_adapter_config, read_peft_keys
from lora.peft_format import TENSORS_FILE, find_adapter, stored_head
from model.checkpoint import base_fingerprint, empty_classifier, weights_metadata
from model.config import read_config, read_decoder_config
from model.files import check_files, file_digest, open_safetensors, read_finite, read_sealed_json
from model.heads import CausalLM, Model

RUN_FILE, HEAD_FILE, ADAPTERS = "run.json", "head.safetensors", "adapter"
MERGED = "merged_adapters"  # entry of the header of merged weights: the adapters in them


@dataclass(frozen=True)
class Parts:
    """The folders and the head of one model."""

    base: Path
    adapters: tuple[Path, ...]  # PEFT folders, in the order of training
    head: Mapping[str, Tensor]  # a classifier's head under its names in the model; else empty
    label_names: tuple[str, ...]  # empty where nothing names them
    trained_on: str | None  # fingerprint of the adapters' base; None where no run tells it

    @property
    def names(self) -> list[str]:
        return [folder.name for folder in self.adapters]

    @property
    def num_labels(self) -> int:
        """Classes of the head; 0 without one."""
        return len(next(iter(self.head.values()))) if self.head else 0

    def empty_model(self) -> Model:
        """The model's names and shapes, without data."""
        if self.head:
            return empty_classifier(read_config(self.base), self.num_labels)
        config = read_decoder_config(self.base)
        with torch.device("meta"):
            return CausalLM(config)


def parts_of_run(run: Path) -> Parts:
    """The parts of a finished run.

    Raises:
        ValueError: no finished run is there, a file of it is not what it wrote, or it trained no
            adapter.
    """
    if not (run / RUN_FILE).is_file():
        raise ValueError(f"{run} holds no run: {RUN_FILE} is missing")
    record = _record(run)
    if record["config"]["adapter"] == "full":
        raise ValueError(f"{run} trained all weights, not adapters: use {run / 'model'} as it is")
    if not record["adapters"]:
        raise ValueError(f"{run} has no adapter, only a head; there is nothing to put together")
    check_files(run, record["files"])
    head: dict[str, Tensor] = {}
    if record["labels"]:
        with open_safetensors(run / HEAD_FILE) as file:
            head = {
                name: read_finite(file, name, path=run / HEAD_FILE) for name in sorted(file.keys())
            }
        for name, tensor in head.items():
            if tensor.dim() == 0 or len(tensor) != len(record["labels"]):
                raise ValueError(
                    f"{run / HEAD_FILE}: {name} does not have one row for each of the "
                    f"{len(record['labels'])} labels in {RUN_FILE}"
                )
    adapters = tuple(run / ADAPTERS / name for name in record["adapters"])
    _check_updates(adapters)
    return Parts(
        base=Path(record["config"]["model"]),
        adapters=adapters,
        head=head,
        label_names=tuple(record["labels"]),
        trained_on=record["fingerprints"]["base"],
    )


def parts_of_folders(base: Path, folders: Sequence[Path]) -> Parts:
    """A base and PEFT folders, which may be those of a run, of others, or of peft.

    Raises:
        ValueError: two adapters disagree about the base or the head, one is missing that another
            was trained on top of, or a run's adapter is not what the run wrote.
    """
    adapters = tuple(find_adapter(folder) for folder in folders)
    _check_updates(adapters)
    digests = [_update_digest(adapter) for adapter in adapters]
    if len(set(digests)) < len(digests):
        raise ValueError("one adapter is given twice; it would be added twice")
    heads: list[dict[str, Tensor]] = []
    bases: set[str] = set()
    label_names: tuple[str, ...] = ()
    for adapter in adapters:
        head = stored_head(adapter)
        heads += [head] if head else []
        run = adapter.resolve().parent.parent
        if not (run / RUN_FILE).is_file():
            continue
        record, name = _record(run), adapter.resolve().name
        if name not in record["adapters"]:
            continue
        own = f"{ADAPTERS}/{name}/"
        check_files(run, {file: of for file, of in record["files"].items() if file.startswith(own)})
        bases.add(record["fingerprints"]["base"])
        label_names = tuple(record["labels"]) if head else label_names
        for below in record["adapters"][: record["adapters"].index(name)]:
            if _update_digest(run / ADAPTERS / below) not in digests:
                raise ValueError(
                    f"{adapter} was trained on top of the adapter {below!r}, which is not given; "
                    f"give {run / ADAPTERS / below} too, or the whole run"
                )
    if len(bases) > 1:
        raise ValueError("the adapters were trained on different bases; they do not add up")
    if len(heads) > 1:
        raise ValueError("two of the adapters carry a classifier's head; a model has one")
    return Parts(
        base=base,
        adapters=adapters,
        head=heads[0] if heads else {},
        label_names=label_names,
        trained_on=bases.pop() if bases else None,
    )


def _check_updates(adapters: Sequence[Path]) -> None:
    """Refuse adapters that are no update of weights."""
    for adapter in adapters:
        if not isinstance(read_adapter_config(adapter), LoraConfig):
            kind = read_peft_keys(adapter)["peft_type"]
            raise ValueError(
                f"{adapter} is of the kind {kind}, which updates no weight; only LoRA can be "
                "merged or exported: keep the folder as it is, peft loads it"
            )


def check_base(parts: Parts) -> None:
    """Refuse a base that is not the adapters'.

    A base with merged adapters in it is one only for adapters of a run that was trained on it.

    Raises:
        ValueError: the base has changed, is another one, or is already merged.
    """
    merged = weights_metadata(parts.base).get(MERGED)
    if parts.trained_on is not None and base_fingerprint(parts.base) == parts.trained_on:
        return
    if merged is not None:
        raise ValueError(
            f"{parts.base} is already merged (with {merged}); give the base that the adapters were "
            "trained on"
        )
    if parts.trained_on is not None:
        raise ValueError(
            f"the base {parts.base} is not the one that the adapters were trained on, or has "
            "changed since; give that base"
        )


def _record(run: Path) -> dict[str, Any]:
    """run.json of a finished run, as far as it is asked for here."""
    path = run / RUN_FILE
    record = read_sealed_json(path)
    if record.get("finished") is False:
        raise ValueError(f"the run in {run} has not ended; continue it with --resume")
    try:
        found: dict[str, Any] = {
            "files": dict(record["files"]),
            "config": {key: str(record["config"][key]) for key in ("model", "adapter")},
            "adapters": [str(name) for name in record["adapters"]],
            "labels": [str(label) for label in record["labels"]],
            "fingerprints": {"base": str(record["fingerprints"]["base"])},
        }
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not the record of a run") from None
    if any(name != Path(name).name for name in found["adapters"]):
        raise ValueError(f"{path} names adapters that are not folders of the run")
    return found


def _update_digest(adapter: Path) -> str:
    if not (adapter / TENSORS_FILE).is_file():
        raise ValueError(f"{adapter / TENSORS_FILE} is missing; the adapter is not complete")
    return file_digest(adapter / TENSORS_FILE)
