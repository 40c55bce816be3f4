"""report.html of questions: accuracy and its intervals, by group and strategy, for people.

Invariant: no text of a question, an option or an answer comes in; letters and counts alone.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data.wording import counted
from evaluation.page import (
    flattened,
    interval_text,
    number,
    number_with_interval,
    page,
    section,
    table,
)
from model.files import write_whole


def write_question_report(
    path: Path,
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    beside: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page, whole or not at all."""
    text = question_report_html(results, config, beside)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def question_report_html(
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    beside: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the page.

    config: the command's settings. beside: results of the same model on the same questions by other
    strategies.
    """
    sections = [
        _summary(results),
        _strategies(results, beside),
        _groups(results),
        _confusion(results),
        _comparison(results),
        _questions(results),
        _settings(results, config),
    ]
    return page(_title(results), sections)


def _title(results: Mapping[str, Any]) -> str:
    return f"{results['mcq']}: {results['strategy']}"


def _summary(results: Mapping[str, Any]) -> str:
    best, share = max(results["accuracy_of_constant"].items(), key=lambda item: item[1])
    interval = results["accuracy_ci"]
    shown = [
        (
            "Accuracy",
            number(results["accuracy"]),
            f"95% interval {interval_text(interval)}" if interval else "no interval",
        ),
        ("A constant answer", number(share), f"always {best}"),
        ("Unanswered", f"{results['unanswered']:,}", "no answer could be read: counted as wrong"),
    ]
    items = (
        f"<li>{escape(name)}<b>{escape(value)}</b><small>{escape(told)}</small></li>"
        for name, value, told in shown
    )
    return (
        f"<h1>{escape(_title(results))}</h1>\n"
        f'<p class="source">{counted(results["n"], "question")}, strategy '
        f"{escape(_named(results))}.</p>\n"
        '<ul class="headlines">' + "".join(items) + "</ul>"
    )


def _named(results: Mapping[str, Any]) -> str:
    return f"{results['strategy']} (version {results['strategy_version']})"


def _strategies(results: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{_named(one)}{' (this page)' if one is results else ''}",
            f"{one['shots']:,}",
            number_with_interval(one["accuracy"], one["accuracy_ci"]),
            f"{one['unanswered']:,}",
            f"{one['texts_asked'] / one['n']:,.1f}",
            f"{one['new_tokens'] / one['n']:,.1f}",
        ]
        for one in (results, *beside)
    ]
    header = ["strategy", "shots", "accuracy", "unanswered", "texts a question"]
    return section(
        "Strategies",
        "The same model on the same questions, asked in different ways. In brackets: 95% interval "
        f"from {results['bootstrap']:,} resamples of questions. Texts are options that were scored "
        "and answers that were written, all tries counted.",
        table("Strategies", [*header, "new tokens a question"], rows, kind="wide"),
    )


def _groups(results: Mapping[str, Any]) -> str:
    content = ""
    for group in ("step", "subject"):
        rows = [
            [name, f"{one['n']:,}", number_with_interval(one["accuracy"], one["accuracy_ci"])]
            for name, one in results[f"per_{group}"].items()
        ]
        if rows:
            content += table(f"By {group}", [group, "questions", "accuracy"], rows)
    if not content:
        return ""
    return section(
        "Parts of the questions",
        "In brackets: 95% interval; none with under ten questions.",
        content,
    )


def _confusion(results: Mapping[str, Any]) -> str:
    counted = results["confusion"]
    rows = [
        [letter, *(f"{count:,}" for count in chosen.values())] for letter, chosen in counted.items()
    ]
    header = ["right answer", *(f"chose {letter}" for letter in next(iter(counted.values())))]
    return section(
        "Which letters were chosen",
        "A model that prefers a place among the options, whatever stands there, fills one column.",
        table("Right and chosen letters", header, rows),
    )


def _comparison(results: Mapping[str, Any]) -> str:
    found = results["comparison"]
    if found is None:
        return ""
    p = f"{found['p']:.3f}" if found["p"] >= 0.001 else "< 0.001"
    row = [
        f"{found['strategy']} (version {found['version']})",
        number(found["difference"], signed=True),
        interval_text(found["ci"], signed=True),
        f"{found['won']:,}",
        f"{found['lost']:,}",
        p,
    ]
    header = ["the earlier run", "difference", "95% interval", "right here alone"]
    return section(
        "Beside an earlier run",
        f"The earlier run is {found['run']}, on the same questions. p is McNemar's, exact: the "
        "chance of so uneven a split of the questions that one of the two had right, were both "
        "equally good.",
        table("Paired comparison", [*header, "right there alone", "p"], [row], kind="wide"),
    )


def _questions(results: Mapping[str, Any]) -> str:
    rows = [["scored", f"{results['n']:,}"]]
    rows += [[name, f"{count:,}"] for name, count in results["counts"].items()]
    for step, count in (results["published_counts"] or {}).items():
        rows.append([f"{step} questions, as published", f"{count:,}"])
    rows.append(["prompts that were shortened", f"{results['shortened_prompts']:,}"])
    for name, count in (results["rationales"] or {}).items():
        rows.append([name.replace("_", " "), f"{count:,}"])
    return section(
        "Questions",
        "What was scored and what was left out.",
        table("Counts", ["what", "count"], rows),
    )


def _settings(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    settings = [[f"--{flag}", str(value)] for flag, value in flattened(config) if value is not None]
    told = [
        [name.replace("_", " "), str(value)]
        for name, value in (*results["settings"].items(), ("tie_rule", results["tie_rule"]))
        if value is not None
    ]
    prints = [[name, results[f"{name}_fingerprint"]] for name in ("questions", "model")]
    return section(
        "Settings and fingerprints",
        "Two runs with the same settings and fingerprints give the same results.",
        table("Settings", ["setting", "value"], settings, kind="settings")
        + (table("Strategy", ["setting", "value"], told, kind="settings") if told else "")
        + table("Fingerprints (SHA-256)", ["of", "digest"], prints, kind="settings"),
    )
