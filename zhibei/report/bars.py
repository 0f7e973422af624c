"""A histogram as inline SVG. Knows ranges and counts, not what was counted."""

from __future__ import annotations

from collections.abc import Sequence

from zhibei.report.curves import BOTTOM, LEFT, TOP, linear_ticks
from zhibei.report.html import Markup, escape

WIDTH, HEIGHT, RIGHT = 960, 240, 30


def bar_svg(bars: Sequence[tuple[float, float, float]], *, unit_en: str, unit_zh: str) -> Markup:
    """Bars of (from, below, rows), side by side with equal widths, whatever their ranges; borders are labelled."""
    highest = max(*(bar[2] for bar in bars), 1.0)
    floor = HEIGHT - BOTTOM
    width = (WIDTH - LEFT - RIGHT) / len(bars)

    def y(count: float) -> float:
        return floor - count / highest * (floor - TOP - 16)

    parts = []
    for count in linear_ticks(0, highest, about=4):
        if count == int(count):
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(count):.1f}" y2="{y(count):.1f}"/>'
                f'<text class="tick" x="{LEFT - 7}" y="{y(count) + 4:.1f}" text-anchor="end">{count:,.0f}</text>'
            )
    for number, (low, below, count) in enumerate(bars):
        left = LEFT + number * width
        parts.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{y(count):.1f}" width="{max(width - 2, 0.5):.1f}" '
            f'height="{max(floor - y(count), 0):.1f}"><title>{low:,.0f} – {below - 1:,.0f}: {count:,.0f}</title></rect>'
            f'<text class="tick" x="{left:.1f}" y="{floor + 17}" text-anchor="middle">{low:,.0f}</text>'
        )
        if count and len(bars) <= 16:
            middle = left + width / 2
            parts.append(f'<text x="{middle:.1f}" y="{y(count) - 4:.1f}" text-anchor="middle">{count:,.0f}</text>')
    right = f'<text class="tick" x="{WIDTH - RIGHT}" y="{floor + 17}" text-anchor="middle">{bars[-1][1]:,.0f}</text>'
    parts.append(right + f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for language, across, up in (("en", unit_en, "rows"), ("zh", unit_zh, "行数")):
        parts.append(
            f'<text class="title {language}" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}" '
            f'text-anchor="middle">{escape(across)}</text><text class="title {language}" '
            f'transform="translate(13 {(TOP + floor) / 2:.0f}) rotate(-90)" text-anchor="middle">{up}</text>'
        )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(unit_en)}">{"".join(parts)}</svg>'
    )
