"""`zhibei check`: everything that is known to be wrong with a run, before it runs. Knows how findings look."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zhibei.cli import console
from zhibei.cli.progress import Mode, ProgressLine, choose_mode
from zhibei.config.errors import DONE, USER_MUST_ACT, UserError
from zhibei.config.read import read_what_is_sound, recipe_names, with_compat_set
from zhibei.config.resolve import ResolvedRun, yaml_value
from zhibei.pipeline.file import is_pipeline
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.doctor.checkup import Checkup, Found
    from zhibei.doctor.facts.facts import Facts
    from zhibei.doctor.repair import Repair
    from zhibei.plan.machines import Machine

STYLES = {"stop": "bold red", "warning": "bold yellow", "note": "bold cyan"}
LOSSES = {
    "run": "costs the whole run",
    "hours": "costs hours",
    "launch": "costs a launch",
    "minutes": "costs minutes",
}
MOST_EVIDENCE = 6


def check(
    run: str,
    /,
    *overrides: str,
    compat: str = "",
    fix: bool = False,
    machine: str = "",
    area: str = "",
    json: bool = False,
) -> int:
    """Find everything that is known to be wrong with a run.

    No weights are loaded. Leaves with exit code 2 when a finding would stop the run.

    Examples:

      zhibei check my_run.yaml
      zhibei check my_run.yaml sft.learning_rate=1e-4
      zhibei check my_run.yaml --machine v100-32g:4
      zhibei check my_run.yaml --fix

    Parameters
    ----------
    run
        A run file, a recipe, a run directory, or a pipeline file (every stage is checked).
    overrides
        Settings laid over it, such as sft.epochs=1.
    compat
        A set of numbers to be laid over the recipe: coati-2023 (docs/recipes.md says what it changes).
    fix
        Show the safe changes as a diff and write them into a copy of the run file (my_run.fixed.yaml).
    machine
        Check for another machine: v100-32g:4, a100-40g:4, rtx4090, t4, h100-80g:8x2, cpu, or a YAML file.
    area
        Only the pitfalls of one area (zhibei pitfalls lists them).
    json
        One JSON document.
    """
    started = time.monotonic()
    overrides = with_compat_set(overrides, compat)
    if is_pipeline(run):
        return _check_pipeline(run, overrides, fix=fix, area=area, machine=machine, json=json)
    resolved, fault = read_what_is_sound(run, overrides)
    if resolved is None:
        assert fault is not None
        raise fault
    wanted: dict[str, Any] = {"machine": machine_of(machine), "area": _area(area), "resume": _resumed(run)}
    facts, found = examine(resolved, fault=fault, mode=choose_mode(quiet=json), **wanted)
    repaired = _repair(run, resolved, found) if fix else None
    mended = _write(repaired, run, resolved) if repaired is not None and fault is None else None
    if json:
        document = {**found.as_dict(), "machine": facts.machine.name, "seconds": time.monotonic() - started}
        if repaired is not None:
            document["fix"] = {**repaired.as_dict(), "file": str(mended) if mended else None}
        console.emit(document, as_json=True)
    else:
        for line in lines_of(found):
            console.stdout.print(line)
        console.stdout.print(last_line(facts, found, seconds=time.monotonic() - started))
        if repaired is not None:
            _show_repair(repaired, mended)
    if mended is not None:
        resolved, _ = read_what_is_sound(mended, overrides)
        assert resolved is not None
        _, found = examine(resolved, **wanted)
        if not json:
            verdict = "still has findings that stop it" if found.blocks else "has nothing that stops it"
            console.stdout.print(f"{mended} {verdict}.")
    return USER_MUST_ACT if found.blocks else DONE


def _check_pipeline(run: str, overrides: tuple[str, ...], *, fix: bool, area: str, machine: str, json: bool) -> int:
    from zhibei.cli.run import look_at

    if fix or area:
        raise UserError(
            f"--{'fix' if fix else 'area'} with a pipeline file",
            expected="a single run",
            fix="leave it out; findings name the line of the pipeline file",
        )
    return look_at(run, overrides, machine=machine, plans=False, json=json)


def examine(
    resolved: ResolvedRun,
    *,
    fault: UserError | None = None,
    machine: Machine | None = None,
    resume: RunDir | None = None,
    area: str = "",
    mode: Mode = "quiet",
) -> tuple[Facts, Checkup]:
    """The facts of a run and what the checks say of them. `fault`: why the run file itself was refused. `resume`: the
    run goes on in that directory."""
    from dataclasses import replace

    from zhibei.config.errors import SeveralErrors
    from zhibei.doctor.checkup import check as check_facts
    from zhibei.doctor.facts.gather import gather_facts

    with ProgressLine(mode) as line:
        facts = gather_facts(resolved, machine=machine, on_rows=_counter(line), resume=resume)
    if fault is not None:
        own = fault.errors if isinstance(fault, SeveralErrors) else (fault,)
        facts = replace(facts, faults=(*own, *facts.faults))
    return facts, check_facts(facts, area=area)


def _counter(line: ProgressLine) -> Callable[[int, str], None]:
    """Shows rows while they are prepared; where they come from concerns nobody who asks for a check."""

    def count(done: int, about: str) -> None:
        if about == "preparing rows":
            line.rows(done)

    return count


def machine_of(text: str) -> Machine | None:
    """The machine that `--machine` describes; None without one."""
    if not text:
        return None
    from zhibei.doctor.facts.machine import machine_for

    return machine_for(text)


def _area(name: str) -> str:
    import difflib

    from zhibei.doctor.pitfalls import AREAS

    if name and name not in AREAS:
        near = difflib.get_close_matches(name, AREAS, n=1, cutoff=0.3)
        raise UserError(
            f"there is no area {name!r}",
            expected=f"one of {', '.join(AREAS)}",
            fix=f"did you mean {near[0]}?" if near else "choose one of them",
            where="--area",
        )
    return name


def _repair(run: str, resolved: ResolvedRun, found: Checkup) -> Repair:
    from zhibei.doctor.repair import repair

    return repair(resolved, found.findings, file=_file_of(run))


def _resumed(run: str) -> RunDir | None:
    """A run directory is checked for going on in it."""
    directory = RunDir(Path(run))
    return directory if run not in recipe_names() and directory.manifest.is_file() else None


def _file_of(run: str) -> Path | None:
    """The file that can be mended: not a recipe, and not the record that a run left behind."""
    path = Path(run)
    return path if run not in recipe_names() and path.is_file() else None


def _write(repaired: Repair, run: str, resolved: ResolvedRun) -> Path | None:
    from zhibei.doctor.repair import write_repaired

    file = _file_of(run)
    return write_repaired(repaired, resolved, file) if file is not None and repaired.text else None


def lines_of(found: Checkup) -> Iterator[Text]:
    """Every finding as a person reads it, the costliest first; then what was accepted and what failed on our side."""
    for one in found.findings:
        yield _finding_text(one)
    for one in found.accepted:
        yield Text(f"accepted  {one.id}: {one.finding.what}", style="dim")
    for defect in found.defects:
        yield Text(
            f"zhibei's own fault, not yours: {defect.place} could not be checked ({defect.error}). Please report it.",
            style="magenta",
        )


def _finding_text(one: Found) -> Text:
    finding = one.finding
    text = Text(f"{finding.level.upper():8}", style=STYLES[finding.level])
    text.append(f" {one.id or 'refused'}", style="bold")
    text.append(f"  {one.area + ', ' if one.area else ''}{LOSSES[one.cost]}\n", style="dim")
    text.append(f"  {finding.what}\n")
    _part(text, "where", finding.where)
    if one.fault is not None:
        _part(text, "wanted", one.fault.expected)
    if one.title:
        _part(text, "why", f"{one.title} {_first_sentence(one.why)}".strip())
    _part(text, "to do", finding.to_do, style="green")
    if finding.changes:
        changes = ", ".join(f"{key}: {yaml_value(value)}" for key, value in finding.changes.items())
        _part(text, "change", f"{changes}  ({'safe: --fix writes it' if finding.is_safe else 'your decision'})")
    for line in finding.evidence[:MOST_EVIDENCE]:
        _part(text, "seen", line)
    if len(finding.evidence) > MOST_EVIDENCE:
        _part(text, "seen", f"{len(finding.evidence) - MOST_EVIDENCE} more (--json lists them)")
    if one.id:
        _part(text, "more", f"zhibei pitfalls {one.id}", style="dim")
    return text


def _first_sentence(why: str) -> str:
    """The beginning of a page's reasons; `more:` leads to the rest."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", why, maxsplit=1)[0]


