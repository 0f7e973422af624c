"""What was made of a run after training, each with its comparison. Knows handed_over.jsonl, not how things are made."""

from __future__ import annotations

from typing import Any

from zhibei.report.html import Markup, Section, both, join, missing, note, size_of, table, tag
from zhibei.report.inputs import RunInputs, finite

FIGURES: tuple[tuple[str, str, str], ...] = (
    ("kl_mean", "KL, mean (nats per token)", "KL 均值（每词元 nat）"),
    ("kl_max", "KL, largest", "KL 最大值"),
    ("top1_agreement", "likeliest token agrees", "最可能词元一致率"),
    ("perplexity_change", "perplexity, change", "困惑度变化"),
)
SHARES = ("top1_agreement", "perplexity_change")


def handed_over(inputs: RunInputs) -> Section:
    """One table for each thing that was made; the newest of a place wins."""
    newest = {str(entry.get("path")): entry for entry in inputs.handed_over}
    if not newest:
        english = "Nothing was made of this run yet (zhibei merge, zhibei export)."
        return Section("Handed over", "交付", missing(english, "尚未导出（zhibei merge、zhibei export）。"))
    return Section("Handed over", "交付", join(_one(entry) for entry in newest.values()))


def _one(entry: dict[str, Any]) -> Markup:
    head = tag("h3", f"{entry.get('what', '?')}: {entry.get('path', '?')}")
    parity = entry.get("parity")
    if not isinstance(parity, dict):
        return head + note("Read back and compared bit for bit, or not compared.", "已逐位读回比较，或未比较。")
    limits = parity.get("limits") or {}
    rows = []
    for key, english, chinese in FIGURES:
        value = finite(parity.get(key))
        if value is not None:
            rows.append([both(english, chinese), _shown(key, value), _shown(key, finite(limits.get(key)))])
    for key, english, chinese in (
        ("tokenizer", "probe texts with equal tokens", "词元相同的探测文本"),
        ("template", "conversations with equal tokens", "词元相同的对话"),
    ):
        found = parity.get(key) or {}
        rows.append([both(english, chinese), f"{found.get('num_equal')} / {found.get('num_asked')}", ""])
    mine, theirs = parity.get("reference") or {}, parity.get("other") or {}
    sizes = f"{size_of(mine.get('bytes_on_disk') or 0)} → {size_of(theirs.get('bytes_on_disk') or 0)}"
    rows.append([both("size on disk", "磁盘占用"), sizes, ""])
    where = f"{parity.get('num_tokens', 0):,} tokens, {parity.get('rows_from', '')}"
    body = table([both("figure", "指标"), both("value", "数值"), both("limit", "限值")], rows, numeric=[1, 2])
    return head + body + note(f"Compared on {where}.", f"比较所用：{where}。")


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3%}" if key in SHARES else f"{value:.3g}"
