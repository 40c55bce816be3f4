"""Killed by SIGKILL at any moment and resumed, a run ends in the bytes of an uninterrupted one.

The moments are file operations (every one of a checkpoint's writing among them) and random delays.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_parallel import GLOO_FAILED, as_file
from training.config import RunConfig
from training.run_folder import HEAD_FILE

MakeConfig = Callable[..., RunConfig]
Serve = Callable[..., list[int]]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def serve(repository_root: Path) -> Iterator[Serve]:
    """Runs train.py as `kill_server` describes and returns the exit code of each rank."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.kill_server"],
        cwd=repository_root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def request(arguments: list[str], folder: Path, ranks: int = 1, **more: Any) -> list[int]:
        log = folder.with_name(f"{folder.name}.log")
        log.unlink(missing_ok=True)
        asked = {"arguments": arguments, "folder": str(folder), "ranks": ranks, "log": str(log)}
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asked | more) + "\n")
        process.stdin.flush()
        return list(json.loads(process.stdout.readline()))

    yield request
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def content(out: Path) -> dict[str, Any]:
    """Every byte that a run leaves, but for the clock's: run.json and TensorBoard's files."""
    found: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes()
        for folder in ("adapter", "checkpoints", HEAD_FILE)
        for path in (out / folder, *(out / folder).rglob("*"))
        if path.is_file()
    }
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
        found[f"metrics {len(found)}"] = entry
    return found


def shown(out: Path) -> str:
    return out.with_name(f"{out.name}.log").read_text()


def kill_and_resume(
    config: RunConfig, serve: Serve, tmp_path: Path, moments: list[dict[str, Any]], ranks: int = 1
) -> tuple[int, int]:
    """Start, kill and resume through all moments, then to the end; compare with a quiet run.

    Returns how many kills there were, and how many of them met a checkpoint half written.
    """
    whole, out = tmp_path / "whole", tmp_path / "killed"
    start = as_file(replace(config, out=str(whole)), tmp_path)
    assert serve(start, whole, ranks) == [0] * ranks, shown(whole)
    start = as_file(replace(config, out=str(out)), tmp_path)
    resume = ["--resume", "--out", str(out)]
    kills = half_written = failed_connections = 0
    while moments:
        began = (out / "run.json").is_file()
        codes = serve(resume if began else start, out, ranks, **moments[0])
        if KILLED not in codes:
            is_environment = any(text in shown(out) for text in GLOO_FAILED)
            assert is_environment and failed_connections < 5 and any(codes), (codes, shown(out))
            failed_connections += 1
            continue
        # The surviving rank notices and ends by itself.
        assert moments[0].get("all") or all(code in (KILLED, 1) for code in codes), codes
        moments.pop(0)
        kills += 1
        half_written += any((out / "checkpoints").glob(".*.partial"))
    while (codes := serve(resume, out, ranks)) != [0] * ranks:
        assert any(text in shown(out) for text in GLOO_FAILED) and failed_connections < 5
        failed_connections += 1
    assert "Traceback" not in shown(out)
    assert content(out) == content(whole)
    assert not list(out.rglob(".*.partial"))
    return kills, half_written


def random_moments(count: int, seed: int, victims: int) -> list[dict[str, Any]]:
    """Up to some checkpoints after the start, at a file operation or a while after it."""
    rng = random.Random(seed)
    return [
        {
            "victim": rng.randrange(victims),
            "all": rng.random() < 0.5,
            "event": rng.randint(1, 60),
            "after": rng.choice([0, 0, rng.uniform(0.0005, 0.03)]),
        }
        for _ in range(count)
    ]


def test_killed_in_checkpoints_and_anywhere(
    make_config: MakeConfig, serve: Serve, tmp_path: Path
) -> None:
    """One rank: at six operations of the first checkpoints and at four random moments."""
    config = make_config("downstream", steps=40, checkpoint_every=2, eval_every=20)
    at_operations = [{"victim": 0, "event": event, "after": 0} for event in (9, 14, 19, 24, 31, 38)]
    moments = at_operations + random_moments(4, seed=0, victims=1)
    kills, half_written = kill_and_resume(config, serve, tmp_path, moments)
    assert kills == 10 and half_written >= 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_twenty_random_moments(
    ranks: int, make_config: MakeConfig, serve: Serve, tmp_path: Path
) -> None:
    config = make_config("clinical", steps=300, checkpoint_every=2, eval_every=50)
    # The other rank touches no file of the run, so operations are the first rank's.
    moments = random_moments(20, seed=ranks, victims=1)
    kills, half_written = kill_and_resume(config, serve, tmp_path, moments, ranks)
    assert kills == 20 and half_written >= 1
    print(f"{ranks} rank(s): {kills} kills, {half_written} in a half-written checkpoint")


def test_a_full_disk_ends_in_1_and_names_the_last_good_checkpoint(
    make_config: MakeConfig, serve: Serve, tmp_path: Path
) -> None:
    """No file may grow beyond what run.json needs; with room again the run ends as if never cut."""
    config = make_config("clinical", steps=8, checkpoint_every=2)
    whole, out = tmp_path / "whole", tmp_path / "full"
    assert serve(as_file(replace(config, out=str(whole)), tmp_path), whole) == [0]
    start = as_file(replace(config, out=str(out)), tmp_path)
    assert serve(start, out, file_bytes=5000) == [1], shown(out)
    last = shown(out).splitlines()[-1]
    assert "step 2: a file could not be written" in last and "no checkpoint had been" in last
    resume = ["--resume", "--out", str(out)]
    assert serve(resume, out, victim=0, event=60, after=0) == [KILLED]
    saved = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert saved
    for size in (5000, 1500):  # in the middle of the loop, and at run.json
        assert serve(resume, out, file_bytes=size) == [1], shown(out)
        last = shown(out).splitlines()[-1]
        assert last.startswith("train.py: step ") and last.endswith(f"checkpoints/{saved[-1]}")
        assert "Traceback" not in shown(out)
    assert serve(resume, out) == [0], shown(out)
    assert content(out) == content(whole)
