"""What one bad input is, what was seen when it was tried, and the verdict and grade that follow. Knows no single case.

Grades as in the comparison with other tools: A names the culprit (value and place) and a remedy, B the culprit, C stops
with a text that points to neither, D crashes or says nothing. They come from regular expressions, never from a person.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.bad_inputs.place import Place

Verdict = Literal["stopped", "handled", "warned", "stopped late", "silent", "crashed", "false alarm", "clean"]
Build = Callable[[Place], Any]

GROUPS = {
    "c": "run file",
    "d": "data",
    "m": "model and tokenizer",
    "l": "adapters",
    "r": "preference pairs",
    "q": "learning from rewards",
    "o": "output",
    "s": "resume",
    "p": "machine",
}
# What is truly said of a run on a base in few bits where its package is absent.
OF_A_QUANTISED_BASE = tuple([] if importlib.util.find_spec("bitsandbytes") else ["bnb-cuda-binary-not-found"])
OUR_FAULT = re.compile(r"This is our fault|Traceback \(most recent call last\)")
DEFECT = re.compile(r"zhibei's own fault[^\n]*")
REMEDY_LABEL = re.compile(r"to do:\s+\S")


@dataclass(frozen=True)
class Scenario:
    """`value`, `where` and `remedy` are regular expressions (all of them must be found) that make an answer right.

    `may` says which verdicts are right: a bad input is "stopped" before the first step, or "handled" and said so;
    "handled" needs `proof`, a look into the folder that shows it.
    """

    id: str
    breaks: str
    build: Build
    value: tuple[str, ...] | str
    where: tuple[str, ...] | str
    remedy: tuple[str, ...] | str
    may: tuple[Verdict, ...] = ("stopped",)
    proof: Callable[[Place], bool] | None = None
    leaves: str = ""
    """What a stop may leave behind, as a regular expression of paths: a run directory from which the run can go on."""

    @property
    def group(self) -> str:
        return GROUPS[self.id.removeprefix("v_")[0]]


@dataclass(frozen=True)
class Control:
    """A sound input."""

    id: str
    build: Build
    known: tuple[str, ...] = ()
    """Findings that are true of it, by id: what this version cannot do yet."""


@dataclass(frozen=True)
class Seen:
    """What a trial showed."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    num_steps: int
    """Optimiser steps recorded in the metrics of runs that were not there before."""
    changed: tuple[str, ...]
    """Files that existed before and are different or gone."""
    created: tuple[str, ...]
    cpu_seconds: float = 0.0
    """Of the process it ran in, whatever else the machine was doing; 0 in this process."""
    findings: tuple[str, ...] = ()
    """Findings of level stop or warning that were shown, as `id`."""

    @property
    def text(self) -> str:
        return f"{self.stdout}\n{self.stderr}"


@dataclass(frozen=True)
class Judgement:
    """Verdict and grade, with what is missing for an A, and everything else that is not as it should be."""

    verdict: Verdict
    grade: str
    missing: tuple[str, ...] = ()
    faults: tuple[str, ...] = field(default=())

    @property
    def is_right(self) -> bool:
        return not self.faults


def judge(scenario: Scenario, seen: Seen, place: Place) -> Judgement:
    """The verdict of a bad input by rule."""
    verdict = _verdict(scenario, seen, place)
    absent = {
        name: [pattern for pattern in _patterns(wanted) if not re.search(pattern, seen.text, re.IGNORECASE | re.DOTALL)]
        for name, wanted in (("value", scenario.value), ("where", scenario.where), ("remedy", scenario.remedy))
    }
    if verdict == "handled":
        absent["remedy"] = []  # nothing is left to do
    if verdict == "stopped" and not REMEDY_LABEL.search(seen.text):
        absent["remedy"].append("to do:")
    missing = tuple(f"{name}: {pattern}" for name, patterns in absent.items() for pattern in patterns)
    grade = _grade(verdict, absent)
    faults: list[str] = []
    if verdict not in scenario.may:
        faults.append(f"{verdict} instead of {' or '.join(scenario.may)}")
    if missing:
        faults.append(f"message lacks {'; '.join(missing)}")
    if seen.changed and verdict != "handled":  # a run that goes on writes into its own directory
        faults.append(f"touched {', '.join(seen.changed[:4])}")
    left = [path for path in seen.created if not re.fullmatch(scenario.leaves, path)]
    if verdict == "stopped" and left:
        faults.append(f"left behind {', '.join(left[:4])}")
    faults += DEFECT.findall(seen.text)
    if verdict == "stopped" and seen.exit_code != 2:
        faults.append(f"exit code {seen.exit_code}")
    return Judgement(verdict, grade, missing, tuple(faults))


def _verdict(scenario: Scenario, seen: Seen, place: Place) -> Verdict:
    if seen.exit_code not in (0, 2, 3) or OUR_FAULT.search(seen.text):
        return "crashed"
    if seen.exit_code:
        return "stopped late" if seen.num_steps or seen.exit_code == 3 else "stopped"
    says = all(re.search(pattern, seen.text, re.IGNORECASE | re.DOTALL) for pattern in _patterns(scenario.value))
    if says and scenario.proof is not None and scenario.proof(place):
        return "handled"
    return "warned" if seen.findings else "silent"


def _grade(verdict: Verdict, absent: dict[str, list[str]]) -> str:
    if verdict in ("crashed", "silent"):
        return "D"
    if not any(absent.values()):
        return "A"
    return "B" if not absent["value"] or not absent["where"] else "C"


def judge_control(control: Control, seen: Seen) -> Judgement:
    """A sound input must end with exit code 0 and show no finding but those that are known to be true of it."""
    faults = []
    if seen.exit_code and not control.known:
        faults.append(f"exit code {seen.exit_code}: {seen.stderr.strip()[:500]}")
    if seen.findings != control.known:
        faults.append(f"showed {', '.join(seen.findings) or 'nothing'}")
    faults += DEFECT.findall(seen.text)
    return Judgement("false alarm" if faults else "clean", "", (), tuple(faults))


def _patterns(wanted: tuple[str, ...] | str) -> tuple[str, ...]:
    return (wanted,) if isinstance(wanted, str) else wanted
