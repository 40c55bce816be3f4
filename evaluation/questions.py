"""Multiple-choice questions put to a language model: prompts, log-likelihoods, accuracy.

    question set -> prompt strategy -> a JSON line per question -> results.json

The prompt is lm-evaluation-harness's of MedQA: "Question:", the stem, a line "A. text" for each
option, "Answer:". A strategy has a name and a version, and the results record both: change what it
asks or how it decides, and its version goes up. The invariant: a question's answer depends on the
model, the strategy, the seed and the question alone, not on what is scored beside it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from data.questions import LETTERS, BadRows, Question, QuestionSetName, read_questions
from data.tokenizer import Tokenizer, load_tokenizer
from evaluation.bootstrap import Floats, intervals, resample
from evaluation.bootstrap import interval as percentiles
from model.batch import TokenBatch
from model.checkpoint import base_fingerprint
from model.ending import RunFailed
from model.files import write_json
from model.generation import GenerationConfig, generate
from model.heads import CausalLM
from training.assemble import base_dtype, load_base, restore
from training.config import BaseDtype, Int8Settings
from training.parallel import choose_device, flush_denormals
from training.run_folder import locked, private_files
from training.stages import clinical

StrategyName = Literal["letter", "choice", "choice-normalised", "answer"]
CHUNK = 32  # questions asked together and written together
ANSWERS = "answers.jsonl"


class Asked(NamedTuple):
    """A continuation whose log-likelihood after a context is asked for."""

    context: str
    continuation: str


class Answer(NamedTuple):
    """What was chosen, from 0; None where no answer could be read. scores: of each option."""

    choice: int | None
    scores: tuple[float, ...] | None = None


class Answerer(Protocol):
    """What a strategy asks of a model."""

    def log_likelihoods(self, asked: Sequence[Asked]) -> list[float]:
        """Summed log-probability of each continuation's tokens."""
        ...

    def complete(self, prompts: Sequence[str], config: GenerationConfig) -> list[str]:
        """The text that the model writes after each prompt."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionConfig:
    """Put multiple-choice questions to a finished run or to a base."""

    mcq: QuestionSetName
    """The question set."""
    data: str = ""
    """Its file; of mmlu and usmle the folder."""
    run: str | None = None
    """Folder of a finished run; its results go into it."""
    model: str | None = None
    """Folder of a bare base instead of a run; needs --out."""
    out: str | None = None
    """Folder of a bare base's results."""
    base_dtype: BaseDtype | None = None
    """How a bare base is held. Default: as stored if int8, else bfloat16 on a GPU that has it, else
    float32. A run's base is held as in training."""
    int8: Int8Settings = field(default_factory=Int8Settings)
    prompt: StrategyName = "letter"
    """How it is asked: the likeliest letter, the likeliest option (as it is, or divided by its
    characters), or a written answer."""
    shots: int = 0
    """Solved questions in front of each question, the first ones of --shots-data."""
    shots_data: str | None = None
    """File of the solved questions, in the layout of --data; none of them is scored."""
    bad_rows: BadRows = "refuse"
    """Refuse rows that are no question, or skip and count them."""
    answers_from: Literal[0, 1] | None = None
    """Number of MedMCQA's first answer. Default: read off the answers."""
    max_new_tokens: int = 16
    """Most tokens of a written answer."""
    compare: str | None = None
    """An earlier run scored in the same way, or a folder of answers: is the difference chance?"""
    bootstrap: int = 1000
    """Resamples of questions behind each interval; 0 for no intervals."""
    seed: int = 0
    """Decides the resamples."""
    micro_tokens: int = 4096
    """Most tokens that pass through the model at once; a longer prompt passes alone."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError(f"--data is missing: name the file of the questions of {self.mcq}")
        if (self.run is None) == (self.model is None):
            raise ValueError("give either --run, a finished run, or --model, a bare base")
        if (self.model is None) != (self.out is None):
            raise ValueError("--out names the folder of the results of --model: give both")
        if (self.base_dtype is not None or self.int8 != Int8Settings()) and self.model is None:
            raise ValueError(
                "--base-dtype and --int8.compute belong to --model, a bare base; a run's base is "
                "held as in training"
            )
        if self.int8 != Int8Settings() and self.base_dtype not in (None, "int8"):
            raise ValueError("--int8.compute is a setting of --base-dtype int8")
        if (self.shots > 0) != (self.shots_data is not None):
            raise ValueError("--shots and --shots-data go together: how many solved questions")
        for flag, number, least in (
            ("--shots", self.shots, 0),
            ("--bootstrap", self.bootstrap, 0),
            ("--seed", self.seed, 0),
            ("--micro-tokens", self.micro_tokens, 1),
            ("--max-new-tokens", self.max_new_tokens, 1),
        ):
            if number < least:
                raise ValueError(f"{flag} must be at least {least}, got {number}")


# A model that answers ----------------------------------------------------------------------------


class ModelAnswerer:
    """A decoder with its tokenizer; `shortened` counts the contexts that were cut in front."""

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, device: torch.device, micro_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.micro_tokens, self.shortened = micro_tokens, 0
        front = model.model.virtual_tokens + model.model.prefix_tokens
        self.positions = model.config.max_position_embeddings - front

    def log_likelihoods(self, asked: Sequence[Asked]) -> list[float]:
        """Sum over the continuation's tokens of log p(token | all before it); any lengths.

        The continuation's tokens are those of context + continuation from where the context's end.
        Continuations that differ in their last token alone share one pass.
        """
        rows: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        totals = [0.0] * len(asked)
        for i, one in enumerate(asked):
            whole, start = self._ids(one)
            rows.setdefault(tuple(whole[:-1]), []).append((i, start, whole[-1]))
        inputs = sorted(rows, key=len)
        for first, last in _micro_batches([len(ids) for ids in inputs], self.micro_tokens):
            for ids, scores in zip(
                inputs[first:last], self._log_probabilities(inputs[first:last], rows), strict=True
            ):
                for (i, _, _), score in zip(rows[ids], scores, strict=True):
                    totals[i] = score
        if not np.isfinite(totals).all():
            raise RunFailed("a log-likelihood is not finite")
        return totals

    def complete(self, prompts: Sequence[str], config: GenerationConfig) -> list[str]:
        room = self.positions - config.max_new_tokens
        if room < 1:
            raise ValueError(
                f"--max-new-tokens {config.max_new_tokens} leaves no place for a prompt in the "
                f"model's {self.positions} positions"
            )
        ids = [self._shortened(self._begun(prompt), room) for prompt in prompts]
        written = generate(self.model, ids, config)
        # A base's matrix may have rows beyond the tokenizer's last id: they are no text.
        stop, known = set(config.stop_ids), self.tokenizer.vocab_size
        return [
            self.tokenizer.decode([i for i in new if i not in stop and i < known])
            for new in written
        ]

    def _begun(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def _ids(self, asked: Asked) -> tuple[list[int], int]:
        """Ids of both, and where the continuation's begin: after what the context's ids share."""
        context, ids = self._begun(asked.context), self._begun(asked.context + asked.continuation)
        shared = 0
        while shared < min(len(context), len(ids) - 1) and context[shared] == ids[shared]:
            shared += 1
        kept = self._shortened(ids, self.positions + 1)  # the last token is never an input
        start = shared - (len(ids) - len(kept))
        if start < 1:
            raise ValueError("an option is longer than the model's positions, or has no context")
        return kept, start

    def _shortened(self, ids: list[int], room: int) -> list[int]:
        """At most `room` ids: BOS and the end."""
        if len(ids) <= room:
            return ids
        self.shortened += 1
        begin = ids[: int(self.tokenizer.bos_id is not None)]
        return begin + ids[len(ids) - room + len(begin) :]

    @torch.inference_mode()
    def _log_probabilities(
        self,
        inputs: Sequence[tuple[int, ...]],
        rows: Mapping[tuple[int, ...], list[tuple[int, int, int]]],
    ) -> Iterator[list[float]]:
        offsets = np.cumsum([0, *map(len, inputs)])
        flat = [token for ids in inputs for token in ids]
        hidden_MD = self.model.model(TokenBatch.from_arrays(flat, offsets.tolist()).to(self.device))
        for begin, ids in zip(offsets, inputs, strict=False):
            least = min(start for _, start, _ in rows[ids])
            part: Tensor = hidden_MD[begin + least - 1 : begin + len(ids)]
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


# Prompts and strategies --------------------------------------------------------------------------


def letter_prompt(question: Question) -> str:
    """The question with its options by letter, up to "Answer:"."""
    options = zip(LETTERS, question.options, strict=False)
    listed = "\n".join(f"{letter}. {text}" for letter, text in options)
    return f"{_stem(question)}\n{listed}\nAnswer:"


def choice_prompt(question: Question) -> str:
    """The question without its options, up to "Answer:"."""
    return f"{_stem(question)}\nAnswer:"


def _stem(question: Question) -> str:
    context = f"Abstract: {question.context}\n" if question.context else ""
    return f"{context}Question: {question.stem}"


def _solved_letters(shots: Sequence[Question]) -> str:
    return "".join(f"{letter_prompt(one)} {LETTERS[one.answer]}\n\n" for one in shots)


def by_letter(
    model: Answerer, questions: Sequence[Question], shots: Sequence[Question], _: GenerationConfig
) -> list[Answer]:
    """The letter that is likeliest after the listed options."""
    front = _solved_letters(shots)
    asked = [
        [
            Asked(front + letter_prompt(question), f" {letter}")
            for letter in LETTERS[: len(question.options)]
        ]
        for question in questions
    ]
    return _likeliest(model, asked)


def by_choice(
    model: Answerer, questions: Sequence[Question], shots: Sequence[Question], _: GenerationConfig
) -> list[Answer]:
    """The option whose whole text is likeliest after the question alone."""
    return _likeliest(model, _choices(questions, shots))


def by_normalised_choice(
    model: Answerer, questions: Sequence[Question], shots: Sequence[Question], _: GenerationConfig
) -> list[Answer]:
    """As `by_choice`, of each option the log-likelihood divided by its characters."""
    return _likeliest(model, _choices(questions, shots), normalise=True)


def by_written_answer(
    model: Answerer,
    questions: Sequence[Question],
    shots: Sequence[Question],
    config: GenerationConfig,
) -> list[Answer]:
    """What the model writes after the listed options, read by `parse_answer`; unread is wrong."""
    front = _solved_letters(shots)
    texts = model.complete([front + letter_prompt(question) for question in questions], config)
    return [
        Answer(parse_answer(text, question.options))
        for text, question in zip(texts, questions, strict=True)
    ]


def _choices(questions: Sequence[Question], shots: Sequence[Question]) -> list[list[Asked]]:
    front = "".join(f"{choice_prompt(one)} {one.options[one.answer]}\n\n" for one in shots)
    return [
        [Asked(front + choice_prompt(question), f" {option}") for option in question.options]
        for question in questions
    ]


def _likeliest(
    model: Answerer, asked: Sequence[Sequence[Asked]], *, normalise: bool = False
) -> list[Answer]:
    found = iter(model.log_likelihoods([one for options in asked for one in options]))
    answers = []
    for options in asked:
        # Characters of the option without the space in front of it, as the harness counts.
        scores = [next(found) / (len(o.continuation) - 1 if normalise else 1) for o in options]
        answers.append(Answer(int(np.argmax(scores)), tuple(scores)))
    return answers


def parse_answer(text: str, options: Sequence[str]) -> int | None:
    """The option, from 0, that a written answer names; None where it names none or several.

    Read in this order: after the last "answer is" or "answer:"; a letter in front; one letter in
    brackets; the only option whose whole text stands in it.
    """
    letters = LETTERS[: len(options)]
    after = re.split(r"answer(?:\s+is)?\s*[:\s]\s*", text, flags=re.IGNORECASE)[-1].strip()
    if match := re.match(rf"[\[(*\s]*([{letters}])(?:[\])*:.,;\s]|$)", after):
        return letters.index(match[1])
    bracketed = set(re.findall(rf"[\[(]([{letters}])[\])]", after))
    if len(bracketed) == 1:
        return letters.index(bracketed.pop())
    named = [
        i
        for i, option in enumerate(options)
        if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", after, flags=re.IGNORECASE)
    ]
    return named[0] if len(named) == 1 else None


class Strategy(Protocol):
    def __call__(
        self,
        model: Answerer,
        questions: Sequence[Question],
        shots: Sequence[Question],
        config: GenerationConfig,
        /,
    ) -> list[Answer]: ...


# Each with its version.
STRATEGIES: Mapping[str, tuple[Strategy, int]] = {
    "letter": (by_letter, 1),
    "choice": (by_choice, 1),
    "choice-normalised": (by_normalised_choice, 1),
    "answer": (by_written_answer, 1),
}


# Scoring -----------------------------------------------------------------------------------------


def score_questions(config: QuestionConfig) -> dict[str, Any]:
    """Ask every question, write answers and results, and return the results.

    Answers that an ended or killed run of the same model, questions and strategy has written are
    taken as they are. Raises ValueError for the user's mistakes.
    """
    flush_denormals()
    device = choose_device(config.device)
    how: dict[str, Any] = {"bad_rows": config.bad_rows, "answers_from": config.answers_from}
    found = read_questions(config.mcq, config.data, **how)
    shots: tuple[Question, ...] = ()
    if config.shots_data is not None:
        solved = read_questions(config.mcq, config.shots_data, **how).questions
        if len(solved) < config.shots:
            raise ValueError(f"--shots {config.shots}: {config.shots_data} has {len(solved)}")
        shots = solved[: config.shots]
        if {shot.stem for shot in shots} & {question.stem for question in found.questions}:
            raise ValueError("a question of --shots-data is among those of --data; name others")
    with private_files():
        answerer, fingerprint, held = _answerer(config, device)
        strategy, version = STRATEGIES[config.prompt]
        stop = answerer.tokenizer.eos_id
        generation = GenerationConfig(
            max_new_tokens=config.max_new_tokens, stop_ids=() if stop is None else (stop,)
        )
        header = {
            "model": fingerprint,
            "base_dtype": held,
            "questions": found.fingerprint,
            "bad_rows": config.bad_rows,
            "answers_from": config.answers_from,
            "strategy": config.prompt,
            "version": version,
            "shots": hashlib.sha256(repr(shots).encode()).hexdigest() if shots else None,
            "max_new_tokens": config.max_new_tokens if config.prompt == "answer" else None,
        }
        # Sets and prompts of their own names: MMLU's results never take the place of MedQA's.
        place = f"eval/{config.mcq}-{config.prompt}-{config.shots}-{found.fingerprint[:8]}"
        root = Path(config.run or config.out or "")
        with locked(root):
            folder = root / place
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            rows = _read_answers(folder / ANSWERS, header)
            asked = found.questions[len(rows) :]
            for start in range(0, len(asked), CHUNK):
                chunk = asked[start : start + CHUNK]
                before = answerer.shortened
                answers = strategy(answerer, chunk, shots, generation)
                new = [
                    {"id": question.id, "answer": question.answer, **answer._asdict()}
                    for question, answer in zip(chunk, answers, strict=True)
                ]
                new[0]["shortened"] = answerer.shortened - before
                _append(folder / ANSWERS, header, new)
                rows += new
            results = {
                "mcq": config.mcq,
                "strategy": config.prompt,
                "strategy_version": version,
                "shots": config.shots,
                "questions_fingerprint": found.fingerprint,
                "model_fingerprint": fingerprint,
                "base_dtype": held,
                "counts": dict(found.counts),
                "shortened_prompts": sum(row.get("shortened", 0) for row in rows),
                "bootstrap": config.bootstrap,
                "seed": config.seed,
                **accuracies(
                    found.questions, [row["choice"] for row in rows], config.bootstrap, config.seed
                ),
                "comparison": None,
            }
            if config.compare is not None:
                results["comparison"] = {"run": config.compare} | paired_accuracy(
                    rows, _other_rows(Path(config.compare), place), config.bootstrap, config.seed
                )
            write_json(folder / "results.json", results)
    return results | {"folder": str(folder)}


def accuracies(
    questions: Sequence[Question], choices: Sequence[int | None], resamples: int, seed: int
) -> dict[str, Any]:
    """`accuracy`, `accuracy_ci` and `n`, also by subject and step, and what constants would score.

    A question without a readable answer (None) is wrong and counted in `unanswered`.
    """
    correct = np.array([q.answer == c for q, c in zip(questions, choices, strict=True)])
    by: dict[str, dict[str, Any]] = {}
    for name in ("subject", "step"):
        values = np.array([getattr(question, name) or "" for question in questions])
        by[f"per_{name}"] = {
            value: _accuracy(correct[values == value], resamples, seed)
            for value in sorted(set(values.tolist()) - {""})
        }
    answers = np.array([question.answer for question in questions])
    return {
        **_accuracy(correct, resamples, seed),
        "unanswered": sum(choice is None for choice in choices),
        "accuracy_of_constant": {
            LETTERS[i]: float((answers == i).mean()) for i in range(int(answers.max()) + 1)
        },
        **by,
    }


def _accuracy(correct: NDArray[np.bool_], resamples: int, seed: int) -> dict[str, Any]:
    value = float(correct.mean())
    (found,) = intervals(
        _means(correct), np.array([value]), len(correct), torch.float64,
        resamples=resamples, seed=seed,
    )  # fmt: skip
    return {"n": len(correct), "accuracy": value, "accuracy_ci": found}


def _means(values: NDArray[Any]) -> Any:
    """The mean of one value a question as a statistic of the bootstrap."""
    row = torch.from_numpy(values.astype(np.float64))[None]

    def statistics(counts: Tensor) -> Floats:
        return np.asarray((row @ counts.double() / len(values)).numpy())

    return statistics


def paired_accuracy(
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Accuracy minus that of an earlier run on the same questions, with McNemar's exact p.

    Raises ValueError unless both answered the same questions.
    """
    if [(row["id"], row["answer"]) for row in rows] != [(o["id"], o["answer"]) for o in others]:
        raise ValueError("--compare: the earlier run answered other questions; score it on these")
    ours, theirs = (
        np.array([row["choice"] == row["answer"] for row in each]) for each in (rows, others)
    )
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    ci = None
    difference = ours.astype(np.float64) - theirs
    if resamples and len(ours) >= 10:
        drawn = resample(
            _means(difference), len(ours), torch.float64, resamples=resamples, seed=seed
        )
        ci = percentiles(drawn[0])
    return {
        "difference": float(difference.mean()),
        "ci": ci,
        "won": won,
        "lost": lost,
        "p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    }


def question_summary(results: Mapping[str, Any]) -> Iterator[str]:
    """The results as lines for people."""

    def said(one: Mapping[str, Any]) -> str:
        ci = one["accuracy_ci"]
        between = "" if ci is None else f" [{ci[0]:.3f}, {ci[1]:.3f}]"
        return f"{one['accuracy']:.3f}{between} of {one['n']:,}"

    yield f"{results['mcq']}, {results['strategy']} (version {results['strategy_version']})"
    yield f"accuracy {said(results)}"
    best = max(results["accuracy_of_constant"].items(), key=lambda item: item[1])
    yield f"always answering {best[0]} would score {best[1]:.3f}"
    for name, count in (("unanswered", "unanswered"), ("shortened prompts", "shortened_prompts")):
        if results[count]:
            yield f"{name}: {results[count]:,}"
    for group in ("step", "subject"):
        for name, one in results[f"per_{group}"].items():
            yield f"  {name}: {said(one)}"
    if (found := results["comparison"]) is not None:
        yield f"above {found['run']} by {found['difference']:.3f}, p {found['p']:.3g}"
    yield f"answers and results are in {results['folder']}"


def _answerer(
    config: QuestionConfig, device: torch.device
) -> tuple[ModelAnswerer, str, dict[str, str]]:
    """What answers, the fingerprint of all that it is made of, and how its base is held."""
    if config.run is not None:
        finished = restore(Path(config.run), device)
        settings, model, tokenizer = finished.config, finished.model, finished.tokenizer
        told = {key: finished.record[key] for key in ("fingerprints", "files")}
        fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    else:
        folder = Path(config.model or "")
        settings = replace(  # a stage that puts nothing on the base, and asks for no length
            clinical(),
            model=config.model,
            base_dtype=config.base_dtype,
            int8=config.int8,
            max_length=2,
        )
        model, tokenizer = load_base(settings, folder, 0, device), load_tokenizer(folder)
        fingerprint = base_fingerprint(folder)
    if not isinstance(model, CausalLM):
        raise ValueError(f"--mcq needs a language model, but {config.run} is a classifier")
    dtype = base_dtype(settings, device)
    held: dict[str, str] = {"dtype": dtype}
    if dtype == "int8":
        held["compute"] = settings.int8.compute
    return ModelAnswerer(model, tokenizer, device, config.micro_tokens), fingerprint, held


def _read_answers(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answers under this very header; a torn last line, and answers of another, are dropped."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        lines = []
    if not lines or lines[0] != dict(header):
        path.unlink(missing_ok=True)
        return []
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return lines[1:]


def _append(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [*rows] if path.exists() else [header, *rows]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _other_rows(folder: Path, place: str) -> list[dict[str, Any]]:
    for path in (folder / place / ANSWERS, folder / ANSWERS):
        if path.is_file():
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]
    raise ValueError(f"--compare {folder} holds no answers; score it first on the same questions")
