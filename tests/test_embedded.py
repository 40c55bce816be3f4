"""The embedded base: its size, its recipe, its generation, and the runs that need no argument."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import eval as eval_command
import train
from data.synthetic import make_cohort
from data.tokenizer import load_tokenizer
from lora.attach import adapter_parameters, without_adapters
from model.batch import TokenBatch
from model.checkpoint import load_causal_lm
from model.generation import GenerationConfig, generate
from tests.conftest import ROOT
from training.assemble import restore
from training.stages import EMBEDDED_BASE


def test_the_base_is_small_and_what_its_recipe_says() -> None:
    files = sorted(EMBEDDED_BASE.iterdir())
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    recipe = json.loads((EMBEDDED_BASE / "recipe.json").read_text())
    for name, digest in recipe["sha256"].items():
        assert hashlib.sha256((EMBEDDED_BASE / name).read_bytes()).hexdigest() == digest
    assert {file.name for file in files} == {*recipe["sha256"], "recipe.json"}
    tokenizer = load_tokenizer(EMBEDDED_BASE)
    model = load_causal_lm(EMBEDDED_BASE, dtype=torch.float32, device="cpu")
    assert tokenizer.vocab_size == model.config.vocab_size
    assert sum(p.numel() for p in model.parameters()) == recipe["parameters"]


@pytest.mark.parametrize("use_cache", [True, False])
def test_it_generates_the_tokens_of_transformers(use_cache: bool) -> None:
    from transformers import LlamaForCausalLM

    oracle = LlamaForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)
    model = load_causal_lm(EMBEDDED_BASE, dtype=torch.float32, device="cpu")
    count = 120
    wanted = oracle.generate(
        torch.tensor([[1]]), do_sample=False, max_new_tokens=count, eos_token_id=-1, pad_token_id=0
    )[0, 1:]
    settings = GenerationConfig(max_new_tokens=count, stop_ids=())
    (ours,) = generate(model, [[1]], settings, seed=0, use_cache=use_cache)
    assert ours == wanted.tolist()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where `runs/` of the defaults is made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_downstream_run_without_a_clinical_one_says_what_to_do(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--stage", "downstream", "--task", "mor"]) == 2
    message = capsys.readouterr().err
    assert "runs/clinical" in message
    assert len(message.splitlines()) == 1
    assert not (elsewhere / "runs" / "downstream").exists()


def test_two_short_stages_learn_with_both_adapters(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--stage", "clinical", "--steps", "6", "--eval-tokens", "20000"]) == 0
    assert eval_command.main(["--run", "runs/clinical"]) == 0
    results = json.loads(Path("runs/clinical/eval/results.json").read_text())
    assert results["perplexity"] < 0.5 * results["perplexity_base"]

    assert train.main(["--stage", "downstream", "--steps", "12", "--eval-every", "12"]) == 0
    assert "runs/clinical" in capsys.readouterr().err
    run = restore(Path("runs/downstream"), torch.device("cpu"))
    batch = TokenBatch.from_arrays([1, 300, 301, 302, 303], [0, 5])
    with torch.inference_mode():
        whole = run.model.scores(batch)
        with without_adapters(run.model):
            assert not torch.equal(run.model.scores(batch), whole)
        for name in ("clinical", "downstream"):
            kept = [p.clone() for p in adapter_parameters(run.model, name)]
            for parameter in adapter_parameters(run.model, name):
                parameter.zero_()
            assert not torch.equal(run.model.scores(batch), whole)
            for parameter, value in zip(adapter_parameters(run.model, name), kept, strict=True):
                parameter.copy_(value)

    assert train.main(["--stage", "clinical"]) == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--overwrite" in message


def test_the_demonstration_goes_on_where_it_was(tmp_path: Path) -> None:
    """make.sh with a Python that only notes what it is told, and ends as the test says."""
    for name in ("make.sh", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/usr/bin/env bash\n"
        'echo "$*" >>told\n'
        'case "$*" in *--resume*) exit "$(<code)" ;; esac\n'
        'for word in "$@"; do if [[ $word == runs/demo/* ]]; then folder=$word; fi; done\n'
        'mkdir -p "$folder" && touch "$folder/run.json"\n'
    )
    python.chmod(0o755)
    installed = 'echo "$(cksum <pyproject.toml) $PWD" >.venv/.installed-mimic'
    subprocess.run(["bash", "-c", installed], cwd=tmp_path, check=True)

    def demo(code: int) -> tuple[int, list[str]]:
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "told").unlink(missing_ok=True)
        done = subprocess.run(["bash", "make.sh", "demo"], cwd=tmp_path, capture_output=True)
        told = (tmp_path / "told").read_text().splitlines()
        return done.returncode, [line.split()[-1] for line in told]

    run = "runs/demo/downstream"
    assert demo(0) == (0, ["--overwrite", "--overwrite", run])  # nothing is there
    assert demo(0) == (0, ["--resume", "--resume", run])  # unfinished, or finished
    assert demo(143) == (143, ["--resume"])  # stopped
    assert demo(2) == (0, ["--resume", "--overwrite"] * 2 + [run])  # runs of other settings


@pytest.mark.slow
def test_the_three_commands_reach_the_ceiling(elsewhere: Path) -> None:
    assert train.main(["--stage", "clinical"]) == 0
    assert train.main(["--stage", "downstream", "--task", "mor"]) == 0
    assert eval_command.main(["--run", "runs/downstream"]) == 0
    results = json.loads(Path("runs/downstream/eval/results.json").read_text())
    assert results["auroc"] >= 0.70
    assert results["auroc"] >= results["auroc_ceiling"] - 0.05
    shutil.rmtree("runs")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six times the demonstration's patients: some 14,300 notes train and 1,800 test."""
    return make_cohort(tmp_path_factory.mktemp("cohort") / "cohort", patients=15_600)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_stages_come_near_the_best_auroc_and_a_frozen_model_does_not(
    cohort: Path, seed: int
) -> None:
    """The seed is that of both stages and their adapters; settings were chosen by validation."""
    root = cohort.parent
    clinical, both, frozen = (
        str(root / f"{name}-{seed}") for name in ("clinical", "both", "frozen")
    )
    common = [
        "--model",
        str(EMBEDDED_BASE),
        "--cache-dir",
        str(root / "cache"),
        "--seed",
        str(seed),
    ]
    first = [*common, "--stage", "clinical", "--data", str(cohort / "mimic-iv-note")]
    first += ["--lora.r", "8", "--lora.alpha", "16", "--lora.target-modules", "all-linear"]
    first += ["--batch-tokens", "8192", "--steps", "60", "--lr", "5e-3", "--out", clinical]
    second = [
        *common,
        "--stage",
        "downstream",
        "--task",
        "mor",
        "--data",
        str(cohort / "mimic-iii"),
    ]
    second += ["--init-adapter", clinical, "--batch-size", "8", "--lr", "5e-4"]
    adapter = ["--lora.r", "8", "--lora.alpha", "16", "--lora.target-modules", "q_proj", "v_proj"]
    head_alone = ["--adapter", "none", "--freeze-init-adapter", "--epochs", "1"]
    assert train.main(first) == 0
    assert train.main([*second, *adapter, "--epochs", "2", "--out", both]) == 0
    assert train.main([*second, *head_alone, "--out", frozen]) == 0
    assert eval_command.main(["--run", frozen]) == 0
    assert eval_command.main(["--run", both, "--compare", frozen]) == 0
    results = json.loads(Path(both, "eval", "results.json").read_text())
    assert results["auroc"] >= results["auroc_ceiling"] - 0.03
    assert results["comparison"]["auroc"]["ci"][0] > 0
