"""Segments of a flat token stream: notes cut into pieces for language modelling, one segment a note for classification."""

from typing import NamedTuple

import numpy as np


class PackedBatch(NamedTuple):
    """One flat stream of M tokens in n segments, without padding; attention and positions stay inside a segment."""

    input_ids: np.ndarray  # int64 [M]
    labels: (
        np.ndarray | None
    )  # int64 [M]: the id that token i itself should be predicted as, -100 = not scored
    offsets: np.ndarray  # int32 [n + 1]: segment s is input_ids[offsets[s]:offsets[s + 1]]
    sample_ids: np.ndarray  # int64 [n]: note row * 2**20 + piece, unique and stable
    targets: (
        np.ndarray | None
    )  # int64 [n], float32 [n, C], or None: what a classifier should answer
    rows: np.ndarray  # int64 [n]: the note's index in its source
