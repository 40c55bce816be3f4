"""Multiple-choice questions put to a language model, from the question set to accuracy.

    question set -> strategy -> a JSON line per question -> results.json, report.html

The results record the strategy's name, version and settings. The invariant: a line holds no text
of its question, and whenever the command is killed, it ends with the same bytes.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from data.questions import (
    LETTERS,
    USMLE_PUBLISHED,
    BadRows,
    Question,
    QuestionSet,
    QuestionSetName,
    read_questions,
)
from data.tokenizer import load_tokenizer
from data.wording import counted
from evaluation.answering import Answerer, ModelAnswerer
from evaluation.bootstrap import Floats, intervals
from evaluation.demonstrations import gather_demonstrations
from evaluation.journal import Row, digest_of, read_header, read_rows, worked_through
from evaluation.question_report import write_question_report
from evaluation.strategies import STRATEGIES, TIE_RULE, Setting, StrategyName, versions_of
from model.checkpoint import base_fingerprint
from model.files import read_json, write_json
from model.heads import CausalLM
from training.assemble import bare_settings, base_dtype, load_bare, restore
from training.config import BaseDtype, Int8Settings
from training.parallel import choose_device, flush_denormals
from training.run_folder import locked, private_files

ANSWERS, RESULTS = "answers.jsonl", "results.json"
RATIONALES = 5  # tried for each solved question by default, as in promptbase


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
    """How it is asked and answered: docs/questions.md describes the strategies."""
    shots: int = 0
    """Solved questions in front of each question: the first ones of --shots-data; with nearest and
    medprompt the most similar ones."""
    shots_data: str | None = None
    """File of the solved questions, in the layout of --data; none of them is scored."""
    rationales: int | None = None
    """With nearest and medprompt: how often the model reasons about each solved question. Default:
    5."""
    bad_rows: BadRows = "refuse"
    """Refuse rows that are no question, or skip and count them."""
    answers_from: Literal[0, 1] | None = None
    """Number of MedMCQA's first answer. Default: read off the answers."""
    max_new_tokens: int | None = None
    """Most tokens of a written answer. Default: the strategy's, or half of the model's positions
    where that is less."""
    temperature: float | None = None
    """Of sampled answers. Default: the strategy's."""
    votes: int | None = None
    """Answers of which the majority counts. Default: the strategy's."""
    compare: str | None = None
    """An earlier run scored in the same way, or a folder of answers: is the difference chance?"""
    bootstrap: int = 1000
    """Resamples of questions behind each interval; 0 for no intervals."""
    seed: int = 0
    """Decides the resamples, what is sampled, and how options are shuffled."""
    micro_tokens: int = 4096
    """Most tokens that pass through the model at once; a longer prompt passes alone."""
    cache_tokens: int = 1 << 15
    """Most tokens whose keys and values are held at once while answers are written."""
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
            ("--cache-tokens", self.cache_tokens, 1),
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--votes", self.votes, 1),
            ("--rationales", self.rationales, 1),
            ("--temperature", self.temperature, 0),
        ):
            if number is not None and not least <= number < float("inf"):
                raise ValueError(f"{flag} must be at least {least}, got {number}")
        self._check_strategy()

    def _check_strategy(self) -> None:
        """Refuse what the strategy has no use for, and ask for what it needs."""
        for name, given, has_use in (
            ("max_new_tokens", self.max_new_tokens, "max_new_tokens"),
            ("temperature", self.temperature, "temperature"),
            ("votes", self.votes, "votes"),
            ("shots", self.shots or None, "takes_shots"),
            ("rationales", self.rationales, "finds_nearest"),
        ):
            users = [
                known
                for known, strategy in STRATEGIES.items()
                if getattr(strategy, has_use) not in (None, False)
            ]
            if given is not None and self.prompt not in users:
                raise ValueError(
                    f"--{name.replace('_', '-')} means nothing to --prompt {self.prompt}; leave it "
                    f"out, or choose one of {', '.join(users)}"
                )
        if STRATEGIES[self.prompt].finds_nearest and not self.shots:
            raise ValueError(
                f"--prompt {self.prompt} puts the nearest solved questions in front: give their "
                "number (published: --shots 5) and their file (--shots-data)"
            )


