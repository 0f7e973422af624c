"""Which of the pitfalls that a log shows is the cause. Knows no reading of logs.

Rank of evidence, best first: an error that a pitfall names; an exit code that one names; an error of a general family
(out of memory, a missing package); numbers that only one pitfall explains; a warning. What only follows from another
process's death comes last, and an error that nobody knows stands before all but named errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zhibei.doctor.log_figures import FigureWatch, Signature
from zhibei.doctor.pitfall import Pitfall

Force = Literal["error", "exit", "warning", "plain", "frame", "figures"]
Verdict = Literal["known", "unknown", "own", "nothing"]

EXCEPTION = re.compile(
    r"(?:^|[\]:|>)│] ?)((?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout|Refused|Expired|Missing"
    r"|NotFound|Failure)|StopIteration|Exception))(?:\(|:(?: |$)|$)"
)
GENERAL_AREA = "messages"
GENERAL = frozenset({"gpu-memory-too-small", "host-oom-exit-9-deepspeed"})
"""Pitfalls of other areas whose message is as general."""
REMARK, NEVER = 6.0, 9.0
"""Tiers of what sound programs say too, and of nothing."""
CONSEQUENCES = frozenset({"nccl-timeout-rank0-tokenising", "child-process-failed", "other-rank-died"})
"""What a job shows after another of its processes has died; a cause only where nothing else is."""
HARMLESS = frozenset({"ignorable-missing-inv-freq", "notice-without-harm"})
"""Messages that people stop sound runs for."""
HINTS = frozenset({
    "tokenizers-fork-deadlock", "rollout-sampling-params-from-generation-config", "server-context-divided-by-slots",
    "legacy-flag-changes-between-versions", "torch-compile-recompiles", "tracker-login-prompt",
    "accelerate-default-config-surprise", "rl-train-inference-logprob-gap", "resume-adapter-path-is-not-resume",
})  # fmt: skip
"""Pitfalls whose messages sound runs print too: named as possible, never as what went wrong."""
DEADLY = frozenset({
    "gpu-memory-too-small", "host-memory-exhausted", "host-oom-exit-9-deepspeed", "no-space-left",
    "illegal-memory-access", "device-side-assert",
    "gpu-library-failed", "gpu-reports-a-fault", "job-ended-from-outside", "nccl-failed",
})  # fmt: skip
"""General families after which a process is lost, so that what stands well below them follows from them."""
NOTICED_ONLY = frozenset({
    "package-missing", "python-too-old", "file-missing", "not-writable", "versions-disagree", "hub-out-of-reach",
    "hub-name-or-path-wrong", "hub-access-refused", "shared-library-missing", "extension-not-built", "compile-failed",
    "data-field-missing",
})  # fmt: skip
"""General families that sound programs report too before they go another way: an error only as an exception."""
SAME_ERROR = 3
"""So many lines may lie between two lines of one message."""
RELATED = {
    "gpu-memory-too-small": ("memory", "resume"),
    "host-memory-exhausted": ("memory", "environment"),
    "nccl-failed": ("distributed", "hardware", "environment"),
    "package-missing": ("environment",),
    "no-space-left": ("checkpoint", "gguf"),
    "device-side-assert": ("tokenizer",),
}
"""General families, and the areas whose warnings before them say more."""
UNKNOWN_CONSEQUENCE = (
    "CalledProcessError", "ChildFailedError", "non-zero exit status", "DistBackendError", "Connection reset by peer",
    "SystemExit", "KeyboardInterrupt", "ProcessExitedException", "ProcessRaisedException", "RayTaskError",
    "Broken pipe", "Connection closed by", "BrokenPipeError", "EOFError", "SignalException",
)  # fmt: skip


def is_exception(text: str) -> bool:
    """A line with which Python ends a traceback, or a program reports one."""
    return EXCEPTION.search(text) is not None


@dataclass(frozen=True, slots=True)
class Evidence:
    """A line of the log; `weight` is how specific the pattern was that found it."""

    line: int
    text: str
    force: Force
    weight: float = 0

    def as_dict(self) -> dict[str, Any]:
        return {"line": self.line, "text": self.text, "force": self.force}


@dataclass(frozen=True, slots=True)
class OwnMessage:
    """An error that zhibei itself explained when it happened."""

    line: int
    what: str
    expected: str
    fix: str

    def as_dict(self) -> dict[str, Any]:
        return {"line": self.line, "what": self.what, "expected": self.expected, "fix": self.fix}


@dataclass(slots=True)
class Gathered:
    """What one pass over a log gathered. `names` are those of all pitfalls; `chains` the lines that say that one
    exception led to the next."""

    names: frozenset[str]
    evidence: dict[str, list[Evidence]] = field(default_factory=dict)
    errors: list[Evidence] = field(default_factory=list)
    own: list[OwnMessage] = field(default_factory=list)
    chains: list[int] = field(default_factory=list)
    figures: FigureWatch = field(default_factory=FigureWatch)
    records_seen: int = 0
    num_lines: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pitfall and what speaks for it; `says` is what its numbers mean, "" when a message names it."""

    pitfall: Pitfall
    confidence: float
    evidence: tuple[Evidence, ...]
    says: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """`known`: `cause` is the pitfall. `unknown`: errors that the catalogue does not name. `own`: zhibei has said it
    itself. `nothing`: no error in it. `others` are further candidates, less likely; `harmless` needs nothing done."""

    source: str
    verdict: Verdict
    cause: Candidate | None = None
    others: tuple[Candidate, ...] = ()
    harmless: tuple[Candidate, ...] = ()
    unknown: tuple[Evidence, ...] = ()
    own: tuple[OwnMessage, ...] = ()
    resembling: tuple[tuple[Pitfall, float], ...] = ()
    """Pages that sound like a short description, with how much they do; a guess, only where nothing is named."""
    num_lines: int = 0
    num_bytes: int = 0


