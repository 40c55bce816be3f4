"""Every operation's kernel beside plain torch and torch.compile, at the shapes of real models.

    python -m kernels.bench                       # all operations; needs a GPU
    python -m kernels.bench swiglu rms_norm       # some: a part of under ten minutes
    python -m kernels.bench --table               # docs/kernel-times.md from the recorded rows

First the kernel's outputs and gradients are compared with the reference's, then the sides take
turns; a time is the median over the rounds, with the cache emptied before each. Ceilings (copy
bandwidth, bf16 and int8 products) are measured in the same run on random numbers. Rows are appended
to benchmarks/results/kernels.csv; `kernels.RECORDED_WINS` names the operations that won.

On a CPU `--smoke` goes through the same steps for one case an operation, with few rows and the
reference in the kernel's place: it shows that the command works and times nothing of interest.
"""

import argparse
import csv
import datetime
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels import CAPABILITIES, exact_capability
from kernels.build import OPERATIONS
from kernels.timing import Case, Operation

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
TABLE = ROOT / "docs" / "kernel-times.md"
ROUNDS, WARM_UP = 30, 5
_CACHE_BYTES = 256 << 20  # more than any GPU's L2


class Ceilings(NamedTuple):
    """What the device reaches in this run."""

    copy_gb_s: float  # read + written
    bf16_tflops: float
    int8_tops: float


class Timed(NamedTuple):
    """One side of one case."""

    median_ms: float
    lowest_ms: float
    highest_ms: float
    peak_mib: float  # beyond the arguments


def find_cases(operations: Sequence[str]) -> Iterator[Case]:
    """The cases of the named operations, or of all; ValueError for a name that is none."""
    cases = [c for file in OPERATIONS for c in importlib.import_module(f"kernels.{file}").cases()]
    known = sorted({case.operation for case in cases})
    for name in operations:
        if name not in known:
            raise ValueError(f"{name} is no operation; choose from {', '.join(known)}")
    yield from (case for case in cases if not operations or case.operation in operations)


