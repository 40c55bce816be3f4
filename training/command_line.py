"""From words typed by a user to a run config, or to one clear line that says what is wrong.

Flags are read twice. First by name: each is known, given once, with as many values as it takes;
--stage, --preset, --config and --resume then decide the defaults. Second by value: tyro parses them
over those defaults. A config file becomes flags that stand before the typed ones, so that file and
command line obey the same rules and the typed flag wins. Invariant: whatever is wrong raises
ValueError with a single line; tyro's own box never reaches the user.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from data import mimic
from model.files import read_json
from training.config import (
    Adapter,
    Preset,
    RunConfig,
    Stage,
    from_dict,
    takes_several,
    to_dict,
)
from training.presets import recipe
from training.run_folder import RUN_FILE
from training.stages import EMBEDDED, STAGES

Settings = TypeVar("Settings")
Flags = dict[str, list[str]]  # "--lora.r" -> its values as typed

# What users of other tools type, and what it is called here.
_OTHER_NAMES = {
    "--adapter-name-or-path": "--init-adapter",
    "--base-model": "--model",
    "--bf16": "--base-dtype",
    "--cutoff-len": "--max-length",
    "--eval-steps": "--eval-every",
    "--eval-strategy": "--eval-every",
    "--gradient-accumulation-steps": "--batch-size",
    "--gradient-checkpointing": "--activations checkpoint",
    "--learning-rate": "--lr",
    "--lora-target-modules": "--lora.target-modules",
    "--lr-scheduler-type": "--optim.schedule",
    "--max-grad-norm": "--optim.clip",
    "--min-lr": "--optim.min-lr-ratio",
    "--min-lr-ratio": "--optim.min-lr-ratio",
    "--max-seq-len": "--max-length",
    "--max-seq-length": "--max-length",
    "--max-steps": "--steps",
    "--model-name-or-path": "--model",
    "--num-train-epochs": "--epochs",
    "--output-dir": "--out",
    "--per-device-train-batch-size": "--batch-size",
    "--rank": "--lora.r",
    "--resume-from-checkpoint": "--resume",
    "--save-steps": "--checkpoint-every",
    "--warmup-ratio": "--optim.warmup-ratio",
}
# May be given several times, once for each source; RunConfig says in which stages.
_REPEATED = ("--data",)
# Two ways to say the same thing: the one that is given switches the stage's other one off.
_EITHER_OR = (("--batch-tokens", "--batch-size"), ("--steps", "--epochs"))
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainFlags(RunConfig):
    """Train one stage: adapt a LLaMA base to notes, or fine-tune the adapted one for an outcome."""

    resume: bool = False
    """Continue the run in --out from its newest good checkpoint, with its own settings."""
    overwrite: bool = False
    """Delete the run in --out and start anew."""
    dry_run: bool = False
    """Print the settings, what would train, and estimates of memory and time, then stop."""
    config: str | None = None
    """A run.json or a YAML file with settings; typed flags win over it."""
    debug: bool = False
    """Show the traceback of a failure."""

    def __post_init__(self) -> None:
        """Nothing: the checks are those of the RunConfig that is made of these flags."""


class Command(typing.NamedTuple):
    """What train.py was asked to do."""

    config: RunConfig
    resume: bool
    overwrite: bool
    dry_run: bool


def read_command(arguments: Sequence[str], prog: str = "train.py") -> Command:
    """The run that the arguments of train.py ask for.

    Raises ValueError with one line for anything wrong, SystemExit(0) after --help.
    """
    known = flag_types(TrainFlags)
    typed = split_flags(arguments, known, repeated=_REPEATED)
    from_file = _file_flags(typed, known)
    default = _default(typed, from_file)
    if "--help" in typed:
        parse(TrainFlags, {"--help": []}, default=default, prog=prog)
    for pair in _EITHER_OR:
        given = [f for f in pair if f in typed] or [f for f in pair if f in from_file]
        if len(given) == 1:
            other = pair[1 - pair.index(given[0])]
            from_file.pop(other, None)
            default = _without(default, other)
    flags = parse(TrainFlags, {**from_file, **typed}, default=default, prog=prog)
    config = RunConfig(
        **{field.name: getattr(flags, field.name) for field in dataclasses.fields(RunConfig)}
    )
    # A run.json states every setting, so only what people write themselves can be superfluous.
    written = typed if _is_json(flags.config) else {**from_file, **typed}
    for flag in written:
        _check_used(flag, config)
    return Command(config, resume=flags.resume, overwrite=flags.overwrite, dry_run=flags.dry_run)


# First pass: flags by name ------------------------------------------------------------------------


def flag_types(kind: type, prefix: str = "--") -> dict[str, Any]:
    """Every flag of a settings dataclass with its field's type; nested ones are dotted."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found |= flag_types(hint, f"{flag}.")
        else:
            found[flag] = hint
    return found


