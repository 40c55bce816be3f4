"""Bit flips, cuts, additions, losses and swaps of every file that a run loads: none goes unnoticed.

Each damage is found before the file is used: a checkpoint is passed over for an older one, anything
else is refused by name.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval
import train
from data.cache import TokenCache
from model.files import write_safetensors
from tests.data.conftest import train_sentencepiece
from tests.evaluation.conftest import settings, write_notes
from training.assemble import restore
from training.checkpoint import Checkpoint, newest_good
from training.record import identity
from training.run import run
from training.run_folder import read_record
from training.stages import clinical, downstream

FLIPS, HEADER_FLIPS, CUTS, ADDITIONS = 7, 3, 4, 2
CASES = [
    *(f"flip-{i}" for i in range(FLIPS)),
    *(f"header-flip-{i}" for i in range(HEADER_FLIPS)),
    *(f"cut-{i}" for i in range(CUTS)),
    *(f"addition-{i}" for i in range(ADDITIONS)),
    "empty", "missing", "swapped",
]  # fmt: skip

CHECKPOINT = "run/checkpoints/step-000008/"
ADAPTER = "run/adapter/downstream/"
LOADED_BY_A_FINISHED_RUN = (
    "run/run.json",
    f"{ADAPTER}adapter_model.safetensors",
    f"{ADAPTER}adapter_config.json",
    "run/adapter/clinical/adapter_model.safetensors",
    "run/head.safetensors",
    "base/config.json",
    "base/model.safetensors",
    "base/tokenizer.model",
)
IN_A_CHECKPOINT = tuple(
    CHECKPOINT + name
    for name in (
        "weights.safetensors",
        "optimiser.safetensors",
        "random.safetensors",
        "state.json",
        "manifest.json",
    )
)
IN_A_CACHE = tuple(
    f"cache/{name}"
    for name in (
        "tokens.bin",
        "offsets.bin",
        "texts.bin",
        "patients.bin",
        "labels.bin",
        "meta.json",
    )
)


@pytest.fixture(scope="module")
def place(base: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pair of runs, its base, notes and cache, and beside each file one of its kind."""
    root = tmp_path_factory.mktemp("place")
    for mine, number in ((root, 0), (root / "other", 1)):
        mine.mkdir(exist_ok=True)
        shutil.copytree(base, mine / "base")
        shutil.copy(notes, mine / "notes.csv")
        if number:
            write_notes(mine / "notes.csv", patients=120, seed=1)
            text = (mine / "base/config.json").read_text()
            (mine / "base/config.json").write_text(text.replace("1e-05", "1e-06"))
            train_sentencepiece(mine / "base/tokenizer.model", vocab_size=390)
            weights = load_file(mine / "base/model.safetensors")
            weights["model.norm.weight"] += 0.5
            write_safetensors(mine / "base/model.safetensors", weights)
        start = replace(clinical(), cache_dir=str(mine / "caches"))
        first = run(settings(start, mine / "base", mine / "notes.csv", mine / "clinical"))
        config = settings(downstream(), mine / "base", mine / "notes.csv", mine / "run")
        config = replace(
            config,
            task="label",
            label_column="label",
            init_adapter=str(first),
            cache_dir=str(mine / "caches"),
            steps=8,
            eval_every=2,
            seed=number,
        )
        run(config)
        labelled = [f for f in (mine / "caches").iterdir() if (f / "labels.bin").stat().st_size]
        (mine / "cache").symlink_to(max(labelled, key=lambda folder: folder.stat().st_mtime_ns))
    assert (root / "base/config.json").read_text() != (root / "other/base/config.json").read_text()
    return root


def damaged(whole: bytes, other: bytes, case: str) -> bytes | None:
    """The content of a file after a mishap; None for a lost file."""
    kind, _, number = case.rpartition("-")
    rng = random.Random(case)
    if kind in ("flip", "header-flip"):
        at = rng.randrange(min(len(whole), 64) if kind == "header-flip" else len(whole))
        return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
    if kind == "cut":
        return whole[: -1 if number == "0" else rng.randrange(1, len(whole))]
    if kind == "addition":
        return whole + (b"\0" if number == "0" else rng.randbytes(100))
    return {"empty": b"", "missing": None, "swapped": other}[case]


