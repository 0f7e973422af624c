"""One page for several runs: figures side by side, shared curves, settings that differ. Knows no single page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.report.curves import Chart, Series, draw, smooth, smoothing_window
from zhibei.report.html import Markup, Section, both, duration, escape, figure, missing, note, page, table, tag
from zhibei.report.inputs import RunInputs, finite, read_inputs
from zhibei.report.training import key_figures, series_of
from zhibei.store.files import write_text_atomic
from zhibei.store.run_dir import RunDir

MOST_RUNS = 8
GENERATOR = '<meta name="generator" content="zhibei">'
# Row of the table: key of `key_figures`, English, Chinese, format; the lowest of those marked True is the best.
ROWS: tuple[tuple[str, str, str, str, bool], ...] = (
    ("best_heldout_loss", "best held-out loss", "最佳留出集损失", ".4f", True),
    ("best_step", "at step", "所在步", ",", False),
    ("heldout_loss", "last held-out loss", "最终留出集损失", ".4f", True),
    ("base_heldout_loss", "base model, held-out loss", "基座模型留出集损失", ".4f", False),
    ("train_loss", "training loss, smoothed", "训练损失（平滑）", ".4f", False),
    ("steps", "optimiser steps", "优化步数", ",", False),
    ("tokens", "tokens trained", "训练词元数", ",", False),
    ("supervised_share", "tokens supervised", "参与损失的词元", ".1%", False),
    ("tokens_per_s", "tokens per second", "每秒词元数", ",.0f", False),
    ("peak_gib", "peak GPU memory, GiB", "GPU 显存峰值，GiB", ".2f", False),
    ("host_gib", "peak host memory, GiB", "主机内存峰值，GiB", ".2f", False),
)


def write_comparison(run_dirs: Sequence[RunDir], path: Path) -> Path:
    """Write one self-contained page over two to eight runs and return its path.

    UserError for another number of runs, or when `path` exists and is not a page of ours: it is not overwritten.
    """
    if not 2 <= len(run_dirs) <= MOST_RUNS:
        raise UserError(
            f"{len(run_dirs)} runs to compare", expected=f"two to {MOST_RUNS} run directories", fix="name fewer runs"
        )
    refuse_foreign(path)
    runs = dict(zip(run_names(run_dirs), (read_inputs(run_dir) for run_dir in run_dirs), strict=True))
    sections = [figures_section(runs), curves_section(runs), settings_section(runs)]
    title = " · ".join(runs)
    subtitle = both("runs side by side", "运行对比")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, page(title, subtitle=subtitle, sections=sections))
    return path


def refuse_foreign(path: Path) -> None:
    """A page may be replaced by a newer one; anything else that is there stays. Raises UserError."""
    if path.is_dir():
        what = "is a folder"
    elif path.exists() and GENERATOR not in path.read_bytes()[:2000].decode("utf-8", errors="replace"):
        what = "exists and is not a report of zhibei"
    else:
        return
    raise UserError(f"{path} {what}", expected="the name of a new page", fix="--out OTHER.html", where="--out")


def run_names(run_dirs: Sequence[RunDir]) -> list[str]:
    """Folder names, or whole paths where two folders share a name."""
    names = [run_dir.path.resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(run_dir.path) for run_dir in run_dirs]


def figures_section(runs: dict[str, RunInputs]) -> Section:
    figures = [key_figures(inputs) for inputs in runs.values()]
    rows: list[list[Any]] = [[both("status", "状态"), *(one["status"] for one in figures)]]
    for key, english, chinese, style, lowest_is_best in ROWS:
        values = [finite(one[key]) for one in figures]
        known = [value for value in values if value is not None]
        if not known:
            continue
        cells = [escape("–" if one[key] is None else format(one[key], style)) for one in figures]
        if lowest_is_best and len(known) > 1:
            best = min(known)
            cells = [
                tag("b", cell, class_="good-text") if value == best else cell
                for cell, value in zip(cells, values, strict=True)
            ]
        rows.append([both(english, chinese), *cells])
    rows.append([both("time", "用时"), *(duration(one["seconds"]) if one["seconds"] else "–" for one in figures)])
    return Section("Key figures", "关键数字", table(["", *runs], rows, numeric=range(1, len(runs) + 1)))


def curves_section(runs: dict[str, RunInputs]) -> Section:
    charts = Markup("")
    heldout, train = [], []
    for number, (name, inputs) in enumerate(runs.items()):
        steps, losses = series_of(inputs.heldout, "loss")
        heldout.append(Series(name, name, f"run-{number}", steps, losses, has_points=len(steps) <= 200))
        pairs = [(record["step"], loss) for record in inputs.train if (loss := finite(record.get("loss"))) is not None]
        smoothed = smooth([loss for _, loss in pairs], smoothing_window(len(pairs)))
        train.append(Series(name, name, f"run-{number}", [step for step, _ in pairs], smoothed))
    unit = "nats per supervised token", "nats / 监督词元"
    for titles, series in (
        (("Held-out loss", "留出集损失"), heldout),
        (("Training loss, smoothed", "训练损失（平滑）"), train),
    ):
        charts += tag("div", draw(Chart(*titles, *unit, series, has_log_switch=True)), class_="full")
    switch = Markup('<p class="switch"><label><input type="checkbox" id="log-scale"> ')
    switch += both("logarithmic axes", "使用对数刻度") + Markup("</label></p>")
    warning = note(
        "Losses compare only where template, masking and held-out rows are the same: see the settings below.",
        "只有模板、掩码与留出集相同时，损失才可比较：请看下方的设置差异。",
    )
    return Section("Curves", "曲线", switch + charts + warning)


def settings_section(runs: dict[str, RunInputs]) -> Section:
    """The settings that are not the same in all runs."""
    settings = [settings_of(inputs.resolved) for inputs in runs.values()]
    keys = sorted({key for one in settings for key in one if key != "name"})
    rows = [
        [
            tag("span", key, class_="code"),
            *(tag("span", figure(one.get(key, "–")), class_="code text") for one in settings),
        ]
        for key in keys
        if len({one.get(key) for one in settings}) > 1
    ]
    text = ("The effective run files are the same.", "实际生效的运行文件完全相同。") if keys else (
        "No resolved.yaml was found.", "未找到 resolved.yaml。")  # fmt: skip
    body = table(["", *runs], rows) if rows else missing(*text)
    return Section("Settings that differ", "不同的设置", body)


def settings_of(resolved: str) -> dict[str, str]:
    """`section.key` -> value as written in resolved.yaml: one line a value, its origin behind two spaces and `#`."""
    settings: dict[str, str] = {}
    section = ""
    for line in resolved.splitlines():
        found = re.match(r"^(  )?([a-z_0-9]+):(?: (.*))?$", line)
        if found is None:
            continue
        indent, key, rest = found.groups()
        if rest is None:
            section = key
            continue
        value = rest.rpartition("  # ")[0] or rest
        settings[f"{section}.{key}" if indent else key] = value
    return settings
