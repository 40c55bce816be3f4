"""Instruction tuning: whole runs, their resumption and score, and NEFTune's noise."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval
from evaluation.score import ScoreConfig, score_run
from model.batch import TokenBatch
from model.files import read_json
from tests.data.conftest import WORDS
from tests.training.conftest import CANARY_TEXT, settings
from tests.training.test_run import Dies, die_at, metrics_of, weights_and_states
from training.assemble import restore
from training.command_line import read_command
from training.config import LoraSettings, RunConfig
from training.neftune import NeftuneNoise
from training.notes import load_notes, make_dataset
from training.run import run
from training.stages import instruct

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")


def write_rows(path: Path, count: int) -> Path:
    """Rows and chats in turn; every answer says the word that the question ends with."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            words = rng.choices(WORDS, k=rng.randint(2, 8))
            question, answer = " ".join([CANARY_TEXT, *words]), f"It is {words[-1]}."
            row: dict[str, Any] = {"instruction": "Say it.", "input": question, "output": answer}
            if i % 3 == 0:
                said = (("user", question), ("assistant", answer)) * 2
                row = {"messages": [{"role": role, "content": text} for role, text in said]}
            print(json.dumps(row), file=file)
    return path


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """A run of 6 steps on the tiny base, with dropout and noise."""

    def make(**changes: Any) -> RunConfig:
        rows = write_rows(tmp_path / "rows.jsonl", 150)
        out = tmp_path / "runs" / changes.pop("out", "instruct")
        config = settings(instruct(), base, rows, out)
        config = replace(
            config,
            patient_column=None,
            prompt_format="plain",
            max_length=128,
            micro_tokens=256,
            eval_every=2,
            neftune_alpha=5.0,
            lora=LoraSettings(r=4, dropout=0.1),
        )
        return replace(config, **changes)

    return make


def test_a_run_trains_resumes_to_the_same_bytes_and_is_scored(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make(out="whole"))
    with monkeypatch.context() as patch, pytest.raises(Dies):
        die_at(3, patch)
        run(make(out="broken"))
    broken = run(make(out="broken"), resume=True)
    assert metrics_of(broken) == metrics_of(whole)
    assert weights_and_states(broken) == weights_and_states(whole)
    record = read_json(whole / "run.json")
    assert record["adapters"] == ["instruct"] and record["finished"]
    results = score_run(ScoreConfig(run=str(whole)))
    assert results["perplexity"] < 0.8 * results["perplexity_base"]
    # Scored are the responses and what ends them: each is counted by its own tokenisation.
    config = make(out="whole")
    notes = load_notes(config)
    dataset = make_dataset(config, notes, notes.splits.test)
    assert results["tokens"] == sum(
        np.count_nonzero(dataset.batch(np.array([i])).labels != -100) for i in range(len(dataset))
    )
    assert results["tokens"] < dataset.lengths(np.arange(len(dataset))).sum() / 2
    other = score_run(ScoreConfig(run=str(whole), data=str(config.data)))
    assert other["n"] == 150 and other["split"] == "all"
    for path in whole.parent.rglob("*"):
        if path.is_file():
            assert CANARY_TEXT.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "full", "lora": LoraSettings(), "lr": 3e-3},
        {"base_dtype": "int8"},
        {"train_on_inputs": True, "prompt_format": "alpaca", "max_length": 200},
        {"adapter": "prompt", "lora": LoraSettings()},
    ],
    ids=["full", "int8", "inputs", "virtual-tokens"],
)
def test_what_trains_may_be_all_weights_or_an_adapter_over_int8(
    make: Make, changes: dict[str, Any]
) -> None:
    out = run(make(**changes, steps=4))
    first, *_, last = (line["loss"] for line in metrics_of(out) if "loss" in line)
    assert last < first
    assert math.isfinite(score_run(ScoreConfig(run=str(out)))["perplexity"])


def test_bad_and_long_rows_are_counted(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(max_length=64)
    with Path(str(config.data)).open("a", encoding="utf-8") as file:
        print(json.dumps({"instruction": "Say it.", "input": "", "output": ""}), file=file)
        print(json.dumps({"instruction": "a b " * 80, "input": "", "output": "c"}), file=file)
    with pytest.raises(ValueError, match=r"line 151: .* an empty output"):
        load_notes(config)
    left_out = load_notes(replace(config, bad_rows="skip")).left_out
    assert left_out["an empty output"] == 1
    assert left_out["more tokens than --max-length 64"] >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "clinical", "--neftune-alpha", "5"], "no effect.*--stage instruct"),
        (["--stage", "instruct", "--neftune-alpha", "0"], "--neftune-alpha must be above 0"),
        (["--stage", "instruct", "--neftune-length", "row"], "a setting of --neftune-alpha"),
        (["--stage", "instruct", "--text-column", "a"], "reads rows and chats"),
        (["--stage", "instruct", "--adapter", "none"], "trains nothing"),
    ],
)
def test_flags_without_a_meaning_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_command([*words, "--model", "base", "--data", "rows.json"])
    assert eval.read_command(["--run", "a"]).run == "a"


