"""`zhibei train` and `zhibei resume`. Knows how a run is started and shown, not how it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zhibei.cli import console
from zhibei.cli.after_training import hand_over_after, is_incomplete
from zhibei.cli.check import examine, lines_of
from zhibei.cli.progress import choose_mode
from zhibei.cli.ranks import are_several, train_among_ranks
from zhibei.cli.rehearse import is_wanted, rehearse_before
from zhibei.cli.training import checked, is_one_refusal, refused, say_done, watched
from zhibei.config.errors import UserError
from zhibei.config.read import read_run, with_compat_set
from zhibei.config.resolve import ResolvedRun
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    pass


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
    settings = with_compat_set(overrides, compat)
    if dry_run:
        return _dry_run(read_run(run, settings), as_json=json, quiet=quiet)
    if are_several():
        return train_among_ranks(lambda: read_run(run, settings), None, quiet=quiet, as_json=json)
    return _train(read_run(run, settings), None, quiet=quiet, as_json=json)


def resume(run_dir: Path, /, *, quiet: bool = False, json: bool = False) -> int | None:
    """Go on with a run that was stopped, from its newest sound checkpoint.

    Of a run that is trained, the forms of hand_over that are still missing are made.

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
    if are_several():
        return train_among_ranks(
            lambda: read_run(str(unfinished(run_dir).resolved)), RunDir(run_dir), quiet=quiet, as_json=json
        )
    if is_incomplete(RunDir(run_dir)):
        hand_over_after(read_run(str(RunDir(run_dir).resolved)), RunDir(run_dir), quiet=quiet, as_json=json)
        return None
    directory = unfinished(run_dir)
    return _train(read_run(str(directory.resolved)), directory, quiet=quiet, as_json=json)


def unfinished(run_dir: Path) -> RunDir:
    """The directory of a run that can go on. Raises UserError."""
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
    return directory


def _train(resolved: ResolvedRun, resumed: RunDir | None, *, quiet: bool, as_json: bool) -> int | None:
    found = checked(resolved, resumed, quiet=quiet, as_json=as_json)
    if found.blocks:
        return refused(found, quiet=quiet, as_json=as_json)
    rehearsed = None
    if resumed is None and is_wanted(resolved):
        rehearsed = rehearse_before(resolved, quiet=quiet or as_json)
    documents = {"check": found.as_dict(), "rehearsal": rehearsed}
    run_dir = watched(resolved, documents, resumed, quiet=quiet, as_json=as_json)
    if not as_json:
        say_done(resolved, run_dir)
    hand_over_after(resolved, run_dir, quiet=quiet, as_json=as_json)
    return None


def _dry_run(resolved: ResolvedRun, *, as_json: bool, quiet: bool) -> int | None:
    from zhibei.data.audit import format_audit
    from zhibei.train.loops import plan_without_model

    _, found = examine(resolved, mode=choose_mode(quiet=quiet or as_json))
    if found.blocks:
        if not quiet and not as_json and not is_one_refusal(found):
            for line in lines_of(found):
                console.stderr.print(line)
        return refused(found, quiet=quiet, as_json=as_json)
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
