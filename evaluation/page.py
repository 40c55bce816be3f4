"""The parts that reports are made of: a page of its own, sections, tables, figures, numbers.

A page is a single file without scripts and without anything from elsewhere (its own policy forbids
both); it opens offline, prints, and is read on a phone.

Invariant: plain text passes `escape` in here; what is HTML already says so.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; background: #fff;
  color: #1a1a1a; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .7rem; border-top: 1px solid #ccc; }
p { margin: .5rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
.source { color: #444; }
.headlines { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0;
  list-style: none; }
.headlines li { flex: 1 1 10rem; border: 1px solid #bbb; border-radius: .4rem;
  padding: .7rem .9rem; }
.headlines b { display: block; font-size: 1.6rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.headlines small { color: #444; font-size: .85rem; }
.warning { border-left: .3rem solid #b34700; background: #fff4ec; padding: .6rem .9rem; }
.table { overflow-x: auto; margin: .8rem 0 1.2rem; background:
  linear-gradient(to left, #fff 2rem, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, #aaa, transparent) right / 1rem 100% no-repeat scroll; }
.table:focus-visible { outline: 2px solid #0072B2; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0;
  border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #777; vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 5rem; }
td { white-space: nowrap; }
.number { text-align: right; }
.wide { font-size: .88rem; }
.wide thead th { white-space: nowrap; }
.wide tbody th { position: sticky; left: 0; background: #fff; min-width: 7rem;
  max-width: 24rem; }
.settings th { white-space: nowrap; }
.settings td { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { flex: 1 1 20rem; max-width: 30rem; margin: .6rem 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.chart { width: 100%; height: auto; display: block; }
@media (max-width: 40rem) {
  body { padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.4rem; }
  th, td { padding-right: .8rem; }
  .wide tbody th { max-width: 9rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  .table { overflow: visible; background: none; }
  .wide { font-size: 7.5pt; }
  .wide th, .wide td { padding-right: .6rem; }
  .wide tbody th { position: static; min-width: 5rem; }
  figure, tr { break-inside: avoid; }
  h2, h2 + p { break-after: avoid; }
}
"""

_NUMBER = re.compile(r"[-+]?[\d,.]+%?|< [\d.]+|under \d+|not shown|not defined|none|")


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page; `title` is plain text, sections are HTML, and empty ones are left out."""
    title = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        "<main>\n" + "\n".join(section for section in sections if section) + "\n"
        "</main>\n</body>\n</html>\n"
    )


def section(heading: str, words: str, content: str) -> str:
    """A section under a heading; `words` is plain text, `content` is HTML."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n<p>{escape(words)}</p>\n{content}\n</section>"


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "plain"
) -> str:
    """A table of plain text whose first cells head their rows; it scrolls by itself when wide.

    Columns of single numbers stand on the right; row heads of a `wide` one stay while it scrolls.
    """
    rows = list(rows)
    classes = [""] + [
        ' class="number"'
        if kind != "settings" and all(_NUMBER.fullmatch(row[i]) for row in rows)
        else ""
        for i in range(1, len(header))
    ]
    heads = "".join(
        f'<th scope="col"{of}>{escape(name)}</th>' for name, of in zip(header, classes, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f"<td{of}>{escape(cell)}</td>" for cell, of in zip(row[1:], classes[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
    )


def charts(drawn: Iterable[tuple[str, str]]) -> str:
    """Drawings (SVG) under their titles."""
    shown = (
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawn
    )
    return '<div class="charts">' + "".join(shown) + "</div>"


def number(value: float | None, *, signed: bool = False) -> str:
    """Three places, or that there is no number."""
    if value is None:
        return "not defined"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def interval_text(interval: Sequence[float] | None, *, signed: bool = False) -> str:
    """From where to where, or that there is none."""
    if interval is None:
        return "none"
    low, high = (number(value, signed=signed) for value in interval)
    return f"{low} to {high}"


def number_with_interval(
    value: float | None, interval: Sequence[float] | None, *, percent: bool = False
) -> str:
    """A number with its interval in brackets."""
    if value is None:
        return "not defined"
    if percent:
        between = "" if interval is None else f" ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})"
        return f"{100 * value:.0f}%{between}"
    between = "" if interval is None else f" ({interval_text(interval)})"
    return f"{number(value)}{between}"


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Settings as flags name them: `lora.r` and its value."""
    for name, value in config.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, Mapping):
            yield from flattened(value, f"{flag}.")
        else:
            yield flag, value
