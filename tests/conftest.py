"""Options and fixtures that every test shares."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--real-data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        metavar="DIR",
        help="folder of real checkpoints and notes (default: %(default)s); "
        "tests that read it are skipped where it is absent",
    )


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Triton decides at import whether kernels are interpreted, so those tests are a run of their
    # own; where there is a GPU they run on it, among all others.
    runs_kernels, runs_others = IS_INTERPRETED or torch.cuda.is_available(), not IS_INTERPRETED
    left_out = [
        item for item in items if not (runs_kernels if "kernel" in item.keywords else runs_others)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    skip_slow = pytest.mark.skip(reason="slow: run with --slow")
    skip_gpu = pytest.mark.skip(reason="gpu: no CUDA device here")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real data; skips the test where there is none."""
    folder: Path = request.config.getoption("--real-data")
    if not folder.is_dir():
        pytest.skip("the folder of real data is absent: name it with --real-data DIR")
    return folder.resolve()


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout: commands of the README run from here."""
    return ROOT
