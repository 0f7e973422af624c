"""A pitfall: its page in two languages, how it is covered, and the one dict of all of them. Knows no single pitfall.

The docstring of a pitfall's function is its page:

    Title, one sentence.

    Why: what goes wrong and why nobody notices.

    Fix: what to do.

    标题，一句话。

    为何：……

    办法：……
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from zhibei.doctor.facts.facts import Facts

Level = Literal["stop", "warning", "note"]
Cost = Literal["run", "hours", "launch", "minutes"]
Kind = Literal["check", "rehearsal", "watchdog", "gate", "construction", "explained"]

COSTS: tuple[Cost, ...] = ("run", "hours", "launch", "minutes")


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a pitfall was met. `what` holds the value that came, `where` its file, record and field.

    `changes` maps run-file fields to new values that mend it; `is_safe` says that they alter neither what is learned
    nor what the run costs, so `zhibei check --fix` may write them. `stop` findings end a check with exit code 2.
    """

    what: str
    where: str
    to_do: str
    level: Level = "stop"
    changes: Mapping[str, Any] = field(default_factory=dict)
    is_safe: bool = False
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """The documentation of a pitfall in one language."""

    title: str
    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class Pitfall:
    """One known way to lose a run.

    `kind` says how it is covered: `check` (static, `find`), `rehearsal` and `watchdog` (named in `by`), `gate` (a stage
    refuses it when it meets it), `construction` (cannot happen here) or `explained` (only `zhibei explain` knows it).
    `proof` names the tests of gate and construction, `because` the reason of construction and explained.
    `errors` are patterns of the messages by which other programs report it.
    """

    id: str
    area: str
    kind: Kind
    cost: Cost
    english: Page
    chinese: Page
    find: Callable[[Facts], Iterable[Finding]] | None = None
    by: str = ""
    because: str = ""
    proof: tuple[str, ...] = ()
    errors: tuple[re.Pattern[str], ...] = ()
    sources: tuple[str, ...] = ()


# Chinese is written without spaces: a line break of the source leaves none.
LINE_BREAK_IN_CHINESE = re.compile(
    r"(?<=[\u3000-\u9fff\uff00-\uffef\u201c\u201d]) (?=[\u3000-\u9fff\uff00-\uffef\u201c\u201d])"
)

CATALOGUE: dict[str, Pitfall] = {}
"""Every pitfall by id; filled when `zhibei.doctor.pitfalls.load_catalogue` imports the areas."""


def pitfall(
    area: str,
    *,
    cost: Cost,
    kind: Kind = "check",
    errors: Iterable[str] = (),
    sources: Iterable[str] = (),
    **cover: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the catalogue under its own name (`bf16_on_pre_ampere` -> `bf16-on-pre-ampere`).

    A `check` takes Facts and yields Findings. Other kinds have an empty body and say in `cover` how they are covered:
    `by="skipped_steps"` (rehearsal, watchdog), `proof=["tests/...::test_..."]` (gate, construction),
    `because="..."` (construction, explained).
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.replace("_", "-")
        if name in CATALOGUE:
            raise ValueError(f"two pitfalls are called {name}")
        english, chinese = pages_of(inspect.getdoc(function) or "", name)
        CATALOGUE[name] = Pitfall(
            id=name,
            area=area,
            kind=kind,
            cost=cost,
            english=english,
            chinese=chinese,
            find=function if kind == "check" else None,
            by=cover.pop("by", ""),
            because=cover.pop("because", ""),
            proof=tuple(cover.pop("proof", ())),
            errors=tuple(re.compile(error, re.IGNORECASE) for error in errors),
            sources=tuple(sources),
        )
        if cover:
            raise ValueError(f"{name}: unknown {', '.join(cover)}")
        return function

    return enter


def pages_of(text: str, name: str) -> tuple[Page, Page]:
    """The English and the Chinese page of a docstring. Raises ValueError naming the part that is missing."""
    paragraphs = [_one_line(part) for part in re.split(r"\n\s*\n", text.strip())]
    try:
        why, fix = _place(paragraphs, "Why:"), _place(paragraphs, "Fix:")
        zh_why, zh_fix = _place(paragraphs, "为何："), _place(paragraphs, "办法：")
    except ValueError as error:
        raise ValueError(f"the page of {name} lacks {error}") from None
    if not 0 < why < fix < zh_why - 1 < zh_fix:
        raise ValueError(f"the page of {name} is not in the order title, Why, Fix, 标题, 为何, 办法")
    english = Page(paragraphs[0], _joined(paragraphs[why:fix]), _joined(paragraphs[fix : zh_why - 1]))
    chinese = Page(paragraphs[zh_why - 1], _joined(paragraphs[zh_why:zh_fix]), _joined(paragraphs[zh_fix:]))
    return english, Page(*(LINE_BREAK_IN_CHINESE.sub("", text) for text in (chinese.title, chinese.why, chinese.fix)))


def _one_line(paragraph: str) -> str:
    """Lines joined by a space, except between Chinese characters, which are written without one."""
    joined = " ".join(paragraph.split())
    return re.sub(r"(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])", "", joined)


def _place(paragraphs: list[str], label: str) -> int:
    for number, paragraph in enumerate(paragraphs):
        if paragraph.startswith(label):
            return number
    raise ValueError(label)


def _joined(paragraphs: list[str]) -> str:
    text = "\n\n".join(paragraphs)
    return re.sub(r"^(Why:|Fix:|为何：|办法：)\s*", "", text)
