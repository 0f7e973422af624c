"""Rows that were dropped or changed, by reason, with examples. Knows the ledger, not the audit."""

from __future__ import annotations

from collections import Counter
from typing import Any

from zhibei.report.html import Markup, Section, both, left_out, missing, nested, table, tag
from zhibei.report.inputs import RunInputs

MOST_EXAMPLES = 5
MOST_REASONS = 40
ACTIONS = {"dropped": ("dropped", "丢弃"), "changed": ("changed", "改动")}


def dropped_rows(inputs: RunInputs) -> Section:
    """Dropped and changed rows by reason, each with its first examples."""
    titles = "Dropped and changed rows", "丢弃与改动的行"
    if not inputs.ledger:
        is_missing = inputs.problems.get("ledger.jsonl") == "missing"
        nothing = "No row was dropped or changed.", "没有丢弃或改动任何行。"
        return Section(
            *titles, missing(*(("ledger.jsonl is missing.", "ledger.jsonl 缺失。") if is_missing else nothing))
        )
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for entry in inputs.ledger:
        kind = str(entry.get("action", "")), str(entry.get("reason", "?"))
        counts[kind] += 1
        kept = examples.setdefault(kind, [])
        if len(kept) < MOST_EXAMPLES:
            kept.append(entry)
    order = counts.most_common(MOST_REASONS)
    rows = [[action_name(action), reason, f"{count:,}"] for (action, reason), count in order]
    body = table([both("action", "处理"), both("reason", "原因"), both("rows", "行数")], rows, numeric=[2])
    body += left_out(len(counts), MOST_REASONS)
    for (action, reason), _ in order:
        title = action_name(action) + ", " + reason if action else Markup("") + reason
        summary = tag("summary", both("first examples: ", "最先的例子：") + title)
        found = [example(entry) for entry in examples[action, reason]]
        body += tag("details", summary + table([both("where", "位置"), both("what", "内容")], found))
    if "ledger.jsonl" in inputs.problems:
        body += tag("p", f"ledger.jsonl: {inputs.problems['ledger.jsonl']}", class_="note")
    return Section(*titles, body)


def action_name(action: str) -> Markup:
    return both(*ACTIONS[action]) if action in ACTIONS else Markup("") + action


def example(entry: dict[str, Any]) -> list[Any]:
    """Where a row lies and what was found there; whatever else the entry says follows below."""
    place = str(entry.get("where") or entry.get("row") or entry.get("source", ""))
    if entry.get("record") is not None:
        place += f", record {entry['record']}"
    if entry.get("line") is not None:
        place += f" (line {entry['line']})"
    what = [str(entry[name]) for name in ("detail", "field", "excerpt") if entry.get(name)]
    known = ("where", "row", "source", "record", "line", "action", "reason", "detail", "field", "excerpt")
    others = {key: value for key, value in entry.items() if key not in known and value not in (None, "")}
    said = tag("span", " · ".join(what), class_="said", dir="auto")
    return [tag("span", place, class_="text"), said + (nested(others) if others else "")]
