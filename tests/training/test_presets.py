"""Presets against the published numbers, and as the command line takes them."""

import json
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from evaluation.published import ADAPTATION
from lora.attach import adapter_parameters, attach
from model.files import read_json
from model.heads import CausalLM
from tests.lora.test_adapters import LLAMA_7B
from tests.training.test_instruct import write_rows
from training.assemble import adapter_settings
from training.command_line import read_command, used_settings
from training.config import Adapter, Preset, from_dict, to_dict
from training.presets import recipe

PRESETS: tuple[Preset, ...] = typing.get_args(Preset)
OWN = ["--model", "M", "--data", "D"]

# Written down from the sources, not from the code. `None` stands for "not set".
PAPER = {
    "max_length": 128, "lr": 5e-5, "epochs": 10, "keep": "last", "cohort": "paper", "seed": 1234,
    "optim.schedule": "linear", "optim.warmup_steps": 0, "optim.clip": None, "optim.beta2": 0.999,
    "optim.weight_decay": 0.01, "class_weights": True, "truncate": "head", "patience": None,
}  # fmt: skip
BEST = PAPER | {"batch_size": 16}  # 8 x 2
FIRST = {
    "max_length": 128, "pieces": "first", "lr": 3e-4, "epochs": 1, "batch_size": 40, "seed": 1234,
    "optim.schedule": "linear", "optim.warmup_steps": 0, "optim.clip": None, "keep": "last",
}  # fmt: skip
MEADOW = {
    "lr": 2e-5, "epochs": 3, "optim.schedule": "cosine", "optim.weight_decay": 0, "max_length": 256,
    "train_on_inputs": True, "prompt_format": "medalpaca", "eval_every": 200,
}  # fmt: skip
MEADOW_LORA = {
    "batch_size": 128, "lora.r": 8, "lora.alpha": 16, "lora.dropout": 0.1, "adapter": "lora",
    "optim.warmup_steps": 100, "activations": "save", "optim.states": "float32",
}  # fmt: skip
STANFORD = {
    "adapter": "full", "batch_size": 128, "max_length": 512, "optim.schedule": "cosine",
    "optim.warmup_steps": None, "optim.warmup_ratio": 0.03, "optim.weight_decay": 0,
    "prompt_format": "alpaca", "train_on_inputs": False, "keep": "last",
}  # fmt: skip
ALPACA_LORA = {
    "adapter": "lora", "batch_size": 128, "lr": 3e-4, "epochs": 3, "max_length": 256,
    "lora.r": 8, "lora.alpha": 16, "lora.dropout": 0.05, "optim.warmup_steps": 100,
    "optim.schedule": "linear", "base_dtype": "int8", "int8.compute": "int8", "eval_every": 200,
    "prompt_format": "alpaca", "train_on_inputs": True, "optim.weight_decay": 0,
}  # fmt: skip


def lora(r: int, alpha: float, dropout: float) -> dict[str, Any]:
    return {"lora.r": r, "lora.alpha": alpha, "lora.dropout": dropout}


PUBLISHED: Mapping[Preset, tuple[str, dict[str, Any]]] = {
    "paper-llama": ("clinical", FIRST | lora(16, 32, 0.0)),
    "paper-pmc-llama": ("clinical", FIRST | lora(4, 4, 0.2) | {"tokenizer_preset": "pmc-llama"}),
    "paper-outcome": ("downstream", PAPER | lora(16, 32, 0.0) | {"batch_size": 20}),
    "paper-outcome-pmv": ("downstream", BEST | lora(16, 32, 0) | {"task": "pmv"}),
    "paper-outcome-mor": ("downstream", BEST | lora(8, 4, 0.2) | {"task": "mor"}),
    "paper-outcome-los": ("downstream", BEST | lora(16, 4, 0) | {"task": "los"}),
    "paper-outcome-diag": ("downstream", BEST | lora(8, 4, 0.1) | {"task": "diag"}),
    "paper-outcome-proc": ("downstream", BEST | lora(2, 8, 0.1) | {"task": "proc"}),
    "paper-lora-mor": ("downstream", PAPER | {"lr": 3e-4, "batch_size": 20, "task": "mor"}),
    "paper-encoder": ("downstream", PAPER | {"batch_size": 64, "adapter": "full"}),
    "medalpaca": (
        "instruct",
        MEADOW
        | {"adapter": "full", "batch_size": 256, "activations": "checkpoint"}
        | {"optim.warmup_ratio": 0.03, "optim.warmup_steps": None},
    ),
    "medalpaca-lora": ("instruct", MEADOW | MEADOW_LORA | {"base_dtype": None}),
    "medalpaca-lora-int8": (
        "instruct",
        MEADOW | MEADOW_LORA | {"base_dtype": "int8", "int8.compute": "int8"},
    ),
    "medalpaca-lora-int8-13b": ("instruct", ALPACA_LORA),
    "alpaca-7b": ("instruct", STANFORD | {"lr": 2e-5, "epochs": 3}),
    "alpaca-13b": ("instruct", STANFORD | {"lr": 1e-5, "epochs": 5}),
    "alpaca-lora": ("instruct", ALPACA_LORA),
    "alpaca-lora-r16": (
        "instruct",
        ALPACA_LORA
        | {"epochs": 10, "max_length": 512, "lora.r": 16}
        | {"lora.target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    ),
}


def command(name: Preset) -> list[str]:
    stage, numbers = PUBLISHED[name]
    task = ["--task", "mor"] if stage == "downstream" and "task" not in numbers else []
    return ["--stage", stage, "--preset", name, *task, *OWN]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_was_published(name: Preset) -> None:
    stage, numbers = PUBLISHED[name]
    config = read_command(command(name)).config
    assert (config.stage, config.preset, config.model) == (stage, name, "M")
    plain = to_dict(config)
    found = {}
    for flag in numbers:
        group, _, setting = flag.rpartition(".")
        found[flag] = plain[group][setting] if group else plain[setting]
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items()}
    assert found == expected
    assert from_dict(json.loads(json.dumps(plain))) == config


@pytest.mark.parametrize("name", ["paper-pmc-llama", "paper-outcome-diag", "medalpaca"])
def test_what_a_dry_run_prints_gives_the_preset_again(name: Preset, tmp_path: Path) -> None:
    config = read_command(command(name)).config
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(used_settings(config)))
    assert read_command(["--config", str(path)]).config == config


