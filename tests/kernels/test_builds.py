"""Every kernel, compiled for GPUs that are not there: no spills, shared memory, tensor cores."""

import ast

import pytest

from kernels.build import (
    CAPABILITIES,
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


def test_every_file_with_kernels_is_compiled() -> None:
    with_kernels = {
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if any(
            isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert with_kernels == set(OPERATIONS)
    for operation in OPERATIONS:
        jitted = {build.kernel.fn.__name__ for name, build in first_builds(90) if name == operation}
        assert jitted, operation


def test_instructions_are_told_apart() -> None:
    bf16 = "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}"
    int8 = "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1}"
    assert has_instruction(bf16, 90, "bf16") and not has_instruction(bf16, 90, "int8")
    assert has_instruction(int8, 90, "int8") and not has_instruction(int8, 90, "bf16")
