"""Kills a study at given moments and calls it again, in processes that share one import.

    python -m tests.evaluation.kill_study MODULE FOLDER EVENT[,EVENT...] ARGUMENTS

Each call dies by SIGKILL at its EVENT-th file operation inside FOLDER, the last one ends by itself.
Prints how each ended. This process itself never computes, so that a child forked from it is as good
as a new one.
"""

import importlib
import os
import sys

from tests.training.kill_server import die_at


def main() -> None:
    name, folder, events, *words = sys.argv[1:]
    module = importlib.import_module(name)
    for event in (*map(int, events.split(",")), None):
        child = os.fork()
        if child == 0:
            if event is not None:
                die_at(folder, event, 0)
            os._exit(module.main(words))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
