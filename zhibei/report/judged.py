"""How well a reward model or a preference run tells good answers from bad ones. Knows metrics records, not training."""

from __future__ import annotations

from typing import Any

from zhibei.report.curves import Chart, Series, draw
from zhibei.report.html import Markup, Section, both, figure, join, missing, note, table, tag
from zhibei.report.inputs import RunInputs, finite
from zhibei.report.training import series_of, tile

# Field of the held-out record -> its name in English and Chinese; shown as tiles where the record has it.
FIGURES: dict[str, tuple[str, str]] = {
    "margin": ("margin, chosen less rejected", "差值（优选减落选）"),
    "chosen_reward": ("reward of chosen answers", "优选回答的奖励"),
    "rejected_reward": ("reward of rejected answers", "落选回答的奖励"),
    "good_reward": ("reward of good answers", "好回答的奖励"),
    "bad_reward": ("reward of bad answers", "坏回答的奖励"),
    "baseline": ("baseline of KTO, nats", "KTO 基线（nat）"),
    "score_mean": ("mean score", "平均得分"),
    "score_deviation": ("standard deviation of scores", "得分标准差"),
    "calibration_error": ("calibration error", "校准误差"),
    "length_correlation": ("correlation of score and length", "得分与长度的相关"),
    "length_slope": ("score per 100 tokens more", "每多 100 词元的得分变化"),
    "accuracy_chosen_shorter": ("accuracy where the chosen answer is shorter", "优选回答较短时的准确率"),
}
CURVES: tuple[tuple[str, tuple[str, str], tuple[str, str]], ...] = (
    ("accuracy", ("Accuracy", "准确率"), ("share of pairs", "占比")),
    ("margin", ("Margin", "差值"), ("chosen less rejected", "优选减落选")),
    ("chosen_logp", ("Log-probability of chosen answers", "优选回答的对数概率"), ("nats", "nat")),
    ("rejected_logp", ("Log-probability of rejected answers", "落选回答的对数概率"), ("nats", "nat")),
)


def has_judgements(inputs: RunInputs) -> bool:
    """Whether this run compares answers."""
    return any(finite(record.get("accuracy")) is not None for record in [*inputs.heldout, *inputs.train[-1:]])


def judged(inputs: RunInputs) -> Section:
    """Held-out accuracy with its interval, length bias, calibration, sources; and how they came about."""
    title = "Good against bad answers", "好坏回答的分辨"
    if not has_judgements(inputs):
        return Section(*title, missing("No comparison was recorded.", "没有比较记录。"))
    last = _figures_of_model(inputs)
    tiles = [_accuracy(last)] if finite(last.get("accuracy")) is not None else []
    tiles += [tile(*names, figure(last[key])) for key, names in FIGURES.items() if finite(last.get(key)) is not None]
    body = tag("dl", join(tiles), class_="tiles") if tiles else Markup("")
    body += _sources(last.get("by_source"))
    body += tag("div", join(draw(chart) for chart in _charts(inputs)), class_="charts")
    if last.get("length_correlation") is not None:
        body += note(
            "A reward that mostly follows length is one that PPO turns into long answers.",
            "主要随长度变化的奖励，会被 PPO 变成冗长的回答。",
        )
    return Section(*title, body)


def _figures_of_model(inputs: RunInputs) -> dict[str, Any]:
    """Of the weights that were written, where that is known; else of the last evaluation."""
    finished = inputs.manifest.get("finished")
    stored = finished.get("heldout") if isinstance(finished, dict) else None
    if isinstance(stored, dict):
        return stored
    return inputs.heldout[-1] if inputs.heldout else {}


def _accuracy(record: dict[str, Any]) -> Markup:
    low, high = finite(record.get("accuracy_low")), finite(record.get("accuracy_high"))
    count = record.get("pairs") or record.get("answers")
    small = both("", "")
    if low is not None and high is not None:
        small = both(f"95 %: {low:.3f} to {high:.3f}, {count} held out", f"95 %：{low:.3f} 至 {high:.3f}，留出 {count}")
    return tile("held-out accuracy", "留出集准确率", f"{record['accuracy']:.3f}", small=small)


def _sources(by_source: Any) -> Markup:
    if not isinstance(by_source, dict) or len(by_source) < 2:
        return Markup("")
    rows = [
        [name, f"{one['right'] / one['total']:.3f}", f"{one['low']:.3f} – {one['high']:.3f}", f"{one['total']:,}"]
        for name, one in by_source.items()
    ]
    head = [both("source", "来源"), both("accuracy", "准确率"), "95 %", both("pairs", "对数")]
    return table(head, rows, numeric=(1, 2, 3))


def _charts(inputs: RunInputs) -> list[Chart]:
    charts = []
    for name, titles, units in CURVES:
        steps, values = series_of(inputs.train, name)
        series = [Series("training", "训练", "raw", steps, values)]
        steps, values = series_of(inputs.heldout, name)
        series.append(Series("held-out", "留出集", "heldout", steps, values, has_points=len(steps) <= 200))
        if any(one.steps for one in series):
            charts.append(Chart(*titles, *units, series, [], width=480, height=260))
    return charts
