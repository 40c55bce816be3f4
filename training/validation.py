"""Validation during training: the loss, and for classifiers a score, over always the same notes.

Invariant: the result does not depend on the number of ranks beyond rounding, because every note is
scored once: losses are summed, and each rank fills its own rows of one table of scores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from data.loader import iter_batches
from data.packing import ClassificationNotes, LanguagePieces, SegmentDataset
from training.objective import Classification, LanguageModelling
from training.parallel import Ranks

# (labels int64 [n] or [n, C], logits float64 [n, C], names of the C classes) -> numbers by name.
Score = Callable[[np.ndarray, np.ndarray, Sequence[str]], Mapping[str, float]]


@torch.inference_mode()
def validate_language(
    objective: LanguageModelling, pieces: SegmentDataset, ranks: Ranks, *, micro_tokens: int
) -> dict[str, float]:
    """Mean loss per scored token, and its exponential, the perplexity."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    scored = 0.0
    batches = iter_batches(
        pieces, micro_tokens=micro_tokens, rank=ranks.rank, world_size=ranks.count
    )
    filler = partial(pieces.batch, np.zeros(1, np.int64))
    for batch, is_own in ranks.in_step(batches, filler):
        loss = objective.loss(batch, dropout_seed=None)
        if not is_own:
            continue
        loss_sum += loss.loss_sum
        scored += loss.denominator
    total, scored = ranks.sum_floats([float(loss_sum), scored])
    mean = total / scored
    return {"loss": mean, "perplexity": perplexity(mean)}


def validate_sources(
    objective: LanguageModelling,
    sources: Mapping[str, LanguagePieces],
    ranks: Ranks,
    *,
    micro_tokens: int,
) -> dict[str, float]:
    """Loss and perplexity over the tokens of all sources, and `perplexity_NAME` of each."""
    found = {
        name: validate_language(objective, pieces, ranks, micro_tokens=micro_tokens)
        for name, pieces in sources.items()
    }
    tokens = {name: pieces.scored_tokens for name, pieces in sources.items()}
    mean = joint_loss({name: each["loss"] for name, each in found.items()}, tokens)
    each = {f"perplexity_{name}": of["perplexity"] for name, of in found.items()}
    return {"loss": mean, "perplexity": perplexity(mean), **each}


def joint_loss(losses: Mapping[str, float], tokens: Mapping[str, int]) -> float:
    """The mean loss of all tokens, from each source's mean and count."""
    return sum(losses[name] * tokens[name] for name in losses) / sum(tokens.values())


def perplexity(loss: float) -> float:
    """The exponential of a mean loss, as far as float64 goes."""
    return math.exp(min(loss, 700.0))


@torch.inference_mode()
def validate_classifier(
    objective: Classification,
    notes: ClassificationNotes,
    rows: np.ndarray,
    ranks: Ranks,
    *,
    micro_tokens: int,
    label_names: Sequence[str],
    score: Score | None,
) -> dict[str, float]:
    """Mean loss per note (per note and label), all weighing the same, and what `score` says.

    rows: [n], the notes' rows in the cache.
    """
    labels, logits_nC = classifier_logits(
        objective, notes, rows, ranks, micro_tokens=micro_tokens, n_classes=len(label_names)
    )
    if labels.ndim == 2:
        loss = float((np.logaddexp(0.0, logits_nC) - labels * logits_nC).mean())
    else:
        highest = logits_nC.max(axis=1)
        partition = highest + np.log(np.exp(logits_nC - highest[:, None]).sum(axis=1))
        loss = float((partition - logits_nC[np.arange(len(rows)), labels]).mean())
    return {"loss": loss, **(score(labels, logits_nC, label_names) if score else {})}


@torch.inference_mode()
def classifier_logits(
    objective: Classification,
    notes: ClassificationNotes,
    rows: np.ndarray,
    ranks: Ranks,
    *,
    micro_tokens: int,
    n_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [n] (zeros where the notes have none) and logits float64 [n, C], on every rank.

    Where notes have several labels these are int64 [n, C] of 0 and 1.
    rows: [n], the notes' rows in the cache, in the order that is wanted.
    """
    logits_nC = np.zeros((len(rows), n_classes))
    labels = np.zeros(logits_nC.shape if notes.multilabel else len(rows), np.int64)
    by_row = np.argsort(rows)
    batches = iter_batches(
        notes, micro_tokens=micro_tokens, rank=ranks.rank, world_size=ranks.count
    )
    filler = partial(notes.batch, np.zeros(1, np.int64))
    for batch, is_own in ranks.in_step(batches, filler):
        scores_nC = objective.scores(batch)
        if not is_own:
            continue
        place = by_row[np.searchsorted(rows, batch.rows, sorter=by_row)]
        if batch.targets is not None:
            labels[place] = batch.targets
        logits_nC[place] = scores_nC.double().cpu().numpy()
    return ranks.sum_array(labels), ranks.sum_array(logits_nC)
