"""A directory that holds the runs of several stages, and which of them a person means. Knows no stage's work.

`pipeline.json`: {"stages": ["pretrain", "sft"], "final": "sft"}; each stage is a run directory below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.store.files import read_json, write_json_atomic

PIPELINE_FILE = "pipeline.json"


def write_pipeline(folder: Path, *, stages: Sequence[str], final: str) -> None:
    """Note the stages in order, and the one whose model is the result."""
    write_json_atomic(folder / PIPELINE_FILE, {"stages": list(stages), "final": final})


def final_run(path: Path) -> Path:
    """The run directory of the last stage when `path` holds a pipeline, else `path` itself.

    Raises UserError when pipeline.json names no folder that is there.
    """
    file = path / PIPELINE_FILE
    if not file.is_file():
        return path
    noted = read_json(file)
    final = noted.get("final") if isinstance(noted, dict) else None
    if not isinstance(final, str) or Path(final).name != final or not (path / final).is_dir():
        raise UserError(
            f"the last stage is {final!r}, and there is no such run in {path}",
            expected="the name of a run directory beside it",
            fix=f"name the run yourself, one of the folders in {path}",
            where=str(file),
        )
    return path / final
