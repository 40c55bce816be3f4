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
    except ValueError as error:
        code, line = WRONG_INPUT, str(error)
    except Stopped as stopped:
        code, line = TERMINATED, str(stopped)
    except KeyboardInterrupt:
        code, line = INTERRUPTED, interrupted
    except (RunFailed, OSError) as error:
        code, line = FAILED, str(error)
    except (torch.OutOfMemoryError, MemoryError):
        code, line = FAILED, "out of memory; try a smaller --micro-tokens"
    except RuntimeError as error:
        code, line = FAILED, f"{type(error).__name__}: {error}"
    except Exception as error:
        # A fault of this program. Its message could quote data, so only its kind is shown.
        code, line = FAILED, f"unexpected {type(error).__name__}; --debug shows where"
    else:
        return DONE
    if "--debug" in arguments:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    speaker = prog if rank == "0" else f"{prog} (rank {rank})"
    print(f"{speaker}: {' '.join(line.split())}", file=sys.stderr)
    return code
