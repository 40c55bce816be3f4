"""Kernels beside Liger's and torch's own, at the shapes and by the timing of `kernels.bench`.

    python -m benchmarks.kernel_peers              # needs a GPU and liger-kernel
    python -m benchmarks.kernel_peers swiglu rope  # a part

Both sides get the same random tensors in the same run and take turns. Before a case is timed the
peer's outputs are compared with the reference's, so that both do the same work. Rows are appended
to benchmarks/results/kernel_peers.csv; a ratio above 1 means that ours is faster.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench import ROUNDS, find_cases, passes, time_in_turn, where
from kernels.timing import Case, Operation

RESULTS = Path(__file__).parent / "results" / "kernel_peers.csv"
_TOLERANCE = 0.02  # relative L2 of bfloat16 outputs


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Liger takes [B, heads, T, H] and each angle twice."""
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (torch.cat([angle, angle], -1)[None] for angle in (cos, sin))
    q, k = (x[None].transpose(1, 2) for x in (q, k))
    q, k = LigerRopeFunction.apply(q, k, cos, sin)
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


def liger_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, targets, None, None, -100, 0.0, 0.0, "sum"
    )
    return found[0] if isinstance(found, tuple) else found


def int_mm_and_scale(x: Tensor, weight: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """torch's own int8 product between an eager quantisation and an eager scaling."""
    absmax = x.abs().amax(-1, keepdim=True).float() / 127
    q = (x / absmax).round().to(torch.int8)
    return (torch._int_mm(q, weight.T) * absmax * scale).to(x.dtype)


# Operation of `kernels.bench`: its peers by name.
PEERS: Mapping[str, Mapping[str, Operation]] = {
    "swiglu": {"liger": liger_swiglu},
    "rms_norm": {"liger": liger_rms_norm},
    "rope": {"liger": liger_rope},
    "linear_cross_entropy": {"liger": liger_linear_cross_entropy},
    "int8_linear": {"torch._int_mm": int_mm_and_scale},
}


def check_same_work(case: Case, peer: Operation, arguments: Sequence[object]) -> None:
    """Refuse a peer whose outputs are not the reference's."""
    with torch.no_grad():
        pairs = [operation(*arguments) for operation in (peer, case.reference)]
    theirs, ours = (pair if isinstance(pair, tuple) else (pair,) for pair in pairs)
    for a, b in zip(theirs, ours, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        if not error < _TOLERANCE:
            raise ArithmeticError(f"{case.operation}, {case.shape}: outputs differ by {error:.1e}")


def compare(case: Case, name: str, peer: Operation, device: torch.device) -> dict[str, Any]:
    """One row: ours against one peer."""
    torch.manual_seed(0)
    arguments = case.make(device, case.dtype, 1)
    check_same_work(case, peer, arguments)
    sides: dict[str, Callable[[], None]] = {
        "ours": passes(case, case.kernel, arguments),
        "peer": passes(case, peer, arguments),
    }
    timed = time_in_turn(sides, device, ROUNDS)
    row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "peer": name}
    for side, figures in timed.items():
        row |= {f"{side}_{key}": round(value, 4) for key, value in figures._asdict().items()}
    row["faster_than_peer"] = round(timed["peer"].median_ms / timed["ours"].median_ms, 3)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OP", choices=[[], *PEERS], help="all")
    flags = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernel_peers: found no CUDA device", file=sys.stderr)
        return 2
    device, failures = torch.device("cuda"), 0
    for case in find_cases(flags.operations or list(PEERS)):
        for name, peer in PEERS[case.operation].items():
            try:
                row = {**where(device), **compare(case, name, peer, device)}
            except (ArithmeticError, ImportError) as error:
                print(f"kernel_peers: {error}", file=sys.stderr)
                failures += 1
                continue
            print(f"{case.operation:24} {case.shape:32} x{row['faster_than_peer']} {name}")
            is_new = not RESULTS.exists()
            with open(RESULTS, "a", newline="", encoding="utf-8") as file:
                rows = csv.DictWriter(file, row)
                if is_new:
                    rows.writeheader()
                rows.writerow(row)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
