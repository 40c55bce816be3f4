"""The shape of a decoder (LLaMA, Mistral, Mixtral) or a BERT encoder, from and to `config.json`.

Fields carry config.json's own names. The files of transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and of transformers 5 (`rope_parameters`, `dtype`) are read, and a written file
serves both. The invariant: a key that the network does not honour is refused, never ignored, so
a loaded model computes what its config says.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.files import read_json, write_json

# Far above any of them; a size beyond these is a damaged or hostile file.
_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 31,
    "type_vocab_size": 1 << 10,
}
_MOST_EXPERTS = 1 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise ValueError(f"the factor of linear RoPE scaling is {self.factor}; at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones left, a ramp between.

    A wavelength is long beyond original_max_position_embeddings / low_freq_factor tokens and short
    below original_max_position_embeddings / high_freq_factor.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        ordered = 0.0 < self.low_freq_factor < self.high_freq_factor
        if not (self.factor >= 1.0 and ordered and self.original_max_position_embeddings > 0):
            raise ValueError(
                f"{self} is not a llama3 RoPE scaling: factor is at least 1, low_freq_factor is "
                "positive and below high_freq_factor, and the original length is positive"
            )


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Everything that decides what a decoder computes, and the ids of its special tokens."""

    model_type: str = "llama"  # or "mistral", or "mixtral"
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert, where there are experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # keys that a token sees, itself included; None: all before
    num_local_experts: int = 0  # 0: one dense MLP
    num_experts_per_tok: int = 0
    router_aux_loss_coef: float = 0.0  # weight of the experts' load-balancing loss in training
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02  # standard deviation of fresh weights
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # `eos_token_id` in the file: one id, or a list of them
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in _FAMILIES:
            raise ValueError(f"model_type is {self.model_type!r}; known are {', '.join(_FAMILIES)}")
        _check_sizes(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: query heads share them evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE rotates halves, so it is even")
        for name in sorted(_OF_SOME - _FAMILIES[self.model_type].own):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"a {self.model_type} has no {name}; found {getattr(self, name)}")
        if self.sliding_window is not None and not 1 <= self.sliding_window <= 1 << 31:
            raise ValueError(
                f"sliding_window is {self.sliding_window}; it is a number of tokens, or null"
            )
        if self.model_type == "mixtral" and not (
            1 <= self.num_experts_per_tok <= self.num_local_experts <= _MOST_EXPERTS
        ):
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} of num_local_experts "
                f"{self.num_local_experts}: allowed are 1 to all, of 1 to {_MOST_EXPERTS}"
            )
        if not 0.0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}; it is 0 (off) or more"
            )
        _check_numbers(
            self,
            positive=("rms_norm_eps", "rope_theta"),
            token_ids=(self.bos_token_id, self.pad_token_id, *self.eos_token_ids),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Everything that decides what a BERT encoder computes, and how it is trained.

    `attention_probs_dropout_prob` is read and written and not applied: attention never holds its
    probabilities, so none of them can be dropped.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: as hidden_dropout_prob
    initializer_range: float = 0.02  # standard deviation of fresh weights
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share < 1.0:
                raise ValueError(f"{name} is {share}; allowed are 0 to below 1")
        _check_numbers(self, positive=("layer_norm_eps",), token_ids=(self.pad_token_id,))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def head_dropout(self) -> float:
        """Share of the pooled row that is dropped before the classifier."""
        own = self.classifier_dropout
        return self.hidden_dropout_prob if own is None else own


ModelConfig = DecoderConfig | EncoderConfig


def _check_sizes(config: ModelConfig) -> None:
    for name, limit in _LIMITS.items():
        size = getattr(config, name, 1)
        if not 1 <= size <= limit:
            raise ValueError(f"{name} is {size}; allowed are 1 to {limit}")


def _check_numbers(
    config: ModelConfig, *, positive: Sequence[str], token_ids: Sequence[int | None]
) -> None:
    for name in positive:
        value = getattr(config, name)
        if not (value > 0.0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it is a positive number")
    if not 0.0 <= config.initializer_range <= 1.0:
        raise ValueError(f"initializer_range is {config.initializer_range}; allowed are 0 to 1")
    for token_id in token_ids:
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise ValueError(
                f"a special token has the id {token_id}, outside the vocabulary of "
                f"{config.vocab_size}; set it to null or to the right id"
            )


class _Family(NamedTuple):
    """What distinguishes one model_type."""

    name: str  # in `architectures`
    own: frozenset[str]  # the fields that not every model_type has
    absent: dict[str, Any]  # what transformers takes for a key that is absent (a null is null)


_FAMILIES = {
    "llama": _Family("Llama", frozenset({"attention_bias", "mlp_bias"}), {}),
    "mistral": _Family(
        "Mistral",
        frozenset({"sliding_window"}),
        {
            **{"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6},
            **{"sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
        },
    ),
    "mixtral": _Family(
        "Mixtral",
        frozenset(
            {"sliding_window", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"}
        ),
        {
            **{"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5},
            **{"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
            **{"bos_token_id": 1, "eos_token_id": 2},
        },
    ),
}
_OF_SOME = frozenset().union(*(family.own for family in _FAMILIES.values()))
_DEFAULT_THETA = {"mixtral": 1_000_000.0}  # of the others 10,000

# Keys that say nothing about the computation of these networks in this project. The experts'
# load-balancing loss is weighed by its coefficient, whatever output_router_logits says.
_WITHOUT_EFFECT = frozenset(
    {
        *("_attn_implementation_autoset", "_name_or_path", "architectures", "model_type"),
        *("chunk_size_feed_forward", "max_length", "max_sequence_length", "pretraining_tp"),
        *("dtype", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version"),
        *("id2label", "label2id", "num_labels", "problem_type"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
        "output_router_logits",
    }
)
# The same of a BERT: its pretraining heads, and the task it was last fine-tuned for.
_WITHOUT_EFFECT_IN_BERT = frozenset(
    {
        *(
            "bos_token_id",
            "eos_token_id",
            "directionality",
            "finetuning_task",
            "tie_word_embeddings",
        ),
        *("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
        *("pooler_size_per_head", "gradient_checkpointing"),
    }
)
# Keys that would change the computation, and the one value of each that the network has.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "router_jitter_noise": 0.0,
}
_REQUIRED_OF_BERT = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "pooler_type": "first_token_transform",
    "pruned_heads": {},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


def read_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json; ValueError names the key that is missing, wrong or unknown."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    try:
        return _parse(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_decoder_config(folder: Path) -> DecoderConfig:
    """`read_config` of a base that must be a decoder; ValueError where it is an encoder."""
    config = read_config(folder)
    if not isinstance(config, DecoderConfig):
        raise ValueError(
            f"{folder} is an encoder (BERT), which predicts no next token: use it with "
            "--stage downstream, or name a LLaMA"
        )
    return config


def check_length(config: ModelConfig, max_length: int, in_front: int = 0) -> None:
    """Refuse segments that are longer than the positions of a base.

    max_length, in_front: tokens of the longest segment, and places that adapters put before it.
    """
    limit = config.max_position_embeddings
    if max_length + in_front > limit:
        adapters = f" and the adapters put {in_front} in front of them" if in_front else ""
        raise ValueError(
            f"--max-length is {max_length}{adapters}, but the base was made for at most {limit} "
            f"positions (max_position_embeddings); give --max-length {limit - in_front} or less"
        )


def write_config(
    config: ModelConfig,
    folder: Path,
    *,
    head: str = "CausalLM",
    dtype: torch.dtype = torch.float32,
    label_names: Sequence[str] = (),
) -> None:
    """Write `folder`/config.json for transformers 4 and 5; a classifier names its labels.

    head: "CausalLM" or "SequenceClassification".
    """
    if isinstance(config, DecoderConfig):
        family, raw = _FAMILIES[config.model_type].name, _raw_decoder(config)
    else:
        family, raw = "Bert", _raw_encoder(config)
    raw["architectures"] = [f"{family}For{head}"]
    raw["dtype"] = raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    if label_names:
        raw["id2label"] = {str(i): name for i, name in enumerate(label_names)}
        raw["label2id"] = {name: i for i, name in enumerate(label_names)}
    write_json(Path(folder) / "config.json", raw)


def _raw_encoder(config: EncoderConfig) -> dict[str, Any]:
    fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    return fixed | asdict(config)


def _raw_decoder(config: DecoderConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0}
    raw |= asdict(config)
    for other in _OF_SOME - _FAMILIES[config.model_type].own:
        del raw[other]
    eos = raw.pop("eos_token_ids")
    raw["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        kind = "linear" if isinstance(config.rope_scaling, LinearScaling) else "llama3"
        scaling = {"rope_type": kind, **asdict(config.rope_scaling)}
    raw["rope_scaling"] = scaling
    raw["rope_parameters"] = {
        "rope_theta": config.rope_theta,
        **(scaling or {"rope_type": "default"}),
    }
    return raw


def _parse(raw: dict[str, Any]) -> ModelConfig:
    if raw.get("auto_map") is not None:
        raise ValueError("auto_map asks for code that came with the checkpoint; none is ever run")
    if raw.get("quantization_config") is not None:
        raise ValueError("the checkpoint is quantised; use the original floating-point one")
    model_type = raw.get("model_type")
    # Google's own bert_config.json names no type, but only BERT has token types.
    if model_type == "bert" or (model_type is None and "type_vocab_size" in raw):
        return _parse_bert(raw)
    if isinstance(model_type, str) and model_type in _FAMILIES:
        return _parse_decoder(raw, model_type)
    raise ValueError(f"model_type is {model_type!r}; known are {', '.join(_FAMILIES)} and bert")


def _parse_decoder(raw: dict[str, Any], model_type: str) -> DecoderConfig:
    family = _FAMILIES[model_type]
    honoured = {*DecoderConfig.__dataclass_fields__, "eos_token_id", *_ROPE_KEYS}
    honoured -= {"eos_token_ids", *(_OF_SOME - family.own)}
    _refuse_unknown(raw, honoured, _REQUIRED, _WITHOUT_EFFECT)
    raw = family.absent | raw
    heads = _integer(raw, "num_attention_heads")
    hidden_size = _integer(raw, "hidden_size")
    if raw.get("head_dim") is None and (heads < 1 or hidden_size % heads):
        raise ValueError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, and "
            "head_dim is not given"
        )
    theta, scaling = _rope(raw, _DEFAULT_THETA.get(model_type, 10_000.0))
    window = raw.get("sliding_window")
    return DecoderConfig(
        model_type=model_type,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_hidden_layers=_integer(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        # From here on the defaults are those of transformers, for a LLaMA.
        num_key_value_heads=_integer(raw, "num_key_value_heads", heads),
        head_dim=_integer(raw, "head_dim", hidden_size // heads if heads else None),
        max_position_embeddings=_integer(raw, "max_position_embeddings", 2048),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=None if window is None else _integer(raw, "sliding_window"),
        num_local_experts=_integer(raw, "num_local_experts", 0),
        num_experts_per_tok=_integer(raw, "num_experts_per_tok", 0),
        router_aux_loss_coef=_number(raw, "router_aux_loss_coef", 0.0),
        tie_word_embeddings=_boolean(raw, "tie_word_embeddings"),
        attention_bias=_boolean(raw, "attention_bias"),
        mlp_bias=_boolean(raw, "mlp_bias"),
        initializer_range=_number(raw, "initializer_range", 0.02),
        bos_token_id=_token_id(raw.get("bos_token_id"), "bos_token_id"),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), "eos_token_id"),
        pad_token_id=_token_id(raw.get("pad_token_id"), "pad_token_id"),
    )


def _parse_bert(raw: dict[str, Any]) -> EncoderConfig:
    honoured = {*EncoderConfig.__dataclass_fields__}
    _refuse_unknown(raw, honoured, _REQUIRED_OF_BERT, _WITHOUT_EFFECT | _WITHOUT_EFFECT_IN_BERT)
    sizes = {
        name: _integer(raw, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "max_position_embeddings"),
        )
    }
    own = raw.get("classifier_dropout")
    return EncoderConfig(
        **sizes,
        # From here on the defaults are those of transformers.
        type_vocab_size=_integer(raw, "type_vocab_size", 2),
        layer_norm_eps=_number(raw, "layer_norm_eps", 1e-12),
        hidden_dropout_prob=_number(raw, "hidden_dropout_prob", 0.1),
        attention_probs_dropout_prob=_number(raw, "attention_probs_dropout_prob", 0.1),
        classifier_dropout=None if own is None else _number(raw, "classifier_dropout"),
        initializer_range=_number(raw, "initializer_range", 0.02),
        pad_token_id=_token_id(raw.get("pad_token_id", 0), "pad_token_id"),
    )


def _refuse_unknown(
    raw: dict[str, Any],
    honoured: set[str],
    required: dict[str, Any],
    without_effect: frozenset[str],
) -> None:
    for key, allowed in required.items():
        if raw.get(key) is not None and raw[key] != allowed:
            raise ValueError(f"{key} is {raw[key]!r}; this network has {allowed!r} only")
    known = {*honoured, *required, *without_effect}
    for key, value in raw.items():
        # null and false switch a feature off: there is nothing to honour.
        if key not in known and value is not None and value is not False:
            raise ValueError(
                f"the key {key!r} is unknown; remove it if it does not change the computation"
            )


def _rope(raw: dict[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from transformers 4's two keys, transformers 5's one, or both agreeing."""
    found = []
    if raw.get("rope_parameters") is not None:
        found.append(_rope_of("rope_parameters", raw["rope_parameters"], default_theta))
    if raw.get("rope_theta") is not None or raw.get("rope_scaling") is not None or not found:
        theta = _number(raw, "rope_theta", default_theta)
        found.append(_rope_of("rope_scaling", raw.get("rope_scaling") or {}, theta))
    if found[0] != found[-1]:
        raise ValueError("rope_parameters contradicts rope_theta and rope_scaling; remove one side")
    return found[0]


def _rope_of(key: str, raw: Any, theta: float) -> tuple[float, RopeScaling | None]:
    if not isinstance(raw, dict):
        raise ValueError(f"{key} is {type(raw).__name__}, not an object")
    raw = dict(raw)
    theta = _number(raw, "rope_theta", theta)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if raw.get("type", kind) != kind:
        raise ValueError(f"{key} has both rope_type {kind!r} and type {raw['type']!r}")
    for name in ("rope_theta", "rope_type", "type"):
        raw.pop(name, None)
    if raw.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{key}: partial_rotary_factor is not 1; whole heads are rotated here")
    scaling: RopeScaling | None
    if kind == "default":
        scaling, known = None, set()
    elif kind == "linear":
        scaling, known = LinearScaling(factor=_number(raw, "factor")), {"factor"}
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=_number(raw, "factor"),
            low_freq_factor=_number(raw, "low_freq_factor"),
            high_freq_factor=_number(raw, "high_freq_factor"),
            original_max_position_embeddings=_integer(raw, "original_max_position_embeddings"),
        )
        known = set(Llama3Scaling.__dataclass_fields__)
    else:
        raise ValueError(f"{key} is of type {kind!r}; known are default, linear and llama3")
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"{key} of type {kind!r} has the unknown key {unknown[0]!r}")
    return theta, scaling


def _integer(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not int:  # a bool is an int to isinstance
        found = "missing" if value is None else repr(value)[:40]
        raise ValueError(f"{key} is {found}; it is a whole number")
    return value


def _number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    value: Any = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, float) or not abs(value) < 1e300:
        found = "missing" if value is None else repr(value)[:40]
        raise ValueError(f"{key} is {found}; it is a number")
    return float(value)


def _boolean(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False) or type(value) is int:
        raise ValueError(f"{key} is {value!r}; it is true or false")
    return bool(value)


def _token_id(value: Any, key: str) -> int | None:
    if value is None or (type(value) is int and value == -1):  # the first LLaMA files say -1
        return None
    if type(value) is not int:
        raise ValueError(f"{key} is {value!r}; it is a token id or null")
    return value


def _token_ids(value: Any, key: str) -> tuple[int, ...]:
    ids = [_token_id(item, key) for item in (value if isinstance(value, list) else [value])]
    return tuple(item for item in ids if item is not None)
