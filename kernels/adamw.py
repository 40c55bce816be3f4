"""AdamW with eight-bit states in Triton: all tensors of a step in one launch.

Letters: n elements of one tensor. A program updates some blocks of 256 elements of one tensor; a
table on the device tells it which, and where the tensor and its states lie. The invariant:
`kernels.reference.adamw_eight_bit` is the contract. Each element is written once, by one program,
so the order of programs changes nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.build import OPTIONS, Build, capability_of
from kernels.reference import STATE_BLOCK, AdamWStep, EightBitStates, dynamic_code
from kernels.timing import MODELS, Case

# State blocks of a program, and its warps, by capability.
_CONFIGURATIONS: Mapping[int, tuple[tuple[int, int], ...]] = {
    80: ((8, 4), (4, 4)),
    90: ((8, 4), (4, 4)),
    100: ((8, 4), (16, 8)),
}
_BLOCK = tl.constexpr(STATE_BLOCK)


@triton.jit
def _quantise(x, IS_SIGNED: tl.constexpr):
    """The nearest code of x [blocks, 256] over its block's largest magnitude, and that magnitude.

    A decade is found by comparing with the points halfway between its neighbours' values, then the
    step in it by counting: what `quantise_state` finds among sorted bounds.
    """
    size = tl.abs(x)
    largest = tl.max(size, 1, keep_dims=True)
    scaled = size * (1.0 / tl.maximum(largest, 1e-38))
    PER: tl.constexpr = 1 if IS_SIGNED else 2  # steps in the lowest decade
    decade = tl.zeros_like(scaled).to(tl.int32)
    end = tl.full(scaled.shape, 1e-6, tl.float32)
    for i in tl.static_range(1, 7):
        # Halfway from the last value of one decade, 1 - 0.45 / steps of its end, to the first of
        # the next, 0.1 + 0.45 / steps of its own end.
        is_above = scaled > 0.5 * (
            10.0 ** (i - 7) * (1 - 0.45 / (PER * 2 ** (i - 1)))
            + 10.0 ** (i - 6) * (0.1 + 0.45 / (PER * 2**i))
        )
        decade += is_above.to(tl.int32)
        end = tl.where(is_above, 10.0 ** (i - 6), end)
    steps = PER << decade
    place = (scaled / end - 0.1) * (1 / 0.9) * steps.to(tl.float32)
    step = tl.minimum(tl.maximum(tl.ceil(place).to(tl.int32) - 1, 0), steps - 1)
    index = steps - PER + step + 1  # among the values above zero
    MIDDLE: tl.constexpr = 1 - 0.45 / (PER * 64)
    SMALLEST: tl.constexpr = 1e-6 * (0.1 + 0.45 / PER)
    is_one = scaled > (MIDDLE + 1) / 2
    if IS_SIGNED:
        # -1 is no value, so the lowest is the end of the last step.
        index = tl.where(is_one & (x > 0), index + 1, index)
        index = tl.where(scaled > SMALLEST / 2, index, 0)
        index = tl.where(x < 0, 127 - index, 127 + index)
    else:
        index = tl.where(is_one, index + 1, index)
        index = tl.where(scaled > 0, index, 0)
    return index.to(tl.uint8), largest


@triton.jit
def _adamw(
    places, tensors, decays, signed, unsigned, keep_mean, gain_mean, keep_square, gain_square,
    step_size, root_correction, eps, rate, BLOCKS: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    number = tl.load(places + 2 * program)
    first = tl.load(places + 2 * program + 1)  # of the program's blocks, within the tensor
    entry = tensors + 7 * number
    n = tl.load(entry)
    p = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    g = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    mean = tl.load(entry + 3).to(tl.pointer_type(tl.uint8))
    mean_scale = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    root = tl.load(entry + 5).to(tl.pointer_type(tl.uint8))
    root_scale = tl.load(entry + 6).to(tl.pointer_type(tl.float32))
    if IS_ALIGNED:
        p, g = tl.multiple_of(p, 16), tl.multiple_of(g, 16)
        mean, root = tl.multiple_of(mean, 16), tl.multiple_of(root, 16)
        n = tl.multiple_of(n, 16)
    decay = tl.load(decays + number)

    blocks = first + tl.arange(0, BLOCKS)[:, None]
    is_block = blocks * _BLOCK < n
    offsets = first * _BLOCK + (
        tl.arange(0, BLOCKS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    )
    inside = offsets < n
    gradient = tl.load(g + offsets, inside, other=0.0)
    value = tl.load(p + offsets, inside, other=0.0)
    m = tl.load(signed + tl.load(mean + offsets, inside, other=0).to(tl.int32))
    m *= tl.load(mean_scale + blocks, is_block, other=0.0)
    s = tl.load(unsigned + tl.load(root + offsets, inside, other=0).to(tl.int32))
    s *= tl.load(root_scale + blocks, is_block, other=0.0)

    m = tl.where(inside, keep_mean * m + gain_mean * gradient, 0.0)
    s = tl.where(inside, tl.sqrt_rn(keep_square * s * s + gain_square * gradient * gradient), 0.0)
    value = value * (1.0 - rate * decay) - step_size * (m / (s / root_correction + eps))
    tl.store(p + offsets, value, inside)
    codes, largest = _quantise(m, True)
    tl.store(mean + offsets, codes, inside)
    tl.store(mean_scale + blocks, largest, is_block)
    codes, largest = _quantise(s, False)
    tl.store(root + offsets, codes, inside)
    tl.store(root_scale + blocks, largest, is_block)


def adamw_eight_bit(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[EightBitStates],
    decays: Sequence[float],
    numbers: AdamWStep,
) -> None:
    """`kernels.reference.adamw_eight_bit` in one launch; all tensors float32 and contiguous."""
    if not parameters:
        return
    device = parameters[0].device
    (blocks, warps), *_ = _CONFIGURATIONS[capability_of(parameters[0])]
    rows: list[list[int]] = []
    places: list[tuple[int, int]] = []
    for i, (p, g, state) in enumerate(zip(parameters, gradients, states, strict=True)):
        assert p.is_contiguous() and g.is_contiguous() and p.dtype == g.dtype == torch.float32
        rows.append([p.numel(), *(tensor.data_ptr() for tensor in (p, g, *state))])
        places += [(i, block) for block in range(0, len(state.mean_scale), blocks)]
    is_aligned = all(row[k] % 16 == 0 for row in rows for k in (0, 1, 2, 3, 5))
    _adamw[(len(places),)](
        _to_device(places, torch.int64, device), _to_device(rows, torch.int64, device),
        _to_device(decays, torch.float32, device),
        dynamic_code(is_signed=True, device=device), dynamic_code(is_signed=False, device=device),
        numbers.beta1, 1 - numbers.beta1, numbers.beta2, 1 - numbers.beta2,
        numbers.rate / numbers.mean_correction, numbers.root_correction, numbers.eps, numbers.rate,
        BLOCKS=blocks, IS_ALIGNED=is_aligned, num_warps=warps, **OPTIONS,
    )  # fmt: skip


def _to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table, copied without waiting for the device."""
    table = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def builds(capability: int) -> list[Build]:
    """The kernel in every configuration; the first is launched."""
    numbers = (
        "keep_mean", "gain_mean", "keep_square", "gain_square", "step_size", "root_correction",
        "eps", "rate",
    )  # fmt: skip
    return [
        Build(
            kernel=_adamw,
            signature={
                **{"places": "*i64", "tensors": "*i64"},
                **dict.fromkeys(("decays", "signed", "unsigned"), "*fp32"),
                **dict.fromkeys(numbers, "fp32"),
            },
            constants={"BLOCKS": blocks, "IS_ALIGNED": is_aligned},
            num_warps=warps,
        )
        for blocks, warps in _CONFIGURATIONS[capability]
        for is_aligned in (True, False)
    ]


