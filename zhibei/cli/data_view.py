"""How `zhibei data inspect` looks: tables, bars in the terminal, a page with the same bars. Computes nothing."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BLOCKS = " ▏▎▍▌▋▊▉█"
BAR_CELLS = 40


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """A bar of eighths of a character; the smallest share above 0 still shows."""
    eighths = round(share * cells * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def percent(part: float, whole: float = 1.0) -> str:
    share = part / whole if whole else 0.0
    return f"{share:.0%}" if share in (0, 1) or 0.1 <= share < 0.995 else f"{share:.2%}"


def shown(facts: dict[str, Any]) -> RenderableType:
    """One file's facts for a terminal."""
    return Group(*_parts(_without_file(facts, f"{facts['file']}, ")))


def _without_file(value: Any, prefix: str) -> Any:
    """Places within the file without its name, which stands above them."""
    if isinstance(value, dict):
        return {key: _without_file(each, prefix) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_file(each, prefix) for each in value]
    return value.removeprefix(prefix) if isinstance(value, str) else value


def _heading(text: str, note: str = "") -> Text:
    return Text(f"\n{text}", style="bold").append(f"  {note}" if note else "", style="not bold dim")


def _parts(facts: dict[str, Any]) -> Iterator[RenderableType]:
    kinds = ", ".join(f"{count} {name}" for name, count in facts["kinds"].items())
    yield Text(facts["file"], style="bold cyan")
    yield Text(
        f"{facts['container']}, format {facts['format']}: {kinds or 'no sound record'}, {facts['bytes']:,} bytes"
    )
    yield from _broken(facts["broken"])
    yield _heading("Fields")
    table = Table("name", "type", "present", "filled", "example", box=None, pad_edge=False, header_style="dim")
    for field in facts["fields"]:
        types = ", ".join(field["types"])
        table.add_row(field["name"], types, percent(field["present"]), percent(field["filled"]), Text(field["example"]))
    yield table
    if facts["speakers"]:
        yield _heading("Speakers")
        yield Text(", ".join(f"{name} {count}" for name, count in facts["speakers"].items()))
    if facts["turns"] and set(facts["turns"]) != {"0"}:
        yield _heading("Questions per record")
        yield Text(", ".join(f"{turns}: {count}" for turns, count in facts["turns"].items()))
    for found in facts["lengths"].values():
        yield from _lengths(found, facts["records"])
    yield _heading("Languages", f"by {facts['languages']['by']}")
    yield Text(", ".join(f"{name} {count}" for name, count in facts["languages"]["counts"].items()))
    yield from _duplicates(facts["duplicates"], facts["records"])
    for shared in facts["shared_with"]:
        what = f"{shared['records']} records and {shared['questions']} questions are also in {shared['file']}"
        yield Text(what, style="yellow").append("  (not for validation, then)", style="dim")
    yield from _suspicious(facts)


def _broken(broken: dict[str, Any]) -> Iterator[RenderableType]:
    if not broken["count"]:
        return
    yield _heading(f"{broken['count']} broken records", "training stops at them, unless data.on_error: drop")
    for entry in broken["examples"][:10]:
        text = Text(f"{entry['where']}: ", style="bold").append(entry["what"], style="not bold red")
        yield text.append(f"\n  expected: {entry['expected']}\n  to do:    {entry['fix']}", style="not bold dim")
    if broken["count"] > 10:
        yield Text(f"... and {broken['count'] - 10} more (--json lists 50)", style="dim")


def _lengths(found: dict[str, Any], num_records: int) -> Iterator[RenderableType]:
    unit = found["unit"]
    if not found["whole"]["count"]:
        return
    note = "without a template" if unit == "tokens" else ""
    yield _heading(f"Lengths in {unit}", note)
    table = Table("", "mean", "min", box=None, pad_edge=False, header_style="dim")
    whole = found["whole"]
    for quantile in whole["percentiles"]:
        table.add_column(f"{quantile}%", justify="right")
    table.add_column("max", justify="right")
    table.add_column("total", justify="right")
    for name in ("whole", "answers"):
        if name in found:
            it = found[name]
            cells = [it["mean"], it["min"], *it["percentiles"].values(), it["max"], f"{it['total']:,}"]
            table.add_row("record" if name == "whole" else "answer", *map(str, cells))
    yield table
    yield bars(whole["bins"], num_records)


