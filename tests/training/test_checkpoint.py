"""Checkpoints are whole or absent, every changed byte is noticed, and the good ones are kept."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import model.files
from model.files import read_json
from training.checkpoint import (
    load_checkpoint,
    load_weights,
    newest_good,
    prune,
    restore_random_state,
    save_checkpoint,
    saved_steps,
    step_folder,
    sweep,
)

FILES = (
    "weights.safetensors",
    "optimiser.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
)


RUN = "the run's identity"


def save(folder: Path, step: int, *, best: int | None = None) -> Path:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "a": torch.randn(8, 4, generator=generator),
        "b": torch.randn(3, generator=generator),
    }
    position = {"step": step, "best": None if best is None else {"step": best}}
    return save_checkpoint(
        folder,
        step,
        run=RUN,
        weights=weights,
        optimiser={"a/exp_avg": weights["a"] * 2},
        state={"position": position},
    )


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = save(tmp_path, 7)
    expected = torch.rand(3)
    loaded = load_checkpoint(path, run=RUN)
    restore_random_state(loaded.random)
    assert loaded.step == 7 and loaded.state["position"]["step"] == 7
    assert torch.equal(loaded.optimiser["a/exp_avg"], loaded.weights["a"] * 2)
    assert torch.equal(load_weights(path, run=RUN)["b"], loaded.weights["b"])
    assert torch.equal(torch.rand(3), expected)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def flip_the_first_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 0x10
    path.write_bytes(content)


def cut_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    path.unlink()


def take_from_another_step(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-000001" / path.name, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        flip_the_first_byte,
        cut_the_end,
        empty,
        lengthen,
        remove,
        take_from_another_step,
    ],
)
def test_damage_is_noticed_and_an_older_checkpoint_taken(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    for step in (1, 2, 3):
        torch.manual_seed(step)  # the generators' states differ too
        save(tmp_path, step)
    path = step_folder(tmp_path, 3)
    damage(path / name)
    with pytest.raises(ValueError, match=rf"step-000003/{name}"):
        load_checkpoint(path, run=RUN)
    found, complaints = newest_good(tmp_path, run=RUN)
    assert found is not None and found.step == 2
    assert len(complaints) == 1 and "step-000003" in complaints[0]


def test_a_checkpoint_of_another_run_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"step-000001/manifest\.json is of another run"):
        load_checkpoint(path, run="another run's identity")


def test_no_good_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "absent", run=RUN) == (None, [])
    path = save(tmp_path, 4)
    flip_a_bit(path / "weights.safetensors")
    found, complaints = newest_good(tmp_path, run=RUN)
    assert found is None and "SHA-256" in complaints[0]


class Killed(BaseException):
    """Stands for a process that ends here: nothing may catch it and tidy up."""


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
def test_a_save_that_dies_anywhere_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Die at the first, second, ... call of a system function, until a save survives."""
    save(tmp_path, 1)
    expected = load_checkpoint(step_folder(tmp_path, 1), run=RUN).weights
    real = getattr(os, call)
    deaths = 0
    while True:
        calls = 0

        def dying(*args: object, _last: int = deaths, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > _last:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            # A killed process removes nothing behind itself.
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            patch.setattr(model.files.os, call, dying)
            try:
                save(tmp_path, 2)
                survived = True
            except Killed:
                survived = False
        found, complaints = newest_good(tmp_path, run=RUN)
        assert found is not None and not complaints
        if survived:
            assert found.step == 2
            break
        if found.step == 2:  # died after the rename: the new one is complete
            assert read_json(step_folder(tmp_path, 2) / "manifest.json")["step"] == 2
            shutil.rmtree(step_folder(tmp_path, 2))
        else:
            assert found.step == 1
            assert all(torch.equal(found.weights[k], expected[k]) for k in expected)
        sweep(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]
        deaths += 1
    assert deaths >= 5


def test_the_newest_stay_and_those_they_call_best(tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 4), (10, 4)):
        save(tmp_path, step, best=best)
    prune(tmp_path, 10, 2)
    assert saved_steps(tmp_path) == [4, 8, 10]
    save(tmp_path, 12, best=12)
    prune(tmp_path, 12, 1)
    assert saved_steps(tmp_path) == [12]


def test_damaged_checkpoints_neither_stop_a_pruning_nor_outlive_it(tmp_path: Path) -> None:
    """Steps 6 and 8 were passed over, the run went on from 4, and step 2 rotted meanwhile."""
    for step in (2, 4, 5, 6, 8):
        save(tmp_path, step, best=4)
    for step in (2, 6, 8):
        flip_the_first_byte(step_folder(tmp_path, step) / "state.json")
    prune(tmp_path, 5, 3)
    assert saved_steps(tmp_path) == [2, 4, 5]
    save(tmp_path, 6, best=6)
    prune(tmp_path, 6, 1)
    assert saved_steps(tmp_path) == [6]


def test_the_same_moment_makes_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        torch.manual_seed(3)
        save(tmp_path / folder, 4, best=2)
    for name in FILES:
        one, other = (tmp_path / f / "step-000004" / name for f in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_a_deletion_that_dies_shows_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def dying(path: Path) -> None:
        (path / "weights.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dying)
        with pytest.raises(Killed):
            prune(tmp_path, 2, 1)
    assert saved_steps(tmp_path) == [2]
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}