def judge(source: str, found: Gathered, catalogue: Mapping[str, Pitfall]) -> Explanation:
    """Rank what was gathered and say what it amounts to."""
    unknown = _roots(found.errors, found.evidence)
    ranked = _ranked(found, catalogue, unknown)
    candidates = tuple(candidate for _, candidate in ranked)
    tier = ranked[0][0][0] if ranked else NEVER
    harmless = tuple(
        Candidate(catalogue[name], 0.9, tuple(lines[:3])) for name, lines in found.evidence.items() if name in HARMLESS
    )
    rest = Explanation(
        source,
        "nothing",
        others=candidates[:5],
        harmless=harmless,
        unknown=tuple(unknown[:3]),
        own=tuple(found.own),
        num_lines=found.num_lines,
        num_bytes=found.num_bytes,
    )
    if tier < 2 or (tier < 4 and not unknown) or (tier < 5 and not unknown and not found.own):
        return replace(rest, verdict="known", cause=candidates[0], others=_fainter(candidates))
    return replace(rest, verdict="own" if found.own else "unknown" if unknown else "nothing")


def _ranked(
    found: Gathered, catalogue: Mapping[str, Pitfall], unknown: Sequence[Evidence]
) -> list[tuple[tuple[float, ...], Candidate]]:
    """All candidates, the likeliest first; a key is (tier, line, -how specific, -how often)."""
    ranked: list[tuple[tuple[float, ...], Candidate]] = []
    notices = {one.line for name in HARMLESS for one in found.evidence.get(name, ())}
    for name, lines in found.evidence.items():
        if name in HARMLESS:
            continue
        tiers = [(_tier(name, one, catalogue, unknown), one.line, one) for one in lines]
        tier, _, best = min(tiers, key=lambda one: one[:2])
        tier = _tier_by_company(name, tier, best, found.evidence, catalogue)
        is_remark = name in NOTICED_ONLY and not any(is_exception(one.text) for one in lines)
        if is_remark or (tier >= 2 and (name in HINTS or best.line in notices)):
            tier = REMARK
        says = (best, *(one for one in lines if one is not best))
        key = (tier, best.line, -best.weight, -len(lines))
        ranked.append((key, Candidate(catalogue[name], _confidence(tier), says[:3])))
    ranked = _in_order(ranked, found.chains)
    named = {candidate.pitfall.id for _, candidate in ranked}
    ranked += _by_figures(tuple(found.figures.signatures()), catalogue, named)
    return _most_specific_first(sorted(ranked, key=lambda pair: pair[0]))


