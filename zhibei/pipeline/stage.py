"""Runs one training stage of a pipeline, or what is left of it, through the same road as `zhibei train`.

Knows run files and run directories, not what is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun
from zhibei.pipeline.run_text import Settings, run_file_text
from zhibei.store.files import write_text_atomic
from zhibei.store.run_dir import RunDir

Watch = Callable[[dict[str, Any]], None]


def stage_record(name: str, text: str) -> dict[str, Any]:
    """What `watch` is told when a stage begins."""
    return {"kind": "stage", "name": name, "text": text}


def write_run_file(path: Path, settings: Settings, *, about: str) -> Path:
    """A run file a person can read, change and run again with `zhibei train`."""
    write_text_atomic(path, run_file_text(settings, about=about))
    return path


Rehearse = Callable[[ResolvedRun], dict[str, Any] | None]
"""Tries a run before it starts; gives the document for rehearsal.json, or None where nothing was tried."""


def train_stage(run_file: Path, *, watch: Watch, on_rows: Callable[[int, str], None] | None = None) -> RunDir:
    """Train what the run file says; a stage that is done is left alone, one that was interrupted is resumed.

    It is checked first, as `zhibei train` does: `watch` gets the warnings. Raises UserError when findings stop the run,
    and what training raises.
    """
    return train_resolved(read_run(run_file), watch=watch, on_rows=on_rows)


def train_resolved(
    resolved: ResolvedRun,
    *,
    watch: Watch,
    on_rows: Callable[[int, str], None] | None = None,
    rehearse: Rehearse | None = None,
) -> RunDir:
    """The same for a run that was read already. A run that is resumed goes on with the values it was started with; of
    one that is finished, the forms that are still missing are made (`hand_over`)."""
    from zhibei.doctor.guard import hand_over, train_guarded
    from zhibei.report.page import write_report
    from zhibei.train.beginning import run_dir_of

    run_dir = run_dir_of(resolved.run)
    if run_dir.model.is_dir():
        hand_over(resolved, run_dir, watch=watch)
        return run_dir
    resume = run_dir if run_dir.manifest.is_file() else None
    if resume is not None:
        resolved = read_run(str(run_dir.resolved))
    try:
        return train_guarded(resolved, watch=watch, resume=resume, on_rows=on_rows, rehearse=rehearse)
    finally:
        if run_dir.metrics.is_file():
            write_report(run_dir)
