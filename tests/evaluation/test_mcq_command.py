"""Questions through the real command: instruct runs, alone and stacked, and bare bases."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval as command
from data.questions import LETTERS, Question
from data.tokenizer import load_tokenizer
from evaluation.answering import Asked, ModelAnswerer, Prompt
from evaluation.prompting import choice_prompt, letter_prompt
from model.checkpoint import load_causal_lm
from model.linear import Linear
from tests.data.conftest import WORDS
from tests.evaluation.conftest import CANARY_TEXT, settings
from training.assemble import restore
from training.config import LoraSettings, RunConfig
from training.run import run
from training.stages import downstream, instruct

CPU = torch.device("cpu")
Ask = Callable[..., dict[str, Any]]


def write_rows(path: Path) -> Path:
    """Rows whose answer is the last word of the question."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(80):
            words = rng.choices(WORDS, k=6)
            row = {"instruction": "Say it.", "input": " ".join(words), "output": words[-1]}
            print(json.dumps(row), file=file)
    return path


def instruct_settings(base: Path, out: Path, **changes: Any) -> RunConfig:
    rows = write_rows(out.parent / "rows.jsonl")
    return replace(
        settings(instruct(), base, rows, out),
        patient_column=None,
        prompt_format="plain",
        max_length=64,
        steps=4,
        lora=LoraSettings(r=4),
        **changes,
    )


@pytest.fixture(scope="module")
def instruct_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(instruct_settings(base, tmp_path_factory.mktemp("instruct") / "first"))


def write_questions(path: Path, count: int, seed: int) -> list[Question]:
    """MedQA's layout; the canary is in every question."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        stem = " ".join([CANARY_TEXT, *rng.choices(WORDS, k=4), f"{seed}-{i}?"])
        options = tuple(" ".join(rng.sample(WORDS, k=1 + i % 2)) for _ in range(3 + i % 2))
        made.append(Question(f"{path.stem}-{i + 1}", stem, options, rng.randrange(len(options))))
    with path.open("w", encoding="utf-8") as file:
        for one in made:
            options_of = dict(zip(LETTERS, one.options, strict=False))
            row = {"question": one.stem, "options": options_of, "answer_idx": LETTERS[one.answer]}
            print(json.dumps(row), file=file)
    return made


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Put questions by the command; the results as it wrote them."""

    def ask(*words: object, code: int = 0) -> dict[str, Any]:
        fixed = ["--mcq", "medqa", "--device", "cpu", "--bootstrap", "20"]
        assert command.main([*map(str, words), *fixed]) == code
        named = dict(zip(map(str, words), map(str, words[1:]), strict=False))
        root = Path(named.get("--run", named.get("--out", "")))
        written = sorted(root.glob("eval/medqa-*/results.json"), key=lambda p: p.stat().st_mtime_ns)
        return {} if code else json.loads(written[-1].read_text()) | {"folder": written[-1].parent}

    return ask


def choices_of(results: dict[str, Any]) -> list[int]:
    lines = (results["folder"] / "answers.jsonl").read_text().splitlines()
    return [json.loads(line)["choice"] for line in lines[1:]]


@pytest.mark.parametrize("prompt", ["letter", "choice"])
def test_few_shots_on_an_instruct_run_answer_what_plain_sums_say(
    prompt: str, instruct_run: Path, ask: Ask, tmp_path: Path
) -> None:
    """The solved questions stand in front, each with its answer, and every sum is of that text."""
    questions = write_questions(tmp_path / "test.jsonl", 12, seed=1)
    shots = write_questions(tmp_path / "solved.jsonl", 3, seed=2)[:2]
    words = ["--run", instruct_run, "--data", tmp_path / "test.jsonl", "--prompt", prompt]
    few = ask(*words, "--shots", 2, "--shots-data", tmp_path / "solved.jsonl")
    assert (few["n"], few["shots"], few["strategy"]) == (12, 2, prompt)

    finished = restore(instruct_run, CPU)
    answerer = ModelAnswerer(finished.model, finished.tokenizer, CPU, 4096)  # type: ignore[arg-type]
    say = letter_prompt if prompt == "letter" else choice_prompt

    def answers(one: Question) -> list[str]:
        listed = LETTERS[: len(one.options)] if prompt == "letter" else one.options
        return [f" {answer}" for answer in listed]

    front = "".join(f"{say(one)}{answers(one)[one.answer]}\n\n" for one in shots)
    expected = []
    for one in questions:
        sums = [
            answerer.log_likelihoods([Asked(Prompt(front + say(one)), answer)])[0].log_likelihood
            for answer in answers(one)
        ]
        expected.append(max(range(len(sums)), key=sums.__getitem__))
    assert choices_of(few) == expected
    right = sum(choice == one.answer for choice, one in zip(expected, questions, strict=True))
    assert few["accuracy"] == pytest.approx(right / 12)
    alone = ask(*words)
    assert alone["shots"] == 0 and alone["folder"] != few["folder"]
    for path in (instruct_run / "eval").rglob("*"):
        assert path.is_dir() or CANARY_TEXT.encode() not in path.read_bytes()


