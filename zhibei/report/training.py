"""How the training went: verdict, key figures, curves, samples. Knows metrics records, not data preparation."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from zhibei.report.curves import Chart, Series, draw, smooth, smoothing_window
from zhibei.report.html import Markup, Section, both, duration, escape, figure, join, missing, note, table, tag
from zhibei.report.inputs import RunInputs, SamplePanel, finite, seconds_since_epoch

MOST_PANELS = 12
MOST_EVENTS = 200
# stage -> what its loss is a mean of
UNITS = {"reward": ("nats per pair", "nats / 对"), "dpo": ("loss per pair or answer", "每对（或每个回答）的损失")}
# event -> (class of the verdict, English, Chinese)
ENDS = {
    "finished": ("good", "Finished", "已完成"),
    "stopped": ("bad", "Stopped", "已停止"),
    "interrupted": ("warn", "Interrupted, state saved", "被中断，状态已保存"),
}


def key_figures(inputs: RunInputs) -> dict[str, Any]:
    """The numbers of a run that a person asks for first; None where unknown. Plain JSON values.

    Losses are mean nats per supervised token (or pair). `base_heldout_loss` is the held-out loss at step 0.
    """
    train, heldout = inputs.train, [record for record in inputs.heldout if finite(record.get("loss")) is not None]
    best = min(heldout, key=lambda record: record["loss"]) if heldout else None
    last = heldout[-1] if heldout else None
    base = next((record for record in heldout if record["step"] == 0), None)
    tokens, supervised = total(train, "tokens"), total(train, "supervised_tokens")
    share = supervised / tokens if tokens and supervised is not None else None
    # With log.every > 1 the records cover only some steps; the manifest of a finished run has the exact sums.
    finished = inputs.manifest.get("finished")
    sums = finished if isinstance(finished, dict) else {}
    is_partial = bool(train) and len(train) < train[-1]["step"]
    scale = train[-1]["step"] / len(train) if is_partial else 1
    skipped = sum(bool(record.get("skipped")) for record in train)
    step_seconds = total(train, "seconds")
    end = next((event for event in reversed(inputs.events) if event.get("event") in ENDS), None)
    started = next((event for event in inputs.events if finite(event.get("total_steps")) is not None), {})
    return {
        "status": end["event"] if end is not None and is_last_word(inputs, end) else "no end recorded",
        "reason": str(end.get("text", "")) if end is not None and is_last_word(inputs, end) else "",
        "steps": train[-1]["step"] if train else None,
        "total_steps": started.get("total_steps"),
        "skipped_steps": skipped,
        "epochs": finite(train[-1].get("epoch")) if train else None,
        "train_loss": smoothed_end(train),
        "heldout_loss": last["loss"] if last else None,
        "perplexity": math.exp(min(last["loss"], 700)) if last and "accuracy" not in last else None,
        "accuracy": finite(last.get("accuracy")) if last else None,
        "best_heldout_loss": best["loss"] if best else None,
        "best_step": best["step"] if best else None,
        "base_heldout_loss": base["loss"] if base else None,
        "model_step": sums.get("model_step"),
        "tokens": sums.get("tokens") or (None if tokens is None else round(tokens * scale)),
        "supervised_tokens": sums.get("learned_tokens") or (None if supervised is None else round(supervised * scale)),
        "tokens_are_estimated": is_partial and "tokens" not in sums,
        "supervised_share": share,
        "seconds": inputs.seconds or None,
        "tokens_per_s": tokens / step_seconds if tokens and step_seconds else None,
        "peak_gib": largest(train, "peak_gib"),
        "host_gib": largest(train, "host_gib"),
        "resumed_at_steps": [event.get("step") for event in inputs.events if event.get("event") == "resumed"],
        "problems": inputs.problems,
    }


def is_last_word(inputs: RunInputs, end: dict[str, Any]) -> bool:
    """An end counts unless the run was started or resumed after it."""
    after = inputs.events[inputs.events.index(end) + 1 :]
    return not any(event.get("event") in ("started", "resumed") for event in after)


def total(records: list[dict[str, Any]], name: str) -> float | None:
    values = [value for value in (finite(record.get(name)) for record in records) if value is not None]
    return sum(values) if values else None


def largest(records: list[dict[str, Any]], name: str) -> float | None:
    return max((value for value in (finite(record.get(name)) for record in records) if value is not None), default=None)


def smoothed_end(train: list[dict[str, Any]]) -> float | None:
    losses = [loss for loss in (finite(record.get("loss")) for record in train) if loss is not None]
    return smooth(losses, smoothing_window(len(losses)))[-1] if losses else None


def verdict(inputs: RunInputs) -> Section:
    """Finished, stopped, interrupted, or no end recorded: with step and reason."""
    figures = key_figures(inputs)
    style, english, chinese = ENDS.get(figures["status"], ("warn", "No end recorded", "没有结束记录"))
    steps = figures["steps"]
    of_total = f" / {figures['total_steps']:,}" if finite(figures["total_steps"]) is not None else ""
    line = tag("b", both(english, chinese))
    if steps is not None:
        line += both(f"at step {steps:,}{of_total}", f"于第 {steps:,}{of_total} 步")
    lines = [line]
    if figures["status"] not in ENDS:
        lines.append(
            tag("p", both("The run is still going, or its process was killed.", "运行尚未结束，或其进程被强行终止。"))
        )
    if figures["reason"]:
        lines.append(tag("p", figures["reason"], dir="auto"))
    if figures["resumed_at_steps"]:
        listed = ", ".join(f"{step:,}" if isinstance(step, int) else "?" for step in figures["resumed_at_steps"])
        lines.append(tag("p", both(f"Resumed after step {listed}.", f"曾从第 {listed} 步之后恢复。")))
    for event in inputs.events:
        if event.get("event") == "early stop":
            lines.append(tag("p", tag("span", both("Stopped early: ", "提前停止：")) + str(event.get("text", ""))))
    if inputs.num_replaced_steps:
        count = f"{inputs.num_replaced_steps:,}"
        lines.append(
            tag("p", both(f"{count} records were replaced by repeated steps.", f"{count} 条记录被重跑的步替换。"))
        )
    for name, problem in inputs.problems.items():
        if problem != "missing":
            lines.append(tag("p", f"{name}: {problem}", class_="quiet"))
    return Section("Verdict", "结论", tag("div", join(lines), class_=f"verdict {style}"))


def tile(english: str, chinese: str, value: Any, *, small: Markup | None = None) -> Markup:
    under = tag("small", small) if small is not None else Markup("")
    return tag("div", tag("dt", both(english, chinese)) + tag("dd", escape(value) + under), class_="tile")


def key_figure_tiles(inputs: RunInputs) -> Section:
    """The key figures as tiles; only those that are known."""
    figures = key_figures(inputs)
    tiles = []
    if figures["heldout_loss"] is not None:
        named = ("perplexity", "困惑度") if figures["perplexity"] is not None else ("accuracy", "准确率")
        second = figures[named[0]]
        small = both(*(f"{name} {second:,.2f}" for name in named)) if second is not None else None
        tiles.append(tile("held-out loss", "留出集损失", f"{figures['heldout_loss']:.4f}", small=small))
        small = f"at step {figures['best_step']:,}", f"第 {figures['best_step']:,} 步"
        tiles.append(
            tile("best held-out loss", "最佳留出集损失", f"{figures['best_heldout_loss']:.4f}", small=both(*small))
        )
    if figures["base_heldout_loss"] is not None and figures["best_step"] != 0:
        base, best = figures["base_heldout_loss"], figures["best_heldout_loss"]
        small = f"{best - base:+.4f} nats after tuning", f"微调后 {best - base:+.4f} nats"
        tiles.append(tile("base model, held-out loss", "基座模型留出集损失", f"{base:.4f}", small=both(*small)))
    if figures["train_loss"] is not None:
        tiles.append(tile("training loss, smoothed", "训练损失（平滑）", f"{figures['train_loss']:.4f}"))
    if figures["steps"] is not None:
        epochs = finite(figures["epochs"])
        small = both(f"{epochs:.2f} epochs", f"{epochs:.2f} 轮") if epochs is not None else None
        tiles.append(tile("optimiser steps", "优化步数", f"{figures['steps']:,}", small=small))
    if figures["skipped_steps"]:
        small = both("a gradient was not finite", "梯度不是有限数")
        tiles.append(tile("skipped steps", "跳过的步", f"{figures['skipped_steps']:,}", small=small))
    if figures["tokens"] is not None:
        share = figures["supervised_share"]
        small = both(f"{share:.1%} supervised", f"其中 {share:.1%} 参与损失") if share is not None else None
        if figures["tokens_are_estimated"]:
            small = (small or Markup("")) + both(", estimated: not every step was logged", "，估计值：并非每步都有记录")
        tiles.append(tile("tokens trained", "训练词元数", f"{figures['tokens']:,}", small=small))
    if figures["seconds"] is not None:
        tiles.append(tile("time", "用时", duration(figures["seconds"])))
    if figures["tokens_per_s"] is not None:
        small = both("non-padding, in optimiser steps", "不含填充，仅计优化步")
        tiles.append(tile("tokens per second", "每秒词元数", f"{figures['tokens_per_s']:,.0f}", small=small))
    if figures["peak_gib"] is not None:
        planned = finite(inputs.plan.get("peak_gib"))
        small = both(f"{planned:.2f} GiB planned", f"计划为 {planned:.2f} GiB") if planned is not None else None
        tiles.append(tile("peak GPU memory", "GPU 显存峰值", f"{figures['peak_gib']:.2f} GiB", small=small))
    if figures["host_gib"] is not None:
        tiles.append(tile("peak host memory", "主机内存峰值", f"{figures['host_gib']:.2f} GiB"))
    body = tag("dl", join(tiles), class_="tiles") if tiles else missing(
        "No step was recorded: metrics.jsonl is missing or empty.", "没有任何步的记录：metrics.jsonl 缺失或为空。"
    )  # fmt: skip
    return Section("Key figures", "关键数字", body)


def series_of(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one field; a value that is not finite stays (as nan) so that the chart can name its step."""
    pairs = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
    return [step for step, _ in pairs], [float(value) for _, value in pairs]


