"""`zhibei train` and `zhibei resume`. Knows how a run is started and shown, not how it is computed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from zhibei.cli import console
from zhibei.cli.check import examine, lines_of
from zhibei.cli.progress import ProgressLine, choose_mode
from zhibei.cli.rehearse import is_wanted, rehearse_before
from zhibei.config.errors import USER_MUST_ACT, UserError
from zhibei.config.read import read_run, with_compat_set
from zhibei.config.resolve import ResolvedRun
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.doctor.checkup import Checkup


def train(
    run: str, /, *overrides: str, compat: str = "", dry_run: bool = False, quiet: bool = False, json: bool = False
) -> int | None:
    """Fine-tune a model as a run file or recipe says.

    Examples:

      zhibei train my_run.yaml
      zhibei train my_run.yaml sft.learning_rate=1e-4 name=warmer
      zhibei train alpaca-lora-7b model.path=llama-7b data.sources=[alpaca.json]
      zhibei train my_run.yaml --dry-run

    Parameters
    ----------
    run
        A run file or the name of a recipe (zhibei config --recipes).
    overrides
        Settings laid over it, such as sft.epochs=1.
    compat
        A set of numbers to be laid over the recipe: coati-2023 (docs/recipes.md says what it changes).
    dry_run
        Read the run file, prepare and audit every row, say what would be trained; load no weights, write no run.
    quiet
        Print only what went wrong, and the last word.
    json
        Every record as one JSON line.
    """
    resolved = read_run(run, with_compat_set(overrides, compat))
    if dry_run:
        return _dry_run(resolved, as_json=json, quiet=quiet)
    return _train(resolved, None, quiet=quiet, as_json=json)


def resume(run_dir: Path, /, *, quiet: bool = False, json: bool = False) -> int | None:
    """Go on with a run that was stopped, from its newest sound checkpoint.

    Examples:

      zhibei resume runs/my_run

    Parameters
    ----------
    run_dir
        The run's directory.
    quiet
        Print only what went wrong, and the last word.
    json
        Every record as one JSON line.
    """
    directory = RunDir(run_dir)
    if not directory.resolved.is_file() or not directory.manifest.is_file():
        raise UserError(
            f"{run_dir} is no run directory (no resolved.yaml and manifest.json in it)",
            expected="a directory that zhibei train wrote, e.g. runs/my_run",
            fix="start a run with: zhibei train RUN_FILE",
        )
    if directory.model.is_dir():
        raise UserError(
            f"{run_dir} is finished: {directory.model} is written",
            expected="a run that was stopped",
            fix=f"look at it with: zhibei report {run_dir}; to train longer, start a new run with "
            f"model.path={directory.model}",
        )
    return _train(read_run(str(directory.resolved)), directory, quiet=quiet, as_json=json)


def _train(resolved: ResolvedRun, resumed: RunDir | None, *, quiet: bool, as_json: bool) -> int | None:
    found = _checked(resolved, resumed, quiet=quiet, as_json=as_json)
    if found.blocks:
        return _refused(found, quiet=quiet, as_json=as_json)
    from zhibei.doctor.guard import train_watched
    from zhibei.train.beginning import run_dir_of

    rehearsed = None
    if resumed is None and is_wanted(resolved):
        rehearsed = rehearse_before(resolved, quiet=quiet or as_json)
    run_dir = resumed or run_dir_of(resolved.run)
    before = _stamp(run_dir)
    with ProgressLine(choose_mode(quiet=quiet, as_json=as_json)) as line:
        documents = {"check": found.as_dict(), "rehearsal": rehearsed}
        try:
            run_dir = train_watched(resolved, documents, watch=line, resume=resumed)
        except BaseException:
            # The page of a run that stopped is worth having; what stopped it is what must be told. A run that was
            # refused before it went on keeps the page it has.
            with contextlib.suppress(Exception):
                if _stamp(run_dir) != before:
                    _report(run_dir)
            raise
        _report(run_dir)
    if as_json:
        return None
    use = (
        f"  score with:  zhibei.judge('{run_dir.path}').score(messages), in Python\n"
        if resolved.run.stage == "reward"
        else f"  talk to it:  zhibei chat {run_dir.path}\n"
    )
    console.stdout.print(
        f"\n{run_dir.model} is trained and proved.\n"
        f"{use}"
        f"  look at it:  {run_dir.report}\n"
        f"  check it:    zhibei verify {run_dir.path}"
    )
    return None


def _checked(resolved: ResolvedRun, resumed: RunDir | None, *, quiet: bool, as_json: bool) -> Checkup:
    """What `zhibei check` says of the run, shown with the audit of its rows; no weights are loaded."""
    from zhibei.data.audit import format_audit

    facts, found = examine(resolved, resume=resumed, mode=choose_mode(quiet=quiet or as_json))
    if not quiet and not as_json:
        if facts.rows is not None and facts.rows.audit:
            console.stderr.print(format_audit(dict(facts.rows.audit)))
        if not _is_one_refusal(found):
            for line in lines_of(found):
                console.stderr.print(line)
    return found


def _refused(found: Checkup, *, quiet: bool, as_json: bool) -> int:
    """The exit code of a run that must not start. Raises the refusal where nothing was shown yet."""
    if as_json:
        console.emit_error({**found.as_error().as_dict(), "exit_code": USER_MUST_ACT, "check": found.as_dict()})
    elif quiet or _is_one_refusal(found):
        raise found.as_error()
    else:
        stops = sum(one.blocks for one in found.findings)
        counted = "1 finding stops" if stops == 1 else f"{stops} findings stop"
        console.stderr.print(f"{counted} this run. No weights were loaded, and nothing was written.", style="bold red")
    return USER_MUST_ACT


def _is_one_refusal(found: Checkup) -> bool:
    """A single refusal is shown as the error it is, as every command shows errors."""
    return len(found.findings) == 1 and found.findings[0].fault is not None


def _stamp(run_dir: RunDir) -> tuple[int, int]:
    """Size and time of the metrics file; it differs once a run has written anything."""
    found = run_dir.metrics.stat() if run_dir.metrics.is_file() else None
    return (found.st_size, found.st_mtime_ns) if found else (0, 0)


def _report(run_dir: RunDir) -> None:
    from zhibei.report.page import write_report

    if run_dir.metrics.is_file():
        write_report(run_dir)


def _dry_run(resolved: ResolvedRun, *, as_json: bool, quiet: bool) -> int | None:
    from zhibei.data.audit import format_audit
    from zhibei.train.loops import plan_without_model

    _, found = examine(resolved, mode=choose_mode(quiet=quiet or as_json))
    if found.blocks:
        if not quiet and not as_json and not _is_one_refusal(found):
            for line in lines_of(found):
                console.stderr.print(line)
        return _refused(found, quiet=quiet, as_json=as_json)
    rows, plan = plan_without_model(resolved)
    if as_json:
        console.emit({"plan": plan, "audit": rows.audit, "check": found.as_dict()}, as_json=True)
        return None
    console.emit(format_audit(rows.audit))
    console.stdout.print("\n".join(f"{name.replace('_', ' '):24} {value}" for name, value in plan.items()))
    for line in lines_of(found):
        console.stdout.print(line)
    console.stdout.print("Nothing was trained or written (--dry-run).")
    return None
