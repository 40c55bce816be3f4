"""Tokenising a table into the token cache, beside sentencepiece's own encoding of a list of texts.

    python -m benchmarks.tokenising --tokenizer tokenizer.model --megabytes 64
    python -m benchmarks.tokenising --tokenizer tokenizer.model --table notes.csv

A table of clinical notes is drawn (or one with a column `text` is given), then both sides take
turns, each in a process of its own: ours reads the CSV, encodes on all cores and writes the whole
cache, checksums and disk included; the peer encodes the same texts, which it already holds in
memory, by `encode(list)` on one thread. The ratio is the peer's seconds over ours. Rows are
appended to benchmarks/results/tokenising.csv.
"""

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.record import append_row, today
from data.general_text import form, health_leaflet

_OURS = """
import json, sys, time
from pathlib import Path
from data.cache import tokenise
from data.notes import open_notes
from data.tokenizer import load_tokenizer
table, tokenizer, folder = sys.argv[1:]
began = time.perf_counter()
source = open_notes(Path(table), text_column="text")
cache = tokenise(source, load_tokenizer(tokenizer), cache_folder=Path(folder))
print(json.dumps({"seconds": time.perf_counter() - began, "tokens": len(cache.tokens)}))
"""
_PEER = """
import csv, json, sys, time
import sentencepiece
table, tokenizer = sys.argv[1:3]
csv.field_size_limit(1 << 30)
with open(table, newline="", encoding="utf-8") as file:
    texts = [row["text"] for row in csv.DictReader(file)]
processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
began = time.perf_counter()
ids = processor.encode(texts, num_threads=1)
print(json.dumps({"seconds": time.perf_counter() - began, "tokens": sum(map(len, ids))}))
"""


def write_table(path: Path, megabytes: float, seed: int = 0) -> None:
    """Write a CSV of drawn notes of about 3 kB each, with so many megabytes of text."""
    rng = random.Random(seed)
    characters = 0
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text"])
        while characters < megabytes * 2**20:
            parts: list[str] = []
            while sum(map(len, parts)) < 3000:
                parts.append(rng.choice((form, health_leaflet))(rng))
            text = "\n\n".join(parts)
            rows.writerow([text])
            characters += len(text)


def measure(program: str, arguments: Sequence[str]) -> tuple[float, int]:
    """Seconds and tokens of one side, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures["seconds"], figures["tokens"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a sentencepiece model")
    parser.add_argument("--megabytes", type=float, default=64.0, help="size of the drawn table")
    parser.add_argument("--table", type=Path, help="a CSV with a column text, instead of drawing")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        table = flags.table or Path(folder) / "notes.csv"
        if flags.table is None:
            write_table(table, flags.megabytes)
        tokenizer = str(flags.tokenizer)
        ours, peer = [], []
        for repeat in range(flags.repeats):
            cache = Path(folder) / f"cache-{repeat}"
            seconds, tokens = measure(_OURS, [str(table), tokenizer, str(cache)])
            ours.append(seconds)
            peer_seconds, peer_tokens = measure(_PEER, [str(table), tokenizer])
            peer.append(peer_seconds)
            assert tokens == peer_tokens, "the two sides have encoded different things"
        megabytes = round(table.stat().st_size / 2**20, 1)
    ratios = [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]
    row = {
        "date": today(),
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "sentencepiece": version("sentencepiece"),
        "vocabulary": flags.tokenizer.stem,
        "table": "drawn" if flags.table is None else "given",
        "megabytes": megabytes,
        "tokens": tokens,
        "ours_s": round(statistics.median(ours), 2),
        "peer_s": round(statistics.median(peer), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_lowest": round(min(ratios), 2),
        "ratio_highest": round(max(ratios), 2),
    }
    append_row("tokenising", row)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