def curves(inputs: RunInputs) -> Section:
    """Loss with its smoothed and held-out curves, then learning rate, gradient norm and speed."""
    if not inputs.train and not inputs.heldout:
        text = "No step was recorded, so there is nothing to draw.", "没有任何步的记录，无法绘制曲线。"
        return Section("Curves", "曲线", missing(*text))
    marks = [
        (event["step"], f"resumed after step {event['step']:,}", f"从第 {event['step']:,} 步恢复")
        for event in inputs.events
        if event.get("event") == "resumed" and isinstance(event.get("step"), int)
    ]
    loss = draw(loss_chart(inputs, marks))
    memory = "peak_gib" if any(finite(record.get("peak_gib")) is not None for record in inputs.train) else "host_gib"
    on_gpu, on_host = (
        ("GPU memory, peak", "GPU 显存峰值", "GiB", "GiB"),
        ("Host memory, peak", "主机内存峰值", "GiB", "GiB"),
    )
    small = [
        draw(small_chart(inputs, name, titles=titles, marks=marks, is_noisy=is_noisy))
        for name, titles, is_noisy in (
            ("learning_rate", ("Learning rate", "学习率", "learning rate", "学习率"), False),
            ("grad_norm", ("Gradient norm before clipping", "梯度范数（裁剪前）", "L2 norm", "L2 范数"), True),
            ("tokens_per_s", ("Speed", "速度", "tokens per second", "词元/秒"), True),
            (memory, on_gpu if memory == "peak_gib" else on_host, False),
        )
    ]
    switch = Markup('<p class="switch"><label><input type="checkbox" id="log-scale"> ')
    switch += both("logarithmic loss axis", "损失轴使用对数刻度") + Markup("</label></p>")
    body = switch + tag("div", loss, class_="full") + tag("div", join(small), class_="charts")
    if marks:
        body += note("Dashed lines: the run was resumed here.", "虚线：运行在此处恢复。")
    return Section("Curves", "曲线", body)