def cases() -> list[Case]:
    """The linear layers of one block, trained whole."""

    def case(model: str, width: int, inner: int, keys: int) -> Case:
        shapes = [(width, width)] * 2 + [(keys, width)] * 2 + [(inner, width)] * 3
        count = sum(rows * columns for rows, columns in shapes)

        def make(device: torch.device, dtype: torch.dtype, shrink: int) -> tuple[Tensor, ...]:
            tensors: list[Tensor] = []
            for rows, columns in shapes:
                n = max(1, rows // shrink) * columns
                blocks = triton.cdiv(n, STATE_BLOCK)
                tensors += [torch.randn(n, device=device) for _ in range(2)]
                for _ in range(2):
                    codes = torch.randint(1, 256, (n,), device=device)
                    tensors += [codes.to(torch.uint8), torch.rand(blocks, device=device)]
            return tuple(tensors)

        return Case(
            operation="adamw_eight_bit",
            shape=f"{model} block, {count / 1e6:.0f} M parameters",
            make=make,
            kernel=functools.partial(_updated, adamw_eight_bit),
            reference=functools.partial(_updated, reference.adamw_eight_bit),
            # Parameter and both codes read and written, gradient read; two scales a block.
            bytes=count * (4 * 3 + 2 * 2 + 2 * 8 / STATE_BLOCK),
            dtype=torch.float32,
            backward=False,
        )

    return [case(model, width, inner, keys) for model, (width, inner, _, keys) in MODELS.items()]


def _updated(update: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The parameters after one update in place; six tensors of each, as `cases` makes them."""
    parameters, gradients = list(tensors[::6]), list(tensors[1::6])
    states = [EightBitStates(*tensors[i + 2 : i + 6]) for i in range(0, len(tensors), 6)]
    numbers = AdamWStep(100, 1e-4, 0.9, 0.999, 1e-8)
    update(parameters, gradients, states, [0.01] * len(parameters), numbers)
    return tuple(parameters)
