"""Text from a language model, token by token: greedy, or drawn with temperature, top-k and top-p.

Letters: n sequences still running, V vocabulary. The invariant: a sequence's tokens follow from
the model, its prompt, the settings and its own seed; which other prompts run beside it, and
whether keys and values are cached or computed again, does not matter, up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import TokenBatch
from model.cache import KVCache
from model.decoding import Plan
from model.heads import CausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """How the next token is chosen. The settings act in this order, as in transformers."""

    max_new_tokens: int
    # Divides a positive logit and multiplies a negative one of every token that already stands in
    # the sequence (Keskar et al., arXiv 1909.05858); 1 is off.
    repetition_penalty: float = 1.0
    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float = 1.0  # keep the most likely tokens that together reach p (arXiv 1904.09751)
    stop_ids: tuple[int, ...] = ()  # a sequence ends with the first of these, which it keeps

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; at least 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; above 0, 1 is off")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; at least 1, or None for off")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; above 0 and at most 1, which is off")


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    has_ended: Callable[[Sequence[int]], bool] | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """The new tokens of each prompt, all prompts together; equal prompts are read once.

    Args:
        prompts: token ids, BOS included where the model expects one; of any lengths.
        seed: prompt i draws with the seed `seed + i`,
        seeds: or with one of its own.
        has_ended: whether a sequence ends here, by its new tokens so far.
        use_cache: False computes every token again at each step, which is slow and the same.
    """
    sequences = [list(prompt) for prompt in prompts]
    seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
    for _ in _steps(model, sequences, config, seeds, has_ended, use_cache):
        pass
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


def stream(
    model: CausalLM, prompt: Sequence[int], config: GenerationConfig, *, seed: int = 0
) -> Iterator[int]:
    """The tokens that `generate` gives of one prompt, each as soon as it is chosen."""
    sequence = list(prompt)
    for _ in _steps(model, [sequence], config, [seed]):
        yield sequence[-1]


@torch.inference_mode()
def _steps(
    model: CausalLM,
    sequences: list[list[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    has_ended: Callable[[Sequence[int]], bool] | None = None,
    use_cache: bool = True,
) -> Iterator[None]:
    """Lengthen every running sequence, which begins as its prompt, by one token at each step."""
    _check_prompts(model, sequences, config)
    weight = model.model.embed_tokens.weight
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert len(generators) == len(sequences)
    begins = [len(sequence) for sequence in sequences]
    running = list(range(len(sequences)))
    pieces: list[Sequence[int]] = list(sequences)  # what the network has not seen yet
    cache, rows = None, running
    if use_cache and sequences:
        distinct = {tuple(sequence): None for sequence in sequences}
        places = {prompt: place for place, prompt in enumerate(distinct)}
        rows, pieces = [places[tuple(sequence)] for sequence in sequences], list(distinct)
        capacity = _places_in_front(model) + max(map(len, sequences)) + config.max_new_tokens
        cache = KVCache(
            model.config, len(pieces), capacity, dtype=weight.dtype, device=weight.device
        )
    plan = None
    if cache is not None:
        plan = Plan.of(model, cache.capacity, count=len(sequences), tokens=config.max_new_tokens)
    stop_ids = set(config.stop_ids)
    for _ in range(config.max_new_tokens):
        if not running:
            break
        if cache is None or plan is None or cache.is_empty:
            batch = _joined(pieces).to(weight.device)
            hidden_MD = model.model(batch, cache=cache)
            last_nD = hidden_MD[batch.segments.cu_seqlens[1:] - 1]
            if len(pieces) < len(running):  # a row for each of equal prompts
                assert cache is not None
                last_nD = last_nD[rows]
                cache.keep(rows)
            logits_nV = model.head_logits(last_nD)
        else:
            logits_nV = plan.step([token for (token,) in pieces], cache)
        logits_nV = _adjusted(logits_nV, [sequences[i] for i in running], config)
        tokens = _choose(logits_nV, [generators[i] for i in running], config)
        for i, token in zip(running, tokens, strict=True):
            sequences[i].append(token)
        yield
        rows = [
            row
            for row, (i, token) in enumerate(zip(running, tokens, strict=True))
            if token not in stop_ids
            and not (has_ended is not None and has_ended(sequences[i][begins[i] :]))
        ]
        if cache is not None and len(rows) < len(running):
            cache.keep(rows)
        running = [running[row] for row in rows]
        pieces = [sequences[i] if cache is None else sequences[i][-1:] for i in running]


def _check_prompts(
    model: CausalLM, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> None:
    limit, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; begin with the BOS token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompt {i} has an id outside the vocabulary of {vocabulary}")
        in_front = _places_in_front(model)
        if in_front + len(prompt) + config.max_new_tokens > limit:
            adapters = f" and {in_front} places of the adapters" if in_front else ""
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens "
                f"{config.max_new_tokens}{adapters} that passes the model's {limit} positions"
            )


def _places_in_front(model: CausalLM) -> int:
    """Positions that adapters take in front of every sequence."""
    return model.model.virtual_tokens + model.model.prefix_tokens


def _joined(pieces: Sequence[Sequence[int]]) -> TokenBatch:
    offsets = [0]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return TokenBatch.from_arrays([token for piece in pieces for token in piece], offsets)


def _adjusted(
    logits_nV: Tensor, sequences: Sequence[Sequence[int]], config: GenerationConfig
) -> Tensor:
    """Penalised and tempered logits, float32 or wider, with -inf where top-k and top-p cut."""
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    if config.repetition_penalty != 1.0:
        has_occurred_nV = torch.zeros(logits_nV.shape, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            has_occurred_nV[row, list(sequence)] = True
        penalty = config.repetition_penalty
        penalised_nV = torch.where(logits_nV < 0, logits_nV * penalty, logits_nV / penalty)
        logits_nV = torch.where(has_occurred_nV.to(logits_nV.device), penalised_nV, logits_nV)
    if config.temperature == 0.0:
        return logits_nV
    logits_nV = logits_nV / config.temperature
    if config.top_k is not None and config.top_k < logits_nV.shape[1]:
        least_n1 = logits_nV.topk(config.top_k).values[:, -1:]
        logits_nV = logits_nV.masked_fill(logits_nV < least_n1, float("-inf"))
    if config.top_p < 1.0:
        # From the least likely up: cut while all that is cut has at most 1 - p.
        ordered_nV, order_nV = logits_nV.sort(stable=True)
        is_cut_nV = ordered_nV.softmax(-1).cumsum(-1) <= 1.0 - config.top_p
        is_cut_nV[:, -1] = False
        is_cut_nV = torch.zeros_like(is_cut_nV).scatter(1, order_nV, is_cut_nV)
        logits_nV = logits_nV.masked_fill(is_cut_nV, float("-inf"))
    return logits_nV


def _choose(
    logits_nV: Tensor, generators: Sequence[torch.Generator], config: GenerationConfig
) -> list[int]:
    """The most likely token of each row, or one drawn by its own generator."""
    if config.temperature == 0.0:
        return logits_nV.argmax(-1).tolist()
    # Inverse transform sampling: the first token whose cumulated probability passes a uniform
    # draw, which is scaled by the last of them because rounding may leave it beside 1.
    cumulated_nV = logits_nV.double().softmax(-1).cumsum(-1)
    draws = [torch.rand((), dtype=torch.float64, generator=g) for g in generators]
    draws_n1 = torch.stack(draws)[:, None].to(cumulated_nV.device) * cumulated_nV[:, -1:]
    return torch.searchsorted(cumulated_nV, draws_n1, right=True).squeeze(1).tolist()
