"""LoRA training beside transformers + peft: the same base, adapter, notes, optimiser and clipping.

    python -m benchmarks.against_peft speed --model stories260k --real-data DIR
    python -m benchmarks.against_peft speed --model llama58m --dropout 0.05 --real-data DIR
    python -m benchmarks.against_peft learning --real-data DIR

`speed` first checks that loss and adapter gradients agree, then times each of the peer's settings
on its own (attention implementation x batch layout), takes its fastest, and runs ours and the peer
in turn, a step each, every side in a process of its own. A rate is real tokens (no padding) a
second of a whole step: batch, forward, backward, clipping, update. Memory is the highest resident
size of a side during its steps, less its size with the model loaded. `learning` trains both sides
on the same batches from the same adapter and compares the held-out perplexity.

`--peer-flushes-denormals` gives the peer what our runs set for themselves (docs/decisions.md).

Rows are appended to benchmarks/results/against_peft.csv.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lora.attach
from benchmarks.record import append_row, machine, today
from data.cache import tokenise
from data.loader import Loader, iter_batches
from data.notes import open_notes
from data.packing import LanguagePieces, PackedBatch
from data.splits import split_notes
from data.tokenizer import load_tokenizer
from lora.attach import adapter_parameters, attach
from lora.config import LoraConfig
from lora.peft_format import load_adapter, save_adapter
from model.checkpoint import load_causal_lm, save_model
from model.config import DecoderConfig
from model.decoder import init_weights
from model.heads import CausalLM
from training.config import OptimSettings
from training.objective import LanguageModelling
from training.optim import make_adamw
from training.parallel import Ranks, start
from training.step import optimiser_step

COLUMNS = [
    "date", "what", "model", "dropout", "peer", "steps", "ours", "theirs", "ratio",
    "lowest_ratio", "highest_ratio", "ours_mib", "theirs_mib", "threads", "cpu", "load",
    "torch", "transformers", "peft", "commit",
]  # fmt: skip
RATE, OPTIM = 3e-3, OptimSettings(schedule="constant")
ADAPTER = "clinical"


@dataclass(frozen=True)
class Workload:
    """A base and the way it is trained."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    batch_tokens: int
    max_length: int = 512