def split_flags(
    arguments: Sequence[str], known: Mapping[str, Any], *, repeated: Sequence[str] = ()
) -> Flags:
    """Values of each flag, as typed; `--no-x` is ["no"] under --x.

    repeated: flags that may stand several times, with one value each.

    Raises ValueError for a flag that is unknown, repeated, or has too few or too many values.
    """
    flags: Flags = {}
    times: Counter[str] = Counter()
    current: str | None = None
    for word in arguments:
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            if current is None:
                raise ValueError(f"{word!r} is not a flag; flags begin with --, as in --stage")
            flags[current].append(word)
            continue
        name, has_value, value = word.partition("=")
        name = name.replace("_", "-")
        current, values = _known_flag(name, known)
        if current in flags and current not in repeated:
            raise ValueError(f"{current} is given twice; give it once")
        times[current] += 1
        flags.setdefault(current, []).extend([*values, value] if has_value else values)
    for flag, values in flags.items():
        if flag in repeated and len(values) != times[flag]:
            raise ValueError(f"{flag} takes one value each time, got {' '.join(values) or 'none'}")
        _check_count(flag, values, known.get(flag, bool))
    return flags


def _known_flag(name: str, known: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The flag that `name` spells, with ["no"] for the negation of a switch."""
    if name in known or name == "--help":
        return name, []
    for flag, hint in known.items():
        if hint is bool and name == _negated(flag):
            return flag, ["no"]
    near = _OTHER_NAMES.get(name)
    if near is None or near.split()[0] not in known:
        dotted = [flag for flag in known if flag.replace(".", "-") == name]
        ending = [flag for flag in known if flag.endswith("." + name.removeprefix("--"))]
        close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
        near = next(iter([*dotted, *ending, *close]), None)
    hint = f"did you mean {near}?" if near else "--help lists all flags"
    raise ValueError(f"{name} is not a flag; {hint}")


def _negated(flag: str) -> str:
    """How a switch is turned off: --no-resume, --lora.no-rslora."""
    group, dot, name = flag.removeprefix("--").rpartition(".")
    return f"--{group}{dot}no-{name}"


def _check_count(flag: str, values: list[str], hint: Any) -> None:
    if hint is bool:
        if values not in ([], ["no"]):
            raise ValueError(
                f"{flag} is a switch and takes no value, got {values[-1]!r}; "
                f"write {flag} or {_negated(flag)}"
            )
    elif takes_several(hint):
        if not values:
            raise ValueError(f"{flag} needs at least one value")
    elif len(values) != 1:
        found = "none" if not values else f"{len(values)}: {' '.join(values)}"
        raise ValueError(f"{flag} takes one value, got {found}")


# The defaults -------------------------------------------------------------------------------------


def _default(typed: Flags, from_file: Flags) -> TrainFlags:
    """The settings that hold where no flag speaks: the stage's, or those of the resumed run."""
    given = {**from_file, **typed}
    stages = ", ".join(STAGES)
    stage = given.get("--stage", [None])[0]
    if stage is not None and stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--stage must be one of {stages}, got {stage}{hint}")
    if typed.get("--resume") == []:
        out = given["--out"][0] if "--out" in given else f"runs/{stage}"
        if stage is None and "--out" not in given:
            raise ValueError("--resume needs --out, the folder of the run, or its --stage")
        if (Path(out) / RUN_FILE).is_file():
            return _as_flags(saved_config(Path(out)))
    if stage is None:
        if "--help" in typed:
            stage = "clinical"
        else:
            raise ValueError(f"--stage is missing: choose one of {stages}")
    stage = cast(Stage, stage)
    preset = _preset(given, stage)
    has_model, has_data = "--model" in given, "--data" in given
    if "--help" in typed or (has_model and has_data):
        return _as_flags(preset or STAGES[stage]())
    if has_model or has_data:
        present, absent = ("--model", "--data") if has_model else ("--data", "--model")
        raise ValueError(
            f"{present} is given without {absent}; give both, or neither for the embedded "
            "base and cohort"
        )
    if stage not in EMBEDDED:
        raise ValueError(f"--stage {stage} needs --model and --data")
    embedded = EMBEDDED[stage]()
    if preset is not None:
        embedded = dataclasses.replace(preset, model=embedded.model, data=embedded.data)
    return _as_flags(embedded)


def _preset(given: Flags, stage: Stage) -> RunConfig | None:
    """The published recipe that --preset names, which must be one of the stage."""
    name = given.get("--preset", ["None"])[0]
    if name == "None":
        return None
    stages = {known: recipe(known).stage for known in typing.get_args(Preset)}
    if stages.get(name) == stage:
        return recipe(cast(Preset, name))
    of_stage = [known for known in stages if stages[known] == stage]
    allowed = f"one of {', '.join(of_stage)}" if of_stage else "left out: there is none"
    if name in stages:
        raise ValueError(
            f"--preset {name} belongs to --stage {stages[name]}, not to --stage {stage}, where it "
            f"must be {allowed}"
        )
    near = difflib.get_close_matches(name, stages, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"--preset of --stage {stage} must be {allowed}, got {name}{hint}")


def saved_config(out: Path) -> RunConfig:
    """The config that a run began with."""
    run = read_json(out / RUN_FILE)
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise ValueError(f"{out / RUN_FILE} is not the record of a run")
    return from_dict(run["config"])


def _as_flags(config: RunConfig) -> TrainFlags:
    fields = dataclasses.fields(RunConfig)
    return TrainFlags(**{field.name: getattr(config, field.name) for field in fields})


def _without(flags: TrainFlags, flag: str) -> TrainFlags:
    """The flags with one of them set to None."""
    unset: dict[str, Any] = {flag.removeprefix("--").replace("-", "_"): None}
    return dataclasses.replace(flags, **unset)


# Files --------------------------------------------------------------------------------------------


def _is_json(path: str | None) -> bool:
    return path is not None and Path(path).suffix == ".json"


def _file_flags(typed: Flags, known: Mapping[str, Any]) -> Flags:
    """The settings of --config as flags that were not typed."""
    if "--config" not in typed:
        return {}
    if typed.get("--resume") == []:
        raise ValueError("--resume takes the settings of the run itself; leave --config out")
    path = Path(typed["--config"][0])
    if not path.is_file():
        raise ValueError(f"--config {path} does not exist or is not a file")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"--config {path} is larger than {_MAX_CONFIG_BYTES} bytes")
    if _is_json(str(path)):
        content = read_json(path)
        if isinstance(content, dict):
            content = content.get("config", content)
    else:
        content = _read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold settings by name, such as lr: 3e-4")
    flags: Flags = {}
    try:
        _flatten(content, "--", known, flags)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    return {flag: values for flag, values in flags.items() if flag not in typed}


