"""What `zhibei train` and `zhibei resume` do once a run is trained: the forms of `hand_over`, and how that is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from zhibei.cli import console
from zhibei.cli.progress import ProgressLine, choose_mode
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.export.after_training import Made


def hand_over_after(resolved: ResolvedRun, run_dir: RunDir, *, quiet: bool, as_json: bool) -> None:
    """Make the forms that the run file asks for, show how each compares with the run, and put them on its page.

    Raises UserError naming what could not be made; the run stays.
    """
    if not resolved.run.hand_over:
        return
    from zhibei.cli.parity_text import telling
    from zhibei.doctor.guard import hand_over
    from zhibei.report.page import write_report

    is_shown = not quiet and not as_json
    with ProgressLine(choose_mode(quiet=quiet, as_json=as_json)) as line:
        try:
            hand_over(
                resolved,
                run_dir,
                watch=line if as_json else lambda record: None,
                on_made=_show if is_shown else lambda made: None,
                progress=telling(as_json=not is_shown),
            )
        finally:
            if run_dir.metrics.is_file():
                write_report(run_dir)


def is_incomplete(run_dir: RunDir) -> bool:
    """Whether a finished run lacks a form that it was to be handed over in."""
    if not run_dir.model.is_dir() or not run_dir.resolved.is_file():
        return False
    asked = read_run(str(run_dir.resolved)).run.hand_over
    if not asked:
        return False
    from zhibei.export.after_training import pending_forms

    return bool(pending_forms(run_dir, asked))


def _show(made: Made) -> None:
    from zhibei.cli.parity_text import show, size
    from zhibei.export.parity_limits import limits_for

    console.stdout.print(Text(f"\n{made.form}: {made.path}, {size(made.num_bytes)}", style="bold"))
    if made.parity is not None:
        show(made.parity, limits_for(made.parity.kind))
    for note in made.notes:
        console.stdout.print(Text(f"note: {note}", style="dim"))
