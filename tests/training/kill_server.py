"""Starts train.py many times in processes that can be killed at any moment, without their imports.

One JSON request a line comes in, one answer a line goes out. Each request forks one process a rank,
which lives as `python train.py ARGUMENTS` (under torchrun, for two ranks) would. It dies by SIGKILL
`after` seconds later than its `event`-th file operation inside `folder`, where opening, renaming,
deleting and making count. The invariant: this process itself never computes, so that a child forked
from it is as good as a new one.
"""

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any

import duckdb  # noqa: F401 (this and the next: what a run imports late)
import torch
import torch._dynamo
import torch.utils.tensorboard
import tyro  # noqa: F401

import train

WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
DEADLINE = 60.0  # seconds in which the ranks of a run must have ended


def die_at(folder: str, event: int, after: float) -> None:
    """Arm this process: it will be killed by the kernel, so nothing is flushed or tidied up."""
    seen = 0

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name not in WATCHED or not str(arguments[0]).startswith(folder):
            return
        seen += 1
        if seen != event:
            return
        if after == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()

    sys.addaudithook(watch)


def child(request: dict[str, Any], rank: int, port: int) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["ranks"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    if rank == request.get("victim"):
        die_at(request["folder"], request["event"], request["after"])
    if "file_bytes" in request:  # as a full disk: no file can grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    return train.main(request["arguments"])


def serve(request: dict[str, Any]) -> list[int]:
    """The exit code of each rank; minus the signal's number for one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(request, rank, port)
            finally:
                os._exit(code)
        ranks.append(pid)
    codes: dict[int, int] = {}
    began = time.monotonic()
    while len(codes) < len(ranks):
        for pid in set(ranks) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] < 0 and request.get("all"):  # a pulled plug takes every rank
                    for other in set(ranks) - set(codes):
                        os.kill(other, signal.SIGKILL)
        if time.monotonic() - began > DEADLINE:
            for pid in set(ranks) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
