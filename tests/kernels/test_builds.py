"""Every kernel, compiled for GPUs that are not there: no spills, shared memory, tensor cores."""

import ast
from pathlib import Path

import pytest

from kernels import CAPABILITIES
from kernels.build import (
    OPERATIONS,
    Build,
    compile_ahead,
    fault,
    first_builds,
    has_instruction,
)
from tests.conftest import ROOT

CASES = [
    pytest.param(capability, build, id=f"{capability}-{operation}-{build.name}")
    for capability in CAPABILITIES
    for operation, build in first_builds(capability)
]


@pytest.mark.parametrize(("capability", "build"), CASES)
def test_a_kernel_compiles_without_a_fault(capability: int, build: Build) -> None:
    assert fault(build, compile_ahead(build, capability), capability) is None


def kernels_in(path: Path) -> set[str]:
    """The kernels that a file launches, as in `_kernel[grid](...)`; others are parts of them."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    jitted = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    launched = {
        ast.unparse(node.func.value)
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    return jitted & launched


def test_every_kernel_is_compiled() -> None:
    launched = {path.stem: kernels_in(path) for path in (ROOT / "kernels").glob("*.py")}
    for capability in CAPABILITIES:
        compiled: dict[str, set[str]] = {operation: set() for operation in OPERATIONS}
        for operation, build in first_builds(capability):
            compiled[operation].add(build.kernel.fn.__name__)
        assert compiled == {file: kernels for file, kernels in launched.items() if kernels}


def test_instructions_are_told_apart() -> None:
    bf16 = "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}"
    int8 = "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1}"
    assert has_instruction(bf16, 90, "bf16") and not has_instruction(bf16, 90, "int8")
    assert has_instruction(int8, 90, "int8") and not has_instruction(int8, 90, "bf16")
