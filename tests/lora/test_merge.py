"""Merging: the numbers of transformers + peft, planted faults, refusals, whole or not there."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora.merge
from lora.config import LoraConfig
from lora.merge import TOLERANCE, main, merge, merged_weight
from lora.parts import parts_of_folders, parts_of_run
from model.checkpoint import load_causal_lm, load_classifier
from model.ending import RunFailed
from model.heads import CausalLM
from model.linear import Linear
from tests.conftest import ROOT
from tests.data.conftest import train_sentencepiece
from tests.lora.oracle import make_batch, oracle_logits, tiny_config
from tests.lora.runs import CLINICAL, DOWNSTREAM, LABELS, make_base, make_run

BOTH = {"clinical": CLINICAL, "downstream": DOWNSTREAM}
BATCH = make_batch(tiny_config(), 17, 1, 12)


def logits(model: torch.nn.Module) -> Tensor:
    return model.logits(BATCH) if isinstance(model, CausalLM) else model.scores(BATCH)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [(), LABELS], ids=["language model", "classifier"])
@pytest.mark.parametrize("adapters", [{"clinical": CLINICAL}, BOTH], ids=["one", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_run_gives_the_runs_logits_in_transformers(
    base: Path, tmp_path: Path, adapters: dict, labels: tuple[str, ...], dtype: torch.dtype
) -> None:
    trained = make_run(tmp_path / "run", base, adapters, labels=labels)
    proof = merge(parts_of_run(tmp_path / "run"), tmp_path / "out", dtype)

    kind = transformers.AutoModelForSequenceClassification if labels else None
    kind = kind or transformers.AutoModelForCausalLM
    theirs, info = kind.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    if dtype == torch.float32:
        assert_close(oracle_logits(theirs, BATCH), logits(trained))
        assert proof.rounding <= TOLERANCE
        assert proof.agreement == 1.0
    else:
        assert_close(oracle_logits(theirs, BATCH), logits(trained), 0.1)
        assert TOLERANCE < proof.rounding < 0.1
        assert proof.agreement > 0.9
    assert proof.dtype == str(dtype).removeprefix("torch.")
    assert proof.sums <= TOLERANCE
    assert proof.files <= TOLERANCE
    assert proof.effect > 0.1

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == proof.dtype
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in written.items() if name != "score.weight"} == {dtype}
    if labels:
        assert theirs.config.architectures == ["LlamaForSequenceClassification"]
        assert theirs.config.id2label == dict(enumerate(LABELS))
        assert torch.equal(written["score.weight"], trained.score.weight)
    else:
        assert theirs.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_weights_are_those_of_pefts_merge(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    settings = {"init_lora_weights": False, "target_modules": "all-linear"}
    for name, rank in (("clinical", 3), ("downstream", 5)):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=4, **settings)
        theirs = (
            peft.get_peft_model(theirs, config, adapter_name=name)
            if name == "clinical"
            else (theirs.add_adapter(name, config), theirs)[1]
        )
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    theirs.base_model.set_adapter(["clinical", "downstream"])
    expected = theirs.merge_and_unload().state_dict()

    folders = [tmp_path / "peft" / name for name in ("clinical", "downstream")]
    merge(parts_of_folders(base, folders), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_the_sum_is_rounded_once(base: Path, tmp_path: Path) -> None:
    """Rounding the base, the product or each adapter's share first would give other bits."""
    trained = make_run(tmp_path / "run", base, BOTH)
    merge(parts_of_run(tmp_path / "run"), tmp_path / "out", torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    layer = trained.model.layers[0].self_attn.v_proj
    exact = layer.weight.double()
    for adapter in layer.adapters.values():
        exact += adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    found = written["model.layers.0.self_attn.v_proj.weight"]
    assert (found == exact.to(torch.bfloat16)).double().mean() > 0.999


def test_the_dtype_is_the_bases_unless_asked(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    make_run(tmp_path / "run", base, BOTH, labels=LABELS)
    assert merge(parts_of_run(tmp_path / "run"), tmp_path / "a").dtype == "bfloat16"
    wide = merge(parts_of_run(tmp_path / "run"), tmp_path / "b", torch.float32)
    assert (wide.dtype, wide.agreement) == ("float32", 1.0)
    # A wide head does not make a narrow checkpoint wide.
    again = {"another": CLINICAL}
    make_run(tmp_path / "run2", tmp_path / "a", again, labels=LABELS)
    assert merge(parts_of_run(tmp_path / "run2"), tmp_path / "c").dtype == "bfloat16"


def test_large_checkpoints_are_sharded(base: Path, tmp_path: Path) -> None:
    trained = make_run(tmp_path / "run", base, BOTH)
    merge(parts_of_run(tmp_path / "run"), tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(oracle_logits(theirs, BATCH), logits(trained))


def test_the_tokenizer_goes_along_and_gives_the_sample(base: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", base, BOTH)
    without = merge(parts_of_run(tmp_path / "run"), tmp_path / "a").tokens
    train_sentencepiece(base / "tokenizer.model")
    shutil.rmtree(tmp_path / "run")
    make_run(tmp_path / "run", base, BOTH)
    with pytest.raises(ValueError, match="embeddings for 61; they do not belong together"):
        merge(parts_of_run(tmp_path / "run"), tmp_path / "b")
    config = json.loads((base / "config.json").read_text())
    weights = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].repeat(9, 1)[:512].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    shutil.rmtree(tmp_path / "run")
    make_run(tmp_path / "run", base, BOTH)
    assert merge(parts_of_run(tmp_path / "run"), tmp_path / "c").tokens > without
    copied = (tmp_path / "c" / "tokenizer.model").read_bytes()
    assert copied == (base / "tokenizer.model").read_bytes()


# Planted faults -----------------------------------------------------------------------------------


def wrong_scaling(layer: Linear) -> Tensor:
    return layer.weight + 1.01 * (merged_weight(layer) - layer.weight)


def without_scaling(layer: Linear) -> Tensor:
    return layer.weight + sum(a.lora_B @ a.lora_A for a in layer.adapters.values())


def without_the_second(layer: Linear) -> Tensor:
    first = next(iter(layer.adapters.values()))
    return layer.weight + first.scaling * first.lora_B @ first.lora_A


def one_layer_missing(layer: Linear) -> Tensor:
    is_down = layer.in_features > layer.out_features
    return layer.weight.clone() if is_down else merged_weight(layer)


def not_a_number(layer: Linear) -> Tensor:
    return torch.full_like(layer.weight, torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fault",
    [wrong_scaling, without_scaling, without_the_second, one_layer_missing, not_a_number],
)
def test_a_wrong_sum_is_caught_in_every_dtype(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Linear], Tensor],
    dtype: torch.dtype,
) -> None:
    make_run(tmp_path / "run", base, BOTH, labels=LABELS)
    monkeypatch.setattr(lora.merge, "merged_weight", fault)
    with pytest.raises(RunFailed, match="the merged weights do not give the logits"):
        merge(parts_of_run(tmp_path / "run"), tmp_path / "out", dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


@pytest.mark.parametrize("lost", ["score.weight", "model.layers.1.mlp.up_proj.weight"])
def test_what_is_lost_in_writing_is_caught(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    make_run(tmp_path / "run", base, BOTH, labels=LABELS)
    write = lora.merge.write_model

    def lose(model: torch.nn.Module, folder: Path, **options: object) -> None:
        write(model, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        tensors[lost] = torch.roll(tensors[lost], 1, 0)
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(lora.merge, "write_model", lose)
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_an_update_lost_in_rounding_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    make_run(tmp_path / "run", base, {"clinical": CLINICAL}, size=3e-3)
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "a")]) == 0
    assert "warning: rounding to bfloat16 hides part" in capsys.readouterr().out
    wide = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "b"), "--dtype", "float32"]
    assert main(wide) == 0
    assert "warning" not in capsys.readouterr().out


