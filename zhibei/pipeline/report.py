"""report.html of a pipeline: what each stage made, all scores with intervals, answers side by side, the way on.

Knows outcome.json, not how it came about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zhibei.pipeline.file import Pipeline
from zhibei.report.html import Markup, Section, both, duration, figure, join, note, page, table, tag
from zhibei.store.files import write_text_atomic

METRICS = {
    "loss": ("held-out loss, nats per token (lower is better)", "留出集损失，nat/词元（越低越好）"),
    "right": ("answers that the check accepts", "通过检查的回答"),
    "judge": ("score of the reward model", "奖励模型得分"),
}


def write_pipeline_report(pipeline: Pipeline, outcome: dict[str, Any]) -> Path:
    """Make `report.html` in the pipeline's folder, with links to the reports of its runs."""
    sections = [_stages(pipeline, outcome)]
    for entry in outcome["stages"]:
        if "scores" in entry:
            sections += [_scores(entry), _paired(entry), _answers(entry)]
        if "handed_over" in entry:
            sections.append(_handed_over(entry))
    sections.append(_onward(pipeline, outcome))
    subtitle = both("pipeline, this call took ", "流水线，本次用时 ") + duration(outcome["seconds"])
    path = pipeline.folder / "report.html"
    write_text_atomic(path, page(pipeline.name, subtitle=subtitle, sections=[one for one in sections if one.body]))
    return path


def shown(found: dict[str, Any], name: str = "score") -> str:
    """0.913 -> '91.3 %' for a share; other figures keep their units."""
    value = found[name]
    return f"{100 * value:.1f} %" if found.get("is_share") else f"{value:.3f}"


def _stages(pipeline: Pipeline, outcome: dict[str, Any]) -> Section:
    head = [
        both("stage", "阶段"),
        both("kind", "类型"),
        both("goes on from", "基于"),
        both("steps", "步数"),
        both("held-out figures", "留出集指标"),
        both("training", "训练用时"),
        both("report", "报告"),
    ]
    rows = []
    for entry in outcome["stages"]:
        finished = entry.get("finished") or {}
        heldout = {name: value for name, value in (finished.get("heldout") or {}).items() if _is_telling(name, value)}
        told = ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in heldout.items())
        seconds = finished.get("training_seconds")
        link = tag("a", "report.html", href=f"{entry['name']}/report.html") if finished else Markup("")
        names = sorted(set(pipeline.stage(entry["name"]).references.values()))
        rows.append([entry["name"], entry["kind"], ", ".join(names), finished.get("steps", ""), told,
                     duration(seconds) if seconds is not None else "", link])  # fmt: skip
    return Section("Stages", "各阶段", table(head, rows, numeric=(3,)))


TELLING = ("loss", "accuracy", "reward_mean", "perplexity")


def _is_telling(name: str, value: Any) -> bool:
    return name in TELLING and isinstance(value, (int, float)) and not isinstance(value, bool)


def _scores(entry: dict[str, Any]) -> Section:
    found = entry["scores"]
    head = [both("model", "模型"), both("score", "得分"), both("95 % interval", "95% 区间"), both("number", "数量")]
    body = Markup("")
    for metric, scores in found["scores"].items():
        rows = [
            [name, shown(one), f"{shown(one, 'low')} – {shown(one, 'high')}", one["number"]]
            for name, one in scores.items()
        ]
        body = body + tag("p", both(*METRICS[metric])) + table(head, rows, numeric=(1, 2, 3))
    notes = [f"{one['name']}: {text}" for one in found["models"] for text in one["notes"]]
    body = body + join(tag("p", text, class_="note") for text in notes)
    return Section(f"Scores: {entry['name']}", f"得分：{entry['name']}", body)


