"""Folders that are whole or absent: filled under another name, then renamed. Knows no tensors and no checkpoint format.

Beside `step-000200` its writer makes `.writing-step-000200-<pid>` and the lock file `.writing-step-000200.lock`. An
older folder becomes `.replaced-…` for the moment between two renames; one being deleted is `.removing-…`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zhibei.store.files import NEW_FILE_NAME, disk_error, sync_folder
from zhibei.store.locks import hold_lock, is_running, take_over

LEFT_OVER_NAME = re.compile(r"\.(writing|replaced|removing)-(.+)-(\d+)")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file or folder on disk, and why."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@contextmanager
def whole_folder(final: Path, *, purpose: str) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends well it becomes `final`, else it vanishes.

    An existing `final` is replaced, and is there until the new one is complete. Files must be synced by who writes them
    (`HashedFile`, `write_json_atomic`), the folder is synced here. UserError when the disk refuses, or when another
    thread or process is writing the same folder.
    """
    temporary = final.with_name(f".writing-{final.name}-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(_lock_of(final)):
            if temporary.exists():  # of a dead process that had our number: the lock is ours, so nobody fills it
                shutil.rmtree(temporary)
            try:
                temporary.mkdir()
                yield temporary
                sync_folder(temporary)
                _put_in_place(temporary, final)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as problem:
        raise disk_error(problem, purpose=purpose, where=final.parent) from problem


def _lock_of(final: Path) -> Path:
    return final.with_name(f".writing-{final.name}.lock")


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename. An older folder steps aside first; `clean_left_overs` brings it back if we die in between."""
    aside = final.with_name(f".replaced-{final.name}-{os.getpid()}")
    has_older = final.exists()
    if has_older:
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if has_older:
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    if has_older:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is never seen half empty under its own name."""
    aside = path.with_name(f".removing-{path.name}-{os.getpid()}")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean_left_overs(parent: Path) -> list[Problem]:
    """Remove what killed writers left in a folder, and bring back what died while being replaced; says what it found.

    Only names that zhibei makes are touched, and nothing of a living writer.
    """
    notes: list[Problem] = []
    if not parent.is_dir():
        return notes
    for path in sorted(parent.iterdir()):
        new_file = NEW_FILE_NAME.fullmatch(path.name)
        if new_file is not None and path.is_file() and not is_running(int(new_file.group(1))):
            path.unlink(missing_ok=True)
        match = LEFT_OVER_NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            notes += _clean(path, match)
    for path in sorted(parent.glob(".writing-*.lock")):
        with take_over(path, pid=os.getpid()) as is_dead:
            if is_dead:
                path.unlink(missing_ok=True)
    return notes


def _clean(path: Path, match: re.Match[str]) -> list[Problem]:
    kind, name, pid = match.groups()
    final = path.with_name(name)
    with take_over(_lock_of(final), pid=int(pid)) as is_dead:
        # Two may remove the same folder at once; what is being written or replaced needs its writer dead.
        if not is_dead and kind != "removing":
            return []
        if kind == "replaced" and not final.exists():
            os.rename(path, final)
            return [Problem(str(path), f"a save was killed while replacing {name}: the older one is back")]
        shutil.rmtree(path, ignore_errors=True)
        return [Problem(str(path), "left by a save that was killed; removed")] if kind == "writing" else []
