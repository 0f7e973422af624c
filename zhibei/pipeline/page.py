"""report.html of a quickstart: scores, tasks, answers side by side, and the way on. Knows figures, not stages' work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zhibei.pipeline.outcome import Outcome
from zhibei.report.html import Markup, Section, both, duration, join, note, page, table, tag
from zhibei.report.training import sample
from zhibei.store.files import write_text_atomic

METRICS = {
    "exact_match": both("held-out exact match", "留出集精确匹配"),
    "heldout_loss": both("held-out loss, nats per token", "留出集损失（nat/词元）"),
}


def write_quickstart_page(outcome: Outcome, *, runs: list[str]) -> Path:
    """Make `report.html` in the quickstart's folder, with links to the reports of its runs."""
    sections = [_scores(outcome)]
    if outcome.by_task:
        sections.append(_tasks(outcome))
    sections += [_answers(outcome), _onward(outcome, runs)]
    when = outcome.summary.get("total_seconds", 0.0)
    subtitle = both("quickstart, made in ", "快速上手，用时 ") + duration(when)
    path = outcome.folder / "report.html"
    write_text_atomic(path, page(outcome.folder.name, subtitle=subtitle, sections=sections))
    return path


def as_score(metric: str, value: float) -> str:
    """0.913 -> '91.3 %' for a share of right answers; a loss keeps its nats."""
    return f"{100 * value:.1f} %" if metric == "exact_match" else f"{value:.3f}"


def _scores(outcome: Outcome) -> Section:
    head = ["", both("score", "得分"), both("95 % interval", "95% 区间"), both("made in", "用时")]
    rows: list[list[Any]] = [
        [
            stage.name,
            as_score(stage.metric, stage.score),
            f"{as_score(stage.metric, stage.low)} – {as_score(stage.metric, stage.high)}",
            duration(stage.seconds),
        ]
        for stage in outcome.stages
    ]
    body = tag("p", METRICS[outcome.stages[0].metric]) + table(head, rows, numeric=(1, 2))
    if outcome.paired is not None:
        pair = outcome.paired
        gained = f"{pair.gained} / {pair.lost}"
        body = body + note(
            f"On the same questions: {gained} gained / lost by tuning, exact McNemar p = {pair.p_value:.2g}.",
            f"同一批问题上，微调后答对 / 答错的变化：{gained}，McNemar 精确检验 p = {pair.p_value:.2g}。",
        )
    return Section("Scores", "得分", Markup(body))


def _tasks(outcome: Outcome) -> Section:
    head = [
        both("task", "任务"),
        both("questions", "题数"),
        both("base", "基座"),
        both("tuned", "微调后"),
        both("95 % interval", "95% 区间"),
    ]
    rows = [
        [
            task,
            found["questions"],
            f"{100 * found['base']:.0f} %",
            f"{100 * found['tuned']:.0f} %",
            f"{100 * found['low']:.0f} – {100 * found['high']:.0f} %",
        ]
        for task, found in outcome.by_task.items()
    ]
    return Section("By task", "分任务", table(head, rows, numeric=(1, 2, 3, 4)))


def _answers(outcome: Outcome) -> Section:
    shown = [
        {
            "prompt": example["question"],
            "base": example["base"],
            "tuned": example["tuned"],
            **({"expected": example["expected"]} if example["expected"] else {}),
        }
        for example in outcome.examples
    ]
    return Section("The same questions, before and after", "同样的问题，微调前后", join(sample(row) for row in shown))


def _onward(outcome: Outcome, runs: list[str]) -> Section:
    links = join(
        tag("li", tag("a", both(f"report of {run}", f"{run} 的报告"), href=f"{run}/report.html")) for run in runs
    )
    commands = join(tag("pre", tag("code", command)) for command in next_commands(outcome))
    return Section("Go on", "下一步", Markup(tag("ul", links) + commands))


def next_commands(outcome: Outcome) -> list[str]:
    """What a person can type now."""
    folder = outcome.folder
    return [
        f"zhibei chat {folder}",
        f"zhibei chat {folder} --compare base",
        f"zhibei train {folder / 'sft.yaml'} name=again sft.epochs=2",
    ]
