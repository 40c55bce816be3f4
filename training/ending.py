"""How a command ends, whatever happens: an exit code and, for a failure, one line.

Invariant: no traceback and no text of a note reaches the terminal unless --debug asks for them.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from training.loop import RunFailed, Stopped

DONE, FAILED, WRONG_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def exit_code(
    prog: str, arguments: Sequence[str], work: Callable[[], object], *, interrupted: str
) -> int:
    """Do the work and return the exit code; `interrupted` is what to say after Ctrl-C."""
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        code, line = _ending(error, interrupted)
        if "--debug" in arguments:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        speaker = prog if rank == "0" else f"{prog} (rank {rank})"
        print(f"{speaker}: {' '.join(line.split())}", file=sys.stderr)
        return code
    return DONE


def _ending(error: BaseException, interrupted: str) -> tuple[int, str]:
    match error:
        case ValueError():
            return WRONG_INPUT, str(error)
        case Stopped():
            return TERMINATED, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, interrupted
        case RunFailed() | OSError():
            return FAILED, str(error)
        case torch.OutOfMemoryError() | MemoryError():
            return FAILED, "out of memory; try a smaller --micro-tokens"
        case RuntimeError():
            return FAILED, f"{type(error).__name__}: {error}"
    # A fault of this program. Its message could quote data, so only its kind is shown.
    return FAILED, f"unexpected {type(error).__name__}; --debug shows where"
