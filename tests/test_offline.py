"""The locks name every package and no place, and what they name installs and works offline."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.evaluation.conftest import base, notes  # noqa: F401 (fixtures)

KINDS = ("cpu", "cuda")
LOCKED_EXTRAS = ("mimic", "search", "tensorboard", "tokenizers")


def pins(kind: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package of a lock."""
    text = (ROOT / "locks" / f"{kind}.txt").read_text(encoding="utf-8")
    found = {}
    for entry in re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        pin, *options = entry.split()
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.+]+)", pin)
        assert match, "a line that is neither a pin nor a comment"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", option) for option in options)
        found[match[1]] = (match[2], options)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_pins_every_dependency_with_hashes(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in LOCKED_EXTRAS:
        wanted += project["optional-dependencies"][extra]
    locked = pins(kind)
    assert all(hashes for _, hashes in locked.values())
    for requirement in map(Requirement, wanted):
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement.name


def test_the_locks_differ_in_torch_and_nvidia_alone() -> None:
    cpu, cuda = ({name: pin[0] for name, pin in pins(kind).items()} for kind in KINDS)
    assert cpu.pop("torch") == f"{cuda.pop('torch')}+cpu"
    extra = {name for name in cuda if name.startswith(("nvidia-", "cuda-"))}
    assert cpu == {name: version for name, version in cuda.items() if name not in extra}


def test_the_cpu_lock_takes_the_published_wheels_of_torch() -> None:
    lines = (ROOT / "locks" / "torch-cpu.sha256").read_text(encoding="utf-8").splitlines()
    digests, names = zip(*(line.split() for line in lines), strict=True)
    version, hashes = pins("cpu")["torch"]
    wheel = f"torch-{version}-{{0}}-{{0}}-manylinux_2_28_x86_64.whl"
    assert list(names) == [wheel.format(python) for python in ("cp311", "cp312")]
    assert hashes == [f"--hash=sha256:{digest}" for digest in digests]


def test_no_lock_names_a_server() -> None:
    for path in (ROOT / "locks").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|index-url|find-links|@", text), path.name


def without_network() -> list[str]:
    """A prefix that runs a command where no interface is up; empty where that is not allowed."""
    prefix = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    tried = subprocess.run([*prefix, "true"], capture_output=True)
    return prefix if tried.returncode == 0 else []


@pytest.mark.slow
def test_a_folder_of_wheels_is_all_that_an_installation_needs(
    base: Path,  # noqa: F811
    notes: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The two commands of docs/offline.md in a copy of the checkout, then a run there."""
    checkout = tmp_path / "checkout"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=skipped)
    wheels = tmp_path / "wheels"
    filled = subprocess.run(
        ["bash", "make.sh", "wheels", "cpu", str(wheels)],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    if filled.returncode:
        pytest.skip("the wheels of the lock cannot be fetched here")

    # Proxies and pip's own settings are gone, and with them every server they could name.
    bare = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    bare |= {"OMP_NUM_THREADS": "1"}
    offline = without_network()
    installed = subprocess.run(
        [*offline, "bash", "make.sh", "offline", "cpu", str(wheels)],
        cwd=checkout,
        env=bare,
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    command = (
        f".venv/bin/python train.py --stage clinical --model {base} --data {notes} --steps 2 "
        f"--max-length 32 --batch-tokens 256 --workers 1 --out {tmp_path / 'run'}"
    )
    trained = subprocess.run(
        [*offline, *command.split()], cwd=checkout, env=bare, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert (tmp_path / "run" / "adapter" / "clinical" / "adapter_model.safetensors").is_file()

    # A file that is not the lock's is refused.
    wheel = next(wheels.glob("tqdm-*.whl"))
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    refused = subprocess.run(
        ["bash", "make.sh", "offline", "cpu", str(wheels)],
        cwd=checkout,
        env=bare,
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0 and "DO NOT MATCH THE HASHES" in refused.stderr