WORKLOADS = {
    "stories260k": Workload(16, 32.0, ("q_proj", "v_proj"), 4096),
    "llama58m": Workload(8, 16.0, ("all-linear",), 2048),
}
# Width 512, 8 layers, vocabulary 32,000: 58 million parameters, drawn at random.
LLAMA58M = DecoderConfig(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
)
PEER_SETTINGS = [
    (attention, layout)
    for attention in ("sdpa", "eager")
    for layout in ("length-sorted", "length-sorted, no mask", "packed")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "learning", "side"])
    parser.add_argument("--model", choices=list(WORKLOADS), default="stories260k")
    parser.add_argument("--real-data", type=Path, required=True)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peer-flushes-denormals", action="store_true")
    parser.add_argument("--setting", type=int, help=argparse.SUPPRESS)  # of the peer; ours if none
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "side":
        run_side(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        make_base(options)
        (compare_speed if options.what == "speed" else compare_learning)(options)


# --- the two sides --------------------------------------------------------------------------------


def make_base(options: argparse.Namespace) -> None:
    """Put the base (a link or a random model) and one adapter for both sides in a folder."""
    base = options.folder / "base"
    if options.model == "stories260k":
        base.symlink_to((options.real_data / "stories260k").resolve())
    else:
        model = CausalLM(LLAMA58M)
        init_weights(model, std=0.02, seed=0)
        save_model(model, base)
        (base / "tokenizer.model").symlink_to(
            (options.real_data / "tokenizers" / "llama2.model").resolve()
        )
    model = load_causal_lm(base, dtype=torch.float32, device="cpu")
    work = WORKLOADS[options.model]
    targets: Any = work.target_modules
    config = LoraConfig(
        r=work.rank,
        lora_alpha=work.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear" if targets == ("all-linear",) else targets,
    )
    attach(model, ADAPTER, config, seed=0)
    # B starts at zero; small numbers make every gradient of the agreement check non-zero.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model, ADAPTER):
            if not parameter.any():
                parameter.normal_(std=1e-3, generator=generator)
    save_adapter(model, ADAPTER, options.folder / ADAPTER, base_model_name="base")


def load_pieces(options: argparse.Namespace) -> tuple[LanguagePieces, LanguagePieces]:
    """Training and test pieces of the 500 notes, split by the text's digest."""
    tokenizer = load_tokenizer(options.folder / "base")
    source = open_notes(options.real_data / "notes" / "medical_notes_500.csv", text_column="text")
    cache = tokenise(source, tokenizer, cache_folder=options.folder / "tokens")
    splits = split_notes(cache)
    work = WORKLOADS[options.model]
    return tuple(
        LanguagePieces(
            cache,
            rows,
            max_length=work.max_length,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
        )
        for rows in (splits.train, splits.test)
    )


class Ours:
    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        self.model = load_causal_lm(options.folder / "base", dtype=torch.float32, device="cpu")
        self.model.requires_grad_(False)
        load_adapter(self.model, options.folder / ADAPTER, ADAPTER, trainable=True)
        self.objective = LanguageModelling(self.model, torch.device("cpu"))
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimiser = make_adamw(self.parameters, OPTIM)
        self.ranks = ranks
        self.steps = 0

    def step(self, batch: PackedBatch) -> float:
        self.steps += 1
        result = optimiser_step(
            self.objective,
            self.parameters,
            self.optimiser,
            [batch],
            self.ranks,
            dropout_seed=self.steps,
            rate=RATE,
            clip=OPTIM.clip,
        )
        return result.loss

    def loss_and_gradients(self, batch: PackedBatch) -> tuple[float, dict[str, Tensor]]:
        loss = self.objective.loss(batch, dropout_seed=None)
        mean = loss.loss_sum / loss.denominator
        mean.backward()
        gradients = {
            f"{layer}.{factor}": getattr(adapter, factor).grad.clone()
            for layer, adapter in lora.attach.adapted_layers(self.model, ADAPTER).items()
            for factor in ("lora_A", "lora_B")
        }
        self.optimiser.zero_grad()
        return mean.item(), gradients

    def perplexity(self, dataset: LanguagePieces) -> float:
        total, count = 0.0, 0.0
        with torch.inference_mode():
            for batch in iter_batches(dataset, micro_tokens=4096):
                loss = self.objective.loss(batch, dropout_seed=None)
                total, count = total + loss.loss_sum.item(), count + loss.denominator
        return math.exp(total / count)


class Peer:
    """transformers' LLaMA with peft's LoRA, as their users write the step."""

    def __init__(self, options: argparse.Namespace, attention: str, layout: str) -> None:
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        base = LlamaForCausalLM.from_pretrained(
            options.folder / "base", attn_implementation=attention, dtype=torch.float32
        )
        self.model: nn.Module = PeftModel.from_pretrained(
            base, options.folder / ADAPTER, is_trainable=True
        )
        self.layout = layout
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            trainable,
            lr=RATE,
            betas=(OPTIM.beta1, OPTIM.beta2),
            eps=OPTIM.eps,
            weight_decay=OPTIM.weight_decay,
            fused=True,
        )
        self.trainable = trainable
        self.model.train()

    def loss(self, batch: PackedBatch) -> Tensor:
        if self.layout == "packed":
            lengths = np.diff(batch.offsets)
            positions = np.arange(len(batch.input_ids)) - np.repeat(batch.offsets[:-1], lengths)
            return self.model(
                input_ids=torch.from_numpy(batch.input_ids)[None],
                position_ids=torch.from_numpy(positions)[None],
                labels=torch.from_numpy(batch.labels)[None],
                use_cache=False,
            ).loss
        segments = [
            torch.from_numpy(batch.input_ids[a:b])
            for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        ]
        padded = nn.utils.rnn.pad_sequence(segments, batch_first=True)
        is_real = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in segments], True)
        # Causal attention never looks at padding on the right: a mask is correct but not needed.
        mask = None if "no mask" in self.layout else is_real
        return self.model(
            input_ids=padded,
            attention_mask=mask,
            labels=padded.where(is_real.bool(), -100),
            use_cache=False,
        ).loss

    def step(self, batch: PackedBatch) -> float:
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainable, OPTIM.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def loss_and_gradients(self, batch: PackedBatch) -> tuple[float, dict[str, Tensor]]:
        self.model.eval()
        loss = self.loss(batch)
        loss.backward()
        gradients = {
            name.removeprefix("base_model.model.").removesuffix(".default.weight"): p.grad.clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        self.optimiser.zero_grad()
        self.model.train()
        return loss.item(), gradients

    def perplexity(self, dataset: LanguagePieces) -> float:
        self.model.eval()
        total, count = 0.0, 0
        with torch.inference_mode():
            for batch in iter_batches(dataset, micro_tokens=4096):
                scored = int((batch.labels != -100).sum())
                total, count = total + self.loss(batch).item() * scored, count + scored
        return math.exp(total / count)


def length_sorted_batches(dataset: LanguagePieces, tokens: int) -> Iterator[PackedBatch]:
    """Batches of neighbours in length in random order, at most `tokens` with their padding."""
    lengths = dataset.lengths(np.arange(len(dataset)))
    batches: list[np.ndarray] = []
    start = 0
    order = np.argsort(lengths, kind="stable")
    for stop in range(1, len(order) + 1):
        if stop == len(order) or lengths[order[stop]] * (stop + 1 - start) > tokens:
            batches.append(order[start:stop])
            start = stop
    generator = np.random.default_rng(0)
    while True:
        for i in generator.permutation(len(batches)):
            yield dataset.batch(batches[i])


def batches_of(
    options: argparse.Namespace, dataset: LanguagePieces, layout: str
) -> Iterator[PackedBatch]:
    """The loader's batches for a packed stream; batches of one length for a padded layout."""
    tokens = WORKLOADS[options.model].batch_tokens
    if layout != "packed":
        yield from length_sorted_batches(dataset, tokens)
    loader = Loader(dataset, batch_tokens=tokens, micro_tokens=tokens, seed=0)
    while True:
        yield from loader.next_step()


# --- what is compared -----------------------------------------------------------------------------


def run_side(options: argparse.Namespace) -> None:
    """The process of one side: a step and its rate for every line read, then the memory taken."""
    if options.setting is None:
        ranks = start("cpu")
        side: Ours | Peer = Ours(options, ranks)
        layout = "packed"
    else:
        torch.set_flush_denormal(options.peer_flushes_denormals)
        attention, layout = PEER_SETTINGS[options.setting]
        side = Peer(options, attention, layout)
    batches = batches_of(options, load_pieces(options)[0], layout)
    before = _resident("VmRSS")
    # Writing 5 sets the kernel's high-water mark of this process back to the present size.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in sys.stdin:
        begin = time.perf_counter()
        batch = next(batches)
        side.step(batch)
        print(len(batch.input_ids) / (time.perf_counter() - begin), flush=True)
    print(_resident("VmHWM") - before, flush=True)


class SideProcess:
    """A side in a process of its own, asked for one step at a time."""

    def __init__(self, options: argparse.Namespace, setting: int | None) -> None:
        arguments = ["--model", options.model, "--real-data", str(options.real_data)]
        arguments += ["--dropout", str(options.dropout), "--folder", str(options.folder)]
        if options.peer_flushes_denormals:
            arguments.append("--peer-flushes-denormals")
        if setting is not None:
            arguments += ["--setting", str(setting)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.against_peft", "side", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def step(self) -> float:
        """Real tokens a second of the next step."""
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def finish(self) -> float:
        """MiB that the steps took beyond the loaded model."""
        self.process.stdin.close()
        memory = float(self.process.stdout.readline())
        self.process.wait()
        return memory


def check_agreement(ours: Ours, peer: Peer, batch: PackedBatch) -> float:
    """The largest relative L2 difference of loss and adapter gradients; refuses above 1e-3."""
    (loss, gradients), (peer_loss, peer_gradients) = (
        side.loss_and_gradients(batch) for side in (ours, peer)
    )
    assert gradients.keys() == peer_gradients.keys()
    differences = [abs(loss - peer_loss) / peer_loss]
    for name, gradient in gradients.items():
        wanted = peer_gradients[name]
        differences.append(((gradient - wanted).norm() / wanted.norm()).item())
    worst = max(differences)
    if worst > 1e-3:
        raise SystemExit(f"the sides do not compute the same: relative difference {worst:.2e}")
    return worst


def compare_speed(options: argparse.Namespace) -> None:
    train, _ = load_pieces(options)
    batch = next(batches_of(options, train, "packed"))
    worst = check_agreement(Ours(options, start("cpu")), Peer(options, *PEER_SETTINGS[0]), batch)
    print(f"loss and gradients agree within {worst:.1e} (relative L2)")

    trials = []
    for i, setting in enumerate(PEER_SETTINGS):
        side = SideProcess(options, i)
        side.step()
        trials.append(statistics.median(side.step() for _ in range(3)))
        side.finish()
        print(f"peer, {', '.join(setting)}: {trials[-1]:,.0f} real tokens/s (median of 3 steps)")
    best = int(np.argmax(trials))

    ours, peer = SideProcess(options, None), SideProcess(options, best)
    for _ in range(3):
        ours.step()
        peer.step()
    rates = [(ours.step(), peer.step()) for _ in range(options.steps)]
    ratios = sorted(a / b for a, b in rates)
    flushes = ", denormals flushed" if options.peer_flushes_denormals else ""
    record(
        {
            "what": "speed",
            "model": options.model,
            "dropout": options.dropout,
            "peer": ", ".join(PEER_SETTINGS[best]) + flushes,
            "steps": options.steps,
            "ours": round(statistics.median(a for a, _ in rates)),
            "theirs": round(statistics.median(b for _, b in rates)),
            "ratio": round(statistics.median(ratios), 3),
            "lowest_ratio": round(ratios[0], 3),
            "highest_ratio": round(ratios[-1], 3),
            "ours_mib": round(ours.finish()),
            "theirs_mib": round(peer.finish()),
        }
    )


def compare_learning(options: argparse.Namespace) -> None:
    """60 steps of both sides on the same batches, from the same adapter."""
    train, test = load_pieces(options)
    sides = {
        "ours": Ours(options, start("cpu")),
        "theirs": Peer(options, "sdpa", "length-sorted, no mask"),
    }
    before = {name: side.perplexity(test) for name, side in sides.items()}
    print("held-out perplexity before:", before)
    batches = batches_of(options, train, "packed")
    for _ in range(60):
        batch = next(batches)
        losses = [side.step(batch) for side in sides.values()]
    print("last step's losses:", losses)
    after = {name: side.perplexity(test) for name, side in sides.items()}
    ratio = after["ours"] / after["theirs"]
    record(
        {
            "what": "learning",
            "model": options.model,
            "dropout": options.dropout,
            "peer": "sdpa, the same batches",
            "steps": 60,
            "ours": round(after["ours"], 4),
            "theirs": round(after["theirs"], 4),
            "ratio": round(ratio, 5),
        }
    )


def _resident(name: str) -> float:
    """VmRSS (now) or VmHWM (highest) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def record(row: dict[str, Any]) -> None:
    """Print a row, and append it with versions, machine and commit."""
    import peft
    import transformers

    row = {
        "date": today(),
        **row,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        **{name: value for name, value in machine().items() if name in COLUMNS},
    }
    print(json.dumps(row, indent=1))
    append_row("against_peft", row, COLUMNS)


if __name__ == "__main__":
    main()
