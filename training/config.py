"""The settings of a run: frozen dataclasses whose field names are the command line's flags.

`--lora.r 16` is `RunConfig.lora.r`. Every value is checked where it lives, so a config that exists
is usable whether it came from a flag, a YAML file, a `run.json` or a test. The docstring under a
field is what `--help` prints.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from data.conversations import BadRows
from data.prompts import PromptName
from data.sources import Source, read_sources
from model.activations import Activations
from training.neftune import NeftuneLength

Stage = Literal["pretrain", "clinical", "downstream", "instruct"]
Task = Literal["pmv", "mor", "los", "diag", "proc", "label"]
Adapter = Literal["lora", "prompt", "prefix", "p-tuning", "adaption-prompt", "none", "full"]
BaseDtype = Literal["float32", "bfloat16", "int8"]
States = Literal["float32", "int8"]
Schedule = Literal["constant", "linear", "cosine"]
Preset = Literal[
    "paper-llama", "paper-pmc-llama",
    "paper-outcome", "paper-outcome-pmv", "paper-outcome-mor", "paper-outcome-los",
    "paper-outcome-diag", "paper-outcome-proc", "paper-lora-mor", "paper-encoder",
    "medalpaca", "medalpaca-lora", "medalpaca-lora-int8", "medalpaca-lora-int8-13b",
    "alpaca-7b", "alpaca-13b", "alpaca-lora", "alpaca-lora-r16",
]  # fmt: skip
AUTO = "auto"  # LoRA's target modules: those that the base's family is adapted at


def _check(flag: str, value: float | None, allowed: str, holds: bool) -> None:
    """Raise ValueError naming the flag unless `holds`; a value of None is "not set" and passes."""
    if value is not None and not (holds and abs(value) < 1e300):  # an int may be no float
        raise ValueError(f"{flag} must be {allowed}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Low-rank adapters (--adapter lora); checked by the RunConfig that holds them."""

    r: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Share of an adapter's inputs set to zero while training."""
    target_modules: tuple[str, ...] = (AUTO,)
    """Names of the linear layers that are adapted, or all-linear, or auto: q_proj and v_proj of a
    LLaMA, query and value of a BERT."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""

    def check(self) -> None:
        """Raise ValueError naming the flag whose value is out of range."""
        _check("--lora.r", self.r, "a whole number from 1 to 65536", 1 <= self.r <= 65536)
        _check("--lora.alpha", self.alpha, "a number above 0, up to 1e9", 0 < self.alpha <= 1e9)
        _check("--lora.dropout", self.dropout, "from 0 to below 1", 0 <= self.dropout < 1)
        if not self.target_modules:
            raise ValueError(
                "--lora.target-modules must name at least one layer, got none; "
                "for example: q_proj v_proj, or all-linear"
            )
        if AUTO in self.target_modules and len(self.target_modules) > 1:
            raise ValueError(f"--lora.target-modules {AUTO} stands alone, beside no layer's name")
        if len(set(self.target_modules)) != len(self.target_modules):
            raise ValueError(
                "--lora.target-modules must name each layer once, got "
                + " ".join(self.target_modules)
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Settings:
    """Linear layers held as int8 (--base-dtype int8)."""

    compute: Literal["bf16", "int8"] = "bf16"
    """Dequantise weights where they are used, or quantise activations too and multiply int8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSettings:
    """Prompt tuning (--adapter prompt); checked by the RunConfig that holds them."""

    num_virtual_tokens: int = 15
    """Trained rows in front of each segment's embedded tokens."""
    init: Literal["random", "text"] = "random"
    """How they begin: standard normal, or as the embeddings of --prompt.init-text."""
    init_text: str = "Finish this clinical note: "
    """The text; its tokens are repeated until they are enough."""

    def check(self) -> None:
        """Raise ValueError naming the flag whose value is out of range."""
        _check_tokens("--prompt.num-virtual-tokens", self.num_virtual_tokens)
        if not self.init_text.strip():
            raise ValueError("--prompt.init-text must hold a word, got none")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSettings:
    """Prefix tuning (--adapter prefix); checked by the RunConfig that holds them."""

    num_virtual_tokens: int = 20
    """Trained keys and values in front of each segment's own, in every layer."""
    projection: bool = False
    """Make them by a small network, which is left behind when the adapter is written."""
    encoder_hidden_size: int | None = None
    """Width of that network. Default: that of a key."""

    def check(self) -> None:
        """Raise ValueError naming the flag whose value is out of range."""
        _check_tokens("--prefix.num-virtual-tokens", self.num_virtual_tokens)
        _check_tokens("--prefix.encoder-hidden-size", self.encoder_hidden_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class PTuningSettings:
    """P-tuning (--adapter p-tuning); checked by the RunConfig that holds them."""

    num_virtual_tokens: int = 20
    """Rows in front of each segment's embedded tokens, made by the encoder."""
    encoder: Literal["mlp", "lstm"] = "lstm"
    """The network that makes them, which is left behind when the adapter is written."""
    encoder_hidden_size: int = 256
    """Its width."""
    encoder_layers: int = 4
    """Layers of the LSTM."""
    encoder_dropout: float = 0.0
    """Share of the values between two layers of the LSTM set to zero while training."""

    def check(self) -> None:
        """Raise ValueError naming the flag whose value is out of range."""
        layers, dropout = self.encoder_layers, self.encoder_dropout
        _check_tokens("--p-tuning.num-virtual-tokens", self.num_virtual_tokens)
        _check_tokens("--p-tuning.encoder-hidden-size", self.encoder_hidden_size)
        _check("--p-tuning.encoder-layers", layers, "from 1 to 1024", 1 <= layers <= 1024)
        _check("--p-tuning.encoder-dropout", dropout, "from 0 to below 1", 0 <= dropout < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptionPromptSettings:
    """Adaption prompt (--adapter adaption-prompt); checked by the RunConfig that holds them."""

    adapter_len: int = 10
    """Trained rows that each of the layers attends to besides its segment."""
    adapter_layers: int | None = None
    """How many of the last layers have them. Default: all but the first two."""

    def check(self) -> None:
        """Raise ValueError naming the flag whose value is out of range."""
        _check_tokens("--adaption-prompt.adapter-len", self.adapter_len)
        _check_tokens("--adaption-prompt.adapter-layers", self.adapter_layers)


def _check_tokens(flag: str, value: int | None) -> None:
    _check(flag, value, "a whole number from 1 to 65536", value is None or 1 <= value <= 65536)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSettings:
    """AdamW and its learning-rate schedule; checked by the RunConfig that holds them."""

    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up: not, in a line, or in half a cosine."""
    min_lr_ratio: float = 0.0
    """Share of --lr that linear and cosine fall to at the end of the run."""
    warmup_steps: int | None = None
    """Steps over which the learning rate climbs in a line to --lr. Default: by the ratio."""
    warmup_ratio: float = 0.05
    """The same as a share of all steps, rounded down."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors (norms) never decay."""
    states: States = "float32"
    """How AdamW's running means are held: int8 takes a quarter of the memory, with a scale for each
    256 of them; tensors of fewer than 4096 elements stay float32."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient; None to leave it as it is."""

    def check(self) -> None:
        """Raise ValueError naming the flag whose value is out of range."""
        warmup = self.warmup_steps
        _check("--optim.warmup-steps", warmup, "0 or more", warmup is None or warmup >= 0)
        _check(
            "--optim.min-lr-ratio", self.min_lr_ratio, "from 0 to 1", 0 <= self.min_lr_ratio <= 1
        )
        ratio = self.warmup_ratio
        _check("--optim.warmup-ratio", ratio, "from 0 to below 1", 0 <= ratio < 1)
        _check("--optim.beta1", self.beta1, "from 0 to below 1", 0 <= self.beta1 < 1)
        _check("--optim.beta2", self.beta2, "from 0 to below 1", 0 <= self.beta2 < 1)
        _check("--optim.eps", self.eps, "a number above 0", self.eps > 0)
        _check("--optim.weight-decay", self.weight_decay, "0 or more", self.weight_decay >= 0)
        _check("--optim.clip", self.clip, "above 0, or None", self.clip is None or self.clip > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    stage: Stage
    """What is done: pretrain trains a base, clinical adapts one to notes, downstream classifies,
    instruct teaches one to answer."""
    preset: Preset | None = None
    """A published recipe of the stage: its settings hold where no flag speaks (docs/presets.md)."""
    task: Task | None = None
    """Downstream only. Of a MIMIC folder: pmv (prolonged ventilation), mor (in-hospital mortality),
    los (length of stay), diag, proc (diagnosis and procedure groups); or label, a table's column.
    """
    cohort: Literal["correct", "paper"] = "correct"
    """MIMIC tasks: paper builds notes and labels with the published quirks (docs/cohorts.md)."""

    model: str | None = None
    """Folder of the base model: config.json, safetensors, tokenizer."""
    from_scratch: bool = False
    """Pretrain only: draw the weights from config.json instead of reading them."""
    tokenizer_preset: str | None = None
    """Special tokens of a family whose files do not state them: llama or pmc-llama."""
    base_dtype: BaseDtype | None = None
    """How the base is held. Default: as stored if int8, else bfloat16 if frozen on a GPU that has
    it, else float32."""
    int8: Int8Settings = field(default_factory=Int8Settings)

    data: str | tuple[str, ...] | None = None
    """Notes: CSV, JSON lines or Parquet table, folder of text files, or MIMIC folder. Pretrain:
    also several sources, each with a --data NAME=PATH:WEIGHT of its own."""
    text_column: str | None = None
    """Column of the notes' text. Default: text, the name in MIMIC-IV-Note."""
    label_column: str | None = None
    """Column of the labels (--task label)."""
    patient_column: str | None = None
    """Column of the patients' ids, which then decide the split."""
    splits: str | None = None
    """Folder with one list of patient ids per split: train.csv, validation.csv, test.csv."""
    exclude: str | None = None
    """Notes to leave out: the list that python -m data.leaks --write made."""
    test_share: float = 0.1
    """Share of patients (or texts) held out for the test, in tenths."""
    max_length: int = 512
    """Longest segment in tokens. Longer notes are cut into pieces; a classifier truncates them."""
    pieces: Literal["all", "first"] = "all"
    """Pretrain and clinical only: learn all pieces of a longer note, or the first alone."""
    truncate: Literal["head", "tail", "both"] = "head"
    """Which end of a note longer than --max-length a classifier keeps."""
    prompt_format: PromptName = "alpaca"
    """Instruct only: how rows and chats are written, in training and when the model is used."""
    train_on_inputs: bool = False
    """Instruct only: train on the prompts too, not on the responses alone."""
    bad_rows: BadRows = "refuse"
    """Instruct only: stop at a row that cannot be used, or count such rows and leave them out."""
    cache_dir: str | None = None
    """Folder of the token caches. Default: token-cache beside the run folder."""
    workers: int | None = None
    """Processes that tokenise. Default: one per core."""

    adapter: Adapter = "lora"
    """What is added and trained: one of five methods; none (the head and the init adapter); full
    (all weights)."""
    init_adapter: str | None = None
    """The folder of a finished run with one adapter, or a PEFT folder, such as adapter/clinical of
    a run with two; loaded as the adapter "clinical", that of an instruct run as "instruct"."""
    freeze_init_adapter: bool = False
    """Leave the init adapter as it is."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    prefix: PrefixSettings = field(default_factory=PrefixSettings)
    p_tuning: PTuningSettings = field(default_factory=PTuningSettings)
    adaption_prompt: AdaptionPromptSettings = field(default_factory=AdaptionPromptSettings)

    batch_tokens: int | None = None
    """Tokens per optimiser step, over all ranks."""
    batch_size: int | None = None
    """Notes (or pieces of notes) per optimiser step, over all ranks, instead of --batch-tokens."""
    micro_tokens: int = 8192
    """Most tokens that pass through the model at once; a step takes as many passes as it needs."""
    steps: int | None = None
    """Optimiser steps."""
    epochs: float | None = None
    """Passes over the training data, instead of --steps."""
    lr: float
    """Highest learning rate."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    class_weights: bool = True
    """Downstream only, one label a note: weigh classes by N / (K * count) in the training loss."""
    neftune_alpha: float | None = None
    """Instruct only: NEFTune's noise on the embedded tokens in training, for example 5. Default:
    none."""
    neftune_length: NeftuneLength = "sample"
    """The length that NEFTune's noise falls with: the sample's own, or that of a row
    (--max-length)."""
    activations: Activations = "save"
    """What blocks keep for the backward pass: all; all but what norms and gates give (selective);
    their inputs alone, to be computed again (checkpoint); these in the host's memory (offload)."""
    shard: bool = False
    """Spread the frozen base over the ranks (FSDP2), for one that a single GPU does not hold."""
    seed: int = 0
    """Decides initial weights, order of the data and dropout."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one."""

    eval_every: int | None = None
    """Steps between two validations. Default: five in a run. The last step always validates."""
    patience: int | None = None
    """Stop after this many validations without a better one (AUROC where there is one, else loss).
    Default: take all steps."""
    eval_tokens: int = 200_000
    """Tokens of the validation notes that are scored (always the same ones)."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints. Default: at each validation."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, beside the best one."""
    keep: Literal["best", "last"] = "best"
    """Whether the files of the finished run hold the weights of the best validation or the last."""
    out: str
    """The run's folder."""

    def __post_init__(self) -> None:
        for settings in (self.lora, self.prompt, self.prefix, self.p_tuning, self.adaption_prompt):
            settings.check()
        self.optim.check()
        _check("--max-length", self.max_length, "from 2 to 2**31 - 1", 2 <= self.max_length < 2**31)
        _check(
            "--test-share",
            self.test_share,
            "a whole number of tenths from 0.1 to 0.8",
            any(abs(self.test_share * 10 - tenths) < 1e-9 for tenths in range(1, 9)),
        )
        workers = self.workers
        _check("--workers", workers, "from 1 to 1024", workers is None or 1 <= workers <= 1024)
        for flag, whole in (
            ("--batch-tokens", self.batch_tokens),
            ("--batch-size", self.batch_size),
            ("--micro-tokens", self.micro_tokens),
            ("--steps", self.steps),
            ("--eval-every", self.eval_every),
            ("--patience", self.patience),
            ("--eval-tokens", self.eval_tokens),
            ("--checkpoint-every", self.checkpoint_every),
            ("--keep-checkpoints", self.keep_checkpoints),
        ):
            _check(flag, whole, "at least 1", whole is None or whole >= 1)
            _check(flag, whole, "below 2**31", whole is None or whole < 2**31)
        epochs = self.epochs
        _check("--epochs", epochs, "above 0, up to 1e6", epochs is None or 0 < epochs <= 1e6)
        alpha = self.neftune_alpha
        _check("--neftune-alpha", alpha, "above 0, up to 1e6", alpha is None or 0 < alpha <= 1e6)
        _check("--lr", self.lr, "above 0", self.lr > 0)
        _check("--seed", self.seed, "from 0 to 2**31 - 1", 0 <= self.seed < 2**31)
        self._check_pairs()
        self._check_stage()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The named sources that --data gives; none where it is one path."""
        return read_sources(self.data) if self.stage == "pretrain" else ()

    def _check_pairs(self) -> None:
        if (self.batch_tokens is None) == (self.batch_size is None):
            raise ValueError(
                "give --batch-tokens or --batch-size, one of the two: got "
                f"{self.batch_tokens} and {self.batch_size}"
            )
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"give --steps or --epochs, one of the two: got {self.steps} and {self.epochs}"
            )
        if self.micro_tokens < self.max_length:
            raise ValueError(
                f"--micro-tokens must be at least --max-length ({self.max_length}), "
                f"got {self.micro_tokens}"
            )
        if self.batch_tokens is not None and self.batch_tokens < self.max_length:
            raise ValueError(
                f"--batch-tokens must be at least --max-length ({self.max_length}), "
                f"got {self.batch_tokens}"
            )
        if self.steps is not None and (self.optim.warmup_steps or 0) > self.steps:
            raise ValueError(
                f"--optim.warmup-steps must be at most --steps ({self.steps}), "
                f"got {self.optim.warmup_steps}"
            )

    def _check_stage(self) -> None:
        if self.stage == "downstream":
            if self.task is None:
                tasks = ", ".join(typing.get_args(Task))
                raise ValueError(f"--stage downstream needs --task: one of {tasks}")
            if self.task == "label" and self.label_column is None:
                raise ValueError("--task label needs --label-column, the column of the labels")
        elif self.task is not None:
            raise ValueError(f"--task belongs to --stage downstream, not to --stage {self.stage}")
        if isinstance(self.data, tuple) and self.stage != "pretrain":
            raise ValueError(
                "--data is given twice; give it once: several sources are for --stage pretrain"
            )
        _ = self.sources  # refuses what is no source
        if self.from_scratch and self.stage != "pretrain":
            raise ValueError(f"--from-scratch belongs to --stage pretrain, not to {self.stage}")
        if self.from_scratch and self.adapter != "full":
            raise ValueError(
                f"--from-scratch trains all weights: --adapter must be full, got {self.adapter}"
            )
        if self.adapter == "full" and self.base_dtype not in (None, "float32"):
            raise ValueError(
                "--adapter full needs --base-dtype float32: AdamW's small steps are lost in "
                f"{self.base_dtype} weights"
            )
        if self.adapter == "full" and self.shard:
            raise ValueError(
                "--shard spreads a frozen base over the ranks, and --adapter full leaves nothing "
                "frozen: leave out --shard, or choose --adapter lora"
            )
        if self.init_adapter is None and self.freeze_init_adapter:
            raise ValueError("--freeze-init-adapter needs --init-adapter")
        if self.init_adapter is not None and self.adapter == "full":
            raise ValueError(
                "--init-adapter cannot go with --adapter full: merge the adapter into the base "
                "first, or choose --adapter lora or none"
            )
        if self.stage != "downstream":
            if (
                self.stage != "instruct"
                and self.init_adapter is not None
                and self.adapter != "none"
            ):
                raise ValueError(
                    f"--adapter {self.adapter} makes a second adapter beside that of "
                    f"--init-adapter, and --stage {self.stage} has one alone: continue that one "
                    "with --adapter none"
                )
            if self.adapter == "none" and (self.init_adapter is None or self.freeze_init_adapter):
                raise ValueError(
                    f"--stage {self.stage} --adapter none trains nothing: add an --init-adapter "
                    "that is not frozen, or choose --adapter lora or full"
                )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON values: nested dictionaries, tuples as lists."""
    plain = dataclasses.asdict(config)
    plain["lora"]["target_modules"] = list(config.lora.target_modules)
    if isinstance(config.data, tuple):
        plain["data"] = list(config.data)
    return plain


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The config that `to_dict` wrote; unknown, missing and wrongly typed settings are refused."""
    config = _build(RunConfig, values, "")
    assert isinstance(config, RunConfig)
    return config


def _build(kind: type, values: object, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"setting {prefix.rstrip('.')} must be a group of settings")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    missing = sorted(set(hints) - set(values))
    if unknown or missing:
        found = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise ValueError(f"settings of another version ({found}); start a new run")
    arguments = {}
    for name, hint in hints.items():
        value = values[name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            value = _build(hint, value, f"{prefix}{name}.")
        elif takes_several(hint) and isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise ValueError(f"setting {prefix}{name} must be a list of names")
            value = tuple(value)
        elif typing.get_origin(hint) is tuple:
            raise ValueError(f"setting {prefix}{name} must be a list of names")
        elif not _is_one_of(hint, value):
            raise ValueError(f"setting {prefix}{name} has a wrong value: {value!r}")
        arguments[name] = value
    return kind(**arguments)


def takes_several(hint: Any) -> bool:
    """Whether a setting of this type may have a list of values."""
    if typing.get_origin(hint) is tuple:
        return True
    return any(typing.get_origin(part) is tuple for part in typing.get_args(hint))


def _is_one_of(hint: Any, value: object) -> bool:
    """Whether a JSON value fits `int`, `float`, `bool`, `str`, None, a Literal or their union."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_is_one_of(part, value) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return False  # a list, which is another branch
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
