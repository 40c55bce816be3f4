"""Merge and export on runs as training leaves them, held to what evaluation puts together."""

from pathlib import Path

import pytest
import torch
import transformers

import lora.export
import lora.merge
from model.batch import TokenBatch
from model.heads import CausalLM, SequenceClassifier
from tests.evaluation.conftest import base, clinical_run, downstream_run, notes  # noqa: F401
from tests.lora.oracle import oracle_logits
from tests.lora.test_export import logits_with_peft
from training.assemble import restore

BATCH = TokenBatch.from_arrays(torch.arange(30) * 7 % 512, [0, 11, 30])


def trained_logits(run: Path) -> torch.Tensor:
    model = restore(run, torch.device("cpu")).model
    return model.logits(BATCH) if isinstance(model, CausalLM) else model.scores(BATCH)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["clinical_run", "downstream_run"])
def test_a_trained_run_merged_and_exported(
    name: str,
    request: pytest.FixtureRequest,
    base: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Path = request.getfixturevalue(name)
    expected = trained_logits(run)
    is_classifier = isinstance(restore(run, torch.device("cpu")).model, SequenceClassifier)
    classes = expected.shape[1] if is_classifier else 0

    assert lora.merge.main(["--run", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert "done" in capsys.readouterr().out
    kind = (
        transformers.AutoModelForSequenceClassification
        if classes
        else transformers.AutoModelForCausalLM
    )
    merged = kind.from_pretrained(tmp_path / "merged")
    assert_close(oracle_logits(merged, BATCH), expected)
    assert (tmp_path / "merged" / "tokenizer.model").is_file()
    if classes:
        assert merged.config.id2label == {0: "no", 1: "yes"}

    assert lora.export.main(["--run", str(run), "--out", str(tmp_path / "exported")]) == 0
    assert_close(logits_with_peft(base, tmp_path / "exported", classes, BATCH), expected)
