"""The stages: each a named function that returns a whole run config.

Defaults follow Clinical LLaMA-LoRA (arXiv 2307.03042) where it states them: LoRA of rank 16 and
alpha 32 on q_proj and v_proj, learning rate 3e-4, one epoch over the notes, then ten over the
outcome. A variant is `dataclasses.replace` of a stage. The `embedded` variants are the
demonstration that runs without any argument: a tiny base and a synthetic cohort.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from training.config import LoraSettings, OptimSettings, RunConfig, Stage

EMBEDDED_BASE = Path(__file__).resolve().parent.parent / "data" / "embedded"
SYNTHETIC_COHORT = "runs/synthetic"
# A base this small has little to spare on two projections: every linear layer takes part.
EMBEDDED_LORA = LoraSettings(r=8, alpha=16.0, target_modules=("all-linear",))


def pretrain() -> RunConfig:
    """Train all weights of a base on texts with the language-modelling loss."""
    return RunConfig(
        stage="pretrain",
        adapter="full",
        max_length=512,
        batch_tokens=65_536,
        epochs=1.0,
        lr=3e-4,
        optim=OptimSettings(schedule="cosine", beta2=0.95, weight_decay=0.1),
        out="runs/pretrain",
    )


def clinical() -> RunConfig:
    """Adapt a base to notes: one adapter, "clinical", trained with the language-modelling loss."""
    return RunConfig(
        stage="clinical",
        max_length=512,
        batch_tokens=32_768,
        epochs=1.0,
        lr=3e-4,
        out="runs/clinical",
    )


def downstream() -> RunConfig:
    """Fine-tune for one outcome: a head, the clinical adapter and a new adapter, "downstream"."""
    return RunConfig(
        stage="downstream",
        task="mor",
        max_length=512,
        batch_size=20,
        epochs=10.0,
        lr=5e-5,
        out="runs/downstream",
    )


def instruct() -> RunConfig:
    """Teach a base to answer: one adapter, "instruct", trained on responses to prompts."""
    return RunConfig(
        stage="instruct",
        max_length=1024,
        batch_size=128,
        epochs=3.0,
        lr=3e-4,
        optim=OptimSettings(schedule="cosine"),
        out="runs/instruct",
    )


def embedded_clinical() -> RunConfig:
    """The clinical stage on the embedded base and the synthetic cohort's notes."""
    return replace(
        clinical(),
        model=str(EMBEDDED_BASE),
        data=f"{SYNTHETIC_COHORT}/mimic-iv-note",
        lora=EMBEDDED_LORA,
        batch_tokens=8192,
        epochs=None,
        steps=60,
        lr=5e-3,
    )


def embedded_downstream() -> RunConfig:
    """In-hospital mortality of the synthetic cohort, on top of the embedded clinical run."""
    return replace(
        downstream(),
        model=str(EMBEDDED_BASE),
        data=f"{SYNTHETIC_COHORT}/mimic-iii",
        init_adapter="runs/clinical",
        lora=EMBEDDED_LORA,
        batch_size=8,
        epochs=3.0,
        lr=5e-4,
    )


STAGES: Mapping[Stage, Callable[[], RunConfig]] = {
    "pretrain": pretrain,
    "clinical": clinical,
    "downstream": downstream,
    "instruct": instruct,
}
EMBEDDED: Mapping[Stage, Callable[[], RunConfig]] = {
    "clinical": embedded_clinical,
    "downstream": embedded_downstream,
}
