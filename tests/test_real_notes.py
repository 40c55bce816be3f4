"""The two stages on a real LLaMA and 500 real notes; minutes long, so with --slow alone."""

import json
from pathlib import Path

import pytest

import eval as eval_command
import train

pytestmark = pytest.mark.slow


def evaluated(run: Path) -> dict:
    assert eval_command.main(["--run", str(run)]) == 0
    return json.loads((run / "eval" / "results.json").read_text())


def test_both_stages_learn_from_real_notes(real_data: Path, tmp_path: Path) -> None:
    base = ["--model", str(real_data / "stories260k")]
    notes = [
        *("--data", str(real_data / "notes" / "medical_notes_500.csv")),
        *("--text-column", "text"),
    ]
    clinical = tmp_path / "notes"
    arguments = "--stage clinical --lora.r 16 --lora.alpha 32 --lora.target-modules q_proj v_proj"
    arguments += " --lr 3e-3 --optim.schedule constant --optim.warmup-steps 0"
    arguments += " --max-length 512 --batch-tokens 4096 --steps 60"
    assert train.main([*arguments.split(), *base, *notes, "--out", str(clinical)]) == 0
    results = evaluated(clinical)
    assert results["perplexity_base"] > 95
    assert results["perplexity"] <= 27.5

    for seed in range(3):
        run = tmp_path / f"label{seed}"
        arguments = "--stage downstream --task label --label-column label --test-share 0.3"
        # A base of width 64 wants a higher rate than the default, which is a 7B model's.
        arguments += f" --lr 5e-3 --batch-size 8 --max-length 256 --epochs 10 --seed {seed}"
        arguments += f" --init-adapter {clinical} --out {run}"
        assert train.main([*arguments.split(), *base, *notes]) == 0
        assert evaluated(run)["auroc_ci"][0] > 0.5