METHODS: tuple[Adapter, ...] = ("lora", "adaption-prompt", "prefix", "prompt", "p-tuning")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "pmc-llama"])
def test_methods_have_the_published_numbers_of_parameters(
    name: str, method: Adapter, base: Path
) -> None:
    """On the shape of LLaMA-7B, which PMC-LLaMA-7B shares; the counts of the paper's table 2."""
    presets: dict[str, Preset] = {"llama": "paper-llama", "pmc-llama": "paper-pmc-llama"}
    config = replace(recipe(presets[name]), adapter=method, model=str(base))
    with torch.device("meta"):
        model = CausalLM(LLAMA_7B)
    attach(model, "clinical", adapter_settings(config, model), seed=0)
    count = sum(p.numel() for p in adapter_parameters(model, "clinical"))
    assert count == ADAPTATION[name, method][0]


def test_typed_flags_win_and_an_alternative_switches_the_presets_off() -> None:
    words = ["--stage", "downstream", "--task", "los", "--preset", "paper-outcome", *OWN]
    config = read_command([*words, "--max-length", "2048", "--cohort", "correct"]).config
    assert (config.max_length, config.cohort, config.lr) == (2048, "correct", 5e-5)
    config = read_command([*words, "--steps", "7", "--batch-tokens", "4096"]).config
    assert (config.steps, config.epochs) == (7, None)
    assert (config.batch_tokens, config.batch_size) == (4096, None)


def test_a_file_may_name_a_preset_and_wins_over_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("stage: instruct\npreset: alpaca-13b\nmodel: M\ndata: D\nlr: 5e-6\n")
    config = read_command(["--config", str(path)]).config
    assert (config.lr, config.epochs, config.preset) == (5e-6, 5.0, "alpaca-13b")
    config = read_command(["--config", str(path), "--preset", "alpaca-7b"]).config
    assert (config.lr, config.epochs, config.preset) == (5e-6, 3.0, "alpaca-7b")


def test_without_model_and_data_a_preset_takes_the_embedded_ones() -> None:
    config = read_command(["--stage", "clinical", "--preset", "paper-llama"]).config
    assert config.model is not None and config.model.endswith("embedded")
    assert (config.max_length, config.lora.r, config.batch_size) == (128, 16, 40)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("clinical --preset paper-lama", "got paper-lama; did you mean paper-llama?"),
        ("clinical --preset paper-lama", "must be one of paper-llama, paper-pmc-llama, got"),
        ("clinical --preset medalpaca", "--preset medalpaca belongs to --stage instruct, not to"),
        ("clinical --preset", "--preset takes one value, got none"),
        ("clinical --pre paper-llama", "--pre is not a flag"),
        ("pretrain --model M --data D --preset x", "must be left out: there is none, got x"),
        ("instruct --preset medalpaca", "--stage instruct needs --model and --data"),
        ("downstream --pieces first", "a setting of --stage pretrain or clinical, but --stage is"),
        (
            "instruct --model M --data D --preset alpaca-lora --optim.warmup-ratio 0.1",
            "not used when --optim.warmup-steps says how many",
        ),
        ("clinical --optim.warmup-ratio 1", "--optim.warmup-ratio must be from 0 to below 1"),
    ],
)
def test_a_preset_that_does_not_fit_is_one_line(
    words: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--stage", *words.split()]) == 2
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1 and said in shown


def test_help_lists_every_preset(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_command(["--help"])
    shown = capfd.readouterr().out
    assert all(name in shown for name in PRESETS)


def test_a_run_says_which_preset_it_began_with(base: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 60), tmp_path / "run"
    words = f"--stage instruct --preset medalpaca-lora --model {base} --data {rows} --out {out}"
    words += " --steps 2 --optim.warmup-steps 1 --batch-size 4 --device cpu --workers 1"
    words += " --prompt-format plain"
    assert train.main(words.split()) == 0
    record = read_json(out / "run.json")
    assert record["config"]["preset"] == "medalpaca-lora"
    assert record["config"]["lora"]["dropout"] == 0.1
    assert train.main([*words.split(), "--resume"]) == 0  # the same words, the same run


def test_a_stage_1_preset_reads_the_beginning_of_each_note(
    base: Path, notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = f"--stage clinical --preset paper-llama --model {base} --data {notes} --out {out}"
    words += " --patient-column patient --max-length 16 --device cpu --workers 1"
    assert train.main([*words.split(), "--dry-run"]) == 0
    plan = capfd.readouterr().out
    assert "cut into pieces, the first kept" in plan
    assert train.main([*words.split(), "--overwrite"]) == 0
    record = read_json(out / "run.json")
    counts = record["counts"]
    assert record["total_steps"] == -(-counts["train_notes"] // 40)
    assert record["epoch_tokens"] <= 16 * counts["train_notes"]
    assert f"epoch:  {record['epoch_tokens']:,} tokens" in plan
