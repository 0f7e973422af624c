"""Runs one training stage of a pipeline, or what is left of it, through the same road as `zhibei train`.

Knows run files and run directories, not what is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zhibei.config.read import read_run
from zhibei.config.resolve import yaml_value
from zhibei.store.files import write_text_atomic
from zhibei.store.run_dir import RunDir

Watch = Callable[[dict[str, Any]], None]
Settings = dict[str, Any]


def stage_record(name: str, text: str) -> dict[str, Any]:
    """What `watch` is told when a stage begins."""
    return {"kind": "stage", "name": name, "text": text}


def write_run_file(path: Path, settings: Settings, *, about: str) -> Path:
    """A run file a person can read, change and run again with `zhibei train`."""
    lines = [f"# {about}"]
    for key, value in settings.items():
        if isinstance(value, dict):
            lines += ["", f"{key}:", *(f"  {name}: {yaml_value(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {yaml_value(value)}")
    write_text_atomic(path, "\n".join(lines) + "\n")
    return path


def train_stage(run_file: Path, *, watch: Watch, on_rows: Callable[[int, str], None] | None = None) -> RunDir:
    """Train what the run file says; a stage that is done is left alone, one that was interrupted is resumed.

    It is checked first, as `zhibei train` does: `watch` gets the warnings. Raises UserError when findings stop the run,
    and what training raises.
    """
    from zhibei.doctor.guard import train_guarded
    from zhibei.report.page import write_report
    from zhibei.train.beginning import run_dir_of

    resolved = read_run(run_file)
    run_dir = run_dir_of(resolved.run)
    if run_dir.model.is_dir():
        return run_dir
    resume = run_dir if run_dir.manifest.is_file() else None
    try:
        return train_guarded(resolved, watch=watch, resume=resume, on_rows=on_rows)
    finally:
        if run_dir.metrics.is_file():
            write_report(run_dir)