# Scoring -----------------------------------------------------------------------------------------


class AnsweredBy(NamedTuple):
    """The fingerprint of all that the model is made of, and how its base is held."""

    model: str
    base_dtype: Mapping[str, str]


def score_questions(config: QuestionConfig) -> dict[str, Any]:
    """Ask every question, write answers, results and report, and return the results.

    Answers that an ended or killed run of the same model, questions and strategy has written are
    taken as they are. Raises ValueError for the user's mistakes.
    """
    flush_denormals()
    device = choose_device(config.device)
    how: dict[str, Any] = {"bad_rows": config.bad_rows, "answers_from": config.answers_from}
    found, solved = read_questions(config.mcq, config.data, **how), None
    if config.shots_data is not None:
        solved = read_questions(config.mcq, config.shots_data, **how)
        check_solved(config, found, solved)
    with private_files():
        answerer, answered_by = _answerer(config, device)
        root = Path(config.run or config.out or "")
        with locked(root):
            return ask_all(answerer, answered_by, config, found, solved, root)


def check_solved(config: QuestionConfig, found: QuestionSet, solved: QuestionSet) -> None:
    """Raises ValueError where the solved questions are too few, or shown ones are asked."""
    if len(solved.questions) < config.shots:
        raise ValueError(
            f"--shots {config.shots}: {config.shots_data} has "
            f"{counted(len(solved.questions), 'question')}"
        )
    if not STRATEGIES[config.prompt].finds_nearest:
        shown = {question.stem for question in solved.questions[: config.shots]}
        if shown & {question.stem for question in found.questions}:
            raise ValueError("a question of --shots-data is among those of --data; name others")


def ask_all(
    answerer: Answerer,
    answered_by: AnsweredBy,
    config: QuestionConfig,
    found: QuestionSet,
    solved: QuestionSet | None,
    root: Path,
) -> dict[str, Any]:
    """`score_questions` with an open model; `root` is the folder that holds eval/."""
    if config.run is None:
        _check_base(root, answered_by.model)
    strategy = STRATEGIES[config.prompt]
    setting, settings, rationales = _setting(answerer, answered_by, config, solved, root / "eval")
    asked: dict[str, Any] = {
        "questions": found.fingerprint,
        "bad_rows": config.bad_rows,
        "answers_from": config.answers_from,
        "strategy": config.prompt,
        **versions_of(config.prompt),
        **settings,
    }
    # A name for each way to ask: MMLU's results never take the place of MedQA's.
    place = f"eval/{config.mcq}-{config.prompt}-{config.shots}-{digest_of(asked)[:8]}"
    folder = root / place
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def work(chunk: range) -> list[Row]:
        questions = found.questions[chunk.start : chunk.stop]
        answers = strategy.ask(answerer, questions, setting)
        return [
            {"id": question.id, "answer": question.answer, **answer._asdict()}
            for question, answer in zip(questions, answers, strict=True)
        ]

    earlier: Row | None = None
    its_rows: list[Row] = []
    if config.compare is not None:  # of other questions: refused before any is asked
        earlier, its_rows = _other_rows(Path(config.compare), place)
        check_same_questions([(q.id, q.answer) for q in found.questions], its_rows)
    header = {**answered_by._asdict(), **asked}
    rows = worked_through(folder / ANSWERS, header, len(found.questions), work)
    results = {
        "mcq": config.mcq,
        "strategy": config.prompt,
        "strategy_version": strategy.version,
        "shots": config.shots,
        "settings": settings,
        "tie_rule": None if strategy.votes is None else TIE_RULE,
        "rationales": rationales,
        "questions_fingerprint": found.fingerprint,
        "model_fingerprint": answered_by.model,
        "base_dtype": answered_by.base_dtype,
        "counts": dict(found.counts),
        "published_counts": dict(USMLE_PUBLISHED) if config.mcq == "usmle" else None,
        "shortened_prompts": sum(row["shortened"] for row in rows),
        "texts_asked": sum(row["asked"] for row in rows),
        "new_tokens": sum(row["new_tokens"] for row in rows),
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        **accuracies(
            found.questions, [row["choice"] for row in rows], config.bootstrap, config.seed
        ),
        "confusion": confusion(rows),
        "comparison": None,
    }
    if earlier is not None:
        results["comparison"] = {
            "run": config.compare,
            "strategy": earlier["strategy"],
            "version": earlier["version"],
        } | paired_accuracy(rows, its_rows, config.bootstrap, config.seed)
    write_json(folder / RESULTS, results)
    write_question_report(
        folder / "report.html", results, dataclasses.asdict(config), _beside(folder, results)
    )
    return results | {"folder": str(folder)}


