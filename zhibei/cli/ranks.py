"""Training as one of several ranks: rank 0 speaks for all of them. Knows who says what, not how ranks add up.

The check and the rehearsal are held once, by rank 0; what it finds is told to the others. An error is shown by rank 0,
that of another rank too; a rank shows its own only where rank 0 cannot.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei.cli import console
from zhibei.cli.after_training import hand_over_after
from zhibei.cli.training import checked, refused, say_done, watched
from zhibei.config.errors import DONE, OUR_FAULT, RankLost, UserError
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.model.meeting import Meeting

VERDICTS = "ZHIBEI_VERDICTS"
"""Environment variable: a folder of `zhibei launch`. Ranks leave there: begun-RANK (their process number), lost-RANK
(they waited for another one in vain), and RANK (an exit code with which they would end again)."""
SECONDS_TO_TELL = 5.0
SECONDS_TO_MEET = 60.0
"""How long ranks wait for one another where no run file could be read that says it."""


def are_several() -> bool:
    """Whether this process was started as one of several ranks. Loads no torch for one process alone."""
    if os.environ.get("WORLD_SIZE") in (None, "", "1"):
        return False
    from zhibei.model.ranks import ranks_asked

    return ranks_asked().are_several


def train_among_ranks(
    read: Callable[[], ResolvedRun], resumed: RunDir | None, *, quiet: bool, as_json: bool
) -> int | None:
    """Meet the other ranks, agree with them, and train; the exit code of this process.

    Under `zhibei launch` a code that would be the same again is left in its folder, and the process itself succeeds.
    """
    _note("begun-", os.getpid())
    code, is_final = _met_and_trained(read, resumed, quiet=quiet, as_json=as_json)
    if VERDICTS not in os.environ or code == DONE or not is_final:
        return code
    _note("", code)
    return DONE


def _note(kind: str, figure: int) -> None:
    """Leave a figure for the launcher of this node, where there is one."""
    if VERDICTS in os.environ:
        Path(os.environ[VERDICTS], f"{kind}{os.environ['RANK']}").write_text(str(figure), encoding="ascii")


def _met_and_trained(
    read: Callable[[], ResolvedRun], resumed: RunDir | None, *, quiet: bool, as_json: bool
) -> tuple[int, bool]:
    """(exit code, whether starting again would end alike)."""
    from zhibei.model.meeting import meeting
    from zhibei.model.ranks import ranks_asked

    resolved, fault = _read_or_fault(read)
    patience = resolved.run.distributed.patience_seconds if resolved is not None else SECONDS_TO_MEET
    asked = ranks_asked()
    if not asked.is_first:
        _hush()
    with meeting(rank=asked.rank, world=asked.world, patience_seconds=patience) as here:
        here.pulse.on_end = lambda error: _show(here, error, as_json=as_json)
        here.pulse.folder = resumed.path if resumed is not None else None
        try:
            code = _trained(here, resolved, fault, resumed, quiet=quiet, as_json=as_json)
        except UserError as error:
            _end_undisturbed()
            here.leave(error)
            return _show(here, error, as_json=as_json), not isinstance(error, RankLost)
        except Exception as error:
            here.leave(error)
            return _show_defect(here, error, as_json=as_json), False
    return code, True


def _read_or_fault(read: Callable[[], ResolvedRun]) -> tuple[ResolvedRun | None, UserError | None]:
    try:
        return read(), None
    except UserError as fault:
        return None, fault


def _trained(
    here: Meeting,
    resolved: ResolvedRun | None,
    fault: UserError | None,
    resumed: RunDir | None,
    *,
    quiet: bool,
    as_json: bool,
) -> int:
    from zhibei.doctor.agreement import agree
    from zhibei.model.meeting import first_does
    from zhibei.train.beginning import run_dir_of
    from zhibei.train.loops import train

    launches = agree(here, resolved, fault, seconds=here.pulse.patience_seconds)
    assert resolved is not None  # a fault has ended this process by now
    prepared = partial(_prepared, resolved, resumed, launches, quiet=quiet, as_json=as_json)
    told = first_does(here, "check and rehearsal", prepared)
    if told["code"] is not None:
        return told["code"]
    if told["resume"] is not None:
        resumed = RunDir(Path(told["resume"]))
        resolved = read_run(str(resumed.resolved))
    here.pulse.folder = (resumed or run_dir_of(resolved.run)).path
    if here.rank != 0:
        train(resolved, resume=resumed)
        return DONE
    run_dir = watched(resolved, told["documents"], resumed, quiet=quiet, as_json=as_json)
    if not as_json:
        say_done(resolved, run_dir)
    hand_over_after(resolved, run_dir, quiet=quiet, as_json=as_json)
    return DONE


def _prepared(
    resolved: ResolvedRun, resumed: RunDir | None, launches: list[str], *, quiet: bool, as_json: bool
) -> dict[str, Any]:
    """What rank 0 decides for all: where the run goes on, what was found, or the code with which all end."""
    from zhibei.store.manifest import LAUNCHES

    os.environ[LAUNCHES] = ",".join(launches)
    own = resumed or _of_this_launch(resolved, launches)
    outcome: dict[str, Any] = {"code": None, "resume": str(own.path) if own is not None else None}
    if own is not None:
        if own.model.is_dir():
            return {**outcome, "code": DONE}  # the others had ended before the failure that started them again
        resolved = read_run(str(own.resolved))
        if resumed is None and not quiet:
            console.stderr.print(f"started again by the same launch: goes on in {own.path}", style="bold yellow")
    found = checked(resolved, own, quiet=quiet, as_json=as_json)
    if found.blocks:
        return {**outcome, "code": refused(found, quiet=quiet, as_json=as_json)}
    rehearsed = _rehearsed(resolved, quiet=quiet, as_json=as_json) if own is None else None
    return {**outcome, "documents": {"check": found.as_dict(), "rehearsal": rehearsed}}


def _of_this_launch(resolved: ResolvedRun, launches: list[str]) -> RunDir | None:
    """The directory that this launch made before its ranks were started again."""
    from zhibei.store.manifest import read_manifest
    from zhibei.train.beginning import run_dir_of

    run_dir = run_dir_of(resolved.run)
    if not run_dir.manifest.is_file() or not run_dir.resolved.is_file():
        return None
    belongs = set(read_manifest(run_dir.path).get("launch", [])) & set(launches)
    return run_dir if belongs else None


def _rehearsed(resolved: ResolvedRun, *, quiet: bool, as_json: bool) -> dict[str, Any] | None:
    """The rehearsal on rank 0's device alone, where every rank holds the whole model; a divided one may not fit it."""
    from zhibei.cli.rehearse import is_wanted, rehearse_before

    if not is_wanted(resolved):
        return None
    run = resolved.run
    is_divided = run.distributed.sharding != "no_shard" and not (
        run.distributed.sharding == "auto" and run.model.method != "full"
    )
    if is_divided:
        if not quiet and not as_json:
            console.stderr.print(
                "not rehearsed: the model is divided among the ranks, and the rehearsal has one (rehearse: never "
                "leaves this note out)",
                style="dim",
            )
        return None
    return rehearse_before(resolved, quiet=quiet or as_json)


