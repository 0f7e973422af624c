"""`zhibei rehearse`, and the rehearsal that training starts with. Knows how steps look, not what they try."""

from __future__ import annotations

import contextlib
import json as json_format
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zhibei.cli import console
from zhibei.cli.check import examine, lines_of
from zhibei.cli.progress import printable
from zhibei.config.errors import DONE, USER_MUST_ACT, UserError
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun, write_resolved
from zhibei.store.files import write_json_atomic
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.doctor.rehearsal import Rehearsal, Step


def rehearse(run: str, /, *overrides: str, json: bool = False) -> int:
    """Try a run for a minute: real weights, the worst batch, two steps, an evaluation, a save, and all of it read back.

    Nothing is left behind. Leaves with exit code 2 when a step fails.

    Examples:

      zhibei rehearse my_run.yaml
      zhibei rehearse my_run.yaml sft.micro_batch_tokens=8192
      zhibei rehearse my_run.yaml --json

    Parameters
    ----------
    run
        A run file, a recipe, or a run directory.
    overrides
        Settings laid over it, such as sft.epochs=1.
    json
        One JSON document; the steps are told on stderr meanwhile.
    """
    from zhibei.doctor.rehearsal import rehearse as try_run

    resolved = read_run(run, overrides)
    directory = RunDir(Path(run))
    own = directory if directory.manifest.is_file() else None
    _, found = examine(resolved, resume=own)
    if found.blocks:
        raise found.as_error()
    screen: Any = console.stderr if json else console.stdout
    done = try_run(resolved, on_step=_teller(screen))
    if own is not None:
        write_json_atomic(own.rehearsal, done.as_dict())
    if json:
        console.emit(done.as_dict(), as_json=True)
    else:
        for line in lines_of(done.checkup):
            console.stdout.print(line)
        console.stdout.print(_verdict(done))
    return USER_MUST_ACT if done.checkup.blocks else DONE


def is_wanted(resolved: ResolvedRun) -> bool:
    """Whether this run is rehearsed before it starts (`rehearse` in its run file; auto: on a GPU)."""
    from zhibei.model.device import choose_device

    wanted = resolved.run.rehearse
    return wanted == "always" or (wanted == "auto" and choose_device(resolved.run.device).type == "cuda")


def rehearse_before(resolved: ResolvedRun, *, quiet: bool) -> dict[str, Any]:
    """The rehearsal in a process of its own, so that the run itself starts clean; the document of `--json`.

    Raises UserError when the run must not start.
    """
    with tempfile.TemporaryDirectory(prefix="zhibei-rehearsal-") as folder:
        file = Path(folder) / f"{resolved.run.name}.yaml"
        write_resolved(resolved, file)
        command = [sys.executable, "-m", "zhibei", "rehearse", str(file), "--json"]
        # It is one process, also where the run itself has several ranks.
        alone = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
        done = subprocess.run(
            command,
            env=alone,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
        )
    document: dict[str, Any] = {"error": {"what": f"its process died (exit code {done.returncode})"}}
    with contextlib.suppress(ValueError):
        document = json_format.loads(done.stdout)
    if "error" in document:
        error: dict[str, str] = document["error"]
        raise UserError(
            f"the rehearsal could not be held: {error['what']}",
            expected=error.get("expected", "a run that can be tried"),
            fix=error.get("fix", "look at it with zhibei rehearse, or go without: rehearse: never"),
            where=error.get("where", "rehearse"),
        )
    if document["blocks"]:
        worst = next(one for one in document["findings"] if one["level"] == "stop")
        raise UserError(
            f"the rehearsal found: {worst['what']}",
            expected="a run whose worst batch, save and reload work",
            fix=f"{worst['to_do']}; see it whole with: zhibei rehearse",
            where=worst["where"],
        )
    return document


def _teller(screen: Any) -> Callable[[str, Step | None], None]:
    def tell(name: str, step: Step | None) -> None:
        if step is None:
            return
        text = Text("ok      " if step.passed else "FAILED  ", style="green" if step.passed else "bold red")
        text.append(f"{name:12}", style="bold").append(f" {step.seconds:7.1f} s  ", style="dim").append(
            printable(step.detail)
        )
        screen.print(text)

    return tell


def _verdict(done: Rehearsal) -> Text:
    seconds = sum(step.seconds for step in done.steps)
    failed = [step.name for step in done.steps if not step.passed]
    if failed:
        return Text(
            f"The rehearsal failed at: {', '.join(failed)} ({seconds:.0f} s). Nothing was left behind.", "bold red"
        )
    return Text(f"Rehearsed in {seconds:.0f} s: {len(done.steps)} steps passed. Nothing is left behind.", "bold green")
