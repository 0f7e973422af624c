"""Curves as inline SVG: thinning, smoothing, ticks, drawing. Knows steps and values, not runs.

Both scales are drawn; CSS shows the one that is chosen. The true values travel in `data-` attributes, so the read-out
under the pointer does not measure pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zhibei.report.html import Markup, both, escape, join, note, tag

Scale = Callable[[float], float]
NUM_BUCKETS = 400
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 12, 44


@dataclass(frozen=True)
class Series:
    """One curve. `style` is a class of page.css: raw, smooth, heldout, or run-0 to run-7."""

    name_en: str
    name_zh: str
    style: str
    steps: Sequence[int]
    values: Sequence[float]
    has_points: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run with one unit. `marks`: (step, English, Chinese) of vertical lines."""

    title_en: str
    title_zh: str
    unit_en: str
    unit_zh: str
    series: Sequence[Series]
    marks: Sequence[tuple[int, str, str]] = ()
    best: tuple[int, float] | None = None
    width: int = 960
    height: int = 340
    has_log_switch: bool = False
    across: tuple[str, str] = ("optimiser step", "优化步数")
    """What a step of the run is, English and Chinese."""


def thin(
    steps: Sequence[int], values: Sequence[float], *, num_buckets: int = NUM_BUCKETS
) -> tuple[list[int], list[float]]:
    """At most two points of each of `num_buckets` equal stretches: its lowest and its highest, in their order.

    First and last point stay, so do global minimum and maximum; nothing is averaged.
    """
    count = len(steps)
    if count <= 2 * num_buckets:
        return list(steps), list(values)
    kept = {0, count - 1}
    for bucket in range(num_buckets):
        members = range(bucket * count // num_buckets, (bucket + 1) * count // num_buckets)
        kept.add(min(members, key=values.__getitem__))
        kept.add(max(members, key=values.__getitem__))
    order = sorted(kept)
    return [steps[index] for index in order], [values[index] for index in order]


def smoothing_window(count: int) -> int:
    """Points that a smoothed curve roughly averages: 4 % of the run, at least 5 and at most 200."""
    return max(5, min(200, count // 25))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average with alpha = 2 / (window + 1), bias-corrected: the first value equals the input's."""
    alpha = 2 / (window + 1)
    weight = total = 0.0
    smoothed = []
    for value in values:
        total = (1 - alpha) * total + alpha * value
        weight = (1 - alpha) * weight + alpha
        smoothed.append(total / weight)
    return smoothed


def linear_ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that lie within low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    last = math.floor(high / size + 1e-9)
    return [index * size for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within low..high (only powers over more than three decades); linear if few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high > 1000 * low else (1, 2, 5)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside if len(inside) >= 3 else linear_ticks(low, high)


def tick_label(value: float) -> str:
    """Short and exact: 12000 -> 12k, 2e-05 -> 2e-5, 0.25 stays."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        return scientific(value)
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:g}{suffix}"
    return f"{value:.6g}"


def scientific(value: float) -> str:
    """0.00015 -> 1.5e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of one axis: plain decimals all get as many digits behind the point as the longest, and k goes with k."""
    labels = [tick_label(value) for value in values]
    if any("e" in label for label in labels):
        return [scientific(value) if value else "0" for value in values]
    if any(label.endswith("k") for label in labels):
        return [f"{value / 1000:g}k" if value else "0" for value in values]
    if any(not label.replace(".", "").replace("-", "").isdigit() for label in labels):
        return labels
    num_decimals = max((len(label.partition(".")[2]) for label in labels), default=0)
    return [f"{value:.{num_decimals}f}" for value in values]


def draw(chart: Chart) -> Markup:
    """The figure with its legend, or a line that says there is nothing to draw."""
    kept = [series for series in (finite_part(series) for series in chart.series) if series.steps]
    title = tag("figcaption", both(chart.title_en, chart.title_zh))
    if not kept:
        return tag("figure", title + note("nothing recorded yet", "尚无记录"), class_="chart")
    thinned = []
    for series in kept:
        steps, values = thin(series.steps, series.values)
        thinned.append(Series(series.name_en, series.name_zh, series.style, steps, values, series.has_points))
    is_positive = all(value > 0 for series in thinned for value in series.values)
    has_log = chart.has_log_switch and is_positive
    scales = join(scale_svg(chart, thinned, is_log=is_log) for is_log in ((False, True) if has_log else (False,)))
    legend = join(
        tag("span", Markup(f'<i class="key {series.style}"></i>') + both(series.name_en, series.name_zh))
        for series in kept
    )
    if chart.best is not None:
        legend += tag("span", Markup('<i class="key best"></i>') + both("best", "最佳"))
    body = title + tag("div", legend, class_="legend") + scales + Markup('<div class="readout" hidden></div>')
    body += honest_notes(chart, kept, thinned)
    return tag("figure", body, class_="chart scalable" if has_log else "chart")


def finite_part(series: Series) -> Series:
    pairs = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if math.isfinite(value)]
    steps, values = [step for step, _ in pairs], [value for _, value in pairs]
    return Series(series.name_en, series.name_zh, series.style, steps, values, series.has_points)


def honest_notes(chart: Chart, kept: Sequence[Series], thinned: Sequence[Series]) -> Markup:
    """What the picture leaves out: thinned points and values that are not numbers."""
    notes = Markup("")
    num_all, num_drawn = len(kept[0].steps), len(thinned[0].steps)
    if num_drawn < num_all:
        notes += note(
            f"{num_drawn:,} of {num_all:,} points are drawn: lowest and highest of each of {NUM_BUCKETS} stretches.",
            f"共 {num_all:,} 个点，绘出 {num_drawn:,} 个：将曲线等分为 {NUM_BUCKETS} 段，每段取最低与最高点。",
        )
    for before in chart.series:
        broken = [
            step for step, value in zip(before.steps, before.values, strict=True) if not math.isfinite(value)
        ]  # fmt: skip
        if broken:
            listed = ", ".join(f"{step:,}" for step in broken[:10]) + (" …" if len(broken) > 10 else "")
            notes += note(
                f"{before.name_en}: not a finite number at {len(broken):,} step(s): {listed}.",
                f"{before.name_zh}：有 {len(broken):,} 步不是有限数：{listed}。",
            )
    return notes


def scale_svg(chart: Chart, series_list: Sequence[Series], *, is_log: bool) -> Markup:
    """One drawing of the chart, with a linear or a logarithmic vertical axis."""
    values = [value for series in series_list for value in series.values]
    low, high = padded(min(values), max(values), is_log=is_log)
    first = min(series.steps[0] for series in series_list)
    last = max(max(series.steps[-1] for series in series_list), first + 1)
    lift = math.log10 if is_log else float

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (chart.width - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (lift(value) - lift(low)) / (lift(high) - lift(low))
        return TOP + (1 - share) * (chart.height - TOP - BOTTOM)

    parts = [axes(chart, x, y, ranges=(first, last, low, high), is_log=is_log)]
    for step, english, chinese in chart.marks:
        if first <= step <= last:
            parts.append(
                Markup(
                    f'<line class="mark" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" '
                    f'y2="{chart.height - BOTTOM}"><title>{escape(english)} / {escape(chinese)}</title></line>'
                )
            )
    for series in series_list:
        points = [(x(step), y(value)) for step, value in zip(series.steps, series.values, strict=True)]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
        parts.append(
            Markup(
                f'<polyline class="line {series.style}" points="{path}" data-en="{escape(series.name_en)}" '
                f'data-zh="{escape(series.name_zh)}" data-steps="{" ".join(map(str, series.steps))}" '
                f'data-values="{" ".join(f"{value:.6g}" for value in series.values)}"/>'
            )
        )
        if series.has_points or len(points) == 1:
            dots = "".join(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3"/>' for left, top in points)
            parts.append(Markup(f'<g class="dots {series.style}">{dots}</g>'))
    if chart.best is not None and low <= chart.best[1] <= high:
        parts.append(Markup(f'<circle class="best" cx="{x(chart.best[0]):.1f}" cy="{y(chart.best[1]):.1f}" r="6.5"/>'))
    parts.append(Markup(f'<line class="cursor" y1="{TOP}" y2="{chart.height - BOTTOM}"/>'))
    return Markup(
        f'<svg class="{"log" if is_log else "linear"}" viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'aria-label="{escape(chart.title_en)}" data-first="{first}" data-last="{last}" data-left="{LEFT}" '
        f'data-right="{chart.width - RIGHT}">{join(parts)}</svg>'
    )


def padded(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    """The range with 4 % of air on both sides; a flat curve gets some height; nothing positive falls below 0."""
    if is_log:
        room = max(math.log10(high / low), 0.1) * 0.04
        return low / 10**room, high * 10**room
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def axes(chart: Chart, x: Scale, y: Scale, *, ranges: tuple[int, int, float, float], is_log: bool) -> Markup:
    """Grid lines, tick labels and axis titles."""
    first, last, low, high = ranges
    floor = chart.height - BOTTOM
    parts = []
    values = log_ticks(low, high) if is_log else linear_ticks(low, high)
    for value, label in zip(values, tick_labels(values), strict=True):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for step in sorted({round(tick) for tick in linear_ticks(first, last, about=chart.width // 100)}):
        parts.append(f'<line class="grid" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{floor + 17}" text-anchor="middle">{step:,}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + chart.width - RIGHT) / 2
    for language, across, up in (("en", chart.across[0], chart.unit_en), ("zh", chart.across[1], chart.unit_zh)):
        parts.append(
            f'<text class="title {language}" x="{middle}" y="{chart.height - 7}" text-anchor="middle">{across}</text>'
            f'<text class="title {language}" transform="translate(13 {(TOP + floor) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{escape(up)}</text>'
        )
    return Markup("".join(parts))
