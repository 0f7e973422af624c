"""Where a run will write: what is there already, and how much room there is. Knows no run file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """`path` is the run directory, `place` the nearest folder that exists."""

    path: Path
    place: Path
    exists: bool = False
    holds: str = ""
    """What is in it: "" nothing, "a run of zhibei", "a checkpoint of transformers' Trainer", "other files"."""
    examples: tuple[str, ...] = ()
    is_writable: bool = True
    free_bytes: int | None = None
    quota_free_bytes: int | None = None
    free_inodes: int | None = None
    file_system: str = ""
    """ext4, nfs4, overlay, tmpfs, ..."""