def small_chart(
    inputs: RunInputs,
    name: str,
    *,
    titles: tuple[str, str, str, str],
    marks: list[tuple[int, str, str]],
    is_noisy: bool,
) -> Chart:
    """One field of the training records; `titles` and unit in English and Chinese. Noisy ones get a smoothed curve."""
    english, chinese, unit_en, unit_zh = titles
    steps, values = series_of(inputs.train, name)
    series = [Series(english, chinese, "raw" if is_noisy else "smooth", steps, values)]
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if is_noisy and len(kept) > 10:
        smoothed = smooth([value for _, value in kept], smoothing_window(len(kept)))
        series.append(Series("smoothed", "平滑", "smooth", [step for step, _ in kept], smoothed))
    return Chart(english, chinese, unit_en, unit_zh, series, marks, width=480, height=260)


def loss_chart(inputs: RunInputs, marks: list[tuple[int, str, str]]) -> Chart:
    steps, losses = series_of(inputs.train, "loss")
    series = [Series("training loss", "训练损失", "raw", steps, losses)]
    kept = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if len(kept) > 10:
        window = smoothing_window(len(kept))
        smoothed = smooth([loss for _, loss in kept], window)
        names = f"smoothed over about {window} records", f"平滑（约 {window} 条记录）"
        series.append(Series(*names, "smooth", [step for step, _ in kept], smoothed))
    steps, losses = series_of(inputs.heldout, "loss")
    series.append(Series("held-out loss", "留出集损失", "heldout", steps, losses, has_points=len(steps) <= 200))
    figures = key_figures(inputs)
    best = (figures["best_step"], figures["best_heldout_loss"]) if figures["best_step"] is not None else None
    units = UNITS.get(str(inputs.manifest.get("stage")), ("nats per supervised token", "nats / 监督词元"))
    return Chart("Loss", "损失", *units, series, marks, best, has_log_switch=True)


