"""Runs on a BERT through the commands: train, resume, score, predict, merge and export."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import eval as eval_command
import lora.export
import lora.merge
import train as train_command
from data.tokenizer import load_tokenizer
from evaluation.metrics import headline_metrics
from model.batch import TokenBatch
from model.checkpoint import save_model
from model.config import EncoderConfig
from model.decoder import init_weights
from model.encoder import EncoderClassifier
from model.files import read_json
from tests.data.conftest import WORDS
from tests.evaluation.conftest import CANARY_TEXT
from tests.model.bert import write_vocabulary
from tests.training.test_run import Dies, die_at, metrics_of, weights_and_states
from training.assemble import restore
from training.config import RunConfig
from training.notes import load_notes, make_dataset
from training.run import run

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and without a head, and its vocabulary."""
    folder = tmp_path_factory.mktemp("bert") / "base"
    config = EncoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = EncoderClassifier(config, 2)
    init_weights(model, 0.2, seed=0)
    save_model(model, folder)
    headless = {
        k: v for k, v in load_file(folder / "model.safetensors").items() if k.startswith("bert.")
    }
    (folder / "model.safetensors").unlink()
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    write_vocabulary(folder, [*dict.fromkeys(WORDS), CANARY_TEXT, "##s", "of"])
    return folder


@pytest.fixture
def make(make_config: MakeConfig, encoder: Path) -> MakeConfig:
    def of_encoder(**changes: Any) -> RunConfig:
        return make_config(
            "downstream", **({"model": str(encoder), "truncate": "tail", "steps": 40} | changes)
        )

    return of_encoder


def arguments_of(config: RunConfig, *more: str) -> list[str]:
    return [
        *("--stage", "downstream", "--task", "label", "--model", str(config.model)),
        *("--data", str(config.data), "--label-column", "label", "--patient-column", "patient"),
        *("--test-share", "0.3", "--max-length", "32", "--batch-tokens", "512", "--steps", "60"),
        *("--lr", "5e-3", "--truncate", "tail", "--device", "cpu", "--workers", "1"),
        *("--eval-every", "20", "--out", config.out, *more),
    ]


