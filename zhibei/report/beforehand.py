"""What was known before the run began: its check, its rehearsal, and the plan beside what was measured.

Knows check.json, rehearsal.json and plan.json of a run directory, not what makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zhibei.report.html import Markup, Section, both, duration, escape, figure, missing, note, table, tag
from zhibei.report.inputs import RunInputs, as_dict, finite
from zhibei.report.training import largest

CHECK, REHEARSAL, PLAN = ("Check", "检查"), ("Rehearsal", "彩排"), ("Plan and measurement", "计划与实测")
LEVELS = {
    "stop": ("stops the run", "阻止训练", "bad-text"),
    "warning": ("warning", "警告", "warn-text"),
    "note": ("note", "提示", "quiet"),
    "accepted": ("accepted", "已接受", "quiet"),
}
PASSED, FAILED = ("passed", "通过", "good-text"), ("failed", "未通过", "bad-text")
MEASURED = (
    ("peak_gib", "GPU memory, peak", "GPU 显存峰值"),
    ("gpu_held_gib", "GPU memory between steps", "步间 GPU 显存"),
    ("host_gib", "host memory, peak", "主机内存峰值"),
)


def check(inputs: RunInputs) -> Section:
    """What `zhibei check` found before this run, with what the run file accepts; or that it found nothing."""
    if not inputs.check:
        text = "No check.json: this run was started without a check.", "没有 check.json：这次训练未经检查就开始。"
        return Section(*CHECK, _absent(inputs, "check.json", *text))
    found = _dicts(inputs.check.get("findings"))
    accepted = [{**one, "level": "accepted"} for one in _dicts(inputs.check.get("accepted"))]
    number = figure(inputs.check.get("checks", "?"))
    if not found and not accepted:
        text = f"Nothing was found by {number} checks.", f"{number} 项检查均未发现问题。"
        body = tag("p", both(*text))
    else:
        head = [both("level", "级别"), both("pitfall", "陷阱"), both("what", "内容"), both("to do", "办法")]
        body = note(f"{number} checks.", f"共 {number} 项检查。") + table(head, map(_finding, [*found, *accepted]))
    for defect in _dicts(inputs.check.get("defects")):
        place = defect.get("place", "?")
        body += note(f"{place} could not be checked: a fault of zhibei.", f"{place} 未能检查：zhibei 自身的缺陷。")
    return Section(*CHECK, body)


def _finding(one: dict[str, Any]) -> list[Markup]:
    english, chinese, style = LEVELS.get(str(one.get("level")), LEVELS["note"])
    what = tag("div", one.get("what", ""), class_="text", dir="auto")
    what += tag("div", one.get("where", ""), class_="quiet text", dir="auto")
    return [
        tag("b", both(english, chinese), class_=style),
        tag("span", one.get("id") or "–", class_="code text"),
        what,
        tag("span", one.get("to_do", ""), class_="text", dir="auto"),
    ]


def rehearsal(inputs: RunInputs) -> Section:
    """The steps that were tried with the real weights, how long they took, and what they found."""
    steps = _dicts(inputs.rehearsal.get("steps"))
    if not steps:
        text = (
            "Not rehearsed (rehearse: never, or auto on a small run).",
            "未彩排（rehearse: never，或 auto 下的小型训练）。",
        )
        return Section(*REHEARSAL, _absent(inputs, "rehearsal.json", *text))
    rows = []
    for step in steps:
        english, chinese, style = PASSED if step.get("passed") is True else FAILED
        seconds = finite(step.get("seconds"))
        rows.append([
            tag("span", step.get("name", "?"), class_="text"),
            tag("b", both(english, chinese), class_=style),
            "" if seconds is None else f"{seconds:.1f}",
            tag("span", step.get("detail", ""), class_="text", dir="auto"),
        ])  # fmt: skip
    head = [both("step", "步骤"), both("result", "结果"), both("seconds", "秒"), both("what it saw", "所见")]
    body = table(head, rows, numeric=[2])
    found = _dicts(inputs.rehearsal.get("findings"))
    if found:
        head = [both("level", "级别"), both("pitfall", "陷阱"), both("what", "内容"), both("to do", "办法")]
        body += table(head, map(_finding, found))
    return Section(*REHEARSAL, body)


def plan(inputs: RunInputs) -> Section:
    """Memory as planned, phase by phase, and beside it what the run measured; steps and time likewise."""
    if not inputs.plan:
        text = "No plan.json: the sizes of this model were not known.", "没有 plan.json：该模型的尺寸未知。"
        return Section(*PLAN, _absent(inputs, "plan.json", *text))
    head = [both("figure", "项目"), both("planned", "计划"), both("measured", "实测")]
    body = table(head, _compared(inputs), numeric=[1, 2])
    phases = [
        [tag("span", phase.get("name", "?"), class_="text"), _gib(phase.get("gib")), _causes(phase)]
        for phase in _dicts(inputs.plan.get("phases"))
    ]
    summary = tag("summary", both("planned memory of every phase", "各阶段的计划内存"))
    head = [both("phase", "阶段"), both("GiB at most", "最多 GiB"), both("by cause, GiB", "按原因（GiB）")]
    return Section(*PLAN, body + tag("details", summary + table(head, phases, numeric=[1])))


def _compared(inputs: RunInputs) -> list[list[Any]]:
    """Rows of the comparison; on a machine without GPU the tensors lie in host memory."""
    planned, rows = inputs.plan, []
    expected = {
        "peak_gib": planned.get("peak_gib"),
        "gpu_held_gib": _held_between_steps(planned),
        "host_gib": planned.get("host_gib"),
    }
    for name, english, chinese in MEASURED:
        measured = largest(inputs.train, name)
        if measured is not None:
            rows.append([both(english, chinese), _gib(expected[name]), _gib(measured)])
    steps, taken = planned.get("steps"), inputs.train[-1]["step"] if inputs.train else None
    rows.append([both("optimiser steps", "优化步数"), _number(steps), _number(taken)])
    hours = finite(planned.get("hours"))
    if hours is not None:
        rows.append([both("time", "用时"), duration(3600 * hours), duration(inputs.seconds)])
    for name, english, chinese in (
        ("micro_batch_tokens", "tokens per forward pass", "每次前向词元数"),
        ("activation_checkpointing", "activation checkpointing", "激活重算"),
    ):
        rows.append([both(english, chinese), escape(figure(planned.get(name, "?"))), ""])
    return rows


def _held_between_steps(planned: dict[str, Any]) -> float | None:
    """What stays on the card from step to step: what a save meets there, without its own needs."""
    for phase in _dicts(planned.get("phases")):
        sizes = {name: finite(size) for name, size in as_dict(phase.get("causes_gib")).items()}
        if phase.get("name") == "save" and sizes:
            return sum(size for name, size in sizes.items() if size is not None and name != "checks")
    return None


def _causes(phase: dict[str, Any]) -> Markup:
    causes = as_dict(phase.get("causes_gib"))
    return tag("span", ", ".join(f"{name} {figure(size)}" for name, size in causes.items()), class_="text")


def _gib(value: Any) -> str:
    known = finite(value)
    return "–" if known is None else f"{known:.2f} GiB"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _absent(inputs: RunInputs, name: str, english: str, chinese: str) -> Markup:
    """Why a file could not be read, where it is there and damaged."""
    problem = inputs.problems.get(name, "missing")
    return missing(english, chinese) if problem == "missing" else missing(f"{name}: {problem}", f"{name}：{problem}")


BEFOREHAND_SECTIONS: dict[str, Callable[[RunInputs], Section]] = {
    "check": check,
    "rehearsal": rehearsal,
    "plan": plan,
}
