"""Writes the safe changes of a checkup into a copy of the run file, and shows them as a diff. Knows no single check."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.config.edit import CannotEdit, edited
from zhibei.config.errors import UserError
from zhibei.config.layers import COMMAND_LINE
from zhibei.config.read import read_run
from zhibei.config.resolve import PLANNED, ResolvedRun, value_of, yaml_value
from zhibei.config.words import leaf_fields
from zhibei.doctor.checkup import Found
from zhibei.store.files import write_text_atomic

MOST_COPIES = 100


@dataclass(frozen=True, slots=True)
class Repair:
    """What can be mended without asking.

    `changes` are in `text` (the new run file), `overrides` are settings for the command line: for values that were
    set there, and for runs that have no file. `left` says why a safe change was not made.
    """

    changes: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    text: str = ""
    diff: str = ""
    left: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "changes": dict(self.changes),
            "overrides": list(self.overrides),
            "diff": self.diff,
            "left": list(self.left),
        }


def safe_changes(findings: Sequence[Found]) -> tuple[dict[str, Any], list[str]]:
    """The changes of all safe findings together; a field that two findings want changed differently is left alone."""
    changes: dict[str, Any] = {}
    by: dict[str, str] = {}
    left: list[str] = []
    for found in findings:
        if not found.finding.is_safe:
            continue
        for key, value in found.finding.changes.items():
            if key in changes and changes[key] != value:
                left.append(f"{key}: {by[key]} wants {yaml_value(changes[key])}, {found.id} {yaml_value(value)}")
            else:
                changes.setdefault(key, value)
                by.setdefault(key, found.id)
    disputed = {line.partition(":")[0] for line in left}
    return {key: value for key, value in changes.items() if key not in disputed}, left


def repair(resolved: ResolvedRun, findings: Sequence[Found], *, file: Path | None) -> Repair:
    """The safe changes made in the text of the run file. `file` is None where the run is a recipe.

    What was set on the command line stays there, as other overrides. The new text is read back as a run file and
    differs from the old one in these values only, or the change is not made.
    """
    changes, left = safe_changes(findings)
    in_file: dict[str, Any] = {}
    overrides: list[str] = []
    for key, value in changes.items():
        if file is None or resolved.origins.get(key) == COMMAND_LINE:
            overrides.append(f"{key}={yaml_value(value)}")
        else:
            in_file[key] = value
    if file is None or not in_file:
        return Repair(changes, tuple(overrides), left=tuple(left))
    try:
        text = edited(resolved.text, in_file)
    except CannotEdit as problem:
        left += [f"{key}: {yaml_value(value)} ({problem})" for key, value in in_file.items()]
        return Repair(changes, tuple(overrides), left=tuple(left))
    return Repair(changes, tuple(overrides), text, diff_of(resolved.text, text, file.name), tuple(left))


def diff_of(old: str, new: str, name: str) -> str:
    """A unified diff, as `diff -u` prints it."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, f"{name} (mended)", lineterm="")
    return "\n".join(lines)


def write_repaired(repaired: Repair, resolved: ResolvedRun, file: Path) -> Path:
    """The mended run file beside the original (`run.fixed.yaml`), which is not touched; its path.

    The new file keeps the run's name. Raises UserError when it does not read back as the same run with these values.
    """
    text = repaired.text
    if resolved.origins.get("name") == PLANNED:
        text = edited(text, {"name": resolved.run.name})
    new = _free_name(file)
    write_text_atomic(new, text)
    try:
        _require_same_run(read_run(new), resolved, repaired.changes)
    except UserError:
        new.unlink()
        raise
    return new


def _free_name(file: Path) -> Path:
    for number in range(1, MOST_COPIES):
        new = file.with_name(f"{file.stem}.fixed{'' if number == 1 else f'-{number}'}{file.suffix}")
        if not new.exists():
            return new
    raise UserError(
        f"there are {MOST_COPIES - 1} mended copies already",
        expected="a free name",
        fix="remove the old copies",
        where=str(file.with_name(f"{file.stem}.fixed{file.suffix}")),
    )


def _require_same_run(new: ResolvedRun, old: ResolvedRun, changes: Mapping[str, Any]) -> None:
    """Every value that the file decides is what it was, or what it was changed into."""
    for key, _ in leaf_fields():
        is_ours = any(changed == key or changed.startswith((f"{key}.", f"{key}[")) for changed in changes)
        if is_ours or old.origins.get(key) in (COMMAND_LINE, PLANNED) or new.origins.get(key) == PLANNED:
            continue
        if value_of(new.run, key) != value_of(old.run, key):
            raise UserError(
                f"mending the file would change {key} from {value_of(old.run, key)} to {value_of(new.run, key)} too",
                expected="only the changes that were shown",
                fix="make the changes by hand",
                where=key,
            )
