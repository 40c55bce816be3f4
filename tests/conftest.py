"""Options and fixtures that every test shares."""

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
