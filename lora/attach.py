"""Named adapters of every kind on a model: attach, detach, list, freeze, take tensors out and in.

An adapter is one or more modules under its name in the slots that the networks leave empty: a
LoRA in every linear layer that it updates, virtual tokens behind the embedding, a prefix on the
decoder, adaption prompts in the attention of its last layers. Any of them stand beside each other:
updates and prompts of one layer are summed, prefixes follow each other, and virtual tokens that are
attached later stand further in front. The invariant: whatever is refused is refused before the
model is touched.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.adapter import LoraAdapter
from lora.adaption_prompt import AdaptionPrompt, AdaptionPromptConfig
from lora.config import LoraConfig, name_matches, pattern_matches
from lora.initial import Draws
from lora.p_tuning import PTuningConfig, make_encoder
from lora.prefix_tuning import Prefix, PrefixTuningConfig
from lora.prompt_tuning import PromptTuningConfig, VirtualTokens
from model.decoder import Attention, Decoder
from model.linear import Linear

Adapter = LoraAdapter | VirtualTokens | Prefix | AdaptionPrompt
AdapterConfig = (
    LoraConfig | PromptTuningConfig | PTuningConfig | PrefixTuningConfig | AdaptionPromptConfig
)

# Heads are trained whole or not at all and are no `model.linear.Linear`; a target that selects one
# would otherwise be passed over in silence.
HEADS = ("lm_head", "score", "classifier")

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def attach(
    model: nn.Module,
    name: str,
    config: AdapterConfig,
    *,
    seed: int,
    trainable: bool = True,
    init_ids: Sequence[int] = (),
    encoded: bool = False,
) -> list[str]:
    """Add the adapter `name` and return the full names of the modules that carry it.

    A new LoRA or adaption prompt changes no output; virtual tokens and a prefix do. Base weights
    keep the `requires_grad` they had.

    Args:
        init_ids: the tokens of prompt tuning's `init_text`.
        encoded: the adapter holds what its encoder gives, not the encoder, as in PEFT's files.

    Raises:
        ValueError: the name is taken or unusable; the kind does not fit the network; or as in
            `targeted_layers`.
    """
    _check_new_name(model, name)
    ordinal = 1 + max((adapter.ordinal for adapter in _adapters(model)), default=-1)
    carriers: dict[str, nn.Module]
    if isinstance(config, LoraConfig):
        layers = targeted_layers(model, config)
        carriers = dict(layers)
        for layer_name, layer in layers.items():
            layer.adapters[name] = LoraAdapter(
                config,
                layer.in_features,
                layer.out_features,
                adapter=name,
                layer=layer_name,
                seed=seed,
                ordinal=ordinal,
            ).to(layer.weight.device)
    else:
        carriers = _attach_to_decoder(model, name, config, seed, ordinal, init_ids, encoded)
    set_trainable(model, name, trainable)
    return list(carriers)


def _attach_to_decoder(
    model: nn.Module,
    name: str,
    config: PromptTuningConfig | PTuningConfig | PrefixTuningConfig | AdaptionPromptConfig,
    seed: int,
    ordinal: int,
    init_ids: Sequence[int],
    encoded: bool,
) -> dict[str, nn.Module]:
    decoder = decoder_of(model, config)
    (path,) = (name for name, module in model.named_modules() if module is decoder)
    embedding = decoder.word_embedding.weight
    width, draws = embedding.shape[1], Draws(seed, name, embedding.device)
    if isinstance(config, AdaptionPromptConfig):
        attentions = prompted_layers(model, config)
        for layer, attention in attentions.items():
            attention.prompts[name] = AdaptionPrompt(
                config, width, draws, layer=layer, ordinal=ordinal
            )
        return dict(attentions)
    if isinstance(config, PrefixTuningConfig):
        decoder.prefixes[name] = Prefix(
            config, decoder.config, draws, encoded=encoded, ordinal=ordinal
        )
        return {path: decoder}
    encoder = None
    if isinstance(config, PTuningConfig) and not encoded:
        encoder = make_encoder(config, width, draws)
    rows_PD = draws.normal("embedding", config.num_virtual_tokens, width)
    if isinstance(config, PromptTuningConfig) and config.init == "text" and not encoded:
        rows_PD = nn.Parameter(_rows_of_text(embedding, init_ids, config.num_virtual_tokens))
    decoder.input_modules[name] = VirtualTokens(
        config, rows_PD, encoder, adapter=name, ordinal=ordinal
    )
    return {path: decoder}


def _rows_of_text(embedding_VD: Tensor, ids: Sequence[int], count: int) -> Tensor:
    """The embeddings of the first tokens, which are repeated until there are `count`: [P, D]."""
    if not ids:
        raise ValueError("init text: the text has no tokens; give another one, or init random")
    repeated = (list(ids) * -(-count // len(ids)))[:count]
    chosen = torch.tensor(repeated, device=embedding_VD.device)
    return embedding_VD.detach()[chosen].to(torch.float32, copy=True)


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter `name` off every module that carries it."""
    check_attached(model, name)
    for carrier, slot in _slots(model):
        adapters = getattr(carrier, slot)
        if name in adapters:
            del adapters[name]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run the block with every adapter out of its slot: the base alone."""
    held = [(carrier, slot, getattr(carrier, slot)) for carrier, slot in _slots(model)]
    for carrier, slot, modules in held:
        others = {key: m for key, m in modules.items() if not isinstance(m, Adapter)}
        setattr(carrier, slot, nn.ModuleDict(others))
    try:
        yield
    finally:
        for carrier, slot, modules in held:
            setattr(carrier, slot, modules)


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order in which they were attached."""
    ordinals = {adapter.name: adapter.ordinal for adapter in _adapters(model)}
    return sorted(ordinals, key=ordinals.__getitem__)


