"""Pieces of a page: escaped text, both languages, tables, sections. Knows HTML, not runs.

Text of the page itself comes in English and Chinese, both written out; CSS shows one. Whatever comes from a file of
the user goes through `escape`.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

# Control characters have no glyph and some are forbidden in HTML: shown as their picture (U+2400 and up).
CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}


class Markup(str):
    """HTML that is already safe to put into a page; what is added to it is escaped."""

    def __add__(self, other: Any) -> Markup:
        return Markup(str.__add__(self, escape(other)))


@dataclass(frozen=True)
class Section:
    """One part of a page: a heading in both languages and a body."""

    title_en: str
    title_zh: str
    body: Markup


def escape(value: Any) -> Markup:
    """Any value as text that cannot become markup; Markup stays what it is."""
    if isinstance(value, Markup):
        return value
    text = str(value).translate(CONTROL_PICTURES)
    return Markup(html.escape(text.encode("utf-8", errors="replace").decode("utf-8"), quote=True))


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("".join(parts))


def both(english: str, chinese: str) -> Markup:
    """A text in both languages, of which CSS shows one."""
    return Markup(
        f'<span class="en" lang="en">{escape(english)}</span><span class="zh" lang="zh-Hans">{escape(chinese)}</span>'
    )


def tag(name: str, body: Any, **attributes: str) -> Markup:
    """An element; an attribute's trailing underscore is dropped (class_) and others become hyphens."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{written}>{escape(body)}</{name}>")


def note(english: str, chinese: str) -> Markup:
    """A quiet line under something."""
    return tag("p", both(english, chinese), class_="note")


def missing(english: str, chinese: str) -> Markup:
    """What a section says when its input is not there."""
    return tag("p", both(english, chinese), class_="missing")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, numeric: Sequence[int] = ()) -> Markup:
    """A table; the columns named in `numeric` are right-aligned with figures of equal width."""

    def cell(name: str, column: int, value: Any) -> Markup:
        return tag(name, value, class_="number") if column in numeric else tag(name, value)

    header = tag("tr", join(cell("th", column, value) for column, value in enumerate(head)))
    body = join(tag("tr", join(cell("td", column, value) for column, value in enumerate(row))) for row in rows)
    thead = tag("thead", header) if any(head) else Markup("")
    return tag("div", tag("table", thead + tag("tbody", body)), class_="wide") if body else Markup("")


def nested(value: Any, *, depth: int = 0) -> Markup:
    """Any JSON value: objects as two-column tables, lists as tables or lines, the rest as text."""
    if isinstance(value, dict) and value and depth < 6:
        rows = join(
            tag("tr", tag("th", key, scope="row") + tag("td", nested(inner, depth=depth + 1)))
            for key, inner in value.items()
        )
        return tag("table", tag("tbody", rows), class_="nested")
    if isinstance(value, list) and value and depth < 6:
        if any(isinstance(inner, (dict, list)) for inner in value):
            return join(tag("div", nested(inner, depth=depth + 1)) for inner in value[:50]) + left_out(len(value), 50)
        return tag("span", ", ".join(figure(inner) for inner in value[:100]), class_="text") + left_out(len(value), 100)
    if value is None or value in ({}, []):
        return tag("span", "–", class_="quiet")
    return tag("span", figure(value), class_="text", dir="auto")


def left_out(num_all: int, num_shown: int) -> Markup:
    if num_all <= num_shown:
        return Markup("")
    rest = num_all - num_shown
    return note(f"and {rest:,} more", f"另有 {rest:,} 项")


def figure(value: Any) -> str:
    """A number as a person writes it: thousands separated, four significant digits below a thousand."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value and (abs(value) < 1e-3 or abs(value) >= 1e15):
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> Markup:
    """3725 -> '1 h 2 min', in both languages."""
    whole = max(0, round(seconds))
    units = ((86400, "d", "天"), (3600, "h", "小时"), (60, "min", "分"), (1, "s", "秒"))
    parts = []
    for size, english, chinese in units:
        if whole >= size or (size == 1 and not parts):
            parts.append((whole // size, english, chinese))
        elif parts:
            break
        whole %= size
        if len(parts) == 2:
            break
    return both(" ".join(f"{n} {en}" for n, en, _ in parts), " ".join(f"{n} {zh}" for n, _, zh in parts))


def size_of(num_bytes: float) -> str:
    """Bytes in binary units: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def shipped(name: str) -> str:
    """A style sheet or script that is part of this package."""
    return resources.files("zhibei.report").joinpath(name).read_text(encoding="utf-8")


def page(title: str, *, subtitle: Markup, sections: Sequence[Section]) -> str:
    """A whole page in one file: no request goes out, and it reads well without JavaScript.

    The content security policy lets only our own script run, by its hash: even markup that slipped through `escape`
    could not.
    """
    style, script = shipped("page.css"), shipped("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    anchors = [f"part-{number}" for number in range(1, len(sections) + 1)]
    contents = join(
        tag("a", both(section.title_en, section.title_zh), href=f"#{anchor}")
        for anchor, section in zip(anchors, sections, strict=True)
    )
    body = join(
        tag("section", tag("h2", both(section.title_en, section.title_zh)) + section.body, id=anchor)
        for anchor, section in zip(anchors, sections, strict=True)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="zhibei">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<div class="languages" role="group" aria-label="language / 语言"><input type="radio" name="language" id="language-en" checked><label for="language-en">English</label><input type="radio" name="language" id="language-zh"><label for="language-zh">中文</label></div>
<h1><span class="text" dir="auto">{escape(title)}</span></h1>
<p class="subtitle">{subtitle}</p>
<nav>{contents}</nav>
</header>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""  # noqa: E501
