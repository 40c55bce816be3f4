"""The benchmark command where nothing can be timed, and what its records allow."""

import csv

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
