"""Prompt formats as data: how the turns of a conversation become tokens, and which are learned.

A format is texts with places for what is said, and special tokens by name; nothing in here but
`PromptEncoder` knows how to use one. Texts are tokenised part by part, so a token never reaches
over the edge between a prompt and its response, and the ids of a prompt are the same with a
response behind it (training) and without (inference), BOS and EOS included.

Invariant: what is supervised is exactly each response, the space with which a format lets it begin,
and the token that ends it; `decode_continuation` of these ids gives that text back.

Sources: Alpaca (Taori et al. 2023); MedAlpaca (arXiv 2304.08247); Llama 2 (arXiv 2307.09288);
Mistral 7B (arXiv 2310.06825); Llama 3 (arXiv 2407.21783); Med42 (arXiv 2404.14779).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.tokenizer import SpecialIds, Tokenizer, load_tokenizer, token_dtype

PromptName = Literal[
    "alpaca", "medalpaca", "medalpaca-question", "llama-2", "mistral", "llama-3", "med42", "plain"
]
ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one side says; `input` is what an instruction is about, where it is kept apart."""

    role: str
    text: str
    input: str = ""


class Special(NamedTuple):
    """A special token: "bos", "eos", or its text in the vocabulary."""

    token: str


BOS, EOS = Special("bos"), Special("eos")
Part = str | Special


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Parts in the order in which they are written; {text}, {input} and {system} are filled in."""

    begin: tuple[Part, ...] = (BOS,)
    """In front of the whole conversation."""
    system: tuple[Part, ...] = ()
    """A system's turn; empty where `first` or the first user's text takes it in."""
    default_system: str = ""
    """What the system says where no turn does."""
    user: tuple[Part, ...]
    """A user's turn, up to where the response begins."""
    without_input: tuple[Part, ...] | None = None
    """The same where there is no input; None: `user` with an empty one."""
    first: tuple[Part, ...] | None = None
    """The first user's turn where a system has spoken, with {system} in it."""
    next: tuple[Part, ...] = ()
    """In front of every user's turn but the first."""
    lead: str = ""
    """What a response begins with, supervised with it: a space, or nothing."""
    end: Special = EOS
    """What a response ends with, supervised with it."""
    keeps_input: bool = False
    """Whether {input} has a place of its own; else it follows the text after a blank line."""


_PRIMER = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
_PRIMER_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)
_SECTIONS = "### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:\n"
_MEDALPACA = PromptFormat(user=(_PRIMER + _SECTIONS,), keeps_input=True)
_LLAMA_3 = {
    role: (
        Special("<|start_header_id|>"),
        role,
        Special("<|end_header_id|>"),
        "\n\n{text}",
        Special("<|eot_id|>"),
    )
    for role in ("system", "user")
}

PROMPTS: Mapping[PromptName, PromptFormat] = {
    "alpaca": PromptFormat(
        user=(_PRIMER + _SECTIONS,),
        without_input=(_PRIMER_WITHOUT_INPUT + "### Instruction:\n{text}\n\n### Response:\n",),
        keeps_input=True,
    ),
    # Every section is written, also an empty one.
    "medalpaca": _MEDALPACA,
    # The response goes on as "LETTER: option".
    "medalpaca-question": replace(
        _MEDALPACA, user=(_PRIMER + _SECTIONS + "The Answer to the question is:",), lead=" "
    ),
    "llama-2": PromptFormat(
        user=("[INST] {text} [/INST]",),
        first=("[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",),
        next=(BOS,),
        lead=" ",
    ),
    "mistral": PromptFormat(user=("[INST] {text} [/INST]",), lead=" "),
    "llama-3": PromptFormat(
        system=_LLAMA_3["system"],
        user=(
            *_LLAMA_3["user"],
            Special("<|start_header_id|>"),
            "assistant",
            Special("<|end_header_id|>"),
            "\n\n",
        ),
        end=Special("<|eot_id|>"),
    ),
    "med42": PromptFormat(
        system=("<|system|>: {text}\n",),
        default_system="You are a helpful medical assistant created by M42 Health in the UAE.",
        user=("<|prompter|>:{text}\n<|assistant|>:",),
    ),
    "plain": PromptFormat(user=("{text}\n",)),
}


class Rendered(NamedTuple):
    """A stretch of a conversation in one format: text or a special token, supervised or not."""

    part: Part
    is_supervised: bool


def render(format: PromptFormat, turns: Sequence[Turn]) -> list[Rendered]:
    """A checked conversation (`check_turns`) in a format; it may end before a response."""
    said = list(turns)
    system = said.pop(0).text if said[0].role == "system" else format.default_system
    parts: list[Rendered] = [Rendered(part, False) for part in format.begin]
    if system and format.system:
        parts += _filled(format.system, Turn("system", system), "")
    for place, turn in enumerate(said):
        if turn.role == "assistant":
            parts += [Rendered(format.lead + turn.text, True), Rendered(format.end, True)]
            continue
        if place:
            parts += [Rendered(part, False) for part in format.next]
        template, user = format.user, turn
        if user.input and not format.keeps_input:
            between = "\n\n" if user.text else ""
            user = Turn("user", f"{user.text}{between}{user.input}")
        if place == 0 and system and not format.system:
            if format.first is None:
                user = user._replace(text=f"{system}\n\n{user.text}")
            else:
                template = format.first
        if not user.input and format.without_input is not None:
            template = format.without_input
        parts += _filled(template, user, system)
    return parts