def _in_order(
    ranked: Sequence[tuple[tuple[float, ...], Candidate]], chains: Sequence[int]
) -> list[tuple[tuple[float, ...], Candidate]]:
    """What follows from an earlier deadly error is no cause, unless Python says that the two are one chain."""
    deadly = min((key[1] for key, one in ranked if one.pitfall.id in DEADLY and key[0] <= 1.5), default=None)
    if deadly is None:
        return list(ranked)

    def follows(key: tuple[float, ...]) -> bool:
        is_chained = any(deadly < line < key[1] for line in chains)
        return key[0] < 1 and key[1] > deadly + SAME_ERROR and not is_chained

    return [((1.8, *key[1:]), one) if follows(key) else (key, one) for key, one in ranked]


def _most_specific_first(
    ranked: list[tuple[tuple[float, ...], Candidate]],
) -> list[tuple[tuple[float, ...], Candidate]]:
    """Lines of one message belong together: among those that name something in it, the longest words win."""
    if not ranked:
        return ranked
    tier, line = ranked[0][0][:2]
    together = [pair for pair in ranked if pair[0][0] == tier and pair[0][1] <= line + SAME_ERROR]
    together.sort(key=lambda pair: pair[0][2:])
    return together + [pair for pair in ranked if pair not in together]


def _roots(errors: Sequence[Evidence], evidence: Mapping[str, Sequence[Evidence]]) -> list[Evidence]:
    """Errors that no pattern explains and that are no consequence of a process's death."""
    explained = {one.line for lines in evidence.values() for one in lines}
    roots = [one for one in errors if one.line not in explained]
    return [one for one in roots if not any(word in one.text for word in UNKNOWN_CONSEQUENCE)]


def _tier(name: str, one: Evidence, catalogue: Mapping[str, Pitfall], unknown: Sequence[Evidence]) -> float:
    """0 is the surest; below 2 an error was named."""
    if name in CONSEQUENCES:
        return 4.0
    is_general = catalogue[name].area == GENERAL_AREA or name in GENERAL
    if one.force == "exit":
        # A process is often killed because another has failed; then the failure is the cause.
        return 3.5 if any(other.line < one.line for other in unknown) else 0.5 + is_general
    by_force = {"error": 0.0, "figures": 2.0, "plain": 2.2, "warning": 2.4, "frame": 3.0}
    return by_force[one.force] + (1.0 if is_general and one.force == "error" else 0.1 * is_general)


def _tier_by_company(
    name: str,
    tier: float,
    best: Evidence,
    evidence: Mapping[str, Sequence[Evidence]],
    catalogue: Mapping[str, Pitfall],
) -> float:
    """A warning that stands before the general error it leads to is the cause of it."""
    if 2 <= tier < 3:
        for general, areas in RELATED.items():
            after = [one for one in evidence.get(general, ()) if one.line >= best.line]
            if after and catalogue[name].area in areas:
                return 0.9
    return tier


def _by_figures(
    signatures: Sequence[Signature], catalogue: Mapping[str, Pitfall], named: set[str]
) -> list[tuple[tuple[float, ...], Candidate]]:
    """What the numbers say; a pitfall that a message names too needs no second mention."""
    ranked: list[tuple[tuple[float, ...], Candidate]] = []
    for order, signature in enumerate(signatures):
        lines = tuple(Evidence(line, text[:600], "figures") for line, text in signature.lines)
        fitting = [catalogue[name] for name in signature.pitfalls if name in catalogue and name not in named]
        for place, pitfall in enumerate(fitting):
            tier = 2.0 + 0.05 * order + (0.9 if place else 0.0)
            ranked.append(((tier, lines[0].line, place), Candidate(pitfall, _confidence(tier), lines, signature.says)))
            named.add(pitfall.id)
    return ranked


def _confidence(tier: float) -> float:
    for limit, value in ((0.4, 0.95), (0.95, 0.85), (1.9, 0.75), (2.3, 0.65), (2.7, 0.5), (3.2, 0.35), (3.9, 0.3)):
        if tier <= limit:
            return value
    return 0.4


def _fainter(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Further candidates, none of them as sure as the first."""
    first = candidates[0].confidence
    return tuple(
        Candidate(one.pitfall, round(min(one.confidence, first * 0.7), 2), one.evidence, one.says)
        for one in candidates[1:6]
    )
