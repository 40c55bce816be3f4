"""How a command is read and how it ends, whatever happens: an exit code and, for a failure, a line.

    0 done   1 failed   2 the user's input is wrong   130 after Ctrl-C   143 after SIGTERM

Invariant: no traceback and no text of a note reaches the terminal unless --debug asks for them.
"""

import argparse
import difflib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

DONE, FAILED, WRONG_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

# What the system says of a path that cannot be used as it was given; a full disk is not among them.
_WRONG_PATH = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault in what the user typed; exit code 1."""


class Stopped(RuntimeError):
    """The run was told to end by SIGTERM and has saved a checkpoint; exit code 143."""


def exit_code(
    prog: str,
    arguments: Sequence[str],
    work: Callable[[], object],
    *,
    interrupted: str,
    out_of_memory: str = "out of memory",
) -> int:
    """Do the work and return the exit code.

    interrupted, out_of_memory: what to say after Ctrl-C, and when memory runs out.
    """
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter flushes at its end
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, line = _ending(error, interrupted, out_of_memory)
        rank = os.environ.get("RANK", "0")
        speaker = prog if rank == "0" else f"{prog} (rank {rank})"
        print(f"{speaker}: {' '.join(line.split())}", file=sys.stderr)
        return code
    return DONE


def _ending(error: BaseException, interrupted: str, out_of_memory: str) -> tuple[int, str]:
    match error:
        case ValueError():
            return WRONG_INPUT, str(error)
        case Stopped():
            return TERMINATED, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, interrupted
        case OSError(errno=number) if number in _WRONG_PATH:
            # A run that has begun turns these into RunFailed, so the path is one the user named.
            return WRONG_INPUT, f"{error.filename or 'a path'} cannot be used: {error.strerror}"
        case RunFailed() | OSError():
            return FAILED, str(error)
        case torch.OutOfMemoryError() | MemoryError():
            return FAILED, out_of_memory
        case RuntimeError():
            return FAILED, f"{type(error).__name__}: {error}"
    # A fault of this program. Its message could quote data, so only its kind is shown.
    return FAILED, f"unexpected {type(error).__name__}; --debug shows where"


class CommandParser(argparse.ArgumentParser):
    """argparse for a small command: a mistake is a ValueError of one line, not an exit.

    No abbreviations, no flag twice, and an unknown flag names the nearest right one. `--debug` is
    there already.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of a failure")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """What the arguments say; ValueError for a mistake, SystemExit(0) after --help."""
        flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        known = [option for action in self._actions for option in action.option_strings]
        for flag in flags:
            if flag not in known:
                near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
                raise ValueError(f"{flag} is not a flag; {hint}")
            if flags.count(flag) > 1:
                raise ValueError(f"{flag} is given twice; give it once")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
