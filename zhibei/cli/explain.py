"""`zhibei explain`: a log or traceback in, the pitfall behind it out. Knows how an explanation looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import DONE, UserError

if TYPE_CHECKING:
    from zhibei.doctor.pitfall import Page, Pitfall
    from zhibei.doctor.verdict import Candidate, Evidence, Explanation

Language = Literal["en", "zh", ""]
SHOWN_CHARACTERS = 300
WORDS = {
    "en": {
        "cause": "why:  ", "fix": "to do:", "page": "page: ", "line": "line", "others": "also possible:",
        "harmless": "harmless here:", "own": "zhibei said it itself:", "expected": "expected:", "sure": "sure",
        "unknown": "unknown: there is an error in it, and none that the catalogue of pitfalls knows",
        "unknown_to_do": "read upwards from the first of these lines; search for its words without paths and numbers",
        "nothing": "nothing known found: no error, and no figures that point to a pitfall",
        "besides": "errors in it that are not known:",
        "resembling": "pages that sound like this description (a guess; zhibei pitfalls ID):",
    },
    "zh": {
        "cause": "为何：", "fix": "办法：", "page": "详情：", "line": "第", "others": "也可能是：",
        "harmless": "无需理会：", "own": "zhibei 当时已经说明：", "expected": "应为：", "sure": "把握",
        "unknown": "未知（unknown）：日志里有错误，但不在已知的坑之中",
        "unknown_to_do": "从下面第一处错误往上读；去掉路径和数字后再搜索它的文字",
        "nothing": "没有发现已知问题（nothing known found）：没有错误，数值也没有异常",
        "besides": "其中尚不认识的错误：",
        "resembling": "与这段描述相近的页面（只是猜测；zhibei pitfalls ID）：",
    },
}  # fmt: skip


def explain(
    *files: Annotated[Path, Parameter(allow_leading_hyphen=True)], lang: Language = "", json: bool = False
) -> int:
    """Name the pitfall behind a log or traceback of zhibei or of any other program, with evidence, cause and remedy.

    Reads logs of any size (also gzip) of transformers, TRL, PEFT, accelerate,
    DeepSpeed, NCCL, CUDA, bitsandbytes, llama.cpp, vLLM, torchrun, Slurm and others.
    The first root cause wins over what follows from it.
    An unknown error is said to be unknown.

    Exit code 0: every log was read. What was found is in the text and, for scripts,
    in --json as `verdict`: `known` (and `pitfall` names it), `own` (zhibei explained
    it when it happened), `unknown`, or `nothing` (no error in it).
    Exit code 2: a log cannot be read.

    Examples:

      zhibei explain train.log

      zhibei explain rank*.log --json

      torchrun train.py 2>&1 | zhibei explain -

    Parameters
    ----------
    files
        Logs or saved tracebacks, or - for standard input.
    lang
        en or zh; by default Chinese where LANG says so.
    json
        Print one JSON document instead.
    """
    from zhibei.doctor.explain import explain_file, explain_stream
    from zhibei.doctor.pitfalls import load_catalogue

    if not files:
        raise UserError(
            "no log was named", expected="one or more files, or - for standard input", fix="zhibei explain train.log"
        )
    language = language_of(lang)
    catalogue = load_catalogue()
    explanations: list[Explanation] = []
    for file in files:
        if str(file) == "-":
            explanations.append(explain_stream(sys.stdin.buffer, "standard input", catalogue))
        else:
            explanations.append(explain_file(file, catalogue))
    if json:
        console.emit(as_dict(explanations, language), as_json=True)
    else:
        for number, explanation in enumerate(explanations):
            console.stdout.print(Text("\n" * bool(number)).append(Text("\n").join(lines_of(explanation, language))))
    return DONE


def language_of(lang: Language) -> str:
    """The language asked for, or that of the terminal."""
    if lang:
        return lang
    setting = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return "zh" if setting.lower().startswith("zh") else "en"


def lines_of(explanation: Explanation, language: str) -> Iterator[Text]:
    """What a person reads about one log."""
    words = WORDS[language]
    head = Text(f"{explanation.source}: ", style="bold")
    if explanation.cause:
        yield head
        yield from _lines_of_cause(explanation.cause, language)
    elif explanation.verdict == "own":
        yield head.append(words["own"])
        for message in explanation.own[:5]:
            yield Text(f"  {_place(message.line, language)}: ", style="dim").append(message.what, style="red")
            yield Text(f"    {words['expected']} ", style="dim").append(message.expected, style="default")
            yield Text(f"    {words['fix']} ", style="dim").append(message.fix, style="green")
    elif explanation.verdict == "unknown":
        yield head.append(words["unknown"], style="yellow")
        yield from _lines_of_evidence(explanation.unknown, language)
        yield Text(f"  {words['fix']} ", style="dim").append(words["unknown_to_do"], style="green")
    else:
        yield head.append(words["nothing"], style="green")
    if explanation.cause and explanation.unknown:
        yield Text(f"  {words['besides']}", style="dim")
        yield from _lines_of_evidence(explanation.unknown, language, indent="    ")
    yield from _lines_of_others(explanation.others, words["others"], language)
    if explanation.resembling:
        yield Text(f"  {words['resembling']}", style="dim")
    for pitfall, _ in explanation.resembling:
        yield Text(f"    {pitfall.id}", style="bold").append(f"  {page_of(pitfall, language).title}", style="not bold")
    yield from _lines_of_others(explanation.harmless, words["harmless"], language)


def _lines_of_cause(cause: Candidate, language: str) -> Iterator[Text]:
    words, page = WORDS[language], page_of(cause.pitfall, language)
    sure = f"  ({words['sure']} {cause.confidence:.0%})"
    yield (
        Text(cause.pitfall.id, style="bold red").append(f"  {page.title}", style="not bold default").append(sure, "dim")
    )
    if cause.says:
        yield Text(f"  {cause.says}", style="yellow")
    yield from _lines_of_evidence(cause.evidence, language)
    yield Text(f"  {words['cause']} ", style="dim").append(page.why, style="default")
    yield Text(f"  {words['fix']} ", style="dim").append(page.fix, style="green")
    yield Text(f"  {words['page']} ", style="dim").append(f"zhibei pitfalls {cause.pitfall.id}", style="default")


def _lines_of_evidence(evidence: Sequence[Evidence], language: str, indent: str = "  ") -> Iterator[Text]:
    for one in evidence:
        yield Text(f"{indent}{_place(one.line, language)}: ", style="dim").append(_short(one.text), style="default")


def _lines_of_others(others: Sequence[Candidate], heading: str, language: str) -> Iterator[Text]:
    if others:
        yield Text(f"  {heading}", style="dim")
    for other in others:
        line = Text(f"    {other.pitfall.id}", style="bold")
        line.append(f"  {page_of(other.pitfall, language).title}", style="not bold")
        yield line.append(
            f"  ({other.confidence:.0%}, {_place(other.evidence[0].line, language)})", style="not bold dim"
        )


def _place(line: int, language: str) -> str:
    return f"第 {line} 行" if language == "zh" else f"line {line}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def page_of(pitfall: Pitfall, language: str) -> Page:
    return pitfall.chinese if language == "zh" else pitfall.english


def as_dict(explanations: Sequence[Explanation], language: str) -> dict[str, Any]:
    """The surest verdict over all logs, and each log's own."""
    first = max(explanations, key=lambda one: (one.cause.confidence if one.cause else 0, one.verdict != "nothing"))
    return {
        "verdict": first.verdict,
        "pitfall": first.cause.pitfall.id if first.cause else None,
        "confidence": first.cause.confidence if first.cause else None,
        "log": first.source,
        "logs": [_log_as_dict(one, language) for one in explanations],
    }


def _log_as_dict(explanation: Explanation, language: str) -> dict[str, Any]:
    return {
        "log": explanation.source,
        "verdict": explanation.verdict,
        "cause": _candidate_as_dict(explanation.cause, language) if explanation.cause else None,
        "others": [_candidate_as_dict(one, language) for one in explanation.others],
        "harmless": [_candidate_as_dict(one, language) for one in explanation.harmless],
        "unknown": [one.as_dict() for one in explanation.unknown],
        "own": [one.as_dict() for one in explanation.own],
        "resembling": [{"pitfall": one.id, "score": score} for one, score in explanation.resembling],
        "lines": explanation.num_lines,
        "bytes": explanation.num_bytes,
    }


def _candidate_as_dict(candidate: Candidate, language: str) -> dict[str, Any]:
    page = page_of(candidate.pitfall, language)
    return {
        "pitfall": candidate.pitfall.id,
        "area": candidate.pitfall.area,
        "confidence": candidate.confidence,
        "title": page.title,
        "why": page.why,
        "fix": page.fix,
        "says": candidate.says,
        "evidence": [one.as_dict() for one in candidate.evidence],
        "sources": list(candidate.pitfall.sources),
    }
