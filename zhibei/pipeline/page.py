"""report.html of a quickstart: scores, tasks, answers side by side, what was preferred and learned, and the way on.

Knows figures, not stages' work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zhibei.pipeline.handover import HandedOver
from zhibei.pipeline.outcome import TITLES, Outcome
from zhibei.report.curves import Chart, Series, draw
from zhibei.report.html import Markup, Section, both, duration, join, note, page, size_of, table, tag
from zhibei.store.files import write_text_atomic

METRICS = {
    "exact_match": both("held-out exact match", "留出集精确匹配"),
    "heldout_loss": both("held-out loss, nats per token", "留出集损失（nat/词元）"),
}
ORIGINS = {
    "hedge": ("the right answer with a hedge behind it", "正确答案后面加了含糊的话"),
    "own": ("a wrong answer of the fine-tuned model", "微调后模型自己的错误回答"),
    "slip": ("a mistake put into the right answer", "在正确答案里放进一处错误"),
}
"""What the worse answer of a pair is, English and Chinese."""


def write_quickstart_page(outcome: Outcome, *, runs: list[str]) -> Path:
    """Make `report.html` in the quickstart's folder, with links to the reports of its runs."""
    sections = [_scores(outcome)]
    if outcome.by_task:
        sections.append(_tasks(outcome))
    sections.append(_answers(outcome))
    if outcome.reward:
        sections.append(_reward(outcome.reward))
    if outcome.course:
        sections.append(_course(outcome))
    if outcome.handed_over is not None:
        sections.append(_handed_over(outcome.handed_over))
    sections.append(_onward(outcome, runs))
    when = outcome.summary.get("total_seconds", 0.0)
    subtitle = both("quickstart, made in ", "快速上手，用时 ") + duration(when)
    path = outcome.folder / "report.html"
    write_text_atomic(path, page(outcome.folder.name, subtitle=subtitle, sections=sections))
    return path


def as_score(metric: str, value: float) -> str:
    """0.913 -> '91.3 %' for a share of right answers; a loss keeps its nats."""
    return f"{100 * value:.1f} %" if metric == "exact_match" else f"{value:.3f}"


def title(name: str) -> Markup:
    """How people call a model."""
    return both(*TITLES[name])


def _scores(outcome: Outcome) -> Section:
    head = ["", both("score", "得分"), both("95 % interval", "95% 区间"), both("made in", "用时")]
    rows: list[list[Any]] = [
        [
            title(stage.name),
            as_score(stage.metric, stage.score),
            f"{as_score(stage.metric, stage.low)} – {as_score(stage.metric, stage.high)}",
            duration(stage.seconds),
        ]
        for stage in outcome.stages
    ]
    body = tag("p", METRICS[outcome.stages[0].metric]) + table(head, rows, numeric=(1, 2))
    for step in outcome.steps:
        pair = step.paired
        change, gained = f"{100 * pair.difference:+.1f}", f"{pair.gained} / {pair.lost}"
        interval = f"{100 * pair.low:+.1f} – {100 * pair.high:+.1f}"
        before, after = TITLES[step.before], TITLES[step.after]
        body = body + note(
            f"{before[0]} → {after[0]}, on the same questions: {change} points (95 %: {interval}), {gained} gained / "
            f"lost, exact McNemar p = {pair.p_value:.2g}.",
            f"{before[1]} → {after[1]}，同一批问题：{change} 个百分点（95%：{interval}），新答对 / 新答错 {gained}，"
            f"McNemar 精确检验 p = {pair.p_value:.2g}。",
        )
    return Section("Scores", "得分", Markup(body))


def _tasks(outcome: Outcome) -> Section:
    names = [stage.name for stage in outcome.stages]
    head = [both("task", "任务"), both("questions", "题数"), *(title(name) for name in names)]
    head.append(both("95 % interval of the last", "最后一个的 95% 区间"))
    rows = [
        [
            task,
            found["questions"],
            *(f"{100 * found[name]['score']:.0f} %" for name in names),
            f"{100 * found[names[-1]]['low']:.0f} – {100 * found[names[-1]]['high']:.0f} %",
        ]
        for task, found in outcome.by_task.items()
    ]
    return Section("By task", "分任务", table(head, rows, numeric=range(1, len(head))))


def _answers(outcome: Outcome) -> Section:
    names = [stage.name for stage in outcome.stages]
    head = [both("question", "问题"), *(title(name) for name in names)]
    is_checked = any(example["expected"] for example in outcome.examples)
    if is_checked:
        head.append(both("right answer", "正确答案"))
    rows = [
        [
            _said(example["question"]),
            *(_judged(example["answers"][name], example["right"].get(name)) for name in names),
            *([_said(example["expected"])] if is_checked else []),
        ]
        for example in outcome.examples
    ]
    return Section("The same questions to every model", "同样的问题，每个模型的回答", table(head, rows))


