"""Trains one stage.

    python train.py --stage clinical
    python train.py --stage downstream --task mor

See `training.run.run`.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.metrics import classification_metrics
from training.command_line import read_command
from training.run import run


def score(labels: np.ndarray, logits: np.ndarray, names: Sequence[str]) -> Mapping[str, float]:
    metrics = classification_metrics(labels, logits, names)
    return {k: metrics[k] for k in ("auroc", "accuracy", "f1") if metrics[k] is not None}


def main(arguments: Sequence[str]) -> int:
    command = read_command(arguments)
    run(command.config, score=score, resume=command.resume, overwrite=command.overwrite)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
