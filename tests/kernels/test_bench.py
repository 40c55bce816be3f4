"""The benchmark command where nothing can be timed, and what its records allow."""

import csv
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from kernels.bench import RESULTS, check, find_cases, main
from kernels.timing import Case


def test_smoke_goes_through_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    before = RESULTS.read_bytes() if RESULTS.exists() else None
    assert main(["--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len({case.operation for case in find_cases([])})
    assert (RESULTS.read_bytes() if RESULTS.exists() else None) == before


def test_an_operation_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swiglou", "--smoke"]) == 2
    assert "swiglou is no operation; choose from" in capsys.readouterr().err


def test_a_wrong_kernel_is_not_timed() -> None:
    case = next(find_cases(["swiglu"]))
    wrong = Case(
        **{**case.__dict__, "kernel": lambda g, u: case.reference(g, u * 1.1)}  # not silu(g) u
    )
    with pytest.raises(ArithmeticError, match="it is not timed"):
        check(wrong, torch.device("cpu"), 1024)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time on")
def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 0), True), ((8, 6), False), ((8, 9), False), ((12, 0), False)]
)
def test_a_gpu_that_no_kernel_is_configured_for_takes_the_references(
    capability: tuple[int, int],
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its blocks may have too little shared memory, so not even `force` runs a kernel there."""
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "RECORDED_WINS", {"swiglu": frozenset({80})})
    assert kernels._is_fused("swiglu", x) == runs
    assert not kernels._is_fused("rope", x)
    with kernels.force("triton"):
        assert kernels._is_fused("rope", x) == runs
    with kernels.force("reference"):
        assert not kernels._is_fused("swiglu", x)
    if not runs:
        assert main([]) == 2
        assert "configured for capability 80, 90, 100, not" in capsys.readouterr().err


def test_a_kernel_is_wired_in_only_on_a_recorded_win() -> None:
    names = {80: "A100", 90: "H", 100: "B"}
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    for operation, capabilities in kernels.RECORDED_WINS.items():
        for capability in capabilities:
            own = [
                row
                for row in rows
                if row["operation"] == operation and names[capability] in row["device"]
            ]
            assert own, f"{operation} at {capability} has no row"
            for row in own:
                assert float(row["faster_than_eager"]) > 1.0, row
                assert float(row["faster_than_compiled"]) > 1.0, row