def _paired(entry: dict[str, Any]) -> Section:
    head = [
        both("models", "模型"),
        both("difference or win rate", "差值或胜率"),
        both("95 % interval", "95% 区间"),
        both("gained / lost / equal", "增 / 减 / 平"),
        "p",
    ]
    body = Markup("")
    for metric, pairs in entry["scores"]["paired"].items():
        rows = [_pair(metric, pair) for pair in pairs]
        body = body + tag("p", both(*METRICS[metric])) + table(head, rows, numeric=(1, 2, 3, 4))
    if body:
        body = body + note(
            "The second model against the first on the same questions: difference of the scores; for the judge, how "
            "often it prefers the second's answer, ties left out. p: exact McNemar test.",
            "在相同的题目上，第二个模型与第一个相比：得分之差；对评判模型，是其偏好第二个回答的比例（不计平局）。"
            "p：McNemar 精确检验。",
        )
    return Section("Pair by pair", "两两比较", body)


def _pair(metric: str, pair: dict[str, Any]) -> list[Any]:
    names = f"{pair['first']} → {pair['second']}"
    if metric == "judge":
        counts = f"{pair['wins']} / {pair['losses']} / {pair['ties']}"
        if pair["win_rate"] is None:
            return [names, "–", "–", counts, ""]
        low, high = 100 * pair["low"], 100 * pair["high"]
        return [names, f"{100 * pair['win_rate']:.1f} %", f"{low:.1f} – {high:.1f} %", counts, ""]
    scale, unit = (100, " %") if "gained" in pair else (1, "")
    value = f"{scale * pair['difference']:+.3g}{unit}"
    interval = f"{scale * pair['low']:+.3g} – {scale * pair['high']:+.3g}{unit}"
    counts = f"{pair['gained']} / {pair['lost']}" if "gained" in pair else ""
    return [names, value, interval, counts, f"{pair['p_value']:.2g}" if "p_value" in pair else ""]


def _answers(entry: dict[str, Any]) -> Section:
    shown_rows = [_sample(example) for example in entry["scores"]["examples"]]
    return Section("The same questions to every model", "同样的问题，每个模型的回答", join(shown_rows))


def _sample(example: dict[str, Any]) -> Markup:
    """One question and what every model answered, with what check and judge say of it."""
    question = tag("h4", both("question", "问题")) + tag("div", example["question"], class_="said", dir="auto")
    if example["reference"]:
        question = question + tag("div", both("expected: ", "期望：") + example["reference"], class_="quiet text")
    answers = []
    for name, text in example["answers"].items():
        verdicts = [f"{kind} {figure(example[kind][name])}" for kind in ("right", "judged") if name in example[kind]]
        said = tag("div", text, class_="said", dir="auto") if text else both("(nothing)", "（空）")
        told = tag("span", "; ".join(verdicts), class_="quiet text")
        answers.append(tag("div", tag("h4", name) + said + told))
    body = tag("div", question, class_="prompt") + tag("div", join(answers), class_="answers")
    return tag("div", body, class_="sample")


def _handed_over(entry: dict[str, Any]) -> Section:
    """Each proof: how far the new form is from its source."""
    head = [both("form", "形式"), both("mean KL, nats", "平均 KL"), both("same top token", "首选词元一致"),
            both("perplexity change", "困惑度变化"), both("MiB", "大小 MiB")]  # fmt: skip
    names = ("kl_mean", "top1_agreement", "perplexity_change")
    rows = [
        [proof["kind"], *(figure(proof[name]) for name in names), f"{proof['other']['bytes_on_disk'] / 2**20:,.1f}"]
        for proof in entry["handed_over"]["proofs"]
    ]
    body = tag("p", entry["handed_over"]["path"], class_="text") + table(head, rows, numeric=(1, 2, 3, 4))
    body = body + join(tag("p", text, class_="note") for text in entry["handed_over"]["notes"])
    return Section(f"Handed over: {entry['name']}", f"移交：{entry['name']}", body)


def _onward(pipeline: Pipeline, outcome: dict[str, Any]) -> Section:
    return Section(
        "Go on", "下一步", join(tag("pre", tag("code", command)) for command in next_commands(pipeline, outcome))
    )


def next_commands(pipeline: Pipeline, outcome: dict[str, Any]) -> list[str]:
    """What a person can type now."""
    made = [entry["name"] for entry in outcome["stages"] if pipeline.stage(entry["name"]).about.makes == "model"]
    commands = [f"zhibei chat {pipeline.folder}", f"zhibei chat {pipeline.folder} --compare base"] if made else []
    return [*commands, f"{pipeline.command} name=again"]
