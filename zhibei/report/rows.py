"""What the data looked like: the audit of all rows, a preview of the mask, the rows that were dropped. Knows no curves.

The audit's keys that are known get their own pictures; whatever else it holds is shown as a plain table, so that a new
figure of the audit never disappears from the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from zhibei.report.bars import bar_svg
from zhibei.report.html import Markup, Section, both, escape, join, left_out, missing, nested, note, table, tag
from zhibei.report.inputs import RunInputs

MOST_EXAMPLES = 5
MOST_REASONS = 40


def dropped_rows(inputs: RunInputs) -> Section:
    """Dropped and changed rows by reason, each with its first examples."""
    if not inputs.ledger:
        reason = inputs.problems.get("ledger.jsonl")
        text = ("ledger.jsonl is missing.", "ledger.jsonl 缺失。") if reason == "missing" else (
            "No row was dropped or changed.", "没有丢弃或改动任何行。")  # fmt: skip
        return Section("Dropped rows", "丢弃的行", missing(*text))
    counts = Counter(str(entry.get("reason", "?")) for entry in inputs.ledger)
    examples: dict[str, list[dict[str, Any]]] = {reason: [] for reason in counts}
    for entry in inputs.ledger:
        kept = examples[str(entry.get("reason", "?"))]
        if len(kept) < MOST_EXAMPLES:
            kept.append(entry)
    head = [both("reason", "原因"), both("rows", "行数")]
    rows = [[reason, f"{count:,}"] for reason, count in counts.most_common(MOST_REASONS)]
    body = table(head, rows, numeric=[1]) + left_out(len(counts), MOST_REASONS)
    for reason, _ in counts.most_common(MOST_REASONS):
        title = tag("summary", both("first examples: ", "最先的例子：") + reason)
        body += tag("details", title + table(EXAMPLE_HEAD, [example(entry) for entry in examples[reason]]))
    if "ledger.jsonl" in inputs.problems:
        body += tag("p", f"ledger.jsonl: {inputs.problems['ledger.jsonl']}", class_="note")
    return Section("Dropped rows", "丢弃的行", body)


EXAMPLE_HEAD = [both("where", "位置"), both("field", "字段"), both("how it begins", "开头内容")]


def example(entry: dict[str, Any]) -> list[Any]:
    """Place, field and beginning of a row; whatever else the entry says follows in brackets."""
    place = str(entry.get("source", ""))
    if entry.get("record") is not None:
        place += f" #{entry['record']}"
    if entry.get("line") is not None:
        place += f" (line {entry['line']})"
    known = ("source", "record", "line", "field", "reason", "excerpt")
    others = {key: value for key, value in entry.items() if key not in known and value not in (None, "")}
    excerpt = tag("span", entry.get("excerpt") or "", class_="said", dir="auto")
    return [tag("span", place, class_="text"), entry.get("field") or "", excerpt + (nested(others) if others else "")]


def audit(inputs: RunInputs) -> Section:
    """All figures of the audit, the length histogram as a drawing, and rows as the model sees them."""
    if not inputs.audit:
        reason = inputs.problems.get("audit.json", "empty")
        text = f"audit.json: {reason}.", f"audit.json：{'缺失' if reason == 'missing' else reason}。"
        return Section("Audit of the rows", "数据审计", missing(*text))
    plain: dict[str, Any] = {}
    drawn: list[Markup] = []
    for key, value in inputs.audit.items():
        bars = histogram_bars(value)
        if bars:
            drawn.append(histogram(key, bars))
        elif key in PREVIEW_KEYS and isinstance(value, list):
            drawn.append(previews(value))
        else:
            plain[key] = value
    body = tag("div", nested(plain), class_="wide") if plain else Markup("")
    return Section("Audit of the rows", "数据审计", body + join(drawn))


PREVIEW_KEYS = ("previews", "preview")


def histogram_bars(value: Any) -> list[tuple[float, float, float]]:
    """(from, to, count) of each bar of {"edges": N+1 numbers, "counts": N numbers} or a list of [from, to, count]."""
    if isinstance(value, dict) and isinstance(value.get("edges"), list) and isinstance(value.get("counts"), list):
        edges, counts = value["edges"], value["counts"]
        if len(edges) == len(counts) + 1 and all(isinstance(number, (int, float)) for number in [*edges, *counts]):
            return list(zip(edges[:-1], edges[1:], counts, strict=True))
    if isinstance(value, list) and value and all(isinstance(bar, list) and len(bar) == 3 for bar in value):
        return [(bar[0], bar[1], bar[2]) for bar in value if all(isinstance(number, (int, float)) for number in bar)]
    return []


def histogram(key: str, bars: list[tuple[float, float, float]]) -> Markup:
    """Bars over row length; each says its range and count under the pointer."""
    caption = both("Row lengths", "行长度") if "length" in key else escape(key)
    drawing = bar_svg(bars, unit_en="tokens per row", unit_zh="每行词元数")
    return tag("figure", tag("figcaption", caption) + tag("div", drawing, class_="full"), class_="chart")


def previews(rows: list[Any]) -> Markup:
    """A few rows as the model sees them, supervised text marked."""
    shown = [row for row in rows if isinstance(row, dict)]
    explained = note(
        "Marked text is supervised: the model learns to produce it. All else is only read.",
        "高亮文本参与损失：模型学习生成这些内容；其余部分只作为输入。",
    )
    return tag("h3", both("What the model sees", "模型看到的内容")) + explained + join(preview(row) for row in shown)


def preview(row: dict[str, Any]) -> Markup:
    pieces = row.get("pieces") or row.get("spans") or row.get("tokens") or []
    text = Markup("")
    for piece in pieces if isinstance(pieces, list) else []:
        words, is_learned = (piece.get("text"), piece.get("supervised")) if isinstance(piece, dict) else piece[:2]
        text += tag("mark", words) if is_learned else escape(words)
    others = {key: value for key, value in row.items() if key not in ("pieces", "spans", "tokens")}
    head = ", ".join(f"{key}: {value}" for key, value in others.items() if not isinstance(value, (dict, list)))
    return tag(
        "div", tag("div", head, class_="quiet text") + tag("div", text, class_="said", dir="auto"), class_="preview"
    )


ROW_SECTIONS: dict[str, Callable[[RunInputs], Section]] = {"audit": audit, "dropped_rows": dropped_rows}
