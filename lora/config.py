"""What one LoRA adapter is: which layers, which rank, which scaling.

Papers: LoRA (Hu et al., arXiv 2106.09685), rank-stabilised scaling (Kalajdzievski, arXiv
2312.03732). Field names, defaults and matching rules are PEFT's, because its `adapter_config.json`
is how adapters travel between tools. The invariant: layer names are those of the Hugging Face
checkpoint, so a pattern selects the same layers here and in PEFT.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard, TypeVar

ALL_LINEAR = "all-linear"
MAX_RANK = 65536
MAX_PATTERN = 10_000  # characters
MAX_ALPHA = 1e9  # float32 arithmetic stays finite

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of one adapter, checked when they are made.

    Raises:
        ValueError: naming the setting, what was found and what is allowed.
    """

    r: int = 8
    """Rank of the update."""

    lora_alpha: float = 8
    """Numerator of the scaling; the denominator is r, or sqrt(r) with `use_rslora`."""

    lora_dropout: float = 0.0
    """Probability of dropping an input of the update, in [0, 1)."""

    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Names of layers (`q_proj`, or longer: `layers.0.self_attn.q_proj`); or "all-linear", which is
    every linear layer but the head; or any other string, a regular expression that matches the
    whole name of a layer (`model.layers.0.self_attn.q_proj`)."""

    exclude_modules: tuple[str, ...] | str = ()
    """Layers left out of `target_modules`: names, or a regular expression."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of the layers whose name, or end of name after a dot, matches the regular expression;
    the first that matches counts."""

    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """The same for lora_alpha."""

    modules_to_save: tuple[str, ...] = ()
    """Whole modules that a PEFT folder holds beside the update: the classification head."""

    def __post_init__(self) -> None:
        check_whole("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        check_share("lora_dropout", self.lora_dropout)
        _check_names("target_modules", self.target_modules)
        if not self.target_modules:
            raise ValueError(
                'target_modules is empty: name layers such as "q_proj", or write "all-linear"'
            )
        _check_names("exclude_modules", self.exclude_modules)
        _check_names("modules_to_save", self.modules_to_save, allow_pattern=False)
        if self.use_rslora not in (True, False):
            raise ValueError(f"use_rslora must be true or false, found {self.use_rslora!r}")
        _check_patterns("rank_pattern", self.rank_pattern, check_whole)
        _check_patterns("alpha_pattern", self.alpha_pattern, _check_alpha)

    def rank(self, layer: str) -> int:
        """Rank of the update of the layer of this full name."""
        return _first_match(self.rank_pattern, layer, self.r)

    def alpha(self, layer: str) -> float:
        """lora_alpha of the layer of this full name."""
        return _first_match(self.alpha_pattern, layer, self.lora_alpha)

    def scaling(self, layer: str) -> float:
        """Factor of the update of the layer of this full name."""
        rank = self.rank(layer)
        return self.alpha(layer) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, layer: str) -> bool:
        """Whether the linear layer of this full name gets an update (heads: see `lora.attach`)."""
        if self.excludes(layer):
            return False
        return self.is_all_linear or _selects(self.target_modules, layer)

    def excludes(self, module: str) -> bool:
        """Whether the module of this full name is left out, whatever `target_modules` says."""
        return _selects(self.exclude_modules, module) or _selects(self.modules_to_save, module)

    def patterns(self) -> list[str]:
        """Every regular expression of the settings, each to be matched with a whole name."""
        selecting = [] if self.is_all_linear else [self.target_modules]
        selecting.append(self.exclude_modules)
        keys = [*self.rank_pattern, *self.alpha_pattern]
        return [p for p in selecting if isinstance(p, str)] + [_anchored(key) for key in keys]

    @property
    def is_all_linear(self) -> bool:
        targets = self.target_modules
        return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def pattern_matches(pattern: str, layer: str) -> bool:
    """PEFT's rule for the keys of `rank_pattern` and `alpha_pattern`."""
    return re.match(_anchored(pattern), layer) is not None


def _anchored(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def shorten(pattern: str) -> str:
    """A pattern for a message, where a long one would be no line."""
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")


def name_matches(target: str, layer: str) -> bool:
    """PEFT's rule for the items of a list of layers: the whole name, or its end after a dot."""
    return layer == target or layer.endswith(f".{target}")


def _selects(names: tuple[str, ...] | str, layer: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(name_matches(name, layer) for name in names)


def _first_match(patterns: Mapping[str, _Value], layer: str, default: _Value) -> _Value:
    for pattern, value in patterns.items():
        if pattern_matches(pattern, layer):
            return value
    return default


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_whole(setting: str, value: object, largest: int = MAX_RANK) -> None:
    """Raise ValueError unless `value` is a whole number from 1 to `largest`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise ValueError(f"{setting} must be a whole number from 1 to {largest}, found {value!r}")


def check_share(setting: str, value: object) -> None:
    """Raise ValueError unless `value` is at least 0 and below 1."""
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{setting} must be at least 0 and below 1, found {value!r}")


def _check_alpha(setting: str, alpha: object) -> None:
    if not _is_number(alpha) or not 0.0 < alpha <= MAX_ALPHA:
        raise ValueError(
            f"{setting} must be a positive number of at most {MAX_ALPHA:g}, found {alpha!r}"
        )


def _check_patterns(
    setting: str, patterns: object, check_value: Callable[[str, object], None]
) -> None:
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{setting} must map patterns to values, found {patterns!r}")
    for pattern, value in patterns.items():
        _check_pattern(setting, pattern)
        _check_pattern(setting, _anchored(pattern))  # "(?i)x" is one alone, but not inside another
        check_value(f"{setting}[{pattern!r}]", value)


def _check_names(setting: str, names: object, *, allow_pattern: bool = True) -> None:
    if isinstance(names, str) and allow_pattern:
        _check_pattern(setting, names)
    elif not isinstance(names, tuple) or not all(isinstance(n, str) and n for n in names):
        what = "names of modules or one pattern" if allow_pattern else "names of modules"
        raise ValueError(f"{setting} must be {what}, found {names!r}")


def _check_pattern(setting: str, pattern: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise ValueError(
            f"{setting}: {shorten(pattern)} has {len(pattern):,} characters; a regular expression "
            f"may have {MAX_PATTERN:,}"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{setting}: {shorten(pattern)} is not a regular expression ({error})"
        ) from error