def _part(text: Text, label: str, words: str, *, style: str = "") -> None:
    text.append(f"  {label + ':':8}", style="dim").append(f"{words}\n", style=style)


def last_line(facts: Facts, found: Checkup, *, seconds: float) -> Text:
    """The verdict, and what was looked at, so that silence is not mistaken for health."""
    stops, warnings, notes = (found.count(level) for level in ("stop", "warning", "note"))
    counted = [_counted(stops, "finding stops", "findings stop") + " the run"] if stops else []
    counted += [_counted(warnings, "warning", "warnings")] if warnings else []
    counted += [_counted(notes, "note", "notes")] if notes else []
    style = "bold red" if stops else "bold yellow" if warnings else "bold green"
    text = Text(", ".join(counted) or "Nothing found", style=style)
    looked = [f"{found.num_checks} checks"]
    if facts.rows is not None:
        looked.append(f"{facts.rows.audit.get('rows_read', 0):,} rows")
    name = facts.machine.name
    looked += [f"machine {name}" if facts.machine.is_described else name, f"{seconds:.1f} s"]
    text.append(f" ({', '.join(looked)}).", style="dim")
    missing = [name for name in ("model", "tokenizer", "template") if getattr(facts, name) is None]
    if missing:
        text.append(f"\nNot looked at, because it could not be read: {', '.join(missing)}.", style="yellow")
    return text


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _show_repair(repaired: Repair, mended: Path | None) -> None:
    out: Any = console.stdout
    if not repaired.changes and not repaired.left:
        out.print("Nothing here can be mended without a decision of yours; nothing was written.")
    for line in repaired.diff.splitlines():
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        out.print(Text(line, style=style))
    for line in repaired.left:
        out.print(Text(f"not mended: {line}", style="yellow"))
    if repaired.overrides:
        out.print(f"Add to the command line: {' '.join(repaired.overrides)}")
    if mended is not None:
        out.print(f"Written: {mended}. The original is as it was.")
