"""A tiny base, notes, two finished runs on them, studies, and a model that follows a script."""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import evaluation.cells
from evaluation.answering import Asked, Prompt, Scored, Written
from model.checkpoint import save_model
from model.config import DecoderConfig
from model.decoder import init_weights
from model.generation import GenerationConfig
from model.heads import CausalLM
from tests.data.conftest import WORDS, train_sentencepiece
from training.config import LoraSettings, OptimSettings, RunConfig
from training.run import run
from training.stages import clinical, downstream

# In every note, and a patient's identifier: neither may appear in anything that is written.
CANARY_TEXT, CANARY_PATIENT = "zebrafinch", "QX-771"


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small sums: waking a second thread would take longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    model = CausalLM(config)
    init_weights(model, 0.2, seed=0)
    save_model(model, folder)
    train_sentencepiece(folder / "tokenizer.model")
    return folder


def write_notes(path: Path, *, patients: int, seed: int, labelled: bool = True) -> Path:
    """Two notes a patient; those of most patients with the label "yes" end in "fever"."""
    rng = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "patient", "label"][: 3 if labelled else 2])
        for patient in range(patients):
            sick = rng.random() < 0.5
            label = "yes" if sick != (rng.random() < 0.15) else "no"
            for _ in range(2):
                words = [
                    word for word in rng.choices(WORDS, k=rng.randint(5, 60)) if word != "fever"
                ]
                words = [CANARY_TEXT, *words, *(["fever"] * 3 if sick else [])]
                row = [
                    " ".join(words),
                    f"{CANARY_PATIENT}-{seed}-{patient}",
                    label,
                ]
                writer.writerow(row[: 3 if labelled else 2])
    return path


@pytest.fixture(scope="package")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("notes") / "notes.csv", patients=120, seed=0)


def settings(stage: RunConfig, base: Path, notes: Path, out: Path) -> RunConfig:
    """A stage that takes seconds: few steps on the tiny base."""
    return replace(
        stage,
        model=str(base),
        data=str(notes),
        patient_column="patient",
        test_share=0.3,
        max_length=32,
        batch_tokens=512,
        batch_size=None,
        epochs=None,
        steps=6,
        lr=2e-2,
        lora=LoraSettings(r=4),
        optim=OptimSettings(),
        device="cpu",
        workers=1,
        out=str(out),
    )


@pytest.fixture(scope="package")
def clinical_run(base: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "clinical"
    return run(settings(clinical(), base, notes, out))


@pytest.fixture(scope="package")
def downstream_run(base: Path, notes: Path, clinical_run: Path) -> Path:
    config = replace(
        settings(downstream(), base, notes, clinical_run.parent / "downstream"),
        task="label",
        label_column="label",
        init_adapter=str(clinical_run),
        truncate="tail",  # where the telling word stands
        steps=30,
    )
    return run(config)


# Studies ------------------------------------------------------------------------------------------

CLOCK = ("hours_per_epoch", "seconds_per_epoch", "peak_memory")  # differ each time


@pytest.fixture(scope="module")
def whole(
    request: pytest.FixtureRequest, words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The finished study of a module's `main` and `words`."""
    out = tmp_path_factory.mktemp("whole") / "study"
    assert request.module.main([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would make a cell of a study again fails."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a cell was made again")

    for name in ("run", "score_run", "score_questions"):
        monkeypatch.setattr(evaluation.cells, name, never)


def tables_of(out: Path) -> dict[str, Any]:
    """A study's figures but for those of the clock."""

    def without_clock(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in CLOCK}

    tables: dict[str, Any] = json.loads((out / "study.json").read_text(), object_hook=without_clock)
    return tables


# A model ------------------------------------------------------------------------------------------


class Scripted:
    """Writes what `say` makes of a prompt, the settings and the seed; keeps what it was asked.

    score: of a continuation, in the place of its log-likelihood.
    """

    positions = 2048

    def __init__(
        self,
        say: Callable[[str, GenerationConfig, int], str] | None = None,
        *,
        score: Callable[[str], float] | None = None,
    ) -> None:
        self.say, self.score = say, score
        self.prompts: list[Prompt] = []
        self.configs: list[GenerationConfig] = []
        self.seeds: list[int] = []

    def log_likelihoods(self, asked: Sequence[Asked]) -> list[Scored]:
        assert self.score is not None
        return [Scored(self.score(one.continuation), False) for one in asked]

    def complete(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        seeds: Sequence[int],
        end: str = "",
    ) -> list[Written]:
        assert self.say is not None
        self.prompts += prompts
        self.configs += [config] * len(prompts)
        self.seeds += seeds
        return [
            Written(self.say(prompt.text, config, seed), 3, False)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[len(text), 1.0] for text in texts], np.float32)
