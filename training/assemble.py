"""The model of a run from its config: base, adapters; and a finished run put together again.

Training and evaluation build theirs here, so a run is scored with exactly the weights that it
wrote. Invariant: before the adapters are attached every weight of the base is frozen, and what then
trains is named, not inferred.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.tokenizer import Tokenizer, load_tokenizer
from lora.adaption_prompt import AdaptionPromptConfig
from lora.attach import AdapterConfig, adapter_names, adapter_parameters, attach
from lora.config import ALL_LINEAR, LoraConfig
from lora.p_tuning import PTuningConfig
from lora.parts import MERGED
from lora.peft_format import find_adapter, load_adapter
from lora.prefix_tuning import PrefixTuningConfig
from lora.prompt_tuning import PromptTuningConfig
from model.checkpoint import (
    WEIGHT_FILES,
    base_fingerprint,
    is_stored_int8,
    load_causal_lm,
    load_classifier,
    load_head,
    weights_metadata,
)
from model.config import (
    DecoderConfig,
    EncoderConfig,
    check_length,
    read_config,
    read_decoder_config,
)
from model.decoder import Decoder, init_weights
from model.files import check_files, file_digest, folder_digest, open_safetensors
from model.heads import CausalLM, Classifier, Model
from training.config import AUTO, BaseDtype, Int8Settings, RunConfig, from_dict
from training.neftune import add_neftune
from training.notes import Notes
from training.run_folder import HEAD_FILE, RUN_FILE, read_record
from training.stages import clinical

CLINICAL, DOWNSTREAM, INSTRUCT = "clinical", "downstream", "instruct"  # the adapters' names
LORA_TARGETS = {DecoderConfig: ("q_proj", "v_proj"), EncoderConfig: ("query", "value")}


@dataclass(frozen=True)
class FinishedRun:
    """A run put together from its folder; nothing of it trains."""

    config: RunConfig
    record: Mapping[str, Any]  # run.json
    model: Model
    tokenizer: Tokenizer
    label_names: tuple[str, ...]


# Model --------------------------------------------------------------------------------------------


def resolve(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with the settings that follow from base and device, as run.json records them.

    Raises ValueError for a stage or an adapter that the base's family does not have, and for
    activations to be moved to where they are.
    """
    if config.model is not None and config.stage != "downstream":
        read_decoder_config(Path(config.model))
    for_all = config.model is None or config.adapter in ("lora", "none", "full")
    if not for_all and isinstance(read_config(Path(config.model or "")), EncoderConfig):
        raise ValueError(
            f"--adapter {config.adapter} is for decoders, but {config.model} is an encoder "
            "(BERT): choose lora, full or none"
        )
    if config.activations == "offload" and device.type == "cpu":
        raise ValueError(
            "--activations offload moves them from a GPU to the host's memory, but this run is on "
            "the CPU: choose save, selective or checkpoint, or a GPU by --device cuda"
        )
    lora = dataclasses.replace(config.lora, target_modules=_lora_targets(config))
    return dataclasses.replace(config, base_dtype=base_dtype(config, device), lora=lora)


def base_dtype(config: RunConfig, device: torch.device) -> BaseDtype:
    """How the base is held: as asked, else as stored if int8, else bfloat16 on a GPU; frozen."""
    if config.base_dtype is not None:
        return config.base_dtype
    if config.adapter == "full":
        return "float32"
    if config.model is not None and is_stored_int8(Path(config.model)):
        return "int8"
    return "bfloat16" if _has_bfloat16(device) else "float32"


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def load_base(
    config: RunConfig,
    folder: Path,
    num_labels: int,
    device: torch.device,
    *,
    place: torch.device | None = None,
) -> Model:
    """The base of a run with the head of its stage, every weight frozen.

    place: where the tensors lie, if not on the device that they are made for.
    """
    held = base_dtype(config, device)
    # Beside int8 weights stand embeddings, norms and the head.
    is_bfloat16 = held == "bfloat16" or (held == "int8" and _has_bfloat16(device))
    device = place or device
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    int8 = config.int8.compute if held == "int8" else None
    model: Model
    if config.stage == "downstream":
        model = load_classifier(
            folder, num_labels, dtype=dtype, device=device, seed=config.seed, int8=int8
        )
    elif config.from_scratch:
        shape = read_decoder_config(folder)
        _check_memory(shape, folder)
        model = CausalLM(shape)
        init_weights(model, shape.initializer_range, config.seed)
        model.to(device=device, dtype=dtype)
    else:
        model = load_causal_lm(folder, dtype=dtype, device=device, int8=int8)
    _check_positions(config, model)
    return model.requires_grad_(False)


