"""Talk to a tuned model on the terminal.

    python -m evaluation.chat --run runs/instruct
    python -m evaluation.chat --model merged --prompt-format alpaca --system "Be brief."
    python -m evaluation.chat --run runs/clinical          # goes on with the text that you type

An instruct run is asked in the format that it was tuned in, with all turns so far, tokenised as in
training. A run of another stage, or a --model, is given plain text to continue unless
--prompt-format says otherwise. The most likely token is taken each time (--temperature 0) unless a
temperature is given.

The invariant: what is said stays in the memory of this process. Nothing is logged, no file is
written, and the line editor's history ends with the process.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.prompts import PROMPTS, PromptEncoder, PromptName, Turn
from data.tokenizer import Tokenizer, load_tokenizer
from data.wording import counted
from model.ending import CommandParser, exit_code
from model.generation import GenerationConfig, stream
from model.heads import CausalLM
from training.assemble import bare_settings, load_bare, restore
from training.parallel import choose_device, flush_denormals

LONGEST_ANSWER = 512  # tokens, where --max-new-tokens does not say and the positions suffice
RESET, QUIT, SEVERAL_LINES = "/reset", "/quit", '"""'
HELP = f"{RESET} begins anew, {QUIT} or Ctrl-D ends, Ctrl-C stops an answer, {SEVERAL_LINES} begins"
HELP += " and ends a text of several lines"


