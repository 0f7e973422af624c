"""The audit of all rows as a section of the page. Knows the figures by name; one it does not know is shown as it is."""

from __future__ import annotations

from typing import Any

from zhibei.report.bars import bar_svg
from zhibei.report.html import Markup, Section, both, escape, figure, join, missing, nested, note, table, tag
from zhibei.report.inputs import RunInputs, as_dict, finite

# Figures that are one value, in the order a person asks for them; the rest of the audit follows as it comes.
LABELS: dict[str, tuple[str, str]] = {
    "template": ("template", "模板"),
    "terminator": ("terminator of an answer", "回答的终止符"),
    "rows_read": ("rows read", "读入的行"),
    "rows_kept": ("rows kept", "保留的行"),
    "rows_train": ("training rows", "训练行"),
    "rows_heldout": ("held-out rows", "留出行"),
    "rows_cut": ("rows cut at max_tokens", "被截断的行"),
    "rows_without_supervision": ("rows with nothing to learn (dropped)", "没有可学习内容的行（已丢弃）"),
    "tokens": ("tokens", "词元"),
    "tokens_supervised": ("tokens supervised", "参与损失的词元"),
    "supervised_share": ("share supervised", "参与损失的比例"),
    "answers": ("answers", "回答"),
    "terminators": ("answers with a terminator", "带终止符的回答"),
    "terminators_supervised": ("terminators supervised", "参与损失的终止符"),
    "terminators_supervised_share": ("share of terminators supervised", "终止符参与损失的比例"),
    "bos_per_row": ("BOS tokens per row", "每行 BOS 数"),
    "unknown_tokens": ("unknown tokens", "未知词元"),
    "rows_with_border_merges": ("rows where one token spans prompt and answer", "提示与回答合并为同一词元的行"),
    "border_merges": ("tokens that span prompt and answer", "跨越提示与回答的词元"),
    "rows_with_special_tokens_in_text": ("rows whose text spells a special token", "文本中出现特殊词元的行"),
}
NESTED: dict[str, tuple[str, str]] = {
    "dropped": ("Dropped, by reason", "丢弃原因"),
    "changed": ("Changed, by reason", "改动原因"),
    "duplicates": ("Duplicates", "重复"),
    "prompts_compared": ("Prompts when chatting compared with training", "对话与训练时提示的比较"),
    "tokenizer": ("Tokenizer", "分词器"),
}
PICTURED = ("notices", "lengths", "longest_rows", "sources", "previews")


def audit(inputs: RunInputs) -> Section:
    """All figures of the audit, the lengths as a histogram, and a few rows as the model sees them."""
    if not inputs.audit:
        reason = inputs.problems.get("audit.json", "empty")
        text = f"audit.json: {reason}.", f"audit.json：{'缺失' if reason == 'missing' else reason}。"
        return Section("Audit of the rows", "数据审计", missing(*text))
    found = inputs.audit
    plain = [[both(*LABELS[key]), audit_value(key, found[key])] for key in LABELS if key in found]
    others = {key: value for key, value in found.items() if key not in (*LABELS, *NESTED, *PICTURED)}
    blocks = [
        notices(found.get("notices")),
        previews(found.get("previews")),
        tag("h3", both("Counts over all rows", "全部行的统计")) + table([], plain, numeric=[1])
        if plain
        else Markup(""),
        lengths(found.get("lengths")),
        records(found.get("longest_rows"), "Longest rows", "最长的行"),
        records(found.get("sources"), "Sources", "数据来源"),
        tag("div", join(block(found.get(key), *titles) for key, titles in NESTED.items()), class_="charts"),
        block(others, "Further figures", "其他数字"),
    ]
    return Section("Audit of the rows", "数据审计", join(blocks))


def audit_value(key: str, value: Any) -> Markup:
    """A share as per cent; a small object in one line; text and numbers as they are."""
    number = finite(value)
    if key.endswith("_share") and number is not None:
        is_low = key == "terminators_supervised_share" and number < 0.99
        return tag("b", f"{number:.2%}", class_="bad-text") if is_low else escape(f"{number:.2%}")
    if isinstance(value, dict):
        return escape(", ".join(f"{name} {figure(inner)}" for name, inner in value.items()))
    return escape(repr(value)[1:-1] if isinstance(value, str) else figure(value))