@pytest.mark.parametrize("adapter", ["lora", "full", "none"])
def test_an_encoder_learns_and_is_scored_through_the_commands(
    adapter: str, make: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(out=make().out + adapter)
    out = Path(config.out)
    assert train_command.main(arguments_of(config, "--adapter", adapter)) == 0
    record = read_json(out / "run.json")
    trained = {
        "lora": 2 * 2 * 16 * (32 + 32) + 66,  # rank 16 on query and value of two layers, and head
        "full": sum(p.numel() for p in restore(out, torch.device("cpu")).model.parameters()),
        "none": 66,
    }
    assert record["parameters"]["trainable"] == trained[adapter]
    if adapter == "lora":
        assert record["config"]["lora"]["target_modules"] == ["query", "value"]
        settings = read_json(out / "adapter" / "downstream" / "adapter_config.json")
        assert settings["target_modules"] == ["query", "value"]
        assert settings["modules_to_save"] == ["classifier"]
    assert eval_command.main(["--run", str(out), "--bootstrap", "20", "--device", "cpu"]) == 0
    results = read_json(out / "eval" / "results.json")
    assert results["auroc"] > (0.6 if adapter == "none" else 0.8)
    predictions = out.parent / "scores.csv"
    scoring = ["--run", str(out), "--data", str(config.data), "--predict", str(predictions)]
    assert eval_command.main([*scoring, "--device", "cpu"]) == 0
    with predictions.open() as file:
        assert len(list(csv.DictReader(file))) == 240
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_resumed_run_ends_in_the_same_bytes(
    adapter: str, make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the encoder's own dropout."""
    config = make(adapter=adapter, steps=6)
    whole = run(replace(config, out=str(tmp_path / "whole")), score=headline_metrics)
    broken = replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(Dies):
        die_at(3, patch)
        run(broken, score=headline_metrics)
    out = run(broken, score=headline_metrics, resume=True)
    assert metrics_of(out) == metrics_of(whole)
    assert weights_and_states(out) == weights_and_states(whole)


@pytest.mark.parametrize("truncate", ["head", "tail", "both"])
def test_notes_are_framed_and_cut_inside_the_frame(make: MakeConfig, truncate: str) -> None:
    config = make(max_length=12, truncate=truncate)
    notes = load_notes(config)
    rows = notes.splits.train
    dataset = make_dataset(config, notes, rows)
    cls, sep = notes.tokenizer.bos_id, notes.tokenizer.eos_id
    batch = dataset.batch(np.arange(len(dataset)))
    assert dataset.truncated > 10
    for i, row in enumerate(batch.rows):
        ids = batch.input_ids[batch.offsets[i] : batch.offsets[i + 1]].tolist()
        whole = notes.cache.tokens_of(row).tolist()
        kept = {
            "head": whole[:10],
            "tail": whole[-10:],
            "both": whole if len(whole) <= 10 else whole[:5] + whole[-5:],
        }[truncate]
        assert ids == [cls, *kept, sep]
    assert dataset.lengths(np.arange(len(dataset))).tolist() == np.diff(batch.offsets).tolist()


@pytest.mark.parametrize("stage", ["clinical", "pretrain"])
def test_an_encoder_has_no_language_modelling_stage(
    stage: str, make_config: MakeConfig, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(stage, model=str(encoder), adapter="full")
    for more in ([], ["--dry-run"]):
        arguments = ["--stage", stage, "--model", str(encoder), "--data", str(config.data), *more]
        assert train_command.main([*arguments, "--out", config.out]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and "is an encoder (BERT)" in shown
        assert "--stage downstream" in shown
    assert not Path(config.out).exists()


def test_longer_notes_than_the_encoder_has_positions_are_refused(make: MakeConfig) -> None:
    with pytest.raises(ValueError, match="--max-length is 65"):
        run(make(max_length=65))


def test_targets_of_the_other_family_are_refused(make: MakeConfig) -> None:
    config = make()
    config = replace(config, lora=replace(config.lora, target_modules=("q_proj",)))
    with pytest.raises(ValueError, match="'q_proj' fits no linear layer"):
        run(config)


@pytest.mark.parametrize("adapter", ["prompt", "prefix", "p-tuning", "adaption-prompt"])
def test_adapters_of_decoders_are_refused(adapter: str, make: MakeConfig) -> None:
    with pytest.raises(ValueError, match=f"--adapter {adapter} is for decoders"):
        run(make(adapter=adapter))


def logits_of(config: RunConfig, out: Path, texts: list[str]) -> torch.Tensor:
    """What the finished run says of texts, one at a time."""
    finished = restore(out, torch.device("cpu"))
    tokenizer = load_tokenizer(str(config.model))
    with torch.no_grad():
        return torch.cat(
            [finished.model.scores(TokenBatch.from_arrays(ids, [0, len(ids)]))
             for ids in (framed(tokenizer, text) for text in texts)]
        )  # fmt: skip


def framed(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def test_a_run_leaves_files_that_peft_and_transformers_load(
    make: MakeConfig, tmp_path: Path
) -> None:
    """The adapter in peft, the export in peft, the merged folder in transformers: same logits."""
    texts = ["chest pain and fever", "the patient was seen in clinic"]
    config = make(lr=5e-3, steps=10)
    out = run(config)
    truth = logits_of(config, out, texts)
    tokenizer = load_tokenizer(str(config.model))
    lora.export.main(["--run", str(out), "--out", str(tmp_path / "exported")])
    assert lora.merge.main(["--run", str(out), "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "vocab.txt").is_file()
    loaded = [
        peft.PeftModel.from_pretrained(
            BertForSequenceClassification.from_pretrained(str(config.model), num_labels=2), folder
        )
        for folder in (out / "adapter" / "downstream", tmp_path / "exported")
    ]
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == dict(enumerate(read_json(out / "run.json")["labels"]))
    for model in (*loaded, merged):
        model.eval()
        with torch.no_grad():
            found = torch.cat(
                [model(input_ids=torch.tensor([framed(tokenizer, text)])).logits for text in texts]
            )
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_a_fully_trained_run_is_a_checkpoint_of_transformers(make: MakeConfig) -> None:
    config = make(adapter="full", steps=4)
    out = run(config)
    model = BertForSequenceClassification.from_pretrained(out / "model").eval()
    text = "chest pain and fever"
    ids = framed(load_tokenizer(out / "model"), text)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(found, logits_of(config, out, [text]), rtol=1e-4, atol=1e-5)


def test_the_dry_run_counts_what_the_run_trains(
    make: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make()
    assert train_command.main(arguments_of(config, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert '#         adapter "downstream": 4,096' in shown
    assert "#         the classifier's head: 66" in shown
    assert "- query" in shown and not Path(config.out).exists()
