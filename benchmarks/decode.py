"""Greedy generation on a CPU beside transformers' `generate`, the same tokens asked of both.

    python -m benchmarks.decode --model stories260k --real-data DIR
    python -m benchmarks.decode --model llama58m --batch 8

Both sides take turns in one process and are given the same prompts, of one length or (--mixed) of
several, which transformers takes padded on the left; every pass must give the same tokens. The row
holds the median of the passes' ratios and their range. Both compute in float32; the checkpoint of
llama58m, which is random, holds its weights in what --weights says, float16 as many published ones
do. With --peer-dtype stored transformers computes in that type too, which gives other tokens.

Two figures say what a token's products with the weights take: `stored_ms` as torch multiplies them
the way a checkpoint stores them, and `read_ms`, their bytes in float32 over the speed at which a
sum reads memory here. On a busy machine --threads 1 --clock cpu takes the process's own time.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.against_peft import LLAMA58M
from benchmarks.record import append_row, machine, today
from model.checkpoint import load_causal_lm, save_model
from model.decoder import init_weights
from model.generation import GenerationConfig, generate
from model.heads import CausalLM

Peer = Callable[[list[list[int]]], list[list[int]]]  # prompts -> new tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["stories260k", "llama58m"], default="stories260k")
    parser.add_argument("--real-data", type=Path, help="the folder of stories260k")
    parser.add_argument("--weights", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--peer-dtype", choices=["float32", "stored"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mixed", action="store_true", help="prompts of several lengths")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    ours = make_model(options)
    peer = make_peer(ours, options)
    prompts = make_prompts(options, ours.config.vocab_size)
    config = GenerationConfig(max_new_tokens=options.tokens)
    times: list[tuple[float, float]] = []
    for _ in range(options.passes + 1):
        began = clock()
        found = generate(ours, prompts, config)
        between = clock()
        expected = peer(prompts)
        times.append((between - began, clock() - between))
        if found != expected and options.peer_dtype == "float32":
            raise SystemExit("the two sides do not give the same tokens")
    del times[0]  # which warmed up
    ratios = [theirs / own for own, theirs in times]
    own, theirs = (statistics.median(side) for side in zip(*times, strict=True))
    row = {
        "date": today(),
        "model": options.model,
        "weights": str(stored_dtype(options)).removeprefix("torch."),
        "peer_dtype": options.peer_dtype,
        "batch": options.batch,
        "prompts": "mixed" if options.mixed else "equal",
        "tokens": options.tokens,
        "threads": options.threads,
        "clock": options.clock,
        "ours_ms": round(1e3 * own / options.tokens, 3),
        "transformers_ms": round(1e3 * theirs / options.tokens, 3),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_low": round(min(ratios), 2),
        "ratio_high": round(max(ratios), 2),
        "stored_ms": round(1e3 * stored_seconds(ours, options.batch, clock), 3),
        "read_ms": round(1e3 * read_seconds(ours, clock), 3),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **machine(),
    }
    append_row("decode", row)
    print("  ".join(f"{key} {value}" for key, value in row.items()))


def stored_dtype(options: argparse.Namespace) -> torch.dtype:
    """What the checkpoint holds its weights in; stories260k is a float32 file."""
    dtype: torch.dtype = getattr(torch, options.weights)
    return torch.float32 if options.model == "stories260k" else dtype


def make_model(options: argparse.Namespace) -> CausalLM:
    if options.model == "stories260k":
        if options.real_data is None:
            raise SystemExit("--model stories260k needs --real-data, the folder that holds it")
        model = load_causal_lm(options.real_data / "stories260k")
    else:
        model = CausalLM(LLAMA58M)
        init_weights(model, std=0.02, seed=0)
        model = model.to(stored_dtype(options)).float()
    return model.requires_grad_(False)


def make_peer(ours: CausalLM, options: argparse.Namespace) -> Peer:
    """transformers' `generate` on the same weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        stored = copy.deepcopy(ours).to(stored_dtype(options))
        save_model(stored, Path(folder) / "model")
        dtype = torch.float32 if options.peer_dtype == "float32" else stored_dtype(options)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out: Tensor = theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=options.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, longest:].tolist()

    return run


def make_prompts(options: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [16 + (11 * i % 48 if options.mixed else 0) for i in range(options.batch)]
    draws = (torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths)
    return [[1, *draw.tolist()] for draw in draws]


def weights_of(model: CausalLM) -> list[Tensor]:
    """The matrices that a token is multiplied with."""
    return [p for p in model.model.layers.parameters() if p.dim() == 2] + [model.head_weight]


def best_seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    best = float("inf")
    for _ in range(20):
        began = clock()
        work()
        best = min(best, clock() - began)
    return best


@torch.inference_mode()
def stored_seconds(model: CausalLM, rows: int, clock: Callable[[], float]) -> float:
    """The best time of all products of one token's rows with the weights as they are stored."""
    weights = weights_of(model)
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
    return best_seconds(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights], clock)


@torch.inference_mode()
def read_seconds(model: CausalLM, clock: Callable[[], float]) -> float:
    """The best time of reading the weights once, at the speed of a sum over 256 MiB."""
    memory = torch.ones(1 << 26)
    size = sum(weight.nbytes for weight in weights_of(model))
    return best_seconds(memory.sum, clock) * size / memory.nbytes


if __name__ == "__main__":
    main()
