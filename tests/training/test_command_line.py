"""Every mistake of a user is one line and exit code 2; files and flags obey the same rules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.conftest import ROOT
from training.command_line import read_command
from training.config import RunConfig, from_dict, to_dict
from training.stages import EMBEDDED, STAGES

CLINICAL = ["--stage", "clinical"]
OWN = ["--model", "M", "--data", "D"]
PRETRAIN = ["--stage", "pretrain", "--model", "M"]
LABEL = ["--stage", "downstream", "--task", "label", "--label-column", "label", *OWN]

REFUSED = {
    # flags that are not there
    "no stage": ([], "--stage is missing: choose one of pretrain, clinical, downstream"),
    "a word": (["clinical"], "'clinical' is not a flag"),
    "typo": ([*CLINICAL, "--max-lenght", "5"], "did you mean --max-length?"),
    "nested typo": ([*CLINICAL, "--optim.schedul", "linear"], "did you mean --optim.schedule?"),
    "without its group": ([*CLINICAL, "--alpha", "5"], "did you mean --lora.alpha?"),
    "dash for dot": ([*CLINICAL, "--lora-r", "5"], "did you mean --lora.r?"),
    "abbreviated": ([*CLINICAL, "--mod", "x"], "--mod is not a flag"),
    "another tool's name": ([*CLINICAL, "--learning_rate", "1"], "did you mean --lr?"),
    "another tool's name 2": ([*CLINICAL, "--output_dir", "x"], "did you mean --out?"),
    "another tool's name 3": ([*CLINICAL, "--num-train-epochs", "1"], "did you mean --epochs?"),
    "unlike anything": ([*CLINICAL, "--qqqqqq", "1"], "--help lists all flags"),
    "group as a flag": ([*CLINICAL, "--lora", "8"], "--lora is not a flag; did you mean"),
    # how many values
    "twice": ([*CLINICAL, "--lr", "1", "--lr", "2"], "--lr is given twice"),
    "twice with =": ([*CLINICAL, "--lr=1", "--lr", "1"], "--lr is given twice"),
    "with its negation": ([*CLINICAL, "--resume", "--no-resume"], "--resume is given twice"),
    "no value": ([*CLINICAL, "--lr"], "--lr takes one value, got none"),
    "two values": ([*CLINICAL, "--lr", "1", "2"], "--lr takes one value, got 2: 1 2"),
    "value of a switch": ([*CLINICAL, "--overwrite", "True"], "--overwrite is a switch"),
    "empty list": ([*CLINICAL, "--lora.target-modules"], "needs at least one value"),
    # values
    "not a whole number": ([*CLINICAL, "--steps", "1e3"], "--steps must be a whole number"),
    "not a number": ([*CLINICAL, "--lr", "fast"], "--lr must be a number, got 'fast'"),
    "unknown stage": (["--stage", "clinicl"], "did you mean clinical?"),
    "unknown choice": ([*CLINICAL, "--optim.schedule", "cos"], "did you mean cosine?"),
    "unknown dtype": ([*CLINICAL, "--base-dtype", "int4"], "one of float32, bfloat16, int8"),
    "rank 0": ([*CLINICAL, "--lora.r", "0"], "--lora.r must be a whole number from 1"),
    "negative rank": ([*CLINICAL, "--lora.r", "-5"], "--lora.r must be a whole number from 1"),
    "no virtual tokens": (
        [*CLINICAL, "--adapter", "prompt", "--prompt.num-virtual-tokens", "0"],
        "--prompt.num-virtual-tokens must be a whole number from 1 to 65536, got 0",
    ),
    "no init text": (
        [*CLINICAL, "--adapter", "prompt", "--prompt.init", "text", "--prompt.init-text", " "],
        "--prompt.init-text must hold a word",
    ),
    "encoder dropout 1": (
        [*CLINICAL, "--adapter", "p-tuning", "--p-tuning.encoder-dropout", "1"],
        "--p-tuning.encoder-dropout must be from 0 to below 1",
    ),
    "unknown encoder": (
        [*CLINICAL, "--adapter", "p-tuning", "--p-tuning.encoder", "ltsm"],
        "did you mean lstm?",
    ),
    "of an adapter that was not chosen": (
        [*CLINICAL, "--adapter", "prefix", "--p-tuning.encoder", "mlp"],
        "it is a setting of --adapter p-tuning, but --adapter is prefix",
    ),
    "of LoRA beside a prompt": (
        [*CLINICAL, "--adapter", "prompt", "--lora.r", "4"],
        "it is a setting of --adapter lora, but --adapter is prompt",
    ),
    "text of a random prompt": (
        [*CLINICAL, "--adapter", "prompt", "--prompt.init-text", "x"],
        "it is a setting of --prompt.init text, but --prompt.init is random",
    ),
    "width of a projection that is off": (
        [*CLINICAL, "--adapter", "prefix", "--prefix.encoder-hidden-size", "8"],
        "it is a setting of --prefix.projection",
    ),
    "layers of an LSTM that is none": (
        [
            *CLINICAL,
            "--adapter",
            "p-tuning",
            "--p-tuning.encoder=mlp",
            "--p-tuning.encoder-layers=3",
        ],
        "it is a setting of an LSTM, but --p-tuning.encoder is mlp",
    ),
    "dropout 1": ([*CLINICAL, "--lora.dropout", "1"], "--lora.dropout must be from 0 to below 1"),
    "nan": ([*CLINICAL, "--lr", "nan"], "--lr must be above 0, got nan"),
    "infinity": ([*CLINICAL, "--lora.alpha", "inf"], "--lora.alpha must be a number above 0"),
    "no steps": ([*CLINICAL, "--steps", "0"], "--steps must be at least 1, got 0"),
    "negative seed": ([*CLINICAL, "--seed", "-1"], "--seed must be from 0"),
    "share of a share": ([*CLINICAL, "--test-share", "0.25"], "whole number of tenths"),
    "beta 1": ([*CLINICAL, "--optim.beta2", "1"], "--optim.beta2 must be from 0 to below 1"),
    "clip of a word": (
        [*CLINICAL, "--optim.clip", "no"],
        "--optim.clip must be a number or None, got 'no'",
    ),
    "no such number format": (
        [*CLINICAL, "--base-dtype", "float16"],
        "--base-dtype must be one of float32, bfloat16, int8, got 'float16'; did you mean bfloat16",
    ),
    "no such task": (
        ["--stage", "downstream", "--task", "xyz"],
        "--task must be one of pmv, mor, los, diag, proc, label, got 'xyz'",
    ),
    "clip 0": ([*CLINICAL, "--optim.clip", "0"], "--optim.clip must be above 0, or None"),
    "a layer twice": (
        [*CLINICAL, "--lora.target-modules", "q_proj", "q_proj"],
        "must name each layer once",
    ),
    # values that do not go together
    "both lengths of a run": ([*CLINICAL, "--steps", "5", "--epochs", "1"], "one of the two"),
    "both sizes of a step": (
        [*CLINICAL, "--batch-size", "5", "--batch-tokens", "4096"],
        "give --batch-tokens or --batch-size, one of the two",
    ),
    "long warm-up": (
        [*CLINICAL, "--steps", "5", "--optim.warmup-steps", "6"],
        "--optim.warmup-steps must be at most --steps (5), got 6",
    ),
    "narrow passes": ([*CLINICAL, "--micro-tokens", "100"], "at least --max-length (512)"),
    "narrow steps": ([*CLINICAL, "--batch-tokens", "100"], "at least --max-length (512)"),
    "model without data": ([*CLINICAL, "--model", "M"], "--model is given without --data"),
    "data without model": ([*CLINICAL, "--data", "D"], "--data is given without --model"),
    "pretrain without data": (["--stage", "pretrain"], "--stage pretrain needs --model and"),
    "task elsewhere": ([*CLINICAL, "--task", "mor"], "--task belongs to --stage downstream"),
    "no label column": (
        ["--stage", "downstream", "--task", "label", *OWN],
        "--task label needs --label-column",
    ),
    "small full weights": (
        [*CLINICAL, *OWN, "--adapter", "full", "--base-dtype", "bfloat16"],
        "--adapter full needs --base-dtype float32",
    ),
    "all weights in int8": (
        [*CLINICAL, *OWN, "--adapter", "full", "--base-dtype", "int8"],
        "lost in int8 weights",
    ),
    "int8 setting of a float base": (
        [*CLINICAL, "--int8.compute", "int8"],
        "--int8.compute would have no effect: it is a setting of --base-dtype int8",
    ),
    "nothing trains": ([*CLINICAL, "--adapter", "none"], "--adapter none trains nothing"),
    "nothing to freeze": ([*LABEL, "--freeze-init-adapter"], "needs --init-adapter"),
    "full with an adapter": (
        [*LABEL, "--init-adapter", "A", "--adapter", "full"],
        "--init-adapter cannot go with --adapter full",
    ),
    "two adapters of a name": (
        [*CLINICAL, *OWN, "--init-adapter", "A"],
        "--adapter lora makes a second adapter beside that of --init-adapter, and --stage clinical",
    ),
    "scratch with an adapter": (
        ["--stage", "pretrain", *OWN, "--from-scratch", "--adapter", "lora"],
        "--adapter must be full, got lora",
    ),
    "two pretraining adapters of a name": (
        ["--stage", "pretrain", *OWN, "--init-adapter", "A", "--adapter", "lora"],
        "--stage pretrain has one alone: continue that one with --adapter none",
    ),
    "two sources elsewhere": (
        [*CLINICAL, "--model", "M", "--data", "D", "--data", "E"],
        "--data is given twice; give it once: several sources are for --stage pretrain",
    ),
    "two paths of a source": (
        [*PRETRAIN, "--data", "a=D", "E"],
        "--data takes one value each time, got a=D E",
    ),
    "a source without a name": (
        [*PRETRAIN, "--data", "a=D", "--data", "E"],
        "--data E: of several sources each is NAME=PATH:WEIGHT",
    ),
    "a source without a path": (
        [*PRETRAIN, "--data", "a=:0.8", "--data", "b=E:0.2"],
        "--data a=:0.8 names no path",
    ),
    "two sources of a name": (
        [*PRETRAIN, "--data", "a=D:1", "--data", "a=E:1"],
        "--data names two sources a; each needs a name of its own",
    ),
    "a source twice": (
        [*PRETRAIN, "--data", "a=D:1", "--data", "b=./D:1"],
        "--data gives ./D twice, as a and as b",
    ),
    "a weight missing": (
        [*PRETRAIN, "--data", "a=D:1", "--data", "b=E"],
        "--data b has no weight, but others have one",
    ),
    "weight 0": (
        [*PRETRAIN, "--data", "a=D:0", "--data", "b=E:1"],
        "--data a: its weight must be a number above 0, up to 1e9, got 0",
    ),
    "weight below 0": (
        [*PRETRAIN, "--data", "a=D:-0.5", "--data", "b=E:1"],
        "must be a number above 0, up to 1e9, got -0.5",
    ),
    "weight not a number": (
        [*PRETRAIN, "--data", "a=D:nan", "--data", "b=E:1"],
        "must be a number above 0, up to 1e9, got nan",
    ),
    "weight without end": (
        [*PRETRAIN, "--data", "a=D:inf", "--data", "b=E:1"],
        "must be a number above 0, up to 1e9, got inf",
    ),
    "scratch elsewhere": ([*CLINICAL, "--from-scratch"], "belongs to --stage pretrain"),
    # flags that would change nothing
    "setting of no adapter": (
        [*LABEL, "--adapter", "none", "--lora.r", "4"],
        "--lora.r would have no effect: it is a setting of --adapter lora",
    ),
    "least rate of none": (
        [*CLINICAL, "--optim.schedule", "constant", "--optim.min-lr-ratio", "0.1"],
        "--optim.min-lr-ratio would have no effect",
    ),
    "least rate above the peak": (
        [*CLINICAL, "--optim.min-lr-ratio", "1.1"],
        "--optim.min-lr-ratio must be from 0 to 1, got 1.1",
    ),
    "truncate nothing": ([*CLINICAL, "--truncate", "tail"], "a setting of --stage downstream"),
    "weigh nothing": ([*CLINICAL, "--no-class-weights"], "a setting of --stage downstream"),
    "label of mor": (
        ["--stage", "downstream", "--label-column", "x"],
        "a setting of --stage downstream --task label",
    ),
    "column of mor": (["--stage", "downstream", "--text-column", "x"], "columns of MIMIC"),
    "share beside lists": (
        [*LABEL, "--splits", "S", "--test-share", "0.2"],
        "not used when --splits",
    ),
    # files
    "no file": ([*CLINICAL, "--config", "nowhere.yaml"], "does not exist or is not a file"),
    "resume and config": ([*CLINICAL, "--resume", "--config", "x"], "leave --config out"),
    "resume nothing": (["--resume"], "--resume needs --out"),
    "resume nowhere": ([*CLINICAL, "--resume", "--out", "nowhere"], "there is no run in nowhere"),
    # what only the run can find out
    "no such device": ([*CLINICAL, "--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
    "no such GPU": ([*CLINICAL, "--device", "cuda:9"], "--device cuda:9 asks for GPU 9"),
    "no such base": ([*CLINICAL, *OWN], "M"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_exit_code_2(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("train.py: ") and shown.err.count("\n") == 1
    assert message in shown.err
    assert not any(tmp_path.iterdir()), "something was written"


BAD_FILES = {
    "unknown setting": ("learning_rate: 1", "did you mean --lr?"),
    "given twice": ("lr: 1\nlr: 2", "lr is given twice"),
    "given twice in two ways": ("lora.r: 1\nlora: {r: 2}", "--lora.r is given twice"),
    "a tag": ("lr: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    "an alias": ("model: &a x\ndata: *a", "aliases are not read"),
    "not settings": ("- lr", "must hold settings by name"),
    "a bare word": ("clinical", "must hold settings by name"),
    "a name that YAML reads as true": ("on: 1", "the name of a setting must be text"),
    "a group that is none": ("lr: {r: 1}", "--lr does not take a group"),
    "a switch that is a number": ("class_weights: 3", "--class-weights is a switch"),
    "a truth for a name": ("model: no", "--model cannot be False"),
    "a list for one value": ("lr: [1, 2]", "--lr takes one value"),
    "resume in a file": ("resume: true", "belongs on the command line"),
    "broken": ("lr: [1", "cannot be read as YAML in line"),
    "deep": ("[" * 5000, "cannot be read as YAML"),
    "wrong type": ("lr: fast", "--lr must be a number"),
    "of another adapter": ("lora: {r: 4}\nadapter: full", "--lora.r would have no effect"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_mistake_in_a_file_is_one_line_too(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert train.main([*CLINICAL, "--config", str(path)]) == 2
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1 and message in shown.err


def test_flags_become_the_config() -> None:
    words = (
        "--lora.r=4 --lora.target_modules q_proj o_proj --steps 9 --lr 1e-2 --batch-size 3 "
        "--optim.clip None --overwrite"
    )
    command = read_command([*CLINICAL, *OWN, *words.split()])
    config = command.config
    assert (config.model, config.data, config.out) == ("M", "D", "runs/clinical")
    assert config.lora.r == 4 and config.lora.target_modules == ("q_proj", "o_proj")
    assert (config.steps, config.epochs) == (9, None)
    assert (config.batch_size, config.batch_tokens) == (3, None)
    assert config.lr == 0.01 and config.optim.clip is None
    assert command.overwrite and not command.resume


def test_without_model_and_data_the_embedded_ones_are_taken() -> None:
    for stage, make in EMBEDDED.items():
        assert read_command(["--stage", stage]).config == make()


def test_a_typed_flag_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "stage: clinical\nmodel: M\ndata: D\nlr: 1e-4\nsteps: 5\nbatch_size: 2\n"
        "lora: {r: 4, target-modules: [k_proj]}\noptim.clip: null\n"
    )
    config = read_command(["--config", str(path), "--lr", "2e-4", "--epochs", "2"]).config
    assert (config.lr, config.steps, config.epochs) == (2e-4, None, 2.0)
    assert (config.batch_size, config.batch_tokens) == (2, None)
    assert config.lora.r == 4 and config.lora.target_modules == ("k_proj",)
    assert config.optim.clip is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_json_gives_its_config_again(stage: str, tmp_path: Path) -> None:
    config = read_command(["--stage", stage, *OWN]).config
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": to_dict(config)}))
    assert read_command(["--config", str(path)]).config == config
    assert read_command(["--config", str(path), "--out", "x"]).config.out == "x"


def test_resume_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    config = read_command([*CLINICAL, *OWN, "--steps", "7", "--out", str(tmp_path)]).config
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(config)}))
    command = read_command(["--resume", "--out", str(tmp_path)])
    assert command.resume and command.config == config


def test_help_names_every_flag(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_command(["--help"])
    assert stopped.value.code == 0
    shown = capfd.readouterr().out
    for flag in (
        "--stage",
        "--lora.target-modules",
        "--optim.warmup-steps",
        "--resume",
        "--config",
    ):
        assert flag in shown


def test_configs_survive_json() -> None:
    for make in (*STAGES.values(), *EMBEDDED.values()):
        config = make()
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "1"}, "setting lr has a wrong value"),
        ({"lr": True}, "setting lr has a wrong value"),
        ({"steps": 1.5}, "setting steps has a wrong value"),
        ({"lora": 3}, "setting lora must be a group"),
        ({"later": 1}, "settings of another version"),
        ({"stage": "instructed"}, "setting stage has a wrong value"),
    ],
)
def test_a_damaged_config_is_refused(change: dict[str, object], message: str) -> None:
    values = to_dict(STAGES["clinical"]()) | change
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_every_setting_has_help() -> None:
    """tyro prints the text under a field; a field without one would be a flag without meaning."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(inspect.getmodule(RunConfig)))  # type: ignore[arg-type]
    for settings in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(settings.body, settings.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                is_group = "Settings" in ast.unparse(field.annotation)
                assert is_group or isinstance(after, ast.Expr), ast.unparse(field.target)


@pytest.mark.parametrize("command", [["train.py", "--help"], ["-m", "data.preview", "--help"]])
def test_a_reader_that_has_read_enough_is_no_failure(command: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as gone:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")
