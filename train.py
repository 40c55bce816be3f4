"""Train one stage of the two-stage adaptation of a LLaMA base to clinical notes.

    python train.py --stage clinical                     # 1: one adapter learns to read the notes
    python train.py --stage downstream --task mor        # 2: head and second adapter, one outcome
    python eval.py --run runs/downstream                 # AUROC with its interval

Without further arguments these run on an embedded tiny base and a synthetic cohort, on a CPU. On
your own base and notes:

    python train.py --stage clinical --model DIR --data NOTES.csv --text-column text \
        --out runs/clinical
    python train.py --stage downstream --task label --model DIR --data TABLE.csv \
        --text-column text --label-column label --init-adapter runs/clinical --out runs/label

Several GPUs or processes share a run when torchrun starts it:

    torchrun --nproc-per-node 8 train.py --stage clinical ...

With --dry-run it says what it would do and what that would take, and stops. What otherwise
happens, in the order of `training/run.py`:

    config   flags, --config file and stage defaults become one checked RunConfig
    data     notes are tokenised into a cache, split by patient and cut into segments   (data/)
    model    the base is read and frozen, adapters are attached or loaded       (model/, lora/)
    loop     forward, backward, sum over ranks, check, clip, AdamW; validate; save  (training/)
    files    adapters in PEFT layout, head, run.json

Exit codes: 0 done; 1 the run failed; 2 something typed or given is wrong; 143 stopped by SIGTERM
with a checkpoint saved, to be continued with --resume.
"""

import sys
from collections.abc import Sequence

from evaluation.metrics import validation_score
from model.ending import exit_code
from training.command_line import read_command
from training.dry_run import dry_run
from training.run import run


def main(arguments: Sequence[str]) -> int:
    """Read the command line, train, and return the exit code."""

    def work() -> None:
        command = read_command(arguments)
        if command.dry_run:
            dry_run(command.config, resume=command.resume, overwrite=command.overwrite)
            return
        run(
            command.config,
            score=validation_score(command.config),
            resume=command.resume,
            overwrite=command.overwrite,
        )

    return exit_code(
        "train.py",
        arguments,
        work,
        interrupted="interrupted; continue from the last checkpoint with --resume",
        out_of_memory="out of memory; try a smaller --micro-tokens",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