def _filled(template: tuple[Part, ...], turn: Turn, system: str) -> list[Rendered]:
    fields = {"text": turn.text, "input": turn.input, "system": system}
    # str.format puts the fields in at once: a brace in what is said stays a brace.
    filled = (p if isinstance(p, Special) else p.format_map(fields) for p in template)
    return [Rendered(part, False) for part in filled]


def check_turns(turns: Sequence[Turn], *, is_answered: bool = True) -> None:
    """Raise ValueError unless a system may speak first, then user and assistant take turns.

    is_answered: the last turn is the assistant's; else it is the user's, who waits for an answer.
    """
    said = list(turns)
    if said and said[0].role == "system":
        said.pop(0)
    if not said:
        raise ValueError("no turn of a user")
    for place, turn in enumerate(said):
        if turn.role not in ROLES:
            raise ValueError("a role that is none of " + ", ".join(ROLES))
        if turn.role != ("user", "assistant")[place % 2]:
            raise ValueError("turns out of order (system first if at all, then user, assistant)")
        if turn.role == "assistant" and not turn.text.strip():
            raise ValueError("an empty output")
        if turn.role == "user" and not (turn.text.strip() or turn.input.strip()):
            raise ValueError("an empty instruction")
    if (said[-1].role == "assistant") != is_answered:
        raise ValueError("no output" if is_answered else "an output already")


def pack_turns(turns: Sequence[Turn]) -> str:
    """The conversation as one text, which names it whatever format it will be trained in."""
    return json.dumps([list(turn) for turn in turns], ensure_ascii=False)


def unpack_turns(text: str) -> list[Turn]:
    """The turns that `pack_turns` wrote."""
    return [Turn(*turn) for turn in json.loads(text)]


class PromptEncoder:
    """A tokenizer that takes conversations (`pack_turns`) in one format.

    It stands where a tokenizer does when a cache is built, and gives twice the token's id, plus 1
    where the token is supervised (`split_supervision`), so a cache holds both in one number.
    """

    def __init__(self, tokenizer: Tokenizer, name: PromptName) -> None:
        """Raises ValueError where the tokenizer lacks a special token of the format."""
        self.tokenizer, self.name, self.format = tokenizer, name, PROMPTS[name]
        self.path: Path = tokenizer.path
        self.vocab_size = 2 * tokenizer.vocab_size
        self._dtype = token_dtype(self.vocab_size)
        self.special = {part: self._special_id(part) for part in _special_parts(self.format)}
        self.end_id = self.special[self.format.end]
        assert self.end_id is not None
        if self.end_id == tokenizer.bos_id:
            raise ValueError(f"{self.path}: BOS and EOS are one token, so no response could end")

    def _special_id(self, part: Special) -> int | None:
        """The id of a special token; None for a BOS that the tokenizer does without."""
        if part == BOS:
            return self.tokenizer.bos_id
        id = self.tokenizer.eos_id if part == EOS else self.tokenizer.token_id(part.token)
        if id is None:
            raise ValueError(
                f"--prompt-format {self.name} needs the token {part.token}, which the tokenizer "
                f"{self.path} lacks; choose another format, or the base that it belongs to"
            )
        return id

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them are supervised."""
        ids: list[int] = []
        supervised: list[bool] = []
        begins = True  # a text begins behind a special token, and goes on behind other text
        for part, is_supervised in render(self.format, turns):
            if isinstance(part, Special):
                id = self.special[part]
                new = [] if id is None else [id]
            elif begins and not is_supervised:
                new = self.tokenizer.encode(part)
            else:
                new = self.tokenizer.encode_continuation(part)
            begins = isinstance(part, Special)
            ids += new
            supervised += [is_supervised] * len(new)
        return ids, supervised

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation that waits for an answer, exactly as in training.

        Raises ValueError for turns that do not end with a user's.
        """
        check_turns(turns, is_answered=False)
        return self.encode(turns)[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """2 id + supervised of each packed conversation."""
        encoded = (self.encode(unpack_turns(text)) for text in texts)
        return [
            2 * np.array(ids, self._dtype) + np.array(supervised, self._dtype)
            for ids, supervised in encoded
        ]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides `encode`."""
        ids = sorted((part.token, id) for part, id in self.special.items() if id is not None)
        described = json.dumps([self.tokenizer.fingerprint(), asdict(self.format), ids])
        return hashlib.sha256(f"prompts {described}".encode()).hexdigest()

    def arguments(self) -> list[str]:
        """What `open_encoder` makes the same encoder of in another process."""
        return [*self.tokenizer.arguments(), self.name, json.dumps(self.tokenizer.special)]


def open_encoder(arguments: Sequence[str]) -> Tokenizer | PromptEncoder:
    """The tokenizer or the encoder whose `arguments` these are."""
    tokenizer = load_tokenizer(arguments[0])
    if len(arguments) == 1:
        return tokenizer
    tokenizer.special = SpecialIds(*json.loads(arguments[2]))
    name: PromptName = arguments[1]  # type: ignore[assignment]
    return PromptEncoder(tokenizer, name)


def split_supervision(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [M] and supervised bool [M] of what `PromptEncoder.encode_many` gave."""
    wide = tokens.astype(np.int64)
    return wide >> 1, (wide & 1).astype(bool)


def _special_parts(format: PromptFormat) -> set[Special]:
    groups = (format.begin, format.system, format.user, format.without_input or ())
    parts = [*groups, format.first or (), format.next, (format.end,)]
    return {part for group in parts for part in group if isinstance(part, Special)}
