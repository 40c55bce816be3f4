"""The rooms import in one direction, and what is banned stays out.

Every Python file of the project is parsed, not run, so an import inside a function counts too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("kernels", "model", "lora", "data", "training", "evaluation", "benchmarks")

# What each room may import besides itself.
ALLOWED = {
    "kernels": set(),
    "model": {"kernels"},
    "lora": {"kernels", "model"},
    "data": set(),
    "training": {"kernels", "model", "lora", "data"},
    "evaluation": {"kernels", "model", "lora", "data", "training"},
    "benchmarks": {"kernels", "model", "lora", "data", "training", "evaluation"},
    "train.py": {"model", "lora", "data", "training", "evaluation"},
    "eval.py": {"model", "lora", "data", "training", "evaluation"},
}
# Commands of a room that may import more: the sample text of a merge needs a tokenizer, and every
# command ends as `model.ending` says.
COMMANDS = {
    "lora/merge.py": {"data"},
    "data/preview.py": {"model"},
    "data/medical_meadow.py": {"model"},
}
NEVER_IMPORTED = {"train", "eval", "tests"}
RIVALS = {
    "accelerate", "bitsandbytes", "lightning", "liger_kernel", "peft", "pytorch_lightning",
    "transformers", "trl", "unsloth",
}  # fmt: skip
HEAVY = ("tyro", "duckdb", "optuna")  # optional for who only takes a kernel or the model


def files_of(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def project_files() -> Iterator[tuple[str, Path]]:
    for room in ALLOWED:
        for path in files_of(room):
            if path.exists():
                yield room, path


def imported_modules(tree: ast.AST, package: tuple[str, ...] = ()) -> set[str]:
    """Dotted names of everything that the module imports, relative imports resolved."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    package = path.relative_to(ROOT).parent.parts
    return imported_modules(ast.parse(path.read_text(encoding="utf-8")), package)


def top(name: str) -> str:
    return name.partition(".")[0]


def test_the_parser_sees_every_form_of_import() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    assert imported_modules(ast.parse(source), ("x", "y")) == {"a.b", "c.d", "x.y.e", "x.g.h"}


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_in_one_direction(room: str) -> None:
    known = set(ROOMS) | NEVER_IMPORTED
    allowed = ALLOWED[room] | {room}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(room)
        if path.exists()
        for name in sorted(imports_of(path))
        if top(name) in known - allowed - COMMANDS.get(str(path.relative_to(ROOT)), set())
    ]
    assert not wrong


def test_torch_distributed_stays_in_training() -> None:
    wrong = []
    for room, path in project_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = any(name.startswith("torch.distributed") for name in imported_modules(tree))
        reached = any(
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            for node in ast.walk(tree)
        )
        if (named or reached) and room != "training":
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong


def test_rivals_stay_in_tests_and_benchmarks() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room, path in project_files()
        if room != "benchmarks"
        for name in sorted(imports_of(path))
        if top(name) in RIVALS
    ]
    assert not wrong


def test_no_pickle_and_no_partial_loading() -> None:
    """State is safetensors and JSON; a state dict matches exactly or is refused."""
    wrong = []
    for _, path in project_files():
        where = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if {top(name) for name in imported_modules(tree)} & {"pickle", "dill", "joblib"}:
            wrong.append(f"{where}: pickle")
        for node in ast.walk(tree):
            pickled = {"torch.load", "torch.save"}
            if isinstance(node, ast.Attribute) and ast.unparse(node) in pickled:
                wrong.append(f"{where}: {ast.unparse(node)}")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            partial = any(
                keyword.arg == "strict" and ast.unparse(keyword.value) == "False"
                for keyword in node.keywords
            )
            if called in {"eval", "exec"}:
                wrong.append(f"{where}: {called}")
            if called.endswith("load_state_dict") and partial:
                wrong.append(f"{where}: strict=False")
    # The one command whose work is to turn old pickled weights into safetensors.
    assert set(wrong) - {"model/convert.py: torch.load"} == set()


def modules_of(room: str) -> list[str]:
    names = []
    for path in files_of(room):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("room", ["kernels", "model", "lora", "training", "benchmarks"])
def test_rooms_import_without_the_optional_packages(room: str) -> None:
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY!r}))\n"  # None there makes the import fail
        f"for name in {modules_of(room)!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
