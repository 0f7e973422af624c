"""The documentation page of a pitfall, as text for a terminal and as Markdown. Knows words, not facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zhibei.doctor.pitfall import Cost, Kind, Page, Pitfall

Language = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class Words:
    """The headings and set phrases of one language."""

    why: str
    fix: str
    area: str
    cost: str
    cover: str
    because: str
    proof: str
    errors: str
    sources: str
    colon: str
    costs: Mapping[Cost, str]
    kinds: Mapping[Kind, str]


ENGLISH = Words(
    why="Why",
    fix="What to do",
    area="Area",
    cost="What it costs",
    cover="How zhibei covers it",
    because="Reason",
    proof="Shown by",
    errors="How other programs report it (patterns)",
    sources="Sources",
    colon=": ",
    costs={"run": "a whole run", "hours": "hours", "launch": "a launch", "minutes": "minutes"},
    kinds={
        "check": "`zhibei check` finds it before any weight is loaded.",
        "rehearsal": "`zhibei rehearse` finds it in the first minute (step: {by}).",
        "watchdog": "A watchdog names it while the run goes on (watchdog: {by}).",
        "gate": "The stage that meets it refuses to go on.",
        "construction": "It cannot happen in zhibei.",
        "explained": "`zhibei explain` recognises its message.",
    },
)
CHINESE = Words(
    why="为何",
    fix="办法",
    area="类别",
    cost="代价",
    cover="zhibei 如何防范",
    because="理由",
    proof="由测试证明",
    errors="其他程序的报错（匹配式）",
    sources="来源",
    colon="：",
    costs={"run": "整个训练白跑", "hours": "数小时", "launch": "一次启动", "minutes": "几分钟"},
    kinds={
        "check": "`zhibei check` 在加载任何权重之前就能发现。",
        "rehearsal": "`zhibei rehearse` 在第一分钟内发现（步骤：{by}）。",
        "watchdog": "训练进行中由监视器指出（监视器：{by}）。",
        "gate": "遇到它的阶段会拒绝继续。",
        "construction": "在 zhibei 中不可能发生。",
        "explained": "`zhibei explain` 能认出它的报错。",
    },
)
WORDS: dict[Language, Words] = {"en": ENGLISH, "zh": CHINESE}
PAGES: dict[Language, Callable[[Pitfall], Page]] = {"en": lambda one: one.english, "zh": lambda one: one.chinese}


def page_of(pitfall: Pitfall, language: Language = "en") -> Page:
    """Title, why and what to do, in one language."""
    return PAGES[language](pitfall)


def cover_of(pitfall: Pitfall, language: Language = "en") -> str:
    """One sentence: what catches it."""
    return WORDS[language].kinds[pitfall.kind].format(by=pitfall.by)


def as_text(pitfall: Pitfall, language: Language = "en") -> str:
    """The page for a terminal, without markup."""
    words, page = WORDS[language], page_of(pitfall, language)
    cost = words.costs[pitfall.cost]
    parts = [
        page.title,
        f"{pitfall.id}  ({words.area}{words.colon}{pitfall.area}; {words.cost}{words.colon}{cost})",
        f"{words.why}{words.colon}{page.why}",
        f"{words.fix}{words.colon}{page.fix}",
        f"{words.cover}{words.colon}{cover_of(pitfall, language).replace('`', '')}",
    ]
    if pitfall.because:
        parts.append(f"{words.because}{words.colon}{pitfall.because}")
    parts += _listed(words.proof, pitfall.proof)
    parts += _listed(words.sources, pitfall.sources)
    return "\n\n".join(parts)


def _listed(heading: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return ["\n".join([f"{heading}:", *(f"  {line}" for line in lines)])] if lines else []


def as_markdown(pitfall: Pitfall) -> str:
    """The page for docs/pitfalls/<id>.md: English, then Chinese, then what belongs to both."""
    lines = [f"# {pitfall.id}\n"]
    for language in WORDS:
        words, page = WORDS[language], page_of(pitfall, language)
        lines += [
            f"## {page.title}\n",
            f"*{words.area}{words.colon}{pitfall.area}; {words.cost}{words.colon}{words.costs[pitfall.cost]}*\n",
            f"**{words.why}**{words.colon}{page.why}\n",
            f"**{words.fix}**{words.colon}{page.fix}\n",
            f"**{words.cover}**{words.colon}{cover_of(pitfall, language)}\n",
        ]
    if pitfall.because:
        lines.append(f"**{ENGLISH.because}**: {pitfall.because}\n")
    for heading, items in (
        (ENGLISH.proof, [f"`{one}`" for one in pitfall.proof]),
        (ENGLISH.errors, [f"`{one.pattern}`" for one in pitfall.errors]),
        (ENGLISH.sources, [f"<{one}>" if one.startswith("http") else one for one in pitfall.sources]),
    ):
        if items:
            lines.append("\n".join([f"**{heading}**\n", *(f"- {item}" for item in items)]) + "\n")
    return "\n".join(lines)


def as_dict(pitfall: Pitfall) -> dict[str, Any]:
    """Everything about a pitfall as plain values, for `--json`."""
    pages = {
        language: {"title": page.title, "why": page.why, "fix": page.fix}
        for language, page in ((language, page_of(pitfall, language)) for language in WORDS)
    }
    return {
        "id": pitfall.id,
        "area": pitfall.area,
        "kind": pitfall.kind,
        "cost": pitfall.cost,
        "covered": cover_of(pitfall).replace("`", ""),
        "by": pitfall.by,
        "because": pitfall.because,
        "proof": list(pitfall.proof),
        "errors": [pattern.pattern for pattern in pitfall.errors],
        "sources": list(pitfall.sources),
        **pages,
    }