class Speaker(NamedTuple):
    """A language model, its tokenizer, and the format in which it is asked; None for plain text."""

    model: CausalLM
    tokenizer: Tokenizer
    prompt_format: PromptName | None

    @property
    def positions(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        network = self.model.model
        in_front = network.virtual_tokens + network.prefix_tokens
        return self.model.config.max_position_embeddings - in_front


class Talk(Protocol):
    """What has been said so far."""

    end_id: int | None  # the token that ends an answer
    lead: str  # what an answer begins with, and nobody reads

    def ask(self, text: str, room: int) -> tuple[list[int], str | None]:
        """At most `room` ids that the model goes on from, and what was dropped for that.

        Raises ValueError for a text that has no room; the talk is then as it was.
        """
        ...

    def take(self, answer: str, *, has_ended: bool) -> str | None:
        """Add the answer; returns what the user should know about it."""
        ...


class Conversation:
    """Turns in a prompt format; the oldest ones are dropped where positions do not suffice."""

    def __init__(self, tokenizer: Tokenizer, name: PromptName, system: str | None) -> None:
        self._encoder = PromptEncoder(tokenizer, name)
        self._system = [] if system is None else [Turn("system", system)]
        self._turns: list[Turn] = []
        self.end_id, self.lead = self._encoder.end_id, self._encoder.format.lead

    def ask(self, text: str, room: int) -> tuple[list[int], str | None]:
        turns = [*self._turns, Turn("user", text)]
        while True:
            ids = self._encoder.encode_prompt([*self._system, *turns])
            if len(ids) <= room:
                break
            if len(turns) == 1:
                raise ValueError(
                    f"that has {counted(len(ids), 'token')} with its prompt, and there is room "
                    f"for {room:,}; make it shorter"
                )
            turns = turns[2:]
        dropped = (len(self._turns) + 1 - len(turns)) // 2
        self._turns = turns
        if not dropped:
            return ids, None
        return (
            ids,
            f"forgotten, for there is no more room: the first {counted(dropped, 'question')}",
        )

    def take(self, answer: str, *, has_ended: bool) -> str | None:
        if not answer.strip():
            self._turns.pop()
            return "no answer; the question is forgotten"
        self._turns.append(Turn("assistant", answer))
        return None


class PlainText:
    """One text that the model continues, and that the next line continues."""

    lead = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._text = tokenizer, ""
        self.end_id = tokenizer.eos_id

    def ask(self, text: str, room: int) -> tuple[list[int], str | None]:
        self._text += text
        begin = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        ids = self._tokenizer.encode(self._text)
        left_out = len(begin) + len(ids) - room
        if left_out <= 0:
            return begin + ids, None
        told = f"not seen, for there is no more room: the first {counted(left_out, 'token')}"
        return begin + ids[left_out:], told

    def take(self, answer: str, *, has_ended: bool) -> str | None:
        self._text = "" if has_ended else self._text + answer
        return "the text has ended; the next line begins another" if has_ended else None


@dataclass(frozen=True)
class Settings:
    """How answers are made."""

    generation: GenerationConfig  # without the token that ends an answer
    seed: int
    system: str | None


def begin_talk(speaker: Speaker, system: str | None) -> Talk:
    """Nothing said yet. Raises ValueError where the tokenizer lacks a token of the format."""
    if speaker.prompt_format is not None:
        return Conversation(speaker.tokenizer, speaker.prompt_format, system)
    if system is not None:
        raise ValueError("--system has no place in plain text; give --prompt-format too")
    return PlainText(speaker.tokenizer)


def chat(speaker: Speaker, settings: Settings, lines: Iterator[str]) -> None:
    """Answer each of the lines on standard output, word by word."""
    talk = begin_talk(speaker, settings.system)
    for number, line in enumerate(lines):
        if line == RESET:
            talk = begin_talk(speaker, settings.system)
            _tell("begun anew")
        elif line.startswith("/") and len(line.split()) == 1:
            _tell(HELP)
        elif line.strip():
            _answer(speaker, talk, line, settings, settings.seed + number)


def _answer(speaker: Speaker, talk: Talk, line: str, settings: Settings, seed: int) -> None:
    stop_ids = () if talk.end_id is None else (talk.end_id,)
    config = replace(settings.generation, stop_ids=stop_ids)
    try:
        ids, told = talk.ask(line, speaker.positions - config.max_new_tokens)
    except ValueError as error:
        _tell(str(error))
        return
    if told is not None:
        _tell(told)
    written: list[int] = []
    text, shown, is_stopped = "", 0, False
    try:
        for token in stream(speaker.model, ids, config, seed=seed):
            written.append(token)
            text = _text_of(written, speaker.tokenizer, talk)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
                _show(text[shown:])
                shown = len(text)
    except KeyboardInterrupt:
        is_stopped = True
    _show(text[shown:] + "\n")
    has_ended = bool(written) and written[-1] in stop_ids
    told = talk.take(text, has_ended=has_ended)
    if told is not None:
        _tell(told)
    elif is_stopped:
        _tell("stopped")
    elif not has_ended:
        _tell(f"--max-new-tokens {config.max_new_tokens} are written")


def _text_of(ids: Sequence[int], tokenizer: Tokenizer, talk: Talk) -> str:
    # A base's matrix may have rows beyond the tokenizer's last id: they are no text.
    known = [id for id in ids if id != talk.end_id and id < tokenizer.vocab_size]
    return tokenizer.decode_continuation(known).removeprefix(talk.lead)


def _show(text: str) -> None:
    # What a model writes shall not steer the terminal.
    safe = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    print("".join(safe), end="", flush=True)


def _tell(line: str) -> None:
    print(f"({line})", file=sys.stderr, flush=True)


def typed_lines() -> Iterator[str]:
    """What the user types until QUIT or the end of the input, several lines where quoted."""
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    editor = _line_editor() if is_terminal else None
    quoted: list[str] | None = None
    while True:
        try:
            line = input(("> " if quoted is None else ". ") if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            print()
            quoted = None
            continue
        if line.strip() == SEVERAL_LINES:
            if quoted is not None:
                yield "\n".join(quoted)
            quoted = [] if quoted is None else None
        elif quoted is not None:
            quoted.append(line)
        elif line.strip() == QUIT:
            return
        else:
            if line.strip() == RESET:
                line = RESET
                if editor is not None:
                    editor.clear_history()
            yield line


def _line_editor() -> Any:
    """readline where Python has it: `input` then edits. Its history is memory until it is asked
    to write a file, which only the interactive interpreter does."""
    try:
        import readline
    except ImportError:
        return None
    return readline


# The command --------------------------------------------------------------------------------------


def open_speaker(
    run: str | None, model: str | None, prompt_format: PromptName | None, device: str | None
) -> Speaker:
    """The model of a finished run, or of a folder."""
    place = choose_device(device)
    if model is not None:
        return Speaker(
            load_bare(bare_settings(Path(model)), place), load_tokenizer(model), prompt_format
        )
    assert run is not None
    finished = restore(Path(run), place)
    if not isinstance(finished.model, CausalLM):
        raise ValueError(f"a chat needs a language model, but {run} is a classifier; try eval.py")
    if finished.config.stage == "instruct":
        own = finished.config.prompt_format
        if prompt_format not in (None, own):
            raise ValueError(f"--prompt-format {prompt_format}: {run} was tuned in {own}")
        prompt_format = own
    return Speaker(finished.model, finished.tokenizer, prompt_format)


def main(arguments: Sequence[str]) -> int:
    """Read the command line, talk, and return the exit code."""

    def work() -> None:
        parser = CommandParser("python -m evaluation.chat", "Talk to a tuned model.")
        parser.add_argument("--run", metavar="DIR", help="a finished run")
        parser.add_argument("--model", metavar="DIR", help="a folder of weights instead")
        parser.add_argument("--prompt-format", choices=sorted(PROMPTS), help="default: the run's")
        parser.add_argument("--system", metavar="TEXT", help="what the system says first")
        parser.add_argument("--max-new-tokens", type=int, help="longest answer; default: 512")
        parser.add_argument(
            "--temperature", type=float, default=0.0, help="0 (default): the most likely token"
        )
        parser.add_argument("--top-p", type=float, help="of the likeliest tokens that reach this")
        parser.add_argument("--repetition-penalty", type=float, default=1.0, help="default: 1, off")
        parser.add_argument("--seed", type=int, help="decides what is drawn; default: 0")
        parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if any")
        flags = parser.read(arguments)
        if (flags.run is None) == (flags.model is None):
            raise ValueError("give either --run, a finished run, or --model, a folder of weights")
        for flag, value in (("--top-p", flags.top_p), ("--seed", flags.seed)):
            if value is not None and flags.temperature == 0:
                raise ValueError(
                    f"{flag} would have no effect: nothing is drawn at --temperature 0"
                )
        if flags.seed is not None and flags.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {flags.seed}")
        flush_denormals()
        speaker = open_speaker(flags.run, flags.model, flags.prompt_format, flags.device)
        longest = flags.max_new_tokens
        if longest is None:
            longest = min(LONGEST_ANSWER, speaker.positions // 2)
        if longest >= speaker.positions:
            raise ValueError(
                f"--max-new-tokens {longest} leaves no room for a question in the model's "
                f"{speaker.positions} positions"
            )
        generation = GenerationConfig(
            max_new_tokens=longest,
            temperature=flags.temperature,
            top_p=1.0 if flags.top_p is None else flags.top_p,
            repetition_penalty=flags.repetition_penalty,
        )
        settings = Settings(generation, seed=flags.seed or 0, system=flags.system)
        begin_talk(speaker, flags.system)  # what is wrong with it is said before all else
        form = speaker.prompt_format or "none: plain text is continued"
        _tell(f"prompt format {form}; nothing is logged or written")
        _tell(HELP)
        chat(speaker, settings, typed_lines())

    return exit_code("evaluation.chat", arguments, work, interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
