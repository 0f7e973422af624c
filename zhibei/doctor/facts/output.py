"""Where a run will write: what is there already, and how much room there is. Knows no run file."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zhibei.store.run_dir import RunDir

MOST_EXAMPLES = 5
# What transformers' Trainer leaves in an output directory; its checkpoints are folders `checkpoint-500`.
TRAINER_FILES = {"trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}

# The kernel's own views; nothing can be made there, whatever the permissions say.
VIRTUAL_FILE_SYSTEMS = {"proc", "sysfs", "cgroup", "cgroup2", "devpts", "debugfs", "tracefs", "securityfs"}


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


def read_output(run_dir: RunDir, *, resume: RunDir | None = None) -> OutputFacts:
    """The run's directory and the disk behind it, links followed. `resume`: what is there is the run's own."""
    path = (resume or run_dir).path
    real = path.expanduser().resolve()
    place = next(folder for folder in (real, *real.parents) if folder.exists())
    entries = _entries(real)
    holds = "" if resume is not None else _contents(path, entries)
    return OutputFacts(
        path=path,
        place=place,
        exists=os.path.lexists(path),
        holds=holds,
        examples=tuple(sorted(entries)[:MOST_EXAMPLES]) if holds else (),
        is_writable=place.is_dir()
        and os.access(place, os.W_OK | os.X_OK)
        and file_system_of(place) not in VIRTUAL_FILE_SYSTEMS,
        free_bytes=shutil.disk_usage(place).free,
        quota_free_bytes=_quota_free_bytes(place),
        free_inodes=_free_inodes(place),
        file_system=file_system_of(place),
    )


def _entries(folder: Path) -> set[str]:
    if not folder.exists():
        return set()
    if not folder.is_dir():
        return {folder.name}
    try:
        return {entry.name for entry in os.scandir(folder)}
    except OSError:
        return set()  # a folder that cannot be listed cannot be written either, and is_writable says so


def _contents(path: Path, entries: set[str]) -> str:
    if not entries:
        return ""
    run_dir = RunDir(path)
    if {run_dir.manifest.name, run_dir.resolved.name} & entries:
        return "a run of zhibei"
    if TRAINER_FILES & entries or any(name.startswith("checkpoint-") for name in entries):
        return "a checkpoint of transformers' Trainer"
    return "other files"


def _free_inodes(place: Path) -> int | None:
    """File names that can still be made; None where the file system does not count them (btrfs says 0 of 0)."""
    found = os.statvfs(place)
    return found.f_favail if found.f_files else None


def _quota_free_bytes(place: Path) -> int | None:
    """What the user's quota leaves on that file system; None without quotas or without the program to ask."""
    program = shutil.which("quota")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, "--no-wrap", "--raw-grace", "--local-only", "--filesystem", str(place)],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return quota_free_bytes(answer.stdout.splitlines())


def quota_free_bytes(lines: Iterable[str]) -> int | None:
    """From the table of quota(1): file system, blocks of 1 KiB used (a star when over), soft and hard limit."""
    left = []
    for line in lines:
        cells = line.split()
        numbers = [cell.rstrip("*") for cell in cells[1:4]]
        if len(numbers) == 3 and all(number.isdigit() for number in numbers):
            used, soft, hard = map(int, numbers)
            limits = [limit for limit in (soft, hard) if limit]
            if limits:
                left.append((min(limits) - used) * 1024)
    return max(0, min(left)) if left else None


def file_system_of(place: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """The kind of the file system a folder lies on, by the longest mount point above it; "" where that is unknown."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        cells, rest = before.split(), after.split()
        if len(cells) < 5 or not rest:
            continue
        point = cells[4].replace("\\040", " ")
        # Later lines cover earlier ones on the same mount point.
        if (place == Path(point) or place.is_relative_to(point)) and len(point) >= len(best):
            best, kind = point, rest[0]
    return kind