def bare_settings(
    folder: Path, base_dtype: BaseDtype | None = None, int8: Int8Settings | None = None
) -> RunConfig:
    """Settings that hold a language model of no run as a run holds its frozen base."""
    # Stage clinical puts nothing on the base; with segments this short it is of any length.
    return replace(
        clinical(),
        model=str(folder),
        base_dtype=base_dtype,
        int8=Int8Settings() if int8 is None else int8,
        max_length=2,
    )


def load_bare(settings: RunConfig, device: torch.device) -> CausalLM:
    """The language model of `bare_settings`."""
    assert settings.model is not None
    model = load_base(settings, Path(settings.model), 0, device)
    assert isinstance(model, CausalLM)
    return model


def _check_positions(config: RunConfig, model: Model) -> None:
    """Refuse segments that, with what adapters put in front of them, are too long for the base."""
    network = model.network
    in_front = network.virtual_tokens + network.prefix_tokens if isinstance(network, Decoder) else 0
    check_length(model.config, config.max_length, in_front)


def _check_memory(shape: DecoderConfig, folder: Path) -> None:
    """Refuse a base to be drawn that this machine could not hold; one to be read has its files."""
    with torch.device("meta"):
        needed = 4 * count_parameters(CausalLM(shape))[1]
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise ValueError(
            f"{folder}/config.json asks for {needed / 2**30:,.0f} GiB of weights, but this machine "
            f"has {present / 2**30:,.0f} GiB of memory; choose smaller sizes"
        )


def build_model(
    config: RunConfig, notes: Notes, device: torch.device, *, place: torch.device | None = None
) -> Model:
    """Base, adapters and head of a run that begins; exactly what the config says is trainable.

    place: where the tensors lie, if not on the device that they are made for.
    """
    assert config.model is not None
    model = load_base(config, Path(config.model), len(notes.label_names), device, place=place)
    if notes.tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {config.model} has {notes.tokenizer.vocab_size} pieces, but the "
            f"base has embeddings for {model.config.vocab_size}; they do not belong together"
        )
    if config.neftune_alpha is not None:
        assert isinstance(model, CausalLM)
        row_length = config.max_length if config.neftune_length == "row" else None
        add_neftune(model.network, config.neftune_alpha, row_length)
    if config.init_adapter is not None:
        adapter = init_adapter_folder(Path(config.init_adapter))
        _check_run_adapter(adapter)
        slot = init_adapter_name(config)
        load_adapter(model, adapter, slot, trainable=not config.freeze_init_adapter)
    if config.adapter == "full":
        model.requires_grad_(True)
    elif config.adapter != "none":
        ids = _init_ids(config, notes.tokenizer)
        settings = adapter_settings(config, model)
        attach(model, new_adapter_name(config), settings, seed=config.seed, init_ids=ids)
    _check_positions(config, model)
    if isinstance(model, Classifier):
        model.head.requires_grad_(True)
    return model


def base_parameters(model: Model) -> set[nn.Parameter]:
    """The frozen parameters that belong to no adapter."""
    of_adapters = {p for name in adapter_names(model) for p in adapter_parameters(model, name)}
    return {p for p in model.parameters() if not p.requires_grad} - of_adapters


