"""What starting a run is for one process and for several ranks: checked, watched, reported. Knows the screen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zhibei.cli import console
from zhibei.cli.check import examine, lines_of
from zhibei.cli.progress import ProgressLine, choose_mode
from zhibei.config.errors import USER_MUST_ACT
from zhibei.config.resolve import ResolvedRun
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.doctor.checkup import Checkup


def watched(
    resolved: ResolvedRun,
    documents: Mapping[str, dict[str, Any] | None],
    resumed: RunDir | None,
    *,
    quiet: bool,
    as_json: bool,
) -> RunDir:
    """Train under the watchdogs with a line of progress; the page is written whether the run ends well or not."""
    from zhibei.doctor.guard import train_watched
    from zhibei.train.beginning import run_dir_of

    run_dir = resumed or run_dir_of(resolved.run)
    before = _stamp(run_dir)
    with ProgressLine(choose_mode(quiet=quiet, as_json=as_json)) as line:
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
    return run_dir


def say_done(resolved: ResolvedRun, run_dir: RunDir) -> None:
    """The last words of a run that ended well: what can be done with it."""
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


def checked(resolved: ResolvedRun, resumed: RunDir | None, *, quiet: bool, as_json: bool) -> Checkup:
    """What `zhibei check` says of the run, shown with the audit of its rows; no weights are loaded."""
    from zhibei.data.audit import format_audit

    facts, found = examine(resolved, resume=resumed, mode=choose_mode(quiet=quiet or as_json))
    if not quiet and not as_json:
        if facts.rows is not None and facts.rows.audit:
            console.stderr.print(format_audit(dict(facts.rows.audit)))
        if not is_one_refusal(found):
            for line in lines_of(found):
                console.stderr.print(line)
    return found


def refused(found: Checkup, *, quiet: bool, as_json: bool) -> int:
    """The exit code of a run that must not start. Raises the refusal where nothing was shown yet."""
    if as_json:
        console.emit_error({**found.as_error().as_dict(), "exit_code": USER_MUST_ACT, "check": found.as_dict()})
    elif quiet or is_one_refusal(found):
        raise found.as_error()
    else:
        stops = sum(one.blocks for one in found.findings)
        counted = "1 finding stops" if stops == 1 else f"{stops} findings stop"
        console.stderr.print(f"{counted} this run. No weights were loaded, and nothing was written.", style="bold red")
    return USER_MUST_ACT


def is_one_refusal(found: Checkup) -> bool:
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