def test_adapters_that_change_nothing_are_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", base, {"clinical": CLINICAL}, size=0.0)
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "warning: the adapters change nothing" in capsys.readouterr().out


# Whole or not there -------------------------------------------------------------------------------


def test_killed_in_the_middle_it_leaves_nothing_under_the_final_name(
    base: Path, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", base, BOTH)
    code = (
        "import sys, time, lora.merge\n"
        "def stall(*_):\n    print('staged', flush=True); time.sleep(60)\n"
        "lora.merge.copy_tokenizer = stall\n"
        "lora.merge.main(sys.argv[1:])\n"
    )
    arguments = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "staged\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0  # and the next one clears what is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "run"]


def test_interrupted_it_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    make_run(tmp_path / "run", base, BOTH)
    monkeypatch.setattr(lora.merge, "copy_tokenizer", interrupt)
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


# Refusals -----------------------------------------------------------------------------------------


def refused(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(word) for word in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("lora.merge: ")
    return printed.err


def test_a_base_that_is_not_the_runs_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", base, BOTH)
    run, out = tmp_path / "run", tmp_path / "out"
    adapters = [run / "adapter" / "clinical", run / "adapter" / "downstream"]
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, other / "model.safetensors")
    said = refused(["--model", other, "--adapter", *adapters, "--out", out], capsys)
    assert "is not the one that the adapters were trained on" in said
    shutil.rmtree(base)
    other.rename(base)
    assert "is not the one" in refused(["--run", run, "--out", out], capsys)
    assert not out.exists()


def test_a_merged_base_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", base, {"clinical": CLINICAL})
    merge(parts_of_run(tmp_path / "run"), tmp_path / "merged")
    shutil.copytree(tmp_path / "run" / "adapter" / "clinical", tmp_path / "loose")
    for adapter in (tmp_path / "run" / "adapter" / "clinical", tmp_path / "loose"):
        arguments = ["--model", tmp_path / "merged", "--adapter", adapter, "--out"]
        said = refused([*arguments, tmp_path / "out"], capsys)
        assert "is already merged (with clinical)" in said


def test_a_run_on_a_merged_base_is_merged_into_it(base: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "first", base, {"clinical": CLINICAL})
    merge(parts_of_run(tmp_path / "first"), tmp_path / "merged")
    trained = make_run(tmp_path / "second", tmp_path / "merged", {"clinical": DOWNSTREAM})
    merge(parts_of_run(tmp_path / "second"), tmp_path / "out")
    assert_close(logits(load_causal_lm(tmp_path / "out")), logits(trained))


def test_adapters_given_one_by_one(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = make_run(tmp_path / "run", base, BOTH, labels=LABELS)
    clinical, downstream = (tmp_path / "run" / "adapter" / name for name in BOTH)
    out = tmp_path / "out"
    begin = ["--model", base, "--out", out, "--adapter"]
    assert "trained on top of the adapter 'clinical', which is not given" in refused(
        [*begin, downstream], capsys
    )
    assert "one adapter is given twice" in refused([*begin, clinical, clinical], capsys)
    assert "found none" in refused([*begin, tmp_path], capsys)
    make_run(tmp_path / "other", make_base(tmp_path / "base2", tied=True), BOTH, size=0.2)
    foreign = tmp_path / "other" / "adapter" / "clinical"
    assert "trained on different bases" in refused([*begin, clinical, foreign], capsys)
    make_run(tmp_path / "run2", base, BOTH, labels=LABELS, size=0.2)
    more = [tmp_path / "run2" / "adapter" / name for name in BOTH]
    assert "two of the adapters carry a classifier's head" in refused(
        [*begin, clinical, downstream, *more], capsys
    )
    assert main([str(word) for word in [*begin, clinical, downstream]]) == 0
    assert_close(logits(load_classifier(out, 3)), logits(trained))
    # The clinical adapter of the pair stands on nothing: alone it is a language model.
    merge(parts_of_folders(base, [clinical]), tmp_path / "language")
    load_causal_lm(tmp_path / "language")


def test_a_loose_adapter_says_that_nothing_vouches_for_its_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", base, BOTH, labels=LABELS)
    loose = [
        str(shutil.copytree(tmp_path / "run" / "adapter" / name, tmp_path / name)) for name in BOTH
    ]
    out = str(tmp_path / "out")
    assert main(["--model", str(base), "--adapter", *loose, "--out", out]) == 0
    assert "nothing tells whether this is their base" in capsys.readouterr().out
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]
    assert labels == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finished": False}, "has not ended"),
        ({"config": {"model": "base", "adapter": "full"}}, "trained all weights"),
        ({"adapters": []}, "has no adapter"),
        ({"adapters": ["../../other"]}, "not folders of the run"),
        ({"config": {}}, "is not the record of a run"),
        ({"labels": ["home", "ward"]}, "one row for each of the 2 labels"),
        ({"labels": 3}, "is not the record of a run"),
    ],
)
def test_a_run_that_cannot_be_merged_is_refused(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict,
    message: str,
) -> None:
    make_run(tmp_path / "run", base, BOTH, labels=LABELS, record=change)
    assert message in refused(["--run", tmp_path / "run", "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "head.safetensors",
        "adapter/clinical/adapter_config.json",
        "adapter/downstream/adapter_model.safetensors",
    ],
)
def test_a_run_with_one_flipped_bit_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, out = tmp_path / "run", ["--out", tmp_path / "out"]
    make_run(run, base, BOTH, labels=LABELS)
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    commands = [["--run", run, *out]]
    if name != "head.safetensors":  # which an adapter's own folder carries too
        commands.append(["--model", base, "--adapter", *(run / "adapter" / a for a in BOTH), *out])
    for command in commands:
        line = refused(command, capsys)
        assert str(run / name) in line
        assert "is damaged" in line or "is not valid JSON" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x"], "name what to merge"),
        (["--out", "x", "--run", "absent"], "absent holds no run"),
        (["--out", "x", "--model", "a"], "name what to merge"),
        (["--out", "x", "--run", "a", "--model", "b"], "leave --model and --adapter out"),
        (["--out", "x", "--run", "a", "--run", "b"], "--run is given twice"),
        (["--out", "x", "--rum", "a"], "did you mean --run?"),
        (["--out", "x", "--run", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", "x", "--model", "a", "--adapter"], "expected at least one argument"),
    ],
)
def test_mistyped_commands_end_in_one_line(
    arguments: list[str | Path], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(arguments, capsys)


def test_what_is_there_is_not_written_over(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", base, BOTH)
    before = (base / "model.safetensors").read_bytes()
    assert "already exists" in refused(["--run", tmp_path / "run", "--out", base], capsys)
    assert (base / "model.safetensors").read_bytes() == before


def test_weights_too_large_for_float16_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    make_run(tmp_path / "run", base, BOTH)
    arguments = ["--run", tmp_path / "run", "--out", tmp_path / "out", "--dtype", "float16"]
    assert "too large for float16" in refused(arguments, capsys)


# Real weights -------------------------------------------------------------------------------------


def test_real_weights_merged(real_data: Path, tmp_path: Path) -> None:
    base = real_data / "stories260k"
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trained = make_run(
        tmp_path / "run", base, {"clinical": config, "downstream": CLINICAL}, size=0.03
    )
    merge(parts_of_run(tmp_path / "run"), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(oracle_logits(theirs, BATCH), logits(trained))
    narrow = merge(parts_of_run(tmp_path / "run"), tmp_path / "narrow", torch.bfloat16)
    assert narrow.agreement > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
def test_peak_memory_is_the_model_and_little_more(tmp_path: Path) -> None:
    """120 M parameters in bfloat16: 240 MB, whose float32 copy would be 480 MB."""
    code = """
import sys, torch
from pathlib import Path
from lora.config import LoraConfig
from lora.merge import merge
from lora.parts import parts_of_run
from model.checkpoint import save_model
from model.config import DecoderConfig
from model.decoder import init_weights
from model.heads import CausalLM
from tests.lora.runs import make_run
folder = Path(sys.argv[1])
if sys.argv[2] == "make":
    config = DecoderConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=17,
        num_attention_heads=12, num_key_value_heads=12, head_dim=64, max_position_embeddings=64,
        rms_norm_eps=1e-5)
    model = CausalLM(config)
    init_weights(model, 0.05, seed=0)
    save_model(model.to(torch.bfloat16), folder / "base")
    make_run(folder / "run", folder / "base", {"clinical": LoraConfig(r=2, lora_alpha=4)})
else:
    parts = parts_of_run(folder / "run")
    def peak():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    before = peak()
    merge(parts, folder / "out")
    print(peak() - before)
"""
    for step in ("make", "merge"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), step],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    size = (tmp_path / "base" / "model.safetensors").stat().st_size / 2**20
    # A second copy would be twice the size, one in float32 three times.
    assert float(done.stdout) < 1.75 * size, f"{float(done.stdout):.0f} MiB for {size:.0f}"
