"""A language model as strategies use it: log-likelihoods, written text, and embeddings of text.

The invariant: what is found of one prompt depends on the model, the prompt and its seed alone, up
to rounding; prompts are put together for speed, and what most of them begin with is read once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tokenizer import Tokenizer
from model.batch import TokenBatch
from model.ending import RunFailed
from model.generation import GenerationConfig, generate
from model.heads import CausalLM
from model.shared_prefix import can_share, shared_prefix

# A common beginning of fewer tokens is not worth a pass of its own.
_LEAST_SHARED = 64


class Prompt(NamedTuple):
    """What the model reads; where it does not fit, the first of `shots` are left out."""

    text: str
    shots: tuple[str, ...] = ()  # solved questions in front


class Asked(NamedTuple):
    """A continuation whose log-likelihood after a prompt is asked for."""

    prompt: Prompt
    continuation: str


class Scored(NamedTuple):
    log_likelihood: float
    is_shortened: bool  # whether the prompt lost shots, or its beginning


class Written(NamedTuple):
    text: str
    new_tokens: int
    is_shortened: bool


class Answerer(Protocol):
    """What a strategy asks of a model."""

    @property
    def positions(self) -> int:
        """Tokens that a prompt and what is written after it may have together."""
        ...

    def log_likelihoods(self, asked: Sequence[Asked]) -> list[Scored]:
        """Summed log-probability of each continuation's tokens."""
        ...

    def complete(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        seeds: Sequence[int],
        end: str = "",
    ) -> list[Written]:
        """What the model writes after each prompt, each drawn with its own seed.

        end: a text after which nothing is read, so nothing more has to be written.
        """
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector of each text [n, D]."""
        ...


class ModelAnswerer:
    """A decoder with its tokenizer.

    micro_tokens: most tokens of a forward pass; cache_tokens: most tokens whose keys and values are
    held at once while text is written. A longer prompt passes alone.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        device: torch.device,
        micro_tokens: int,
        cache_tokens: int = 1 << 15,
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.micro_tokens, self.cache_tokens = micro_tokens, cache_tokens
        front = model.model.virtual_tokens + model.model.prefix_tokens
        self._positions = model.config.max_position_embeddings - front

    @property
    def positions(self) -> int:
        return self._positions

    def log_likelihoods(self, asked: Sequence[Asked]) -> list[Scored]:
        """Sum over the continuation's tokens of log p(token | all before it); any lengths.

        The continuation's tokens are those of prompt + continuation from where the prompt's end.
        Continuations that differ in their last token alone share one pass.
        """
        rows: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        totals, is_shortened = [0.0] * len(asked), [False] * len(asked)
        for i, one in enumerate(asked):
            whole, start, is_shortened[i] = self._ids(one)
            rows.setdefault(tuple(whole[:-1]), []).append((i, start, whole[-1]))
        inputs = list(rows)
        # The row that predicts a continuation's first token is the input's own.
        limits = [min(start for _, start, _ in rows[ids]) - 1 for ids in inputs]
        for members, shared in self._alike(inputs, limits):
            parts = sorted((inputs[i] for i in members), key=len)
            with shared_prefix(self.model.model, parts[0][:shared]):
                lengths = [len(ids) - shared for ids in parts]
                for first, last in _micro_batches(lengths, self.micro_tokens):
                    chosen = parts[first:last]
                    found = self._log_probabilities(chosen, shared, rows)
                    for ids, scores in zip(chosen, found, strict=True):
                        for (i, _, _), score in zip(rows[ids], scores, strict=True):
                            totals[i] = score
        if not np.isfinite(totals).all():
            raise RunFailed("a log-likelihood is not finite")
        return [Scored(*found) for found in zip(totals, is_shortened, strict=True)]

    def complete(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        seeds: Sequence[int],
        end: str = "",
    ) -> list[Written]:
        room = self.positions - config.max_new_tokens
        if room < 1:
            raise ValueError(
                f"--max-new-tokens {config.max_new_tokens} leaves no place for a prompt in the "
                f"model's {self.positions} positions"
            )
        stop = self.tokenizer.eos_id
        config = replace(config, stop_ids=() if stop is None else (stop,))
        fitted = [self._fitted(prompt, "", room) for prompt in prompts]
        ids_of = [tuple(self._cut(ids, room)) for _, ids, _ in fitted]

        def has_ended(new: Sequence[int]) -> bool:
            # A token is a byte at least, and the first one decoded may be part of a letter.
            return end in self._text(new[-len(end.encode()) - 4 :])

        written: dict[int, Written] = {}
        for members, shared in self._alike(ids_of, [len(ids) - 1 for ids in ids_of]):
            # Prompts of nearly one length together: a cache is as wide as its longest.
            members.sort(key=lambda i: len(ids_of[i]))
            lengths = [len(ids_of[i]) + config.max_new_tokens for i in members]
            with shared_prefix(self.model.model, ids_of[members[0]][:shared]):
                for first, last in _micro_batches(lengths, self.cache_tokens):
                    chosen = members[first:last]
                    new = generate(
                        self.model,
                        [ids_of[i][shared:] for i in chosen],
                        config,
                        seeds=[seeds[i] for i in chosen],
                        has_ended=has_ended if end else None,
                    )
                    for i, ids in zip(chosen, new, strict=True):
                        written[i] = Written(self._text(ids), len(ids), fitted[i][2])
        return [written[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The mean of the last hidden states over a text's tokens, BOS left out: [n, D]."""
        front = len(self._begun(""))
        ids = [self._begun(text)[: self.positions] for text in texts]
        found = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for first, last in _micro_batches([len(ids[i]) for i in order], self.micro_tokens):
            chosen = order[first:last]
            hidden_MD, offsets = self._hidden([ids[i] for i in chosen])
            for i, begin, end in zip(chosen, offsets, offsets[1:], strict=False):
                # A text without tokens is its BOS.
                part: Tensor = hidden_MD[min(begin + front, end - 1) : end]
                found[i] = part.float().mean(0).cpu().numpy()
        return found

    def _text(self, ids: Sequence[int]) -> str:
        # A base's matrix may have rows beyond the tokenizer's last id: they are no text.
        known, eos = self.tokenizer.vocab_size, self.tokenizer.eos_id
        return self.tokenizer.decode([id for id in ids if id != eos and id < known])

    def _begun(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def _fitted(self, prompt: Prompt, continuation: str, room: int) -> tuple[str, list[int], bool]:
        """The prompt with as many shots as fit, all ids with the continuation, and whether that
        is less than was asked; without any shot the ids may still be more than `room`."""
        text, ids = "", list[int]()
        for left_out in range(len(prompt.shots) + 1):
            text = "".join(prompt.shots[left_out:]) + prompt.text
            ids = self._begun(text + continuation)
            if len(ids) <= room:
                return text, ids, left_out > 0
        return text, ids, True

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """At most `room` ids: BOS and the end."""
        if len(ids) <= room:
            return ids
        begin = ids[: int(self.tokenizer.bos_id is not None)]
        return begin + ids[len(ids) - room + len(begin) :]

    def _ids(self, asked: Asked) -> tuple[list[int], int, bool]:
        """Ids of both, where the continuation's begin, and whether the prompt was shortened.

        The continuation begins behind what the prompt's ids alone share with the ids of both.
        """
        room = self.positions + 1  # the last token is never an input
        text, ids, is_shortened = self._fitted(asked.prompt, asked.continuation, room)
        context, shared = self._begun(text), 0
        while shared < min(len(context), len(ids) - 1) and context[shared] == ids[shared]:
            shared += 1
        kept = self._cut(ids, room)
        start = shared - (len(ids) - len(kept))
        if start < 1:
            raise ValueError("an option is longer than the model's positions, or has no context")
        return kept, start, is_shortened

    def _alike(
        self, inputs: Sequence[tuple[int, ...]], limits: Sequence[int]
    ) -> Iterator[tuple[list[int], int]]:
        """Inputs that begin alike, and with how many tokens; then all others, with 0.

        limits: how many tokens of each may be shared. Where less than half begin alike none do: a
        small group passes slowly by itself.
        """
        if not inputs:
            return
        members, shared = list[int](), 0
        begins = Counter(ids[:_LEAST_SHARED] for ids in dict.fromkeys(inputs))
        begin, count = begins.most_common(1)[0]
        if 1 < count >= len(inputs) / 2 and len(begin) == _LEAST_SHARED:
            members = [i for i, ids in enumerate(inputs) if ids[:_LEAST_SHARED] == begin]
            ends = min(inputs[i] for i in members), max(inputs[i] for i in members)
            shared = min(limits[i] for i in members)
            while ends[0][:shared] != ends[1][:shared]:
                shared -= 1
            if shared < _LEAST_SHARED or not can_share(self.model.model, shared):
                members, shared = [], 0
        if members:
            yield members, shared
        others = sorted(set(range(len(inputs))) - set(members))
        if others:
            yield others, 0

    def _hidden(self, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Rows [M, D] after the last norm, and where each input begins and the last one ends."""
        offsets = np.cumsum([0, *map(len, inputs)]).tolist()
        batch = TokenBatch.from_arrays([token for ids in inputs for token in ids], offsets)
        return self.model.model(batch.to(self.device)), offsets

    @torch.inference_mode()
    def _log_probabilities(
        self,
        inputs: Sequence[tuple[int, ...]],
        shared: int,
        rows: Mapping[tuple[int, ...], list[tuple[int, int, int]]],
    ) -> Iterator[list[float]]:
        """Of inputs behind `shared` of their tokens the scores of each one's continuations."""
        hidden_MD, offsets = self._hidden([ids[shared:] for ids in inputs])
        for end, ids in zip(offsets[1:], inputs, strict=True):
            least = min(start for _, start, _ in rows[ids])
            part: Tensor = hidden_MD[end - len(ids) + least - 1 : end]
            logits = self.model.head_logits(part)
            wide = torch.promote_types(logits.dtype, torch.float32)
            log_p = logits.to(wide).log_softmax(-1).cpu()
            scores = []
            for _, start, final in rows[ids]:
                targets = torch.tensor([*ids[start:], final])
                chosen = log_p[start - least :].gather(1, targets[:, None])
                scores.append(float(chosen.sum()))
            yield scores


def _micro_batches(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours of at most `most` tokens together; a longer one alone."""
    first, held = 0, 0
    for i, length in enumerate(lengths):
        if i > first and held + length > most:
            yield first, i
            first, held = i, 0
        held += length
    if lengths:
        yield first, len(lengths)