def adapter_settings(config: RunConfig, model: Model) -> AdapterConfig:
    """The new adapter's settings in the words of PEFT."""
    if config.adapter == "prompt":
        prompt = config.prompt
        text = prompt.init_text if prompt.init == "text" else None
        return PromptTuningConfig(
            num_virtual_tokens=prompt.num_virtual_tokens, init=prompt.init, init_text=text
        )
    if config.adapter == "prefix":
        return PrefixTuningConfig(
            num_virtual_tokens=config.prefix.num_virtual_tokens,
            prefix_projection=config.prefix.projection,
            encoder_hidden_size=config.prefix.encoder_hidden_size,
        )
    if config.adapter == "p-tuning":
        return PTuningConfig(
            num_virtual_tokens=config.p_tuning.num_virtual_tokens,
            encoder=config.p_tuning.encoder,
            encoder_hidden_size=config.p_tuning.encoder_hidden_size,
            encoder_num_layers=config.p_tuning.encoder_layers,
            encoder_dropout=config.p_tuning.encoder_dropout,
        )
    if config.adapter == "adaption-prompt":
        upper = max(1, len(model.network.blocks) - 2)  # 30 of LLaMA-7B's 32, as in the paper
        return AdaptionPromptConfig(
            adapter_len=config.adaption_prompt.adapter_len,
            adapter_layers=config.adaption_prompt.adapter_layers or upper,
        )
    assert config.adapter == "lora"
    targets = _lora_targets(config)
    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else targets,
        use_rslora=config.lora.rslora,
    )


def _init_ids(config: RunConfig, tokenizer: Tokenizer) -> list[int]:
    """The tokens of prompt tuning's init text, BOS first, as in PEFT."""
    if config.adapter != "prompt" or config.prompt.init != "text":
        return []
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*begin, *tokenizer.encode(config.prompt.init_text)]


def _lora_targets(config: RunConfig) -> tuple[str, ...]:
    """The layers that --lora.target-modules names, or those of the base's family."""
    named = config.lora.target_modules
    if named != (AUTO,) or config.model is None:
        return named
    return LORA_TARGETS[type(read_config(Path(config.model)))]


def init_adapter_folder(folder: Path) -> Path:
    """The PEFT folder that --init-adapter means: itself, or the one adapter of a run."""
    if not folder.is_dir():
        command = "python train.py --stage clinical"
        hint = f"; make it with: {command}" if folder == Path("runs/clinical") else ""
        raise ValueError(f"--init-adapter {folder} does not exist{hint}")
    if not (folder / RUN_FILE).is_file():
        return find_adapter(folder)
    record = read_record(folder)
    names = record["adapters"]
    if not names:
        raise ValueError(
            f"--init-adapter {folder} is a run without an adapter: it trained all weights; give "
            f"--model {folder / 'model'} instead"
        )
    if len(names) > 1:
        is_instruct = record["config"]["stage"] == "instruct"
        merged = ", or merge both into a base (python -m lora.merge) and train on it"
        raise ValueError(
            f"--init-adapter {folder} is a run of {len(names)} adapters, {' and '.join(names)}, "
            f"which work together; give the first alone: {folder / 'adapter' / names[0]}"
            + (merged if is_instruct else "")
        )
    adapter = folder / "adapter" / names[0]
    if not adapter.is_dir():
        raise ValueError(
            f'--init-adapter {folder} is a run without an adapter "{names[0]}": it has not ended '
            "(continue it with --resume), or its files were moved"
        )
    return adapter


def init_adapter_name(config: RunConfig) -> str:
    """What the init adapter is called in this run: "instruct" if one was trained, or "clinical"."""
    assert config.init_adapter is not None
    adapter = init_adapter_folder(Path(config.init_adapter))
    is_instruct = _run_of(adapter) is not None and adapter.resolve().name == INSTRUCT
    return INSTRUCT if is_instruct else CLINICAL


def new_adapter_name(config: RunConfig) -> str:
    """What the run's own adapter is called: its stage; "instruct-2" on top of an instruct run's."""
    name = {"downstream": DOWNSTREAM, "instruct": INSTRUCT}.get(config.stage, CLINICAL)
    if config.init_adapter is not None and init_adapter_name(config) == name:
        return f"{name}-2"
    return name


def _check_run_adapter(adapter: Path) -> None:
    """Refuse an adapter in a run's folder whose files are not those that the run wrote."""
    run = _run_of(adapter)
    if run is None:
        return  # a PEFT folder that nobody has vouched for
    record = read_record(run)
    if not record["finished"]:
        raise ValueError(f"the run in {run} has not ended; continue it with --resume")
    names, name = record["adapters"], adapter.resolve().name
    if name in names[1:]:
        below = run / "adapter" / names[names.index(name) - 1]
        raise ValueError(
            f"--init-adapter {adapter} was trained on top of {below} and means nothing alone; give "
            "that one, or merge the run into a base (python -m lora.merge) and train on it"
        )
    own = f"adapter/{name}/"
    files = {path: file for path, file in record["files"].items() if path.startswith(own)}
    check_files(run, files)


