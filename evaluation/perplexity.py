"""Perplexity over whole notes, of a run and of its base, for each source of notes that has a name.

exp(summed negative log-likelihood / number of scored tokens): every token of a note counts the
same, wherever the note was cut, and the mean is never taken over batches.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lora.attach import adapter_names, without_adapters
from model.ending import RunFailed
from training.notes import LanguageDataset
from training.objective import LanguageModelling
from training.parallel import Ranks
from training.validation import joint_loss, perplexity, validate_language


def language_metrics(
    objective: LanguageModelling,
    parts: Mapping[str, LanguageDataset],
    ranks: Ranks,
    *,
    micro_tokens: int,
    base: Callable[[], LanguageModelling | None],
) -> dict[str, Any]:
    """Return `tokens` (those scored), `perplexity` and `perplexity_base`, and both `per_source`.

    parts: what is scored by the name of its source; one without a name is in no `per_source`.
    base: makes what a run without adapters was trained from, once the run itself is scored. Where
    it has none to give, `perplexity_base` is None.
    Raises ValueError without a token to score, RunFailed for a loss that is not finite.
    """
    tokens = {name: part.scored_tokens for name, part in parts.items() if part.scored_tokens}
    if not tokens:
        raise ValueError("there is no token to score: name other data or another split")

    def losses(of: LanguageModelling) -> dict[str, float]:
        found = {
            name: validate_language(of, parts[name], ranks, micro_tokens=micro_tokens)["loss"]
            for name in tokens
        }
        if not all(map(math.isfinite, found.values())):
            raise RunFailed("the loss on the notes is not finite")
        return found

    trained, untrained = losses(objective), None
    if adapter_names(objective.model):
        with without_adapters(objective.model):
            untrained = losses(objective)
    elif (before := base()) is not None:
        untrained = losses(before)

    def metrics(names: list[str]) -> dict[str, Any]:
        counts = {name: tokens[name] for name in names}

        def joint(found: Mapping[str, float]) -> float:
            return perplexity(joint_loss({name: found[name] for name in names}, counts))

        return {
            "tokens": sum(counts.values()),
            "perplexity": joint(trained),
            "perplexity_base": None if untrained is None else joint(untrained),
        }

    named = {name: metrics([name]) for name in tokens if name}
    return metrics(list(tokens)) | ({"per_source": named} if named else {})
