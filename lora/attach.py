"""Named adapters on a model: attach, detach, list, freeze, take their tensors out and in.

An adapter is one `LoraAdapter` in the `adapters` slot of every layer it updates, under the
adapter's name; several adapters on one layer are summed. The invariant: whatever is refused is
refused before the model is touched.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lora.adapter import LoraAdapter
from lora.config import LoraConfig, name_matches, pattern_matches
from model.linear import Linear

# Heads are trained whole or not at all and are no `model.linear.Linear`; a target that selects one
# would otherwise be passed over in silence.
HEADS = ("lm_head", "score", "classifier")

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def attach(
    model: nn.Module, name: str, config: LoraConfig, *, seed: int, trainable: bool = True
) -> list[str]:
    """Add the adapter `name` to every layer that `config` targets and return their full names.

    A new adapter changes no output. Base weights keep the `requires_grad` they had.

    Raises:
        ValueError: the name is taken or unusable; or as in `targeted_layers`.
    """
    _check_new_name(model, name)
    layers = targeted_layers(model, config)
    ordinal = 1 + max((adapter.ordinal for adapter in _adapters(model)), default=-1)
    for layer_name, layer in layers.items():
        adapter = LoraAdapter(
            config,
            layer.in_features,
            layer.out_features,
            adapter=name,
            layer=layer_name,
            seed=seed,
            ordinal=ordinal,
        )
        layer.adapters[name] = adapter.to(layer.weight.device).requires_grad_(trainable)
    return list(layers)


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter `name` off every layer."""
    check_attached(model, name)
    for layer in _linear_layers(model).values():
        if name in layer.adapters:
            del layer.adapters[name]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run the block with every slot empty: the base alone."""
    slots = {layer: layer.adapters for layer in _linear_layers(model).values()}
    for layer in slots:
        layer.adapters = nn.ModuleDict()
    try:
        yield
    finally:
        for layer, adapters in slots.items():
            layer.adapters = adapters


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order in which they were attached."""
    ordinals = {adapter.name: adapter.ordinal for adapter in _adapters(model)}
    return sorted(ordinals, key=ordinals.__getitem__)


def adapted_layers(model: nn.Module, name: str) -> dict[str, LoraAdapter]:
    """The adapter `name` layer by layer, by the layers' full names."""
    check_attached(model, name)
    return {adapter.layer: adapter for adapter in _adapters(model) if adapter.name == name}


def adapter_config(model: nn.Module, name: str) -> LoraConfig:
    """The settings the adapter `name` was attached with."""
    return next(iter(adapted_layers(model, name).values())).config


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """A and B of every layer, trainable or not."""
    return [
        parameter
        for adapter in adapted_layers(model, name).values()
        for parameter in (adapter.lora_A, adapter.lora_B)
    ]


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Let the adapter `name` train, or freeze it; other adapters keep what they have."""
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors (not copies) as `LAYER.lora_A.weight` [R, K], `LAYER.lora_B.weight`
    [N, R]: PEFT's names without its prefix.
    """
    state: dict[str, Tensor] = {}
    for layer_name, adapter in adapted_layers(model, name).items():
        state[f"{layer_name}.lora_A.weight"] = adapter.lora_A.detach()
        state[f"{layer_name}.lora_B.weight"] = adapter.lora_B.detach()
    return state


def load_adapter_state(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, named as by `adapter_state`, into the adapter; the match is one to one.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    state = adapter_state(model, name)
    check_same_tensors(
        f"the state of adapter {name!r}",
        expected={key: tuple(tensor.shape) for key, tensor in state.items()},
        found={key: tuple(tensor.shape) for key, tensor in tensors.items()},
    )
    for key, tensor in state.items():
        tensor.copy_(tensors[key])


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


def _adapters(model: nn.Module) -> list[LoraAdapter]:
    """Every adapter of every layer, in the order of the layers."""
    slots = (layer.adapters.values() for layer in _linear_layers(model).values())
    return [adapter for slot in slots for adapter in slot if isinstance(adapter, LoraAdapter)]


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