def bars(bins: Sequence[dict[str, int]], total: int) -> Table:
    """Counts as bars, with the share of all records up to the end of each bin."""
    table = Table(box=None, pad_edge=False, show_header=False)
    most = max((each["count"] for each in bins), default=1)
    so_far = 0
    for each in bins:
        so_far += each["count"]
        table.add_row(
            Text(f"{each['from']}-{each['to']}", justify="right", style="dim"),
            Text(bar(each["count"] / most), style="cyan"),
            Text(str(each["count"]), justify="right"),
            Text(f"{so_far / total:.1%} so far", style="dim", justify="right"),
        )
    return table


def _duplicates(found: dict[str, Any], num_records: int) -> Iterator[RenderableType]:
    yield _heading("Duplicates")
    yield Text(f"{found['exact']} records equal to an earlier one ({percent(found['exact'], num_records)})")
    for first, second in found["exact_examples"]:
        yield Text(f"  {second} = {first}", style="dim")
    partial = f", among the first {found['near_rows_compared']:,}" if found["near_is_partial"] else ""
    yield Text(
        f"{found['near']} nearly so (at least {found['near_min_similarity']:.0%} of the word runs shared{partial})"
    )
    for pair in found["near_examples"]:
        yield Text(f"  {pair['second']} is {pair['similarity']:.1%} {pair['first']}", style="dim")
    if found["questions_with_several_answers"]:
        yield Text(f"{found['questions_with_several_answers']} questions with several answers")


def _suspicious(facts: dict[str, Any]) -> Iterator[RenderableType]:
    found = facts["suspicious"]
    share = percent(found["records"], facts["records"])
    yield _heading(f"{found['records']} suspicious records ({share})", "a reason to look, not a verdict")
    for rule in found["rules"]:
        yield (
            Text(f"{rule['count']:>6}  ")
            .append(rule["rule"], style="yellow")
            .append(f"  {rule['reason']}", style="dim")
        )
        for example in rule["examples"][:2]:
            yield Text(f"        {example['where']}: {example['text']}", style="dim")
    for each in facts["repeated_answers"]:
        yield Text(f"{each['count']:>6}  the same answer: {each['answer']}")
    if facts["without_answer"]:
        yield Text(
            f"{facts['without_answer']:>6}  conversations end with a question; it is left out and kept in the ledger"
        )


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Lengths</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:60rem}}svg{{max-width:100%}}</style>
<h1>Lengths</h1>{body}</html>
"""


def plot_page(files: Sequence[dict[str, Any]], *, as_svg: bool) -> str:
    """The length distributions as one SVG picture, or as a page around it."""
    charts = [(facts["file"], found) for facts in files for found in facts["lengths"].values()]
    height, parts = 10, []
    for name, found in charts:
        part, height = _chart(f"{name}: {found['unit']} per record", found["whole"], height)
        parts.append(part)
    picture = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" '
        f'font-family="system-ui,sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>"
    )
    return picture if as_svg else PAGE.format(body=picture)


def _chart(title: str, found: dict[str, Any], top: int) -> tuple[str, int]:
    bins = found.get("bins", [])
    most = max((each["count"] for each in bins), default=1)
    parts = [f'<text x="10" y="{top + 14}" font-weight="bold">{html.escape(title)}</text>']
    y = top + 24
    for each in bins:
        width = 460 * each["count"] / most
        label = f"{each['from']}-{each['to']}"
        parts.append(
            f'<text x="110" y="{y + 12}" text-anchor="end" fill="#555">{label}</text>'
            f'<rect x="120" y="{y + 2}" width="{width:.1f}" height="13" fill="#2a78b5"/>'
            f'<text x="{126 + width:.1f}" y="{y + 12}">{each["count"]}</text>'
        )
        y += 17
    return "".join(parts), y + 20
