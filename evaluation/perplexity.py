"""Perplexity over whole notes, with the adapters and without.

exp(summed negative log-likelihood / number of scored tokens): every token of a note counts the
same, wherever the note was cut, and the mean is never taken over batches.
"""

import math

from lora.attach import adapter_names, without_adapters
from model.ending import RunFailed
from training.assemble import LanguageDataset
from training.objective import LanguageModelling
from training.parallel import Ranks
from training.validation import validate_language


def language_metrics(
    objective: LanguageModelling, pieces: LanguageDataset, ranks: Ranks, *, micro_tokens: int
) -> dict[str, float | int | None]:
    """Return `tokens` (those scored), `perplexity`, and `perplexity_base` of the base alone.

    `perplexity_base` is None where the model has no adapters.
    Raises ValueError without a token to score, RunFailed for a loss that is not finite.
    """
    tokens = pieces.scored_tokens
    if tokens == 0:
        raise ValueError("there is no token to score: name other data or another split")

    def perplexity() -> float:
        found = validate_language(objective, pieces, ranks, micro_tokens=micro_tokens)
        if not math.isfinite(found["loss"]):
            raise RunFailed("the loss on the notes is not finite")
        return found["perplexity"]

    adapted = perplexity()
    base = None
    if adapter_names(objective.model):
        with without_adapters(objective.model):
            base = perplexity()
    return {"tokens": tokens, "perplexity": adapted, "perplexity_base": base}
