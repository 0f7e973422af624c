"""A histogram as inline SVG. Knows ranges and counts, not what was counted."""

from __future__ import annotations

from collections.abc import Sequence

from zhibei.report.curves import BOTTOM, LEFT, RIGHT, TOP, linear_ticks, tick_label
from zhibei.report.html import Markup, escape

WIDTH, HEIGHT = 960, 240


def bar_svg(bars: Sequence[tuple[float, float, float]], *, unit_en: str, unit_zh: str) -> Markup:
    """Bars of (from, to, count); both axes start where the data does and at 0."""
    first, last = min(bar[0] for bar in bars), max(bar[1] for bar in bars)
    highest = max(max(bar[2] for bar in bars), 1)
    floor = HEIGHT - BOTTOM
    span = (last - first) or 1

    def x(value: float) -> float:
        return LEFT + (value - first) / span * (WIDTH - LEFT - RIGHT)

    def y(count: float) -> float:
        return floor - count / highest * (floor - TOP)

    parts = []
    for count in linear_ticks(0, highest, about=4):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(count):.1f}" y2="{y(count):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y(count) + 4:.1f}" text-anchor="end">{tick_label(count)}</text>'
        )
    for low, high, count in bars:
        width = max(x(high) - x(low) - 1, 0.5)
        parts.append(
            f'<rect class="bar" x="{x(low):.1f}" y="{y(count):.1f}" width="{width:.1f}" '
            f'height="{max(floor - y(count), 0):.1f}"><title>{low:g}–{high:g}: {count:,g}</title></rect>'
        )
    for value in linear_ticks(first, last, about=8):
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{floor + 17}" text-anchor="middle">{value:,g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for language, across, up in (("en", unit_en, "rows"), ("zh", unit_zh, "行数")):
        parts.append(
            f'<text class="title {language}" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}" '
            f'text-anchor="middle">{escape(across)}</text><text class="title {language}" '
            f'transform="translate(13 {(TOP + floor) / 2:.0f}) rotate(-90)" text-anchor="middle">{up}</text>'
        )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(unit_en)}">{"".join(parts)}</svg>'
    )