def samples(inputs: RunInputs) -> Section:
    """What base and tuned model answered, side by side, one tab per evaluation."""
    if not inputs.samples:
        text = "No samples: the panel is off (sft.sample_tokens: 0) or no evaluation came yet."
        return Section(
            "Samples", "样例", missing(text, "没有样例：样例面板已关闭（sft.sample_tokens: 0），或尚未评估。")
        )
    # Before the first step both columns are the base model; that panel is shown only while it is the only one.
    panels = spread([panel for panel in inputs.samples if panel.step] or inputs.samples, MOST_PANELS)
    tabs = []
    for number, panel in enumerate(panels):
        checked = " checked" if number == len(panels) - 1 else ""
        identity = f"samples-{panel.step}"
        tabs.append(Markup(f'<input type="radio" name="samples" id="{identity}"{checked}>'))
        tabs.append(tag("label", both(f"step {panel.step:,}", f"第 {panel.step:,} 步"), for_=identity))
        tabs.append(tag("div", join(sample(row) for row in panel.rows), class_="panel"))
    body = tag("div", join(tabs), class_="tabs")
    num_tuned = sum(panel.step > 0 for panel in inputs.samples)
    if len(panels) < num_tuned:
        count = f"{len(panels)}", f"{num_tuned:,}"
        body += note(
            f"{count[0]} of {count[1]} evaluations, evenly spread; all are in samples/.",
            f"均匀选取 {count[1]} 次评估中的 {count[0]} 次；全部在 samples/ 中。",
        )
    return Section("Samples", "样例", body)


def spread(panels: list[SamplePanel], most: int) -> list[SamplePanel]:
    """At most so many, evenly spread, first and last included."""
    if len(panels) <= most:
        return panels
    return [panels[round(index * (len(panels) - 1) / (most - 1))] for index in range(most)]


def sample(row: dict[str, Any]) -> Markup:
    def answer(english: str, chinese: str, value: Any) -> Markup:
        text = tag("div", value, class_="said", dir="auto") if value else both("(nothing)", "（空）")
        return tag("div", tag("h4", both(english, chinese)) + text)

    prompt = tag("h4", both("prompt", "提示")) + tag("div", row.get("prompt", ""), class_="said", dir="auto")
    answers = answer("base", "基座", row.get("base")) + answer("tuned", "微调后", row.get("tuned"))
    others = {key: value for key, value in row.items() if key not in ("prompt", "base", "tuned")}
    extra = Markup("")
    if others:
        listed = "; ".join(f"{key}: {figure(value)}" for key, value in others.items())
        extra = tag("div", tag("span", listed, class_="quiet text"), class_="prompt")
    return tag(
        "div", tag("div", prompt, class_="prompt") + tag("div", answers, class_="answers") + extra, class_="sample"
    )


def events(inputs: RunInputs) -> Section:
    """Starts, saves, notes and stops, in order."""
    if not inputs.events:
        return Section("Events", "事件", missing("No event was recorded.", "没有任何事件记录。"))
    rows = []
    for event in inputs.events[-MOST_EVENTS:]:
        step = event.get("step")
        name, text = event.get("event", ""), tag("span", event.get("text", ""), class_="text", dir="auto")
        rows.append([f"{step:,}" if isinstance(step, int) else "", written_at(event), name, text])
    head = [both("step", "步"), both("time, UTC", "时间（UTC）"), both("event", "事件"), both("what", "内容")]
    shown = table(head, rows, numeric=[0])
    if len(inputs.events) > MOST_EVENTS:
        rest = f"{len(inputs.events) - MOST_EVENTS:,}"
        shown += note(f"{rest} earlier events are in metrics.jsonl", f"另有更早的 {rest} 个事件，见 metrics.jsonl")
    count = f"{len(inputs.events):,}"
    summary = tag("summary", both(f"show {count} events", f"展开 {count} 个事件"))
    return Section("Events", "事件", tag("details", summary + shown))


def written_at(record: dict[str, Any]) -> str:
    """When a record was written, in UTC; empty if unknown."""
    seconds = seconds_since_epoch(record.get("time"))
    if seconds is None or not 0 <= seconds < 1e11:
        return ""
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


TRAINING_SECTIONS: dict[str, Callable[[RunInputs], Section]] = {
    "verdict": verdict,
    "key_figures": key_figure_tiles,
    "curves": curves,
    "samples": samples,
    "events": events,
}