def _show(here: Meeting, error: UserError, *, as_json: bool) -> int:
    """Show an error where it is this rank's to show; its exit code."""
    if _is_ours_to_tell(here, error):
        console.report_error(error, as_json and here.rank == 0)
    if isinstance(error, RankLost):
        _note("lost-", error.exit_code)
    else:
        _wait_for_others(here)
    return error.exit_code


def _show_defect(here: Meeting, error: Exception, *, as_json: bool) -> int:
    if _is_ours_to_tell(here, error):
        debug = os.environ.get("ZHIBEI_DEBUG", "") not in ("", "0")
        console.report_defect(error, debug=debug, as_json=as_json and here.rank == 0)
    _wait_for_others(here)
    return OUR_FAULT


def _is_ours_to_tell(here: Meeting, error: Exception) -> bool:
    if isinstance(error, RankLost):
        return error.is_told_here
    try:
        if here.rank == 0:
            here.tell("told", value=True)
            return True
        return here.wait_for("told", seconds=SECONDS_TO_TELL) is None
    except RuntimeError:  # rank 0 kept the store, and is gone
        return True


def _wait_for_others(here: Meeting) -> None:
    """Rank 0 may keep the store in which the others look for what has been told."""
    if here.rank == 0:
        for rank in range(1, here.world):
            try:
                here.wait_for(f"left/{rank}", seconds=SECONDS_TO_TELL / here.world)
            except RuntimeError:
                return


def _end_undisturbed() -> None:
    """A launcher may say SIGTERM twice; what ended this rank must still be told to the others."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _hush() -> None:
    """Libraries say the same on every rank; it is heard once."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