# NEFTune ------------------------------------------------------------------------------------------

LENGTHS, SAMPLES, SEED = [3, 40, 17], [7, 1 << 20, 5 << 20], 11


def noise_of(module: NeftuneNoise, lengths: list[int], samples: list[int], x: torch.Tensor):
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    batch = TokenBatch.from_arrays(torch.zeros(int(offsets[-1])), offsets.tolist(), samples)
    noisy, same = module(x, batch, SEED)
    assert same is batch
    return noisy - x


@pytest.mark.parametrize("row_length", [None, 512])
def test_the_noise_has_the_stated_size_and_is_the_same_packed_and_unpacked(row_length) -> None:
    alpha, width = 5.0, 4096
    module = NeftuneNoise(alpha, row_length)
    x = torch.zeros(sum(LENGTHS), width, dtype=torch.float64)
    packed = noise_of(module, LENGTHS, SAMPLES, x).split(LENGTHS)
    for length, sample, noise in zip(LENGTHS, SAMPLES, packed, strict=True):
        bound = alpha / math.sqrt((row_length or length) * width)
        assert noise.abs().max() <= bound * (1 + 1e-6) and noise.abs().max() > 0.99 * bound
        # Of uniform noise the mean square is a third of the bound's; the norm over a sample of its
        # own length is then alpha / sqrt(3), whatever that length.
        assert float(noise.norm()) == pytest.approx(bound * math.sqrt(length * width / 3), rel=0.02)
        assert abs(float(noise.mean())) < 0.03 * bound
        alone = noise_of(module, [length], [sample], torch.zeros_like(noise))
        assert torch.equal(alone, noise)
    flat = torch.cat(packed)
    signs = torch.corrcoef(flat[[0, 1, 3, 4, 50]])
    assert (signs - torch.eye(5)).abs().max() < 0.06  # rows draw independently


def test_evaluation_has_no_noise_and_another_step_another_one() -> None:
    module, x = NeftuneNoise(5.0), torch.ones(4, 8)
    batch = TokenBatch.from_arrays([1, 2, 3, 4], [0, 4])
    assert module(x, batch, None)[0] is x
    assert not torch.equal(module(x, batch, 1)[0], module(x, batch, 2)[0])


def test_a_run_has_the_noise_in_training_alone(make: Make, monkeypatch) -> None:
    """Another loss from the first step on; none of it in validation, and in no finished run."""
    shared = {"steps": 2, "eval_every": 2, "lr": 1e-12, "lora": LoraSettings(r=4)}
    losses = {}
    for alpha in (None, 5.0, 50.0):
        out = run(make(**shared, neftune_alpha=alpha, out=f"alpha-{alpha}"))
        lines = metrics_of(out)
        losses[alpha] = (
            next(line["loss"] for line in lines if "loss" in line),
            score_run(ScoreConfig(run=str(out)))["perplexity"],
        )
        assert len(restore(out, CPU).model.network.input_modules) == 0
    trained, scored = zip(*losses.values(), strict=True)
    assert len(set(trained)) == 3
    assert max(scored) - min(scored) < 1e-6 * max(scored)


def test_virtual_rows_get_no_noise(make: Make) -> None:
    from training.assemble import build_model

    config = make(adapter="prompt", lora=LoraSettings())
    model = build_model(config, load_notes(config), CPU)
    modules = list(model.network.input_modules.values())
    assert isinstance(modules[0], NeftuneNoise) and len(modules) == 2
    batch = TokenBatch.from_arrays(torch.arange(3, 13), [0, 4, 10])
    x = model.network.embed_tokens(batch.input_ids)
    wide = batch
    for module in modules:
        x, wide = module(x, wide, SEED)
    is_virtual = wide.input_ids == -1
    rows = modules[1].rows().repeat(2, 1)
    assert torch.equal(x[is_virtual], rows)
    assert not torch.equal(x[~is_virtual], model.network.embed_tokens(batch.input_ids))
