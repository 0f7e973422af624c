"""Checkpoints that are complete or absent: written aside, read back, then renamed. Knows no optimiser and no model.

A checkpoint is a folder `step-000200` with one or more safetensors files per group of tensors (`model`, `optimizer`,
`random`, ...), `state.json` (plain values) and `files.json` (store/checkpoint_files.py; written last). Several
processes may write one together, each its own files: a `Draft` makes the folder, and a checkpoint of it in the end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.store.checkpoint_files import (
    Groups,
    check_checkpoint,
    files_record,
    line_of,
    read_groups,
    require_same,
    require_sound,
    share_bytes,
    write_share,
    write_text,
)
from zhibei.store.files import as_json, read_json, require_space
from zhibei.store.folders import Problem, clean_left_overs, remove_folder, whole_folder
from zhibei.store.parts import StoredTensors
from zhibei.store.shards import DEFAULT_SHARD_BYTES

STEP_NAME = re.compile(r"step-(\d{6,})")
GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
SPARE_BYTES = 2**20


@dataclass(frozen=True)
class Sound:
    """A verified checkpoint, and what was found wrong with newer ones on the way to it."""

    path: Path
    step: int
    notes: list[Problem] = field(default_factory=list)


def step_path(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def list_steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, sound or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    matches = ((STEP_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir() if path.is_dir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


class _GivenUp(Exception):
    """Lets the folder of a draft vanish."""


class Draft:
    """A checkpoint that is being written. Its owner makes it and commits it; others only fill `folder` (write_share).

    Killed at any moment, it leaves the older checkpoints and at most a `.writing-*` folder that the next run cleans.
    """

    def __init__(
        self,
        checkpoints: Path,
        step: int,
        *,
        groups: Collection[str],
        state: Mapping[str, Any],
        needed_bytes: int,
        world: int = 1,
    ) -> None:
        """`state` must be JSON without NaN and should hold `run_id`: the same step of another run is never replaced.
        `needed_bytes`: of all writers together. UserError when there is too little space or the folder is taken."""
        self.step, self.world = step, world
        self.final = step_path(checkpoints, step)
        full_state = {**state, "step": step, "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        self._state_text = as_json(full_state)
        for group in groups:
            if not GROUP_NAME.fullmatch(group) or group in ("state", "files"):
                raise ValueError(f"group name {group!r} must be lower-case letters, digits and underscores")
        self._groups = list(groups)
        _refuse_other_run(self.final, state)
        needed = needed_bytes + len(self._state_text) + SPARE_BYTES
        require_space(checkpoints, needed_bytes=needed, purpose=self.purpose)
        self._open = ExitStack()
        self.folder = self._open.enter_context(whole_folder(self.final, purpose=self.purpose))

    @property
    def purpose(self) -> str:
        """What a person should read when it fails."""
        return f"checkpoint {self.final.name}"

    def commit(self, lines: Iterable[Mapping[str, Any]]) -> Path:
        """Make it a checkpoint of these files (what every `write_share` has returned). UserError when the disk refuses;
        nothing is then left behind."""
        with self._open.pop_all():
            state = line_of(write_text(self.folder, "state.json", self._state_text))
            record = files_record(self.step, [*lines, state], groups=self._groups, world=self.world)
            write_text(self.folder, "files.json", as_json(record))
            require_same(self.folder / "state.json", state)
            require_sound(self.folder, self.step)
        return self.final

    def abandon(self) -> None:
        """Remove what was written; the older checkpoints are untouched."""
        with suppress(_GivenUp), self._open.pop_all():
            raise _GivenUp


def save_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    groups: Groups,
    state: Mapping[str, Any],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Save tensors and plain state as `step-000200`, by one process alone; when this returns, the checkpoint is on disk
    and was read back.

    Tensors pass through host memory one at a time. `step` and `saved_at` are added to `state` (see `Draft`).
    UserError when the disk is full, before or while writing; nothing is then left behind.
    """
    needed = share_bytes(groups, max_shard_bytes=max_shard_bytes)
    draft = Draft(checkpoints, step, groups=list(groups), state=state, needed_bytes=needed)
    try:
        lines = write_share(draft.folder, groups, purpose=draft.purpose, max_shard_bytes=max_shard_bytes)
    except BaseException:
        draft.abandon()
        raise
    return draft.commit(lines)


def _refuse_other_run(final: Path, state: Mapping[str, Any]) -> None:
    if not (final / "state.json").exists():
        return
    try:
        owner = read_json(final / "state.json").get("run_id")
    except (UserError, AttributeError):
        return  # damaged: it will be replaced by a sound one
    if owner != state.get("run_id"):
        raise UserError(
            f"the checkpoint exists and belongs to run {owner}; this is run {state.get('run_id')}",
            expected="an empty checkpoints folder, or that of the same run",
            fix="give the run another name, or move the old run away",
            where=str(final),
        )


def newest_sound(checkpoints: Path) -> Sound | None:
    """The newest checkpoint that verifies, with a note for each newer one that does not. None: there is none at all.

    Left-over folders of dead writers are cleaned first, and noted. UserError when checkpoints exist and none is sound.
    """
    notes = clean_left_overs(checkpoints)
    steps = list_steps(checkpoints)
    for step, path in reversed(steps):
        problems = check_checkpoint(path, step=step)
        if not problems:
            return Sound(path, step, notes)
        notes += problems
    if not steps:
        return None
    raise UserError(
        f"{len(steps)} checkpoints, none of them sound:\n    " + "\n    ".join(str(note) for note in notes),
        expected="at least one complete checkpoint",
        fix="restore one from a copy, or start the run anew under another name; nothing was removed",
        where=str(checkpoints),
    )


def load_checkpoint(path: Path) -> tuple[dict[str, StoredTensors], dict[str, Any]]:
    """The tensors of each group (read from disk when asked for, whole or some rows), and the state. Verify first: see
    `newest_sound`."""
    return read_groups(path), read_json(path / "state.json")


def prune(
    checkpoints: Path, *, keep: int = 2, protect: Collection[Path] = (), verified: Path | None = None
) -> list[Path]:
    """Remove all but the `keep` newest sound checkpoints and the protected ones; returns what was removed.

    The newest sound one always stays. Its hashes are read again unless it is `verified` (what `save_checkpoint` has
    just returned); of the others, names, sizes and headers are looked at. A damaged one counts for nothing: it goes
    when it is older than the kept ones, and stays, as evidence, when newer.
    """
    if keep < 1:
        raise ValueError("keep must be at least 1")
    protected = {path.resolve() for path in protect}
    kept: list[Path] = []
    removed = []
    for step, path in reversed(list_steps(checkpoints)):
        if len(kept) < keep:
            with_hashes = not kept and (verified is None or path.resolve() != verified.resolve())
            if not check_checkpoint(path, step=step, with_hashes=with_hashes):
                kept.append(path)
        elif path.resolve() not in protected:
            remove_folder(path)
            removed.append(path)
    return removed