def _said(text: str) -> Markup:
    return tag("span", text or "–", class_="text", dir="auto")


def _judged(answer: str, is_right: bool | None) -> Markup:
    mark = "" if is_right is None else " ✓" if is_right else " ✗"
    return _said((answer if len(answer) <= 160 else answer[:157] + "...") + mark)


def _reward(reward: dict[str, Any]) -> Section:
    head = [
        both("the worse answer of the pair is", "一对中较差的回答是"),
        both("held-out pairs", "留出的对"),
        both("put in order rightly", "排对的比例"),
        both("95 % interval", "95% 区间"),
    ]
    groups = [(both(*ORIGINS[origin]), found) for origin, found in reward["by_origin"].items()]
    groups.append((both("all", "全部"), reward))
    rows = [
        [
            words,
            found["pairs"],
            f"{100 * found['accuracy']:.0f} %",
            f"{100 * found['low']:.0f} – {100 * found['high']:.0f} %",
        ]
        for words, found in groups
    ]
    body = table(head, rows, numeric=(1, 2, 3)) + note(
        "The better answer is always the right one. Guessing has 50 %. What the reward model cannot tell apart, the "
        "policy cannot learn from it.",
        "较好的回答总是正确答案。瞎猜是 50%。奖励模型分不清的，策略也无法从中学到。",
    )
    return Section("What the reward model learned", "奖励模型学到了什么", Markup(body))


def _course(outcome: Outcome) -> Section:
    def chart(field: str, titles: tuple[str, str, str, str], name: tuple[str, str]) -> Markup:
        known = [point for point in outcome.course if point[field] is not None]
        steps = [int(point["step"]) for point in known]
        series = Series(*name, "heldout", steps, [float(point[field]) for point in known], has_points=True)
        return draw(Chart(*titles, [series], [], width=480, height=260))

    charts = [
        chart("learned_reward", ("Learned reward", "学到的奖励", "reward", "奖励"), ("held-out prompts", "留出的提示")),
        chart("true_score", ("True score", "真实得分", "share", "占比"), ("held-out questions", "留出的问题")),
        chart("kl", ("KL to the SFT model", "与 SFT 模型的 KL", "nats per token", "nats / 词元"), ("answers", "回答")),
    ]
    body = tag("div", join(charts), class_="charts") + note(
        "The policy sees the learned reward only. The true score is the checker's, measured afterwards on its "
        "checkpoints: a reward that rises while the true score falls is a reward that is being exploited.",
        "策略只看得到学到的奖励。真实得分由检查程序在训练之后对各检查点测得：若奖励上升而真实得分下降，就是奖励被钻了空子。",
    )
    return Section("PPO: learned reward beside the true score", "PPO：学到的奖励与真实得分", Markup(body))


def _handed_over(handed: HandedOver) -> Section:
    head = [
        both("form", "形式"),
        both("file", "文件"),
        both("size", "大小"),
        both("KL, nats per token", "KL（nat/词元）"),
        both("likeliest token agrees", "最可能词元一致"),
        both("tokenizer and template", "分词器与模板"),
    ]
    rows = [
        [
            form.what,
            form.path.name,
            size_of(form.parity.other.bytes_on_disk),
            f"{form.parity.kl_mean:.2g}",
            f"{100 * form.parity.top1_agreement:.1f} %",
            both("equal", "相同")
            if form.parity.tokenizer.is_whole and form.parity.template.is_whole
            else both("differ", "不同"),
        ]
        for form in handed.forms
    ]
    body = table(head, rows, numeric=(2, 3, 4))
    return Section("Handed over", "交付", Markup(body + tag("p", handed.note) if handed.note else body))


def _onward(outcome: Outcome, runs: list[str]) -> Section:
    links = join(
        tag("li", tag("a", both(f"report of {run}", f"{run} 的报告"), href=f"{run}/report.html")) for run in runs
    )
    commands = join(tag("pre", tag("code", command)) for command in next_commands(outcome))
    return Section("Go on", "下一步", Markup(tag("ul", links) + commands))


def next_commands(outcome: Outcome) -> list[str]:
    """What a person can type now."""
    folder, handed = outcome.folder, outcome.handed_over
    has_policy = any(stage.name == "ppo" for stage in outcome.stages)
    again = (
        f"{folder / 'ppo.yaml'} name=again ppo.kl_coefficient=0.2"
        if has_policy
        else (f"{folder / 'sft.yaml'} name=again sft.epochs=2")
    )
    files = [str(form.path) for form in (handed.forms if handed else ()) if form.path.suffix == ".gguf"]
    return [
        f"zhibei chat {folder}",
        f"zhibei chat {folder} --compare {folder / 'sft' if has_policy else 'base'}",
        *(f"zhibei chat {file}" for file in files),
        f"zhibei serve {folder}",
        f"zhibei web {folder}",
        f"zhibei train {again}",
    ]
