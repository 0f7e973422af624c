"""The errors and exit codes a person meets. Knows nothing of what raises them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DONE = 0
OUR_FAULT = 1
USER_MUST_ACT = 2
STOPPED_BY_WATCHDOG = 3
INTERRUPTED_AND_SAVED = 130


class UserError(Exception):
    """Something only the user can put right: what came, what was expected, what to do, and where.

    `where` names file, record and field, e.g. `data.json, record 17 (line 204), field 'output'`. `pitfall` is the
    name of the known pitfall that this is, where it is one (`zhibei pitfalls NAME`).
    """

    exit_code = USER_MUST_ACT

    def __init__(self, what: str, *, expected: str, fix: str, where: str = "", pitfall: str = "") -> None:
        super().__init__(what)
        self.what, self.expected, self.fix, self.where, self.pitfall = what, expected, fix, where, pitfall

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}\n  expected: {self.expected}\n  to do:    {self.fix}"

    def as_dict(self) -> dict[str, Any]:
        """The same facts for `--json`."""
        named = {"pitfall": self.pitfall} if self.pitfall else {}
        return {"what": self.what, "expected": self.expected, "fix": self.fix, "where": self.where, **named}


class RunStopped(UserError):
    """A watchdog stopped a run that was under way; the last sound checkpoint can be resumed."""

    exit_code = STOPPED_BY_WATCHDOG


class RankLost(RunStopped):
    """Another rank died, hangs or cannot be reached; the run can go on from its newest sound checkpoint.

    `is_told_here`: of the ranks that wait for it, this is the one to say so.
    """

    is_told_here = True


class RunInterrupted(UserError):
    """The run was asked to stop (SIGTERM, SIGUSR1, Ctrl-C) and saved its state first."""

    exit_code = INTERRUPTED_AND_SAVED


class SeveralErrors(UserError):
    """All faults of one input, reported together so that one reading mends them all."""

    def __init__(self, errors: Sequence[UserError], *, what: str, where: str = "") -> None:
        super().__init__(what, expected="none of them", fix="see each", where=where)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join([self.what, *(str(error) for error in self.errors)])

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "errors": [error.as_dict() for error in self.errors]}


def as_told(error: UserError) -> dict[str, Any]:
    """An error as JSON can hold it, for another process of the same run."""
    return {**error.as_dict(), "exit_code": error.exit_code}


def from_told(told: Mapping[str, Any]) -> UserError:
    """The error of another process, to end with as that one does."""
    code = int(told.get("exit_code", USER_MUST_ACT))
    kind = {each.exit_code: each for each in (RunStopped, RunInterrupted)}.get(code, UserError)
    error = kind(told["what"], expected=told["expected"], fix=told["fix"], where=told["where"])
    error.exit_code = code
    return error
