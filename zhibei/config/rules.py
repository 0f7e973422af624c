"""What a rule between fields of the run file is, and short ways to write one. Knows no particular field."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zhibei.config.yaml_tree import KeyPath

if TYPE_CHECKING:
    from zhibei.config.run import RunFile, TrainingSection


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` gives those of the `watches` fields that `cause` leaves idle (or contradicts); `why` and `fix` say so."""

    watches: tuple[KeyPath, ...]
    find: Callable[[RunFile], list[KeyPath]]
    cause: KeyPath
    why: str
    fix: str
    is_conflict: bool = False


@dataclass(frozen=True, slots=True)
class Misfit:
    """One field that a rule objects to."""

    field: KeyPath
    rule: Rule


class PartsDoNotFit(ValueError):
    """Each field is fine by itself; together they are not. Carries every misfit at once."""

    def __init__(self, misfits: Iterable[Misfit]) -> None:
        self.misfits = tuple(misfits)
        super().__init__("; ".join(f"{_dotted(m.field)}: {m.rule.why} ({m.rule.fix})" for m in self.misfits))


def _rule(applies: Callable[[RunFile], bool], fields: str, cause: str, *, why: str, fix: str) -> Rule:
    """A rule under which all of these fields (names with spaces between) are idle, or none is."""
    paths = tuple(tuple(field.split(".")) for field in fields.split())
    return Rule(paths, lambda run: list(paths) if applies(run) else [], tuple(cause.split(".")), why, fix)


def no_effect(applies: Callable[[RunFile], bool], fields: str, cause: str, why: str, fix: str) -> Rule:
    return _rule(applies, fields, cause, why=why, fix=fix)


def conflict(applies: Callable[[RunFile], bool], field: str, cause: str, why: str, fix: str) -> Rule:
    return replace(_rule(applies, field, cause, why=why, fix=fix), is_conflict=True)


def training(
    stage: str, applies: Callable[[TrainingSection, RunFile], bool], fields: str, cause: str, *reasons: str
) -> Rule:
    """A rule of section `stage`, whose name stands as {stage} in the words."""
    named, named_cause, why, fix = (words.replace("{stage}", stage) for words in (fields, cause, *reasons))

    def holds(run: RunFile) -> bool:
        return run.stage == stage and applies(run.training, run)

    return no_effect(holds, named, named_cause, why, fix)


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)