def block(value: Any, english: str, chinese: str) -> Markup:
    if not value:
        return Markup("")
    return tag("div", tag("h3", both(english, chinese)) + tag("div", nested(value), class_="wide"))


def notices(value: Any) -> Markup:
    """What the audit wants a person to know before training."""
    lines = [tag("p", line, dir="auto") for line in value] if isinstance(value, list) else []
    return tag("div", join(lines), class_="verdict warn") if lines else Markup("")


def records(value: Any, english: str, chinese: str) -> Markup:
    """A list of flat objects as a table with their keys as its head."""
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    if not rows:
        return Markup("")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [column for column, key in enumerate(keys) if all(finite(row.get(key)) is not None for row in rows)]
    cells = [
        [
            figure(row.get(key, "")) if column in numeric else tag("span", figure(row.get(key, "")), class_="text")
            for column, key in enumerate(keys)
        ]
        for row in rows[:50]
    ]
    return tag("h3", both(english, chinese)) + table([key.replace("_", " ") for key in keys], cells, numeric=numeric)


def lengths(value: Any) -> Markup:
    """Mean, percentiles and histogram of tokens per row."""
    found = as_dict(value)
    bins = found.get("histogram")
    bars = [
        (low, high, rows)
        for one in (bins if isinstance(bins, list) else [])
        if isinstance(one, dict)
        for low, high, rows in [tuple(finite(one.get(name)) for name in ("from", "below", "rows"))]
        if low is not None and high is not None and rows is not None
    ]
    if not found:
        return Markup("")
    percentiles = as_dict(found.get("percentiles"))
    names = {"0": ("shortest", "最短"), "50": ("median", "中位数"), "100": ("longest", "最长")}
    head = [both(*names.get(key, (f"{key} %", f"{key}%"))) for key in percentiles]
    mean = finite(found.get("mean"))
    row = [*(figure(number) for number in percentiles.values()), f"{mean:,.1f}" if mean is not None else ""]
    figures = table([*head, both("mean", "平均")], [row], numeric=range(len(row)))
    drawing = bar_svg(bars, unit_en="tokens per row", unit_zh="每行词元数") if bars else Markup("")
    others = {key: inner for key, inner in found.items() if key not in ("mean", "percentiles", "histogram")}
    rest = nested(others) if others else Markup("")
    title = tag("h3", both("Tokens per row", "每行词元数"))
    return title + figures + tag("figure", tag("div", drawing, class_="full"), class_="chart") + rest


def previews(value: Any) -> Markup:
    """A few rows as the model sees them, supervised text marked."""
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    if not rows:
        return Markup("")
    explained = note(
        "Marked text is supervised: the model learns to produce it. All else is only read.",
        "高亮文本参与损失：模型学习生成这些内容；其余部分只作为输入。",
    )
    return tag("h3", both("What the model sees", "模型看到的内容")) + explained + join(preview(row) for row in rows)


def preview(row: dict[str, Any]) -> Markup:
    pieces = row.get("pieces")
    text = Markup("")
    for piece in pieces if isinstance(pieces, list) else []:
        if isinstance(piece, list) and len(piece) == 2:
            text += tag("mark", piece[0]) if piece[1] is True else escape(piece[0])
    counts = [finite(row.get(name)) for name in ("tokens", "tokens_supervised", "tokens_not_shown")]
    num_tokens, num_learned, num_hidden = (int(count or 0) for count in counts)
    head = tag("span", f"{row.get('row', '')} · ", class_="text") + both(
        f"{num_tokens:,} tokens, {num_learned:,} supervised", f"{num_tokens:,} 个词元，{num_learned:,} 个参与损失"
    )
    if num_hidden:
        text += tag("span", both(f" … {num_hidden:,} more tokens", f" …… 另有 {num_hidden:,} 个词元"), class_="quiet")
    return tag("div", tag("div", head, class_="quiet") + tag("div", text, class_="said", dir="auto"), class_="preview")