def _check_base(root: Path, model: str) -> None:
    """Refuse a folder with the answers of another base, whose place the new ones would take."""
    for path in sorted(root.glob(f"eval/*/{ANSWERS}")):
        header = read_header(path)
        if header is not None and header.get("model") != model:
            raise ValueError(
                f"--out {root} holds answers of another base ({path.parent.name}); choose another "
                "--out, or remove that folder"
            )


def _setting(
    answerer: Answerer,
    answered_by: AnsweredBy,
    config: QuestionConfig,
    solved: QuestionSet | None,
    folder: Path,
) -> tuple[Setting, dict[str, Any], Mapping[str, int] | None]:
    """What the strategy is told, how the results record it, and the counts of rationales."""
    strategy = STRATEGIES[config.prompt]
    tokens = config.max_new_tokens
    if tokens is None and strategy.max_new_tokens is not None:
        tokens = max(1, min(strategy.max_new_tokens, answerer.positions // 2))
    temperature = strategy.temperature if config.temperature is None else config.temperature
    votes = strategy.votes if config.votes is None else config.votes
    settings: dict[str, Any] = {
        "shots": None,
        "max_new_tokens": tokens,
        "temperature": temperature,
        "votes": votes,
        "seed": config.seed if strategy.draws else None,
    }
    setting = Setting(
        max_new_tokens=tokens or 1,
        temperature=temperature or 0.0,
        votes=votes or 1,
        seed=config.seed,
    )
    if solved is None:
        return setting, settings, None
    if not strategy.finds_nearest:
        shots = solved.questions[: config.shots]
        settings["shots"] = hashlib.sha256(repr(shots).encode()).hexdigest()
        return dataclasses.replace(setting, shots=shots), settings, None
    tried = RATIONALES if config.rationales is None else config.rationales
    named = {
        "questions": solved.fingerprint,
        "bad_rows": config.bad_rows,
        "answers_from": config.answers_from,
    }
    settings |= {"shots": digest_of(named), "neighbours": config.shots, "rationales": tried}
    demonstrations = gather_demonstrations(
        answerer,
        solved.questions,
        folder,
        {**answered_by._asdict(), **named},
        rationales=tried,
        max_new_tokens=setting.max_new_tokens,
        seed=config.seed,
    )
    setting = dataclasses.replace(setting, demonstrations=demonstrations, neighbours=config.shots)
    return setting, settings, demonstrations.counts


def _beside(folder: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of the same model on the same questions by other strategies."""
    found = []
    for path in sorted(folder.parent.glob(f"*/{RESULTS}")):
        try:
            other = read_json(path) if path.parent != folder else None
        except ValueError:
            continue
        same = ("questions_fingerprint", "model_fingerprint", "base_dtype")
        if isinstance(other, dict) and all(other.get(key) == results[key] for key in same):
            found.append(other)
    return found


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


def confusion(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How often each letter was chosen where each was right; "none" where none could be read."""
    counts = Counter((row["answer"], row["choice"]) for row in rows)
    known = {place for pair in counts for place in pair if place is not None}
    letters = range(max(known) + 1)
    return {
        LETTERS[answer]: {
            **{LETTERS[choice]: counts[answer, choice] for choice in letters},
            "none": counts[answer, None],
        }
        for answer in letters
    }


def _accuracy(correct: NDArray[np.bool_], resamples: int, seed: int) -> dict[str, Any]:
    value = float(correct.mean())
    found = _interval(correct, value, resamples, seed)
    return {"n": len(correct), "accuracy": value, "accuracy_ci": found}


def _interval(values: NDArray[Any], mean: float, resamples: int, seed: int) -> list[float] | None:
    """The 95% interval of the mean of one value a question; None where there is none."""
    row = torch.from_numpy(values.astype(np.float64))[None]

    def means(counts: Tensor) -> Floats:
        return np.asarray((row @ counts.double() / len(values)).numpy())

    (found,) = intervals(
        means, np.array([mean]), len(values), torch.float64, resamples=resamples, seed=seed
    )
    return found


def check_same_questions(
    asked: Sequence[tuple[str, int]], others: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ValueError unless an earlier run answered the same questions (id, right answer)."""
    if list(asked) != [(other["id"], other["answer"]) for other in others]:
        raise ValueError("--compare: the earlier run answered other questions; score it on these")


def paired_accuracy(
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Accuracy minus that of an earlier run on the same questions, with McNemar's exact p.

    Raises ValueError unless both answered the same questions.
    """
    check_same_questions([(row["id"], row["answer"]) for row in rows], others)
    ours, theirs = (
        np.array([row["choice"] == row["answer"] for row in each]) for each in (rows, others)
    )
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    difference = ours.astype(np.float64) - theirs
    mean = float(difference.mean())
    return {
        "difference": mean,
        "ci": _interval(difference, mean, resamples, seed),
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
    if (rationales := results["rationales"]) is not None:
        yield (
            f"rationales: {rationales['rationales_kept']:,} of "
            f"{rationales['rationales_tried']:,} ended in the answer, of "
            f"{rationales['with_rationale']:,} of "
            f"{counted(rationales['solved_questions'], 'question')}"
        )
    for step, published in (results["published_counts"] or {}).items():
        if (scored := results["counts"].get(f"{step} questions")) is not None:
            yield f"{step}: {counted(scored, 'question')} (the paper counts {published:,})"
    for name, count in (("unanswered", "unanswered"), ("shortened prompts", "shortened_prompts")):
        if results[count]:
            yield f"{name}: {results[count]:,}"
    for group in ("step", "subject"):
        for name, one in results[f"per_{group}"].items():
            yield f"  {name}: {said(one)}"
    if (found := results["comparison"]) is not None:
        yield f"difference {found['difference']:+.3f} to {found['run']}, p {found['p']:.3g}"
    yield f"answers and results are in {results['folder']}"


def _answerer(config: QuestionConfig, device: torch.device) -> tuple[ModelAnswerer, AnsweredBy]:
    if config.run is not None:
        finished = restore(Path(config.run), device)
        settings, model, tokenizer = finished.config, finished.model, finished.tokenizer
        fingerprint = digest_of({key: finished.record[key] for key in ("fingerprints", "files")})
    else:
        folder = Path(config.model or "")
        settings = bare_settings(folder, config.base_dtype, config.int8)
        model, tokenizer = load_bare(settings, device), load_tokenizer(folder)
        fingerprint = base_fingerprint(folder)
    if not isinstance(model, CausalLM):
        raise ValueError(f"--mcq needs a language model, but {config.run} is a classifier")
    held: dict[str, str] = {"dtype": base_dtype(settings, device)}
    if held["dtype"] == "int8":
        held["compute"] = settings.int8.compute
    answerer = ModelAnswerer(model, tokenizer, device, config.micro_tokens, config.cache_tokens)
    return answerer, AnsweredBy(fingerprint, held)


def _other_rows(folder: Path, place: str) -> tuple[Row, list[Row]]:
    for path in (folder / place / ANSWERS, folder / ANSWERS):
        if path.is_file():
            return read_rows(path)
    raise ValueError(f"--compare {folder} holds no answers; score it first on the same questions")