def passes(case: Case, operation: Operation, arguments: Sequence[object]) -> Callable[[], None]:
    """One forward pass, and a backward pass from fixed random gradients where the case has one."""
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    douts: list[Tensor] = []

    def step() -> None:
        outputs = operation(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not case.backward:
            return
        if not douts:
            douts.extend(torch.randn_like(output) for output in outputs)
        # `check` has seen all gradients of the kernel; a bare operation leaves some inputs out.
        torch.autograd.grad(outputs, inputs, douts, allow_unused=True)

    return step


def check(case: Case, device: torch.device, shrink: int) -> None:
    """Refuse to time a kernel whose numbers are further off than twice the reference's own."""
    torch.manual_seed(0)
    arguments = case.make(device, case.dtype, shrink)

    def numbers(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
        inputs = [
            # A copy, for an operation may work in place.
            a.detach()
            .to(dtype if a.is_floating_point() else a.dtype, copy=True)
            .requires_grad_(a.requires_grad)
            if isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        outputs = operation(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = list(outputs)
        if case.backward:
            generator = torch.Generator(device).manual_seed(1)
            douts = [
                torch.randn(o.shape, generator=generator, device=device).to(o.dtype)
                for o in outputs
            ]
            wanted = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
            found += torch.autograd.grad(outputs, wanted, douts)
        return [tensor.detach().double() for tensor in found]

    truth = numbers(case.reference, torch.float32)
    expected, found = numbers(case.reference, case.dtype), numbers(case.kernel, case.dtype)
    for i, (f, e, t) in enumerate(zip(found, expected, truth, strict=True)):
        size = float(t.norm()) or 1.0
        error, allowed = float((f - t).norm()) / size, 2 * float((e - t).norm()) / size
        allowed = max(allowed, 2 * torch.finfo(case.dtype).eps)
        if not error <= allowed:
            raise ArithmeticError(
                f"{case.operation}, {case.shape}: tensor {i} has the relative error {error:.1e}, "
                f"allowed is {allowed:.1e}; it is not timed"
            )


def time_in_turn(
    sides: Mapping[str, Callable[[], None]], device: torch.device, rounds: int
) -> dict[str, Timed]:
    """Run the sides one after another, `rounds` times, each alone on the device."""
    cache = torch.empty(_CACHE_BYTES if device.type == "cuda" else 1, device=device).byte()
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for turn in range(WARM_UP + rounds):
        for name, step in sides.items():
            cache.zero_()
            if device.type != "cuda":
                began = time.perf_counter()
                step()
                took = (time.perf_counter() - began) * 1e3
            else:
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                step()
                stop.record()
                stop.synchronize()
                took = start.elapsed_time(stop)
                peaks[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            if turn >= WARM_UP:
                times[name].append(took)
    return {
        name: Timed(statistics.median(t), min(t), max(t), peaks[name]) for name, t in times.items()
    }


def measure_ceilings(device: torch.device, size: int, rounds: int) -> Ceilings:
    """Copy bandwidth and the rates of square products."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    q, w = (torch.randint(-127, 128, (size, size), device=device).to(torch.int8) for _ in range(2))
    out = torch.empty_like(a)
    sides: dict[str, Callable[[], Any]] = {
        "copy": lambda: out.copy_(a),
        "bf16": lambda: torch.mm(a, b, out=out),
        "int8": lambda: torch._int_mm(q, w.T),
    }
    timed = time_in_turn(sides, device, rounds)
    products = 2 * size**3 / 1e9
    return Ceilings(
        copy_gb_s=4 * size * size / timed["copy"].median_ms / 1e6,
        bf16_tflops=products / timed["bf16"].median_ms,
        int8_tops=products / timed["int8"].median_ms,
    )


def measure(case: Case, device: torch.device, ceilings: Ceilings, flags: Any) -> dict[str, Any]:
    """The row of one case."""
    torch.manual_seed(0)
    arguments = case.make(device, case.dtype, flags.shrink)
    sides = {"kernel": case.kernel, "eager": case.reference}
    if device.type == "cuda":  # compiling for a CPU says nothing about one
        sides["compiled"] = torch.compile(case.plain or case.reference, dynamic=False)
    if case.bare is not None:
        sides["bare"] = case.bare
    steps = {name: passes(case, operation, arguments) for name, operation in sides.items()}
    timed = time_in_turn(steps, device, flags.rounds)
    kernel = timed["kernel"]
    row: dict[str, Any] = {
        "operation": case.operation,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "passes": "forward + backward" if case.backward else "forward",
    }
    for name in ("kernel", "eager", "compiled", "bare"):
        side = timed.get(name)
        row[f"{name}_ms"] = side and round(side.median_ms, 4)
        row[f"{name}_ms_lowest"] = side and round(side.lowest_ms, 4)
        row[f"{name}_ms_highest"] = side and round(side.highest_ms, 4)
        row[f"{name}_peak_mib"] = side and round(side.peak_mib, 1)
    for name in ("eager", "compiled"):
        side = timed.get(name)
        row[f"faster_than_{name}"] = side and round(side.median_ms / kernel.median_ms, 3)
    bare = timed.get("bare")
    row["times_bare"] = bare and round(kernel.median_ms / bare.median_ms, 3)
    of_copy = case.bytes / kernel.median_ms / 1e6 / ceilings.copy_gb_s
    of_bf16 = case.flops / kernel.median_ms / 1e9 / ceilings.bf16_tflops
    row["share_of_copy"] = round(of_copy, 3) if case.bytes else None
    row["share_of_bf16_rate"] = round(of_bf16, 3) if case.flops else None
    row |= {name: round(value, 1) for name, value in ceilings._asdict().items()}
    return row


def append(rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the rows to the recorded ones."""
    is_new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def write_table() -> None:
    """docs/kernel-times.md: the newest row of every operation, shape and device."""
    with open(RESULTS, newline="", encoding="utf-8") as file:
        newest = {(r["operation"], r["shape"], r["device"]): r for r in csv.DictReader(file)}
    head = [
        "operation", "shape", "passes", "kernel_ms", "faster_than_eager", "faster_than_compiled",
        "times_bare", "share_of_copy", "share_of_bf16_rate", "device", "commit",
    ]  # fmt: skip
    lines = [
        "# Kernels beside torch",
        "",
        "Made by `python -m kernels.bench --table` from `benchmarks/results/kernels.csv`, which",
        "also has the spread, the memory and the versions. Ratios above 1: the kernel is faster.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in head) + " |",
        "|" + " --- |" * len(head),
    ]
    lines += ["| " + " | ".join(row[name] for name in head) + " |" for row in newest.values()]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def where(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the code's shapes."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OP", help="default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--smoke", action="store_true", help="few rows, references only, on a CPU")
    parser.add_argument("--table", action="store_true", help="write docs/kernel-times.md and stop")
    flags = parser.parse_args(arguments)
    if flags.table:
        write_table()
        return 0
    if not flags.smoke and not torch.cuda.is_available():
        print("bench: found no CUDA device; try the command with --smoke", file=sys.stderr)
        return 2
    device = torch.device("cpu" if flags.smoke else "cuda")
    if not flags.smoke and (found := exact_capability(device)) not in CAPABILITIES:
        allowed = ", ".join(map(str, CAPABILITIES))
        print(
            f"bench: kernels are configured for capability {allowed}, not {found}", file=sys.stderr
        )
        return 2
    flags.shrink = 1024 if flags.smoke else 1
    flags.rounds = 2 if flags.smoke else flags.rounds
    try:
        cases = list(find_cases(flags.operations))
        if flags.smoke:
            cases = list({case.operation: case for case in reversed(cases)}.values())
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    ceilings = measure_ceilings(device, 256 if flags.smoke else 8192, flags.rounds)
    here, failures = where(device), 0
    for case in cases:
        if flags.smoke:
            changes = {"kernel": case.reference, "dtype": torch.float32}
            changes |= {"bare": case.bare and case.reference}
            case = Case(**{**case.__dict__, **changes})
        try:
            check(case, device, max(flags.shrink, 16))
        except ArithmeticError as error:
            print(f"bench: {error}", file=sys.stderr)
            failures += 1
            continue
        row = {**here, **measure(case, device, ceilings, flags)}
        print(
            f"{case.operation:24} {case.shape:28} {row['kernel_ms']:9.3f} ms  "
            f"eager x{row['faster_than_eager']}  compiled x{row['faster_than_compiled']}",
            flush=True,
        )
        if not flags.smoke:
            append([row])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