@pytest.mark.parametrize("frozen", [True, False])
def test_an_instruct_run_on_another_is_stacked_by_name_and_answers(
    frozen: bool, base: Path, instruct_run: Path, ask: Ask, tmp_path: Path
) -> None:
    config = instruct_settings(base, tmp_path / "second", init_adapter=str(instruct_run))
    out = run(replace(config, freeze_init_adapter=frozen))
    record = json.loads((out / "run.json").read_text())
    assert record["adapters"] == ["instruct", "instruct-2"]
    file = "adapter/instruct/adapter_model.safetensors"
    assert ((out / file).read_bytes() == (instruct_run / file).read_bytes()) == frozen
    write_questions(tmp_path / "test.jsonl", 12, seed=1)
    assert ask("--run", out, "--data", tmp_path / "test.jsonl")["n"] == 12

    # Both adapters are on the base: their updates, read from their files, are in every product.
    network = restore(out, CPU).model.network
    layer = network.blocks[0].self_attn.q_proj
    assert isinstance(layer, Linear) and list(layer.adapters) == ["instruct", "instruct-2"]
    x = torch.randn(3, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x @ layer.weight.T
    for name in record["adapters"]:
        a, b, scaling = _stored(out / "adapter" / name, "layers.0.self_attn.q_proj")
        expected += scaling * (x @ a.T) @ b.T
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer(x), x @ layer.weight.T, rtol=1e-5, atol=1e-6)

    again = replace(config, out=str(tmp_path / "third"), init_adapter=str(out))
    with pytest.raises(ValueError, match="2 adapters, instruct and instruct-2, which work"):
        run(again)


def _stored(folder: Path, layer: str) -> tuple[Tensor, Tensor, float]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    (a,) = (tensor for name, tensor in tensors.items() if f"{layer}.lora_A" in name)
    (b,) = (tensor for name, tensor in tensors.items() if f"{layer}.lora_B" in name)
    settings = json.loads((folder / "adapter_config.json").read_text())
    return a, b, settings["lora_alpha"] / settings["r"]


def test_instruct_stands_on_clinical_and_downstream_on_instruct(
    base: Path, notes: Path, clinical_run: Path, instruct_run: Path, ask: Ask, tmp_path: Path
) -> None:
    config = instruct_settings(base, tmp_path / "upper", init_adapter=str(clinical_run))
    out = run(config)
    assert restore(out, CPU).record["adapters"] == ["clinical", "instruct"]
    write_questions(tmp_path / "test.jsonl", 12, seed=1)
    assert ask("--run", out, "--data", tmp_path / "test.jsonl", "--prompt", "choice")["n"] == 12
    outcome = replace(
        settings(downstream(), base, notes, tmp_path / "outcome"),
        task="label",
        label_column="label",
        init_adapter=str(instruct_run),
        steps=2,
    )
    assert restore(run(outcome), CPU).record["adapters"] == ["instruct", "downstream"]
    # Trained on, it keeps its name.
    more = instruct_settings(base, tmp_path / "more", init_adapter=str(instruct_run))
    more = replace(more, adapter="none", lora=LoraSettings())
    assert restore(run(more), CPU).record["adapters"] == ["instruct"]


def scores(answerer: ModelAnswerer, question: Question, letters: str) -> list[float]:
    asked = [Asked(Prompt(letter_prompt(question)), f" {letter}") for letter in letters]
    return [found.log_likelihood for found in answerer.log_likelihoods(asked)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_bare_base_is_held_as_asked(dtype: str, base: Path, ask: Ask, tmp_path: Path) -> None:
    """Its log-likelihoods are those of a base that is loaded so; other answers are not reused."""
    questions = write_questions(tmp_path / "test.jsonl", 6, seed=1)
    out = tmp_path / "scores"
    words = ["--model", base, "--out", out, "--data", tmp_path / "test.jsonl"]
    if dtype != "float32":
        ask(*words, "--base-dtype", "float32")
    results = ask(*words, "--base-dtype", dtype)
    assert results["base_dtype"]["dtype"] == dtype
    if dtype == "int8":
        model = load_causal_lm(base, int8="bf16")
    else:
        model = load_causal_lm(base, dtype=getattr(torch, dtype))
    answerer = ModelAnswerer(model, load_tokenizer(base), CPU, 4096)
    lines = (results["folder"] / "answers.jsonl").read_text().splitlines()[1:]
    for one, line in zip(questions, map(json.loads, lines), strict=True):
        letters = LETTERS[: len(one.options)]
        assert line["scores"] == pytest.approx(scores(answerer, one, letters), rel=1e-2)
    plain = ModelAnswerer(load_causal_lm(base), load_tokenizer(base), CPU, 4096)
    full = [scores(plain, one, "A")[0] for one in questions]
    found = [json.loads(line)["scores"][0] for line in lines]
    assert (found == pytest.approx(full, rel=1e-6)) == (dtype == "float32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "a", "--base-dtype", "int8"], "belong to --model"),
        (
            ["--model", "a", "--out", "b", "--base-dtype", "float32", "--int8.compute", "int8"],
            "a setting of --base-dtype int8",
        ),
    ],
)
def test_how_a_base_is_held_is_asked_of_a_bare_base_alone(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.read_command([*words, "--mcq", "medqa", "--data", "c.jsonl"])
