"""`zhibei train` and `zhibei resume`. Knows how a run is started and shown, not how it is computed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei.cli import console
from zhibei.cli.progress import ProgressLine, choose_mode
from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.data.prepared import PreparedSet


def train(run: str, /, *overrides: str, dry_run: bool = False, quiet: bool = False, json: bool = False) -> int | None:
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
    dry_run
        Read the run file, prepare and audit every row, say what would be trained; load no weights, write no run.
    quiet
        Print only what went wrong, and the last word.
    json
        Every record as one JSON line.
    """
    resolved = read_run(run, overrides)
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
            fix=f"talk to it with: zhibei chat {run_dir}; to train longer, start a new run with "
            f"model.path={directory.model}",
        )
    return _train(read_run(str(directory.resolved)), directory, quiet=quiet, as_json=json)


def _train(resolved: ResolvedRun, resumed: RunDir | None, *, quiet: bool, as_json: bool) -> None:
    from zhibei.doctor.watchdogs import watch_over
    from zhibei.train.beginning import run_dir_of
    from zhibei.train.sft import train

    with ProgressLine(choose_mode(quiet=quiet, as_json=as_json)) as line:
        try:
            run_dir = train(
                resolved,
                watch=watch_over(resolved.run, also=line, resumed=resumed),
                resume=resumed,
                on_rows=lambda done, _text: line.rows(done),
                on_audit=None if quiet or as_json else _show_audit(line),
            )
        except BaseException:
            # The page of a run that stopped is worth having; what stopped it is what must be told.
            with contextlib.suppress(Exception):
                _report(resumed or run_dir_of(resolved.run))
            raise
        _report(run_dir)
    if as_json:
        return
    console.stdout.print(
        f"\n{run_dir.model} is trained and proved.\n"
        f"  talk to it:  zhibei chat {run_dir.path}\n"
        f"  look at it:  {run_dir.report}\n"
        f"  check it:    zhibei verify {run_dir.path}"
    )


def _report(run_dir: RunDir) -> None:
    from zhibei.report.page import write_report

    if run_dir.metrics.is_file():
        write_report(run_dir)


def _show_audit(line: ProgressLine) -> Any:
    from zhibei.data.audit import format_audit

    def show(rows: PreparedSet) -> None:
        line.close()
        console.stderr.print(format_audit(rows.audit))

    return show


def _dry_run(resolved: ResolvedRun, *, as_json: bool, quiet: bool) -> None:
    from zhibei.data.audit import format_audit
    from zhibei.train.materials import plan_without_model

    with ProgressLine(choose_mode(quiet=quiet or as_json)) as line:
        rows, plan = plan_without_model(resolved, on_rows=lambda done, _text: line.rows(done))
    if as_json:
        console.emit({"plan": plan, "audit": rows.audit}, as_json=True)
        return
    console.emit(format_audit(rows.audit))
    console.stdout.print("\n".join(f"{name.replace('_', ' '):24} {value}" for name, value in plan.items()))
    console.stdout.print("Nothing was trained or written (--dry-run).")
