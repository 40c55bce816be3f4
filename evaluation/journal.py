"""Lines of JSON that a killed command goes on from: a header, then one line for each item.

Items are worked on in chunks that begin at multiples of their size. What a killed command had
written of an unfinished chunk is dropped and made again from its beginning, beside the same
neighbours. The invariant: whenever a command was killed, the file ends with the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CHUNK = 32  # items worked on and written together

Row = dict[str, Any]


def worked_through(
    path: Path, header: Mapping[str, Any], count: int, work: Callable[[range], Sequence[Row]]
) -> list[Row]:
    """The lines of all items: of a file under this very header, and of `work` for the rest.

    A file under another header, or one that is damaged, is begun anew.
    """
    rows = _whole_chunks(path, header, count)
    for start in range(len(rows), count, CHUNK):
        chunk = range(start, min(start + CHUNK, count))
        new = list(work(chunk))
        assert len(new) == len(chunk)
        with path.open("a", encoding="utf-8") as file:
            lines = new if start else [dict(header), *new]
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        rows += new
    return rows


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of what is written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_rows(path: Path) -> tuple[Row, list[Row]]:
    """Header and lines of a file; ValueError where it is no whole one."""
    try:
        header, *rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError):
        raise ValueError(f"{path} is missing, damaged or not finished; make it again") from None
    return header, rows


def read_header(path: Path) -> Row | None:
    """The first line of a file; None where it is no whole one."""
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def _whole_chunks(path: Path, header: Mapping[str, Any], count: int) -> list[Row]:
    content = path.read_bytes() if path.is_file() else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        found = [json.loads(line) for line in lines]
    except ValueError:
        found = []
    if not found or found[0] != dict(header) or len(found) > count + 1:
        found, lines = [], []
    done = len(found) - 1
    kept = done if done == count else max(done, 0) // CHUNK * CHUNK
    size = sum(map(len, lines[: kept + 1])) if kept else 0
    if size < len(content):
        os.truncate(path, size)
    return found[1 : kept + 1] if kept else []
