"""Kernels compiled ahead of time, without a GPU, and what the machine code says about them.

    python -m kernels.build [--capability 90 ...]     # every configuration of every kernel

Each operation's file lists its kernels as `builds(capability)`: what is launched, with which types
and configuration, and which tensor-core instruction is meant. The invariant: a launch takes its
configuration from the same lists, so what compiles here is what runs there.
"""

import argparse
import csv
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels import CAPABILITIES, exact_capability

# Files with kernels; each has a function `builds`.
OPERATIONS = (
    "adamw",
    "dequantised",
    "down_projection",
    "experts",
    "gated",
    "hashing",
    "head_loss",
    "int8",
    "low_rank",
    "norm",
    "rotary",
    "up_projection",
)  # fmt: skip
# Bytes of shared memory that one block may have (CUDA programming guide, table of capabilities).
SHARED_LIMIT: Mapping[int, int] = {80: 166_912, 90: 232_448, 100: 232_448}
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "kernel_builds.csv"

# Stated at every launch too: Triton's default changes between versions, and results with it.
OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": True}

TensorCore = Literal["bf16", "int8"]
# What the PTX of each capability calls a tensor-core product.
_INSTRUCTION: Mapping[tuple[int, TensorCore], str] = {
    (80, "bf16"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    (90, "bf16"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    (100, "bf16"): r"tcgen05\.mma\S*kind::f16",
    (80, "int8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32",
    (90, "int8"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    (100, "int8"): r"tcgen05\.mma\S*kind::i8",
}


@dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel in one configuration."""

    kernel: Any  # a function under @triton.jit
    signature: Mapping[str, str]  # argument: "*bf16", "i32", "fp32", ...
    constants: Mapping[str, Any] = field(default_factory=dict)  # the constexpr arguments
    num_warps: int = 4
    num_stages: int = 1
    tensor_core: TensorCore | None = None  # the product that the machine code must contain
    # Integers that are multiples of 16 at the shapes of models; pointers always are.
    divisible: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        constants = ",".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.kernel.fn.__name__}[{constants},{self.num_warps}w,{self.num_stages}s]"


class Built(NamedTuple):
    """What came out of it."""

    ptx: str
    shared: int  # bytes of a block
    registers: int  # of a thread
    spill_bytes: int  # stored to local memory because registers ran out


def as_rows(x: Tensor) -> Tensor:
    """x with adjacent columns, as kernels read it; any distance between rows will do."""
    return x if x.stride(1) == 1 else x.contiguous()


def capability_of(x: Tensor) -> int:
    """The compute capability whose lists apply to x's device; the interpreter takes the first."""
    if not x.is_cuda:
        return CAPABILITIES[0]
    capability = exact_capability(x.device)
    assert capability in CAPABILITIES
    return capability


def compile_ahead(build: Build, capability: int) -> Built:
    """Compile for a compute capability that need not be present, and read ptxas's report."""
    names = list(build.kernel.arg_names)
    kinds = {name: build.signature.get(name, "constexpr") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if kinds[name].startswith("*") or name in build.divisible
    }
    source = ASTSource(build.kernel, kinds, dict(build.constants), attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spill_bytes = _assemble(ptx, capability)
    return Built(ptx, compiled.metadata.shared, registers, spill_bytes)


def has_instruction(ptx: str, capability: int, tensor_core: TensorCore) -> bool:
    """Whether the code contains the capability's tensor-core product of that type."""
    return re.search(_INSTRUCTION[capability, tensor_core], ptx) is not None


def all_builds(capability: int) -> Iterator[tuple[str, Build]]:
    """Every kernel in every configuration, with the file it stands in."""
    for operation in OPERATIONS:
        module = importlib.import_module(f"kernels.{operation}")
        for build in module.builds(capability):
            yield operation, build


def first_builds(capability: int) -> Iterator[tuple[str, Build]]:
    """Every kernel once per set of argument types, in its first configuration."""
    seen = set()
    for operation, build in all_builds(capability):
        key = (build.kernel.fn.__name__, tuple(build.signature.items()), build.tensor_core)
        if key not in seen:
            seen.add(key)
            yield operation, build


def fault(build: Build, built: Built, capability: int) -> str | None:
    """What is wrong with the machine code, or None."""
    if built.spill_bytes:
        return f"{built.spill_bytes} bytes of registers spill"
    if built.shared > SHARED_LIMIT[capability]:
        return f"{built.shared} bytes of shared memory, of {SHARED_LIMIT[capability]}"
    wanted = build.tensor_core
    if wanted is not None and not has_instruction(built.ptx, capability, wanted):
        return f"no {wanted} tensor-core instruction"
    return None


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as the assembler reports them."""
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch=sm_{capability}{suffix}", str(path)]
        command += ["-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return max(map(int, registers)), sum(map(int, spilled))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile every configuration, append a row each to the results, and list the faults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES))
    flags = parser.parse_args(arguments)
    rows, faults = [], 0
    for capability in flags.capability:
        for operation, build in all_builds(capability):
            built = compile_ahead(build, capability)
            found = fault(build, built, capability)
            faults += found is not None
            rows.append(
                {
                    "triton": triton.__version__,
                    "capability": capability,
                    "operation": operation,
                    "build": build.name,
                    "types": " ".join(build.signature.values()),
                    "registers": built.registers,
                    "shared_bytes": built.shared,
                    "spill_bytes": built.spill_bytes,
                    "tensor_core": build.tensor_core or "",
                    "fault": found or "",
                }
            )
            print(f"{capability} {operation} {build.name}: {found or 'good'}", flush=True)
    kept = []
    if RESULTS.exists():
        with open(RESULTS, newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["triton"] != triton.__version__]
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*kept, *rows])
    print(f"{len(rows)} configurations, {faults} with a fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
