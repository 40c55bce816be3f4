"""What the studies share: how a cell is shown, how tables are written, how folders are named.

The invariant: what is not there is shown as nothing, never as a figure.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.files import write_json, write_whole

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")


def write_tables(out: Path, tables: Mapping[str, Any], lines: Iterable[str]) -> None:
    """study.json with the figures and study.md with `lines`, each in the place of the last one."""
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(out / "study.json", tables)
    text = "\n".join(lines) + "\n"
    write_whole(out / "study.md", lambda path: path.write_text(text, encoding="utf-8"))


def table_head(*names: str) -> tuple[str, str]:
    """The first two lines of a table in Markdown."""
    return table_row(*names), "|" + "---|" * len(names)


def table_row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def aside(published: float | None, form: str = ".2f") -> str:
    """A published figure in brackets; nothing where there is none."""
    return "" if published is None else f" ({published:{form}})"


def accuracy(found: Mapping[str, Any] | None) -> str:
    """Percent of questions with its interval, and how many were scored."""
    if found is None:
        return ""
    text = f"{100 * found['accuracy']:.1f}"
    if found["accuracy_ci"] is not None:
        low, high = found["accuracy_ci"]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{text} of {found['n']:,}"


def gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def minutes(seconds: float | None) -> str:
    """minutes:seconds"""
    if seconds is None:
        return ""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def named(words: Sequence[str], flag: str) -> dict[str, str]:
    """NAME=PATH pairs of a flag. Raises ValueError for another form and a name given twice."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path or not _NAME.fullmatch(name):
            raise ValueError(
                f"{flag} takes NAME=DIR, with a name of lower-case letters, digits, '.' and '-'; "
                f"got {word}"
            )
        if name in found:
            raise ValueError(f"{flag} names {name} twice")
        found[name] = path
    return found


def named_folders(words: Sequence[str], flag: str) -> dict[str, str]:
    """`named`, where each must be a folder."""
    found = named(words, flag)
    for name, folder in found.items():
        if not Path(folder).is_dir():
            raise ValueError(f"{flag} {name}={folder}: there is no folder {folder}")
    return found
