"""A tiny base, a table of notes, and two finished runs on them."""

import csv
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_model
from model.config import DecoderConfig
from model.decoder import init_weights
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