@pytest.fixture
def damage(place: Path) -> Iterator[Callable[[str, str], Path]]:
    """Damages one file of the place; the end of the test puts it right."""
    before: dict[Path, bytes] = {}

    def do(name: str, case: str) -> Path:
        path = place / name
        before[path] = whole = path.read_bytes()
        content = damaged(whole, (place / "other" / name).read_bytes(), case)
        assert content != whole
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        return path

    yield do
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOADED_BY_A_FINISHED_RUN)
def test_a_finished_run_is_refused(
    name: str, case: str, place: Path, damage: Callable[[str, str], Path]
) -> None:
    path = damage(name, case)
    with pytest.raises(ValueError) as refusal:
        restore(place / "run", torch.device("cpu"))
    # A base is vouched for as a whole, so its refusal names the folder; another run's run.json is
    # sound, and the first file that it does not describe is named.
    assert (
        case == "swapped"
        or path.name in str(refusal.value)
        or str(place / "base") in str(refusal.value)
    )


def newest_of(out: Path) -> tuple[Checkpoint | None, list[str]]:
    return newest_good(out / "checkpoints", run=identity(read_record(out)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", IN_A_CHECKPOINT)
def test_a_checkpoint_is_passed_over(
    name: str, case: str, place: Path, damage: Callable[[str, str], Path]
) -> None:
    path = damage(name, case)
    found, complaints = newest_of(place / "run")
    assert found is not None and found.step == 6
    named = path.parent if case == "swapped" else path  # another run's manifest is sound
    assert len(complaints) == 1 and str(named) in complaints[0]


def test_a_checkpoint_of_another_run_is_passed_over(place: Path, tmp_path: Path) -> None:
    """Same shapes, sound bytes, the name of a step that this run has not reached."""
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    shutil.copytree(place / "other" / CHECKPOINT, tmp_path / "theirs")
    shutil.rmtree(out / "checkpoints/step-000008")
    shutil.move(tmp_path / "theirs", out / "checkpoints/step-000008")
    found, complaints = newest_of(out)
    assert found is not None and found.step < 8
    assert len(complaints) == 1 and "step-000008/manifest.json is of another run" in complaints[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", IN_A_CACHE)
def test_a_cache_is_refused(
    name: str, case: str, place: Path, damage: Callable[[str, str], Path]
) -> None:
    path = damage(name, case)
    with pytest.raises(ValueError, match=rf"{path.name}: .*it is made again"):
        TokenCache((place / "cache").resolve())


def test_there_are_enough_cases(place: Path) -> None:
    files = (*LOADED_BY_A_FINISHED_RUN, *IN_A_CHECKPOINT, *IN_A_CACHE)
    assert len(files) * len(CASES) >= 300
    restore(place / "run", torch.device("cpu"))
    assert newest_of(place / "run")[1] == []
    TokenCache((place / "cache").resolve())


@pytest.mark.parametrize(
    "name",
    [
        "run/run.json",
        "clinical/adapter/clinical/adapter_model.safetensors",
        "base/config.json",
        "base/model.safetensors",
        "base/tokenizer.model",
        "cache/tokens.bin",
    ],
)
def test_a_command_ends_in_2_and_one_line(
    name: str, place: Path, damage: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = damage(name, "flip-1")
    commands = [(train.main, ["--resume", "--out", str(place / "run")])]
    if not name.startswith("clinical"):
        commands.append((eval.main, ["--run", str(place / "run")]))
    for main, arguments in commands:
        capfd.readouterr()
        assert main(arguments) == 2
        (line,) = capfd.readouterr().err.splitlines()
        folder = "tokenizer" if "tokenizer" in name else path.parent.name
        assert path.name in line or folder in line


def test_another_tokenizer_is_not_resumed(
    place: Path, damage: Callable[[str, str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    damage("base/tokenizer.model", "swapped")
    assert train.main(["--resume", "--out", str(place / "run")]) == 2
    assert "the content of the tokenizer is not what it was" in capfd.readouterr().err


def test_the_rot_of_the_best_checkpoint_is_told_before_the_run_goes_on(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = place / "run"
    steps = sorted((out / "checkpoints").glob("step-*"))
    best = newest_of(out)[0].state["position"]["best"]["step"]  # type: ignore[union-attr]
    assert best < 8
    path = out / f"checkpoints/step-{best:06d}/weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capfd.readouterr()
    assert train.main(["--resume", "--out", str(out)]) == 2
    assert "put it back, or resume with --keep last" in capfd.readouterr().err
    assert sorted((out / "checkpoints").glob("step-*")) == steps
    path.write_bytes(whole)