def _flatten(
    content: Mapping[Any, Any], prefix: str, known: Mapping[str, Any], into: Flags
) -> None:
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"the name of a setting must be text, got {key!r}; quote it")
        name = prefix + key.replace("_", "-")
        if isinstance(value, dict):
            groups = {flag.rpartition(".")[0] for flag in known}
            if name not in groups:
                raise ValueError(f"{name} does not take a group of settings")
            _flatten(value, f"{name}.", known, into)
            continue
        flag, values = _known_flag(name, known)
        if flag in ("--config", "--resume", "--overwrite", "--dry-run", "--debug"):
            raise ValueError(f"{flag} belongs on the command line, not in a file")
        if flag in into:
            raise ValueError(f"{flag} is given twice; give it once")
        if isinstance(value, bool):
            values = values if value else ["no"]
            if known[flag] is not bool:
                raise ValueError(f"{flag} cannot be {value}; quote it if it is a name")
        elif isinstance(value, list):
            values = [str(item) for item in value]
        else:
            values = [str(value)]
        _check_count(flag, values, known[flag])
        into[flag] = values


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags, aliases (which can explode) and duplicate keys (the last would win).

    A plain word is true, false, null or text. YAML's own numbers hold surprises: 1:30 is 90, 0377
    is 255 and 1e-4 is text; a flag's value is read as if typed.
    """

    yaml_implicit_resolvers = {
        first: [(tag, word) for tag, word in known if tag.endswith((":bool", ":null", ":merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = getattr(error, "problem", None) or str(error) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        reason = " ".join(reason.split())
        raise ValueError(f"--config {path} cannot be read as YAML{line}: {reason}") from None


# Second pass: values ------------------------------------------------------------------------------


def parse(kind: type[Settings], flags: Flags, *, default: Settings, prog: str) -> Settings:
    """Let tyro turn the flags' values into settings over `default`.

    Raises ValueError naming the flag whose value is not of its type; SystemExit(0) after --help.
    """
    import tyro  # here, so that the room imports without it

    known = flag_types(kind)
    words = []
    for flag, values in flags.items():
        if known.get(flag) is bool and values == ["no"]:
            words.append(_negated(flag))
        else:
            _check_values(flag, values, known.get(flag))
            words += [flag, *values]
    if "--help" in flags:
        tyro.cli(kind, default=default, args=["--help"], prog=prog)
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return tyro.cli(kind, default=default, args=words, prog=prog)
    except SystemExit:
        # Nothing is known to arrive here; if something does, its words are better than none.
        said = re.sub(r"[^\x20-\x7e]|--+(?!\w)", " ", box.getvalue()).split()
        raise ValueError(f"the command line cannot be read: {' '.join(said)}") from None


def _check_values(flag: str, values: list[str], hint: Any) -> None:
    if typing.get_origin(hint) is tuple or hint in (None, bool):
        return
    if not _fits(hint, values[0]):
        choices = [str(choice) for part in _parts(hint) for choice in typing.get_args(part)]
        near = difflib.get_close_matches(values[0], choices, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{flag} must be {_describe(hint)}, got {values[0]!r}{guess}")


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(hint: Any, word: str) -> bool:
    """Whether a word can be read as the type, a Literal's choice, None, or one of a union."""
    for part in _parts(hint):
        if part is type(None):
            fits = word == "None"
        elif typing.get_origin(part) is typing.Literal:
            fits = word in map(str, typing.get_args(part))
        else:
            try:
                part(word)
            except ValueError:
                fits = False
            else:
                fits = True
        if fits:
            return True
    return False


