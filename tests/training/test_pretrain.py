"""Continuous pretraining on several sources: shares, records, resume, scores, what is forgotten."""

import csv
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eval as eval_command
import train
from data.general_text import write_general_text
from data.loader import iter_batches
from data.packing import LanguagePieces
from data.tokenizer import load_tokenizer
from evaluation.score import ScoreConfig, score_run
from model.checkpoint import load_causal_lm
from model.files import read_json
from model.generation import GenerationConfig, generate
from tests.evaluation.conftest import write_notes
from tests.training.test_run import Dies, die_at, metrics_of, weights_and_states
from training.checkpoint import load_checkpoint
from training.config import LoraSettings, OptimSettings, RunConfig
from training.dry_run import dry_run
from training.notes import load_notes, source_pieces
from training.objective import LanguageModelling
from training.optim import make_adamw
from training.parallel import Ranks
from training.record import identity
from training.run import run
from training.run_folder import read_record
from training.stages import EMBEDDED_BASE, pretrain
from training.step import optimiser_step

CPU = torch.device("cpu")
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """A second source, a table without patients."""
    path = write_notes(tmp_path / "general.csv", patients=30, seed=9)
    path.write_text(path.read_text().replace("text,patient,label", "text,nobody,label"))
    return path


@pytest.fixture
def mixed(make_config: MakeConfig, notes: Path, general: Path) -> MakeConfig:
    def make(**changes: Any) -> RunConfig:
        data = (f"notes={notes}:0.75", f"general={general}:0.25")
        return make_config("pretrain", **({"data": data, "adapter": "full"} | changes))

    return make


def scored(model: nn.Module, pieces: LanguagePieces) -> tuple[float, float]:
    """Summed loss and scored tokens of every piece, one at a time."""
    objective, total, count = LanguageModelling(model, CPU), 0.0, 0.0
    with torch.inference_mode():
        for batch in iter_batches(pieces, micro_tokens=pieces.max_length):
            loss = objective.loss(batch, dropout_seed=None)
            total, count = total + float(loss.loss_sum), count + loss.denominator
    return total, count


def evaluated(out: Path, *words: str) -> dict[str, Any]:
    assert eval_command.main(["--run", str(out), "--device", "cpu", "--debug", *words]) == 0
    return read_json(out / "eval" / "results.json")


