"""Runs every check of the catalogue over the facts of a run. Knows no single check, no file and no screen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.resolve import DEFAULT
from zhibei.doctor.facts.facts import Defect, Facts
from zhibei.doctor.pitfall import COSTS, Cost, Finding, Level, Pitfall
from zhibei.doctor.pitfalls import load_catalogue

LEVELS: tuple[Level, ...] = ("stop", "warning", "note")
MOST_PER_CHECK = 8
"""A check that finds the same thing in every row is cut here, and says how often it was found."""


@dataclass(frozen=True, slots=True)
class Found:
    """A finding with the pitfall it belongs to; `id` is "" for a refusal that no entry of the catalogue describes."""

    id: str
    area: str
    cost: Cost
    finding: Finding
    title: str = ""
    why: str = ""
    fault: UserError | None = None
    """What reading raised, where the finding is such a refusal."""

    @property
    def blocks(self) -> bool:
        return self.finding.level == "stop"

    def as_dict(self) -> dict[str, Any]:
        """One finding for `--json` and check.json."""
        finding = self.finding
        return {
            "id": self.id,
            "area": self.area,
            "cost": self.cost,
            "level": finding.level,
            "what": finding.what,
            "where": finding.where,
            "why": self.why or self.title,
            "to_do": finding.to_do,
            "changes": dict(finding.changes),
            "is_safe": finding.is_safe,
            "evidence": list(finding.evidence),
        }


@dataclass(frozen=True, slots=True)
class Checkup:
    """Every finding, the costliest first. `accepted` were found too, and the run file says that they are wanted."""

    findings: tuple[Found, ...]
    accepted: tuple[Found, ...] = ()
    defects: tuple[Defect, ...] = ()
    num_checks: int = 0

    @property
    def blocks(self) -> bool:
        """Whether a finding stops the run."""
        return any(found.blocks for found in self.findings)

    def count(self, level: Level) -> int:
        return sum(found.finding.level == level for found in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """What `zhibei check --json` prints and check.json holds."""
        return {
            "blocks": self.blocks,
            "counts": {level: self.count(level) for level in LEVELS},
            "findings": [found.as_dict() for found in self.findings],
            "accepted": [found.as_dict() for found in self.accepted],
            "defects": [{"place": defect.place, "error": defect.error} for defect in self.defects],
            "checks": self.num_checks,
        }

    def as_error(self) -> UserError:
        """The findings that stop the run as one error: the refusal itself where there is only one."""
        errors = [_as_error(found) for found in self.findings if found.blocks]
        if len(errors) == 1:
            return errors[0]
        return SeveralErrors(errors, what=f"{len(errors)} findings stop this run before any weight is loaded")


def check(facts: Facts, *, area: str = "") -> Checkup:
    """Every finding of every check (or of one area), and every refusal met while the facts were gathered."""
    catalogue = load_catalogue()
    found: list[Found] = [_placed(found_of(fault, catalogue), facts) for fault in facts.faults]
    defects = list(facts.defects)
    checks = [entry for entry in catalogue.values() if entry.find is not None and area in ("", entry.area)]
    for entry in checks:
        try:
            found += _found_by(entry, facts)
        except Exception as error:  # a check that crashes must neither stop the run nor hide the others
            defects.append(Defect.of(entry.id, error))
    wanted = set(facts.run.accept) if facts.resolved else set()
    accepted = [one for one in found if one.id in wanted and one.fault is None]
    kept = [one for one in found if one not in accepted]
    kept += _about_accept(facts, catalogue, {one.id for one in accepted}, is_whole=not area)
    return Checkup(
        findings=tuple(sorted(_distinct(kept), key=_order)),
        accepted=tuple(sorted(_distinct(accepted), key=_order)),
        defects=tuple(defects),
        num_checks=len(checks),
    )


def found_of(fault: UserError, catalogue: Mapping[str, Pitfall] | None = None) -> Found:
    """A refusal in the form of a finding, under the name of its pitfall where it has one."""
    entry = (catalogue or load_catalogue()).get(fault.pitfall)
    finding = Finding(what=fault.what, where=fault.where or "the run", to_do=fault.fix, level="stop")
    if entry is None:
        return Found("", "", "launch", finding, why=f"expected: {fault.expected}", fault=fault)
    return Found(entry.id, entry.area, entry.cost, finding, entry.english.title, entry.english.why, fault)


def _placed(found: Found, facts: Facts) -> Found:
    """A refusal that names a field of the run file says where that field was set."""
    key = found.finding.where
    if facts.resolved is None or key not in facts.resolved.origins or facts.origin(key) == DEFAULT:
        return found
    return replace(found, finding=replace(found.finding, where=f"{facts.origin(key)}, {key}"))


def _found_by(entry: Pitfall, facts: Facts) -> list[Found]:
    assert entry.find is not None
    page = entry.english
    findings = list(entry.find(facts))
    shown = [Found(entry.id, entry.area, entry.cost, one, page.title, page.why) for one in findings[:MOST_PER_CHECK]]
    if len(findings) > MOST_PER_CHECK:
        rest = len(findings) - MOST_PER_CHECK
        more = Finding(
            what=f"{rest} more of the same ({entry.id})",
            where=findings[MOST_PER_CHECK].where,
            to_do=findings[MOST_PER_CHECK].to_do,
            level="note",
        )
        shown.append(Found(entry.id, entry.area, entry.cost, more, page.title, page.why))
    return shown


def _order(found: Found) -> tuple[int, int]:
    return COSTS.index(found.cost), LEVELS.index(found.finding.level)


def _distinct(found: Iterable[Found]) -> list[Found]:
    """The same thing in the same place is told once: by the check that names it rather than by the refusal."""
    told: dict[tuple[str, str], Found] = {}
    named: set[tuple[str, str]] = set()
    for one in sorted(found, key=lambda one: one.fault is not None):
        if one.fault is not None and one.id and (one.id, "") in named:
            continue
        named.add((one.id, ""))
        told.setdefault((one.finding.what, one.finding.where), one)
    return list(told.values())


def _about_accept(facts: Facts, catalogue: Mapping[str, Pitfall], used: set[str], *, is_whole: bool) -> Iterable[Found]:
    """Names in `accept` that are no pitfall, and those that silence nothing."""
    if facts.resolved is None:
        return
    where = facts.origin("accept")
    for name in facts.run.accept:
        if name not in catalogue:
            near = difflib.get_close_matches(name, catalogue, n=1, cutoff=0.4)
            finding = Finding(
                what=f"accept names {name!r}, and there is no such pitfall",
                where=where,
                to_do=f"did you mean {near[0]}?" if near else "take a name that `zhibei check` prints",
            )
            yield Found("", "config", "minutes", finding, title="accept names pitfalls by the ids that a check prints")
        elif _is_idle(name, facts, catalogue, used) and is_whole:
            finding = Finding(
                what=f"accept names {name}, and nothing of that kind was found",
                where=where,
                to_do="remove it, so that it hides nothing later",
                level="note",
            )
            yield Found("", "config", "minutes", finding, title="an entry of accept that silences nothing")


def _is_idle(name: str, facts: Facts, catalogue: Mapping[str, Pitfall], used: set[str]) -> bool:
    """Whether a check looked and found nothing: not so where facts are missing or another machine stands in."""
    could_look = not facts.faults and not facts.defects and not facts.machine.is_described
    return catalogue[name].find is not None and name not in used and could_look


def _as_error(found: Found) -> UserError:
    if found.fault is not None:
        return found.fault
    finding = found.finding
    changes = ", ".join(f"{key}: {value}" for key, value in finding.changes.items())
    return UserError(
        finding.what,
        expected=changes or found.title,
        fix=f"{finding.to_do} (more: zhibei pitfalls {found.id})" if found.id else finding.to_do,
        where=finding.where,
        pitfall=found.id,
    )