def _run_of(adapter: Path) -> Path | None:
    """The run in whose folder an adapter lies, links resolved; None for any other PEFT folder."""
    holder = adapter.resolve().parent
    is_of_run = holder.name == "adapter" and (holder.parent / RUN_FILE).is_file()
    return holder.parent if is_of_run else None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


# Fingerprints -------------------------------------------------------------------------------------


def fingerprints(config: RunConfig, notes: Notes) -> dict[str, Any]:
    """What goes into a run besides its settings; a resumed run must find the same."""
    assert config.model is not None
    init, splits = config.init_adapter, config.splits
    return {
        "data": notes.fingerprints,
        "tokenizer": notes.tokenizer.fingerprint(),
        "base": base_fingerprint(Path(config.model)),
        "init_adapter": None
        if init is None
        else folder_digest(init_adapter_folder(Path(init)), WEIGHT_FILES),
        "splits": None if splits is None else folder_digest(Path(splits), (".csv",)),
        "exclude": None if config.exclude is None else file_digest(Path(config.exclude)),
    }


def check_same_base(config: RunConfig, found: str | None) -> None:
    """Refuse an init adapter of another base, and one of unknown origin on a merged base."""
    if config.init_adapter is None:
        return
    run = _run_of(init_adapter_folder(Path(config.init_adapter)))
    if run is None:
        assert config.model is not None
        if merged := weights_metadata(Path(config.model)).get(MERGED):
            raise ValueError(
                f"{config.model} is already merged (with {merged}), and nothing tells that "
                f"--init-adapter {config.init_adapter} is not in it; give the base that the "
                "adapter was trained on"
            )
        return
    trained_on = read_record(run)["fingerprints"]["base"]
    if trained_on != found:
        raise ValueError(
            f"--init-adapter {config.init_adapter} was trained on another base than "
            f"{config.model}; give the base it was trained on"
        )


def has_same_lists(config: RunConfig, recorded: Mapping[str, Any]) -> bool:
    """Tell whether the lists of patients, if any, are those by which a run split its notes."""
    if config.splits is None:
        return True
    folder = Path(config.splits)
    return folder.is_dir() and folder_digest(folder, (".csv",)) == recorded["splits"]


# A finished run -----------------------------------------------------------------------------------


def restore(folder: Path, device: torch.device) -> FinishedRun:
    """Put a finished run together: its base, every adapter it wrote, and its head.

    Raises ValueError for a folder that holds no finished run, for a base or a tokenizer that has
    changed, and for a damaged file, before any of it is used.
    """
    record = read_record(folder)
    config = from_dict(record["config"])
    if not record["finished"]:
        raise ValueError(f"the run in {folder} has not ended; continue it with --resume")
    if config.model is None:
        raise ValueError(f"{folder / RUN_FILE} is damaged: it names no base")
    label_names = tuple(record["labels"])
    is_full = config.adapter == "full"
    base = folder / "model" if is_full else Path(config.model)
    if not is_full and base_fingerprint(base) != record["fingerprints"]["base"]:
        raise ValueError(f"the base {base} is not the one that the run in {folder} was trained on")
    check_files(folder, record["files"])
    tokenizer = load_tokenizer(base if is_full else Path(config.model), config.tokenizer_preset)
    if tokenizer.fingerprint() != record["fingerprints"]["tokenizer"]:
        raise ValueError(
            f"{tokenizer.path} is not the tokenizer that the run in {folder} was trained with"
        )
    model = load_base(config, base, len(label_names), device)
    for name in record["adapters"]:
        load_adapter(model, folder / "adapter" / name, name, trainable=False)
    if isinstance(model, Classifier):
        with open_safetensors(folder / HEAD_FILE) as file:
            head = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        load_head(model, head, folder / HEAD_FILE)
    model.requires_grad_(False)
    return FinishedRun(
        config,
        record,
        model,
        tokenizer,
        label_names,
    )
