"""A dry run says what the run will do, refuses what it would refuse, and leaves no run behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import train
from model.files import read_json
from training.command_line import read_command, used_settings
from training.config import RunConfig
from training.dry_run import dry_run
from training.run import run

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("stage", ["clinical", "downstream"])
def test_the_plan_is_what_the_run_does(
    stage: str, make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(stage, steps=4)
    dry_run(config)
    plan = capfd.readouterr().out
    assert not Path(config.out).exists()
    record = read_json(run(config) / "run.json")
    parameters, counts = record["parameters"], record["counts"]
    assert f"{parameters['trainable']:,} of {parameters['all']:,} parameters" in plan
    assert f"{counts['train_notes']:,} train, {counts['validation_notes']:,} validate" in plan
    assert "  ".join(f"{n} {v:,}" for n, v in counts["note_length"].items()) in plan
    assert f"{record['total_steps']:,} steps, " in plan and "; 2 validations" in plan
    # The output is a config file that gives the same run.
    path = tmp_path / "plan.yaml"
    path.write_text(plan)
    lora = replace(config.lora, target_modules=("q_proj", "v_proj"))
    resolved = replace(config, base_dtype="float32", lora=lora)
    assert read_command(["--config", str(path)]).config == resolved
    assert yaml.safe_load(plan) == used_settings(resolved)


def test_what_a_run_would_refuse_is_refused(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config("clinical", steps=2)
    run(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    command = (
        f"--stage clinical --model {config.model} --data {config.data} --dry-run --max-length 32 "
        f"--batch-tokens 512 --workers 1 --device cpu --out {config.out}"
    )
    capfd.readouterr()
    assert train.main(command.split()) == 2
    assert "already holds a run" in capfd.readouterr().err
    assert train.main([*command.split(), "--overwrite"]) == 0
    assert capfd.readouterr().out.startswith("# dry run: nothing is trained")
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before
    assert train.main([*command.split(), "--overwrite", "--activations", "offload"]) == 2
    assert "this run is on the CPU: choose save, selective" in capfd.readouterr().err
    assert train.main([*command.split(), "--overwrite", "--gradient-checkpointing"]) == 2
    assert "did you mean --activations checkpoint?" in capfd.readouterr().err
    assert train.main([*command.split(), "--overwrite", "--lora.target-modules", "q_prj"]) == 2
    assert "q_proj" in capfd.readouterr().err