def _describe(hint: Any) -> str:
    """A type in words: "a whole number or None"; of choices the names alone, for None is none."""
    words = {int: "a whole number", float: "a number", str: "text", type(None): "None"}
    choices = [part for part in _parts(hint) if typing.get_origin(part) is typing.Literal]
    if choices:
        return "one of " + ", ".join(str(c) for part in choices for c in typing.get_args(part))
    return " or ".join(words[part] for part in _parts(hint))


def used_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide something in this run, by name, as a --config file takes them."""
    settings: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            dotted = {k: f"{flag}.{k.replace('_', '-')}" for k in value}
            value = {k: v for k, v in value.items() if not why_unused(dotted[k], config)}
        if value not in (None, {}) and not why_unused(flag, config):
            settings[name] = value
    return settings


def _check_used(flag: str, config: RunConfig) -> None:
    """Refuse a flag that would change nothing in the run that was asked for."""
    reason = why_unused(flag, config)
    if reason is not None:
        raise ValueError(f"{flag} would have no effect: it is {reason}; leave it out")


def why_unused(flag: str, config: RunConfig) -> str | None:
    """Why a flag changes nothing in this run; None where it may change something."""
    is_downstream = config.stage == "downstream"
    reason = None
    group = flag.removeprefix("--").partition(".")[0] if "." in flag else None
    if group in typing.get_args(Adapter) and config.adapter != group:
        reason = f"a setting of --adapter {group}, but --adapter is {config.adapter}"
    elif flag == "--prompt.init-text" and config.prompt.init != "text":
        reason = f"a setting of --prompt.init text, but --prompt.init is {config.prompt.init}"
    elif flag == "--prefix.encoder-hidden-size" and not config.prefix.projection:
        reason = "a setting of --prefix.projection"
    elif flag in ("--p-tuning.encoder-layers", "--p-tuning.encoder-dropout") and (
        config.p_tuning.encoder != "lstm"
    ):
        reason = f"a setting of an LSTM, but --p-tuning.encoder is {config.p_tuning.encoder}"
    elif flag == "--optim.min-lr-ratio" and config.optim.schedule == "constant":
        reason = "a setting of a rate that falls, but --optim.schedule is constant"
    elif flag.startswith("--int8.") and config.base_dtype != "int8":
        reason = "a setting of --base-dtype int8"
    elif flag == "--pieces" and config.stage not in ("pretrain", "clinical"):
        reason = f"a setting of --stage pretrain or clinical, but --stage is {config.stage}"
    elif flag == "--optim.warmup-ratio" and config.optim.warmup_steps is not None:
        reason = "not used when --optim.warmup-steps says how many, as a preset may; None frees it"
    elif flag in ("--truncate", "--class-weights") and not is_downstream:
        reason = f"a setting of --stage downstream, but --stage is {config.stage}"
    elif (
        flag
        in (
            "--prompt-format",
            "--train-on-inputs",
            "--bad-rows",
            "--neftune-alpha",
            "--neftune-length",
        )
        and config.stage != "instruct"
    ):
        reason = f"a setting of --stage instruct, but --stage is {config.stage}"
    elif flag == "--neftune-length" and config.neftune_alpha is None:
        reason = "a setting of --neftune-alpha"
    elif flag in ("--text-column", "--patient-column", "--splits") and config.stage == "instruct":
        reason = "a setting of notes, but --stage instruct reads rows and chats"
    elif flag == "--label-column" and config.task != "label":
        reason = "a setting of --stage downstream --task label"
    elif flag in ("--text-column", "--patient-column") and config.task in mimic.TASKS:
        reason = f"a setting of tables, but --task {config.task} reads the columns of MIMIC"
    elif flag == "--cohort" and config.task not in mimic.TASKS:
        reason = f"a setting of the MIMIC tasks {', '.join(mimic.TASKS)}"
    elif flag == "--class-weights" and config.task in mimic.MULTILABEL_TASKS:
        reason = f"a setting of one label a note, but --task {config.task} has several"
    elif flag == "--test-share" and config.splits is not None:
        reason = "not used when --splits lists the patients of the test"
    return reason