def adapter_modules(model: nn.Module, name: str) -> list[Adapter]:
    """The modules of the adapter `name`, in the order of the network."""
    check_attached(model, name)
    return [adapter for adapter in _adapters(model) if adapter.name == name]


def adapted_layers(model: nn.Module, name: str) -> dict[str, LoraAdapter]:
    """The LoRA `name` layer by layer, by the layers' full names."""
    modules = adapter_modules(model, name)
    return {module.layer: module for module in modules if isinstance(module, LoraAdapter)}


def adapter_config(model: nn.Module, name: str) -> AdapterConfig:
    """The settings the adapter `name` was attached with."""
    return adapter_modules(model, name)[0].config


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """All parameters of the adapter, trainable or not; of a LoRA A and B of every layer."""
    return [p for module in adapter_modules(model, name) for p in module.parameters()]


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Let the adapter `name` train, or freeze it; other adapters keep what they have."""
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None


@torch.no_grad()
def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors (not copies) under PEFT's names without its prefix.

    Of a LoRA `LAYER.lora_A.weight` [R, K] and `LAYER.lora_B.weight` [N, R]; of adaption prompts
    `LAYER.adaption_prompt` [1, P, D] and `LAYER.adaption_gate` [1]; else `prompt_embeddings`, which
    are an encoder's output where there is one.
    """
    state: dict[str, Tensor] = {}
    for module in adapter_modules(model, name):
        if isinstance(module, LoraAdapter):
            state[f"{module.layer}.lora_A.weight"] = module.lora_A.detach()
            state[f"{module.layer}.lora_B.weight"] = module.lora_B.detach()
        elif isinstance(module, AdaptionPrompt):
            state[f"{module.layer}.adaption_prompt"] = module.adaption_prompt.detach()
            state[f"{module.layer}.adaption_gate"] = module.adaption_gate.detach()
        else:
            state["prompt_embeddings"] = module.rows().detach()
    return state


