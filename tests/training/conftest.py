"""Runs of seconds: the tiny base and notes of the evaluation tests, and configs on them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import (  # noqa: F401 (fixtures)
    CANARY_PATIENT,
    CANARY_TEXT,
    base,
    notes,
    one_thread,
    settings,
)
from training.config import LoraSettings, RunConfig
from training.stages import clinical, downstream, pretrain


@pytest.fixture
def make_config(base: Path, notes: Path, tmp_path: Path) -> Callable[..., RunConfig]:  # noqa: F811
    """A config of a stage by name: 8 steps, validated and saved every second one, with dropout."""

    def make(stage: str, **changes: Any) -> RunConfig:
        start = {"clinical": clinical, "downstream": downstream, "pretrain": pretrain}[stage]()
        if stage == "downstream":
            start = replace(start, task="label", label_column="label")
        out = changes.pop("out", tmp_path / "runs" / stage)
        config = settings(start, base, notes, Path(out))
        lora = LoraSettings(r=4, dropout=0.1)
        return replace(
            config, **({"steps": 8, "eval_every": 2, "eval_tokens": 2000, "lora": lora} | changes)
        )

    return make