def test_two_sources_are_drawn_recorded_and_scored(
    mixed: MakeConfig, base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = mixed(steps=15, eval_every=15)
    dry_run(config)
    plan = capfd.readouterr().out
    out = run(config)
    record, last = read_json(out / "run.json"), metrics_of(out)[-1]

    drawn = record["kept"]["sources"]
    total = record["kept"]["tokens"]
    assert sum(of["tokens"] for of in drawn.values()) == total
    assert abs(drawn["notes"]["tokens"] - 0.75 * total) < 2 * config.max_length
    assert drawn["general"]["epochs"] > 1 > drawn["notes"]["epochs"]
    for of in drawn.values():  # the plan knew it
        assert f"the run draws {of['tokens']:,} tokens of it, {of['epochs']:.2f} epochs" in plan
    assert "epoch:  once through notes, " in plan

    told = {source["name"]: source for source in record["sources"]}
    assert [told[name]["share"] for name in ("notes", "general")] == [0.75, 0.25]
    assert "by patient" in told["notes"]["split"] and "by text" in told["general"]["split"]
    for part in ("train_notes", "validation_notes", "test_notes", "train_tokens"):
        assert sum(source[part] for source in told.values()) == record["counts"][part]
    prints = record["fingerprints"]["data"]
    assert all(re.fullmatch("[0-9a-f]{64}", prints[name]) for name in ("notes", "general"))

    # Perplexities, each token once, by an account that knows no sources.
    notes = load_notes(config)
    trained, untrained = load_causal_lm(out / "model"), load_causal_lm(base)
    of_part = {
        part: source_pieces(config, notes, getattr(notes.splits, part))
        for part in ("validation", "test")
    }
    results = evaluated(out)
    sums = {"trained": 0.0, "untrained": 0.0, "validation": 0.0}
    counts = {"test": 0.0, "validation": 0.0}
    for name in ("notes", "general"):
        loss, count = scored(trained, of_part["test"][name])
        before, _ = scored(untrained, of_part["test"][name])
        found = results["per_source"][name]
        assert found["tokens"] == count and found["n"] == told[name]["test_notes"]
        assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
        assert found["perplexity_base"] == pytest.approx(math.exp(before / count), rel=1e-5)
        sums["trained"], sums["untrained"] = sums["trained"] + loss, sums["untrained"] + before
        counts["test"] += count
        loss, count = scored(trained, of_part["validation"][name])
        assert last[f"validation_perplexity_{name}"] == pytest.approx(
            math.exp(loss / count), rel=1e-5
        )
        sums["validation"] += loss
        counts["validation"] += count
    assert results["tokens"] == counts["test"]
    assert results["perplexity"] == pytest.approx(math.exp(sums["trained"] / counts["test"]))
    assert results["perplexity_base"] == pytest.approx(math.exp(sums["untrained"] / counts["test"]))
    assert last["validation_perplexity"] == pytest.approx(
        math.exp(sums["validation"] / counts["validation"]), rel=1e-5
    )
    page = (out / "eval" / "report.html").read_text()
    assert "general" in page and f"{results['per_source']['general']['perplexity']:.4f}" in page
    assert evaluated(out)["seen_in_training"] == {"text": 0, "patient": 0}


def test_a_resumed_mixture_ends_in_the_same_bytes(
    mixed: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch of both sources, after the small one has begun again."""
    config = mixed(optim=OptimSettings(states="int8"))
    whole = run(replace(config, out=str(tmp_path / "whole")))
    broken = replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(Dies):
        die_at(5, patch)
        run(broken)
    out = run(broken, resume=True)
    assert metrics_of(out) == metrics_of(whole)
    assert weights_and_states(out) == weights_and_states(whole)
    assert read_json(out / "run.json")["kept"] == read_json(whole / "run.json")["kept"]
    state = read_json(out / "checkpoints" / "step-000006" / "state.json")["loader"]["sources"]
    assert state["notes"]["position"] > 0 and state["notes"]["tokens"] > 0


def test_a_changed_source_is_named(mixed: MakeConfig, notes: Path, general: Path) -> None:
    config = mixed(steps=2, eval_every=2)
    out = run(config)
    for data, says in (
        ((f"notes={notes}:0.5", f"general={general}:0.5"), r"sources were notes \(0.75 of"),
        ((f"notes={notes}:0.75", f"other={general}:0.25"), r"and are notes .*, other \(0.25"),
        ((f"general={general}:0.25", f"notes={notes}:0.75"), "sources were"),
    ):
        with pytest.raises(ValueError, match=says) as refused:
            run(replace(config, data=data), resume=True)
        assert "\n" not in str(refused.value)
    moved = general.with_name("moved.csv")
    general.rename(moved)
    run(replace(config, data=(f"notes={notes}:3", f"general={moved}:1")), resume=True)
    moved.write_text(moved.read_text().replace("fever", "cough", 1))
    config = replace(config, data=(f"notes={notes}:3", f"general={moved}:1"))
    with pytest.raises(ValueError, match="the content of the source general is not what it was"):
        run(config, resume=True)
    with pytest.raises(ValueError, match=r"moved\.csv.*\(general\) have changed since"):
        score_run(ScoreConfig(run=str(out), device="cpu"))


def test_a_checkpoint_of_other_shares_is_refused(mixed: MakeConfig, tmp_path: Path) -> None:
    """One of the same sources and settings, laid into a run of other weights or another order."""
    config = mixed(steps=2, eval_every=1)
    assert isinstance(config.data, tuple)
    notes, general = (word.rpartition(":")[0] for word in config.data)
    taken = run(replace(config, out=str(tmp_path / "taken")))
    saved = taken / "checkpoints" / "step-000002"
    assert load_checkpoint(saved, run=identity(read_record(taken))).weights
    for number, data in enumerate(
        ((f"{notes}:0.25", f"{general}:0.75"), (f"{general}:0.25", f"{notes}:0.75"))
    ):
        other = run(replace(config, data=data, out=str(tmp_path / str(number))))
        with pytest.raises(ValueError, match="another run"):
            load_checkpoint(saved, run=identity(read_record(other)))
    moved = replace(config, data=(f"{notes}:3", f"{general}:1"), out=str(tmp_path / "moved"))
    assert identity(read_record(run(moved))) == identity(read_record(taken))


def test_bad_sources_are_one_line(
    mixed: MakeConfig, notes: Path, general: Path, tmp_path: Path, base: Path
) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_bytes(notes.read_bytes())
    few = tmp_path / "few.csv"
    few.write_text("text\n")
    for changes, says in (
        ({"data": (f"a={notes}:1", f"b={tmp_path}/none.csv:1")}, "none.csv: no such file"),
        ({"data": (f"a={notes}:1", f"b={copy}:1")}, "the sources a and b hold the same notes"),
        ({"data": (f"a={notes}:1", f"b={few}:1")}, "few.csv: no notes in it"),
        ({"patient_column": "nurse"}, "--patient-column is nurse, but none of the sources"),
        (
            {"patient_column": None, "splits": str(tmp_path)},
            "--splits names patients, but none of the sources has any",
        ),
    ):
        with pytest.raises(ValueError, match=says) as refused:
            run(mixed(**changes))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pieces", ["all", "first"])
def test_without_weights_sources_end_their_epochs_together(
    mixed: MakeConfig, notes: Path, general: Path, pieces: str
) -> None:
    """Notes of a few tokens, where BOS and EOS weigh, beside notes of many pieces."""
    with general.open(newline="") as file:
        rows = list(csv.DictReader(file))
    short, long = general.with_name("short.csv"), general.with_name("long.csv")
    for path, texts in (
        (short, [" ".join(row["text"].split()[:2]) + f" {i}" for i, row in enumerate(rows * 5)]),
        (long, [" ".join([row["text"]] * 8) for row in rows]),
    ):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    config = mixed(
        data=(f"short={short}", f"long={long}"),
        patient_column=None,
        pieces=pieces,
        steps=None,
        epochs=2.0,
        eval_every=999,
    )
    cut = source_pieces(config, loaded := load_notes(config), loaded.splits.train)
    has = [int(of.lengths(np.arange(len(of))).sum()) for of in cut.values()]
    record = read_json(run(config) / "run.json")
    assert [source["share"] for source in record["sources"]] == [n / sum(has) for n in has]
    drawn = record["kept"]["sources"]
    # Each of the two epochs ends with a whole step.
    step = config.batch_tokens / sum(has)
    for name in ("short", "long"):
        assert 2.0 - step < drawn[name]["epochs"] < 2.0 + 3 * step
        assert abs(drawn[name]["tokens"] / record["kept"]["tokens"] - 0.5) > 0.1  # unequal


def test_what_was_pretrained_goes_into_later_stages(
    mixed: MakeConfig, make_config: MakeConfig, tmp_path: Path
) -> None:
    """An adapter as --init-adapter, a whole model as --model."""
    changes = {"steps": 4, "eval_every": 4}
    lora = mixed(**changes, adapter="lora", out=tmp_path / "lora")
    out = run(lora)
    results = evaluated(out)
    assert results["per_source"]["notes"]["perplexity_base"] is not None
    assert read_json(out / "run.json")["adapters"] == ["clinical"]
    task = make_config("downstream", **changes, init_adapter=str(out), out=tmp_path / "task")
    assert read_json(run(task) / "run.json")["adapters"] == ["clinical", "downstream"]
    more = replace(lora, adapter="none", init_adapter=str(out), lora=LoraSettings())
    assert read_json(run(replace(more, out=str(tmp_path / "more"))) / "run.json")["finished"]
    full = run(mixed(**changes, out=tmp_path / "full"))
    later = make_config("clinical", **changes, model=str(full / "model"), out=tmp_path / "later")
    assert read_json(run(later) / "run.json")["finished"]


def test_one_named_source_is_the_command_line_s_too(
    mixed: MakeConfig, notes: Path, general: Path, tmp_path: Path
) -> None:
    config = mixed()
    words = ["--stage", "pretrain", "--model", str(config.model), "--data", f"notes={notes}:0.8"]
    words += ["--data", f"general={general}:0.2", "--patient-column", "patient", "--steps", "2"]
    words += ["--max-length", "32", "--batch-tokens", "256", "--device", "cpu", "--workers", "1"]
    assert train.main([*words, "--out", str(tmp_path / "words")]) == 0
    record = read_json(tmp_path / "words" / "run.json")
    assert record["config"]["data"] == [f"notes={notes}:0.8", f"general={general}:0.2"]
    file = tmp_path / "run.yaml"
    settings = {"stage": "pretrain", "model": config.model, "data": [f"notes={notes}"]}
    file.write_text(json.dumps({**settings, "epochs": 0.1}))
    alone = ["--config", str(file), *words[10:12], *words[-8:], "--out", str(tmp_path / "alone")]
    assert train.main(alone) == 0
    record = read_json(tmp_path / "alone" / "run.json")
    assert record["sources"][0]["share"] == 1.0


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_updates_too_small_for_bfloat16_are_kept(
    states: str, mixed: MakeConfig, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 arithmetic on float32 weights: steps that bf16 weights would round away add up.

    30 updates of 1e-6 beside weights of some 0.2, whose neighbours in bfloat16 lie 1e-3 apart.
    """
    monkeypatch.setattr("training.objective.compute_dtype", lambda *_: torch.bfloat16)
    config = mixed()
    notes = load_notes(config)
    pieces = source_pieces(config, notes, notes.splits.train)["notes"]
    batch = [pieces.batch(np.arange(2))]
    settings = OptimSettings(states=states, weight_decay=0.0)

    def trained(dtype: torch.dtype, rate: float, steps: int) -> dict[str, torch.Tensor]:
        model = load_causal_lm(base, dtype=dtype)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        objective = LanguageModelling(model, CPU)
        parameters = dict(model.named_parameters())
        optimiser = make_adamw(parameters, settings)
        for step in range(steps):
            optimiser_step(
                objective, parameters, optimiser, batch, Ranks(0, 1, CPU),
                dropout_seed=step, rate=rate, clip=1.0,
            )  # fmt: skip
        return {name: p.detach().float() - before[name].float() for name, p in parameters.items()}

    name = "model.layers.0.mlp.gate_proj.weight"
    kept = trained(torch.float32, 1e-6, 30)[name]
    assert kept.abs().median() > 5e-6  # of the 3e-5 that all updates could add up to
    if states == "float32":
        lost = trained(torch.bfloat16, 1e-6, 30)[name]
        assert (lost == 0).float().mean() > 0.9


# Forgetting ---------------------------------------------------------------------------------------


def perplexities(out: Path, general: Path) -> dict[str, tuple[float, float]]:
    """Test perplexity and that of the base, of the notes and of the general texts."""
    own = score_run(ScoreConfig(run=str(out), device="cpu"))["per_source"]
    if "general" not in own:  # not trained on: scored as other notes, split by the same rule
        other = ScoreConfig(run=str(out), data=str(general), split="test", device="cpu")
        own["general"] = score_run(other)
    return {name: (of["perplexity"], of["perplexity_base"]) for name, of in own.items()}


def check_that_replay_forgets_less(config: RunConfig, notes: Path, general: Path) -> None:
    """Trained on notes alone, then with a fifth of general text, for as many tokens."""
    alone, replay = (
        perplexities(run(replace(config, data=data, out=f"{config.out}-{name}")), general)
        for name, data in (
            ("alone", (f"notes={notes}:1",)),
            ("replay", (f"notes={notes}:0.8", f"general={general}:0.2")),
        )
    )
    assert alone["general"][1] == pytest.approx(replay["general"][1], rel=1e-6)
    base = {name: alone[name][1] for name in alone}
    for found in (alone, replay):
        assert found["notes"][0] < 0.7 * base["notes"]
    assert alone["general"][0] > 1.05 * base["general"]
    assert replay["general"][0] - base["general"] < 0.5 * (alone["general"][0] - base["general"])


def test_replay_forgets_less(tmp_path: Path) -> None:
    """The embedded base, which knows the general texts, on notes made of other words."""
    config = replace(
        pretrain(),
        model=str(EMBEDDED_BASE),
        max_length=128,
        batch_tokens=1024,
        test_share=0.3,
        epochs=None,
        steps=16,
        lr=2e-3,
        eval_every=99,
        eval_tokens=500,
        keep="last",
        device="cpu",
        workers=1,
        out=str(tmp_path / "run"),
    )
    general = write_general_text(tmp_path / "general", documents=80, seed=7)
    notes = write_notes(tmp_path / "notes.csv", patients=120, seed=3)
    check_that_replay_forgets_less(config, notes, general)


def sampled(base: Path, folder: Path, *, count: int) -> Path:
    """Texts that the base itself writes, a file each: what it knows, where nobody has its data."""
    model, tokenizer = load_causal_lm(base), load_tokenizer(base)
    assert tokenizer.bos_id is not None
    settings = GenerationConfig(
        max_new_tokens=250,
        temperature=1.0,
        stop_ids=(tokenizer.bos_id, model.config.eos_token_ids[0]),
    )
    folder.mkdir()
    for i, ids in enumerate(generate(model, [[tokenizer.bos_id]] * count, settings)):
        ids = [token for token in ids if token not in settings.stop_ids]
        (folder / f"{i:04d}.txt").write_text(tokenizer.decode(ids))
    return folder


@pytest.mark.slow
def test_replay_forgets_less_on_real_notes(real_data: Path, tmp_path: Path) -> None:
    """A LLaMA trained on stories, 120 real notes, and stories that it wrote; three seeds."""
    base = real_data / "stories260k"
    general = sampled(base, tmp_path / "stories", count=200)
    with (real_data / "notes" / "medical_notes_500.csv").open(newline="") as file:
        rows = list(itertools.islice(csv.DictReader(file), 120))
    notes = tmp_path / "notes.csv"
    with notes.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([row["text"]] for row in rows)])
    config = replace(
        pretrain(),
        model=str(base),
        batch_tokens=2048,
        epochs=None,
        steps=30,
        lr=2e-3,
        optim=OptimSettings(schedule="cosine", min_lr_ratio=0.1, beta2=0.95, weight_decay=0.1),
        eval_every=99,
        eval_tokens=1000,
        keep="last",
        device="cpu",
    )
    for seed in range(3):
        out = str(tmp_path / f"seed{seed}")
        check_that_replay_forgets_less(replace(config, seed=seed, out=out), notes, general)