def load_adapter_state(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, named as by `adapter_state`, into the adapter; the match is one to one.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    modules = adapter_modules(model, name)
    # What an encoder gives does not tell its weights; `attach` with `encoded` has none.
    assert all(getattr(module, "encoder", None) is None for module in modules)
    state = adapter_state(model, name)
    check_same_tensors(
        f"the state of adapter {name!r}",
        expected={key: tuple(tensor.shape) for key, tensor in state.items()},
        found={key: tuple(tensor.shape) for key, tensor in tensors.items()},
    )
    for key, tensor in state.items():
        tensor.copy_(tensors[key])


def prompted_layers(model: nn.Module, config: AdaptionPromptConfig) -> dict[str, Attention]:
    """The attention of the last layers, by full name.

    Raises:
        ValueError: the network has fewer layers.
    """
    attentions = {
        name: module for name, module in model.named_modules() if isinstance(module, Attention)
    }
    if config.adapter_layers > len(attentions):
        raise ValueError(
            f"adapter_layers is {config.adapter_layers}, but the base has {len(attentions)} layers"
        )
    return dict(list(attentions.items())[-config.adapter_layers :])


def state_shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the `adapter_state` of an adapter with these settings.

    Raises ValueError as `attach` does for a kind or a layer that does not fit the model.
    """
    if isinstance(config, LoraConfig):
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in targeted_layers(model, config).items():
            shapes[f"{name}.lora_A.weight"] = (config.rank(name), layer.in_features)
            shapes[f"{name}.lora_B.weight"] = (layer.out_features, config.rank(name))
        return shapes
    base = decoder_of(model, config).config
    if isinstance(config, AdaptionPromptConfig):
        shapes = {}
        for name in prompted_layers(model, config):
            shapes[f"{name}.adaption_prompt"] = (1, config.adapter_len, base.hidden_size)
            shapes[f"{name}.adaption_gate"] = (1,)
        return shapes
    width = base.hidden_size
    if isinstance(config, PrefixTuningConfig):
        width = 2 * base.num_hidden_layers * base.num_key_value_heads * base.head_dim
    return {"prompt_embeddings": (config.num_virtual_tokens, width)}


def decoder_of(model: nn.Module, config: AdapterConfig) -> Decoder:
    """The decoder of the model.

    Raises:
        ValueError: it has none, so an adapter of this kind has no place in it.
    """
    for module in model.modules():
        if isinstance(module, Decoder):
            return module
    kind = type(config).__name__.removesuffix("Config")
    raise ValueError(f"{kind} needs a decoder (LLaMA, Mistral); choose LoRA for this base")


def targeted_layers(model: nn.Module, config: LoraConfig) -> dict[str, Linear]:
    """The linear layers of the model that `config` selects, by full name.

    Raises:
        ValueError: a target, or the key of a pattern, fits no layer; a target is the head.
    """
    heads = [head for head in HEADS if config.targets(head)]
    targets = config.target_modules
    if heads and not config.is_all_linear:
        raise ValueError(
            f"target_modules: {targets!r} selects the head {heads[0]!r}, which is trained whole "
            "instead of by an adapter; leave it out"
        )
    layers = {name: layer for name, layer in _linear_layers(model).items() if config.targets(name)}
    for target in targets if isinstance(targets, tuple) else ():
        if not any(name_matches(target, layer) for layer in layers):
            raise ValueError(_unmatched(target, model))
    if not layers:
        assert isinstance(targets, str)
        raise ValueError(_unmatched_pattern(targets, model))
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            if not any(pattern_matches(pattern, layer) for layer in layers):
                raise ValueError(
                    f"{setting}: {pattern!r} fits none of the {len(layers)} adapted layers, "
                    f"such as {next(iter(layers))!r}; correct it or leave it out"
                )
    return layers


def check_attached(model: nn.Module, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        raise ValueError(
            f"no adapter {name!r} is attached; attached: {', '.join(map(repr, names)) or 'none'}"
        )


def check_same_tensors(
    where: str,
    *,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare names and shapes one to one.

    Raises:
        ValueError: naming the first tensors that are missing, left over or of another shape.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} is {list(found[key])} instead of {list(expected[key])}"
        for key in sorted(expected.keys() & found.keys())
        if tuple(found[key]) != tuple(expected[key])
    ]
    faults = [
        f"{len(names)} {fault}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for fault, names in (
            ("tensors missing", missing),
            ("tensors that fit nothing in this model and configuration", extra),
            ("tensors of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{where} does not match: {'; '.join(faults)}")


def _linear_layers(model: nn.Module) -> dict[str, Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def _slots(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where adapters stand: modules, and the attribute of each that holds them by name."""
    slots: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, Linear):
            slots.append((module, "adapters"))
        elif isinstance(module, Attention):
            slots.append((module, "prompts"))
        elif isinstance(module, Decoder):
            slots += [(module, "input_modules"), (module, "prefixes")]
    return slots


def _adapters(model: nn.Module) -> list[Adapter]:
    """Every module of every adapter, in the order of the network."""
    return [
        module
        for carrier, slot in _slots(model)
        for module in getattr(carrier, slot).values()
        if isinstance(module, Adapter)
    ]


def _check_new_name(model: nn.Module, name: str) -> None:
    """An adapter's name is a key of a ModuleDict and the name of a folder."""
    if not _ADAPTER_NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"an adapter cannot be called {name!r}: use 1 to 64 letters, digits, '-' and '_', "
            "beginning with a letter or digit (and not a word such as 'keys' or 'items')"
        )
    if name in adapter_names(model):
        raise ValueError(
            f"an adapter {name!r} is already attached; choose another name or detach it first"
        )


def _unmatched(target: str, model: nn.Module) -> str:
    layers = _linear_layers(model)
    if any(name_matches(target, layer) for layer in layers):
        return f"exclude_modules leaves nothing of the target module {target!r}"
    names = dict.fromkeys([*(name.rpartition(".")[2] for name in layers), *layers])
    near = difflib.get_close_matches(target, names, n=3, cutoff=0.5) or list(names)[:7]
    return (
        f"the target module {target!r} fits no linear layer of the model; "
        f"the nearest names are {', '.join(near) or 'none'}"
    )


def _unmatched_pattern(pattern: str, model: nn.Module) -> str:
    layers = list(_linear_layers(model))
    if pattern in {name.rpartition(".")[2] for name in layers}:
        return (
            f"target_modules: the string {pattern!r} is a regular expression for a layer's whole "
            f"name and fits none; write the list [{pattern!r}] or the pattern '.*{pattern}'"
        )
    return (
        f"target_modules: {pattern!r} selects no linear layer; names look like "
        f"{', '.join(layers[:2]) or 'nothing, as the model has no linear layer'}"
    )
