"""Checkpoints that are complete or absent: written aside, read back, then renamed. Knows no optimiser and no model.

A checkpoint is a folder `step-000200` with one or more safetensors files per group of tensors (`model`, `optimizer`,
`random`, ...), `state.json` (plain values) and `files.json` (name, size and SHA-256 of every other file; written last).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.store.files import (
    HashedFile,
    as_json,
    drop_from_page_cache,
    read_json,
    require_space,
    sha256_of,
)
from zhibei.store.folders import Problem, clean_left_overs, remove_folder, whole_folder
from zhibei.store.shards import (
    DEFAULT_SHARD_BYTES,
    TensorFolder,
    Writable,
    WrittenFile,
    plan_shards,
    read_header,
    read_tensors,
    write_shards,
)

FILES_FORMAT = 1
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


def save_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    groups: Mapping[str, Mapping[str, Writable]],
    state: Mapping[str, Any],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Save tensors and plain state as `step-000200`; when this returns, the checkpoint is on disk and was read back.

    Tensors pass through host memory one at a time. `state` must be JSON without NaN and should hold `run_id`: the same
    step of another run is never replaced. `step` and `saved_at` are added to it.
    Killed at any moment, it leaves the older checkpoints and at most a `.writing-*` folder that the next run cleans.
    UserError when the disk is full, before or while writing; nothing is then left behind.
    """
    final = step_path(checkpoints, step)
    full_state = {**state, "step": step, "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    state_text = as_json(full_state)
    plans = {}
    for group, tensors in groups.items():
        if not GROUP_NAME.fullmatch(group) or group in ("state", "files"):
            raise ValueError(f"group name {group!r} must be lower-case letters, digits and underscores")
        plans[group] = plan_shards(tensors, stem=group, max_shard_bytes=max_shard_bytes)
    _refuse_other_run(final, state)
    needed = sum(plan.num_bytes(groups[group]) for group, files in plans.items() for plan in files)
    require_space(checkpoints, needed_bytes=needed + len(state_text) + SPARE_BYTES, purpose=f"checkpoint {final.name}")
    with whole_folder(final, purpose=f"checkpoint {final.name}") as temporary:
        written: list[WrittenFile] = []
        for group, files in plans.items():
            written += write_shards(temporary, groups[group], plans=files)
        written.append(_write_file(temporary, "state.json", state_text))
        _write_file(temporary, "files.json", as_json(_files_record(step, written, list(groups))))
        _require_sound(temporary, step)
    return final


def _write_file(folder: Path, name: str, text: str) -> WrittenFile:
    file = HashedFile(folder / name)
    try:
        file.write(text.encode("utf-8", errors="backslashreplace"))
    except BaseException:
        file.abandon()
        raise
    return WrittenFile(name, file.num_bytes, file.close(), ())


def _files_record(step: int, written: list[WrittenFile], groups: list[str]) -> dict[str, Any]:
    files = [
        {"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256, "tensors": len(file.tensors)}
        for file in written
    ]
    return {"format": FILES_FORMAT, "step": step, "groups": groups, "files": files}


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


def _require_sound(temporary: Path, step: int) -> None:
    problems = check_checkpoint(temporary, step=step)
    if problems:
        raise UserError(
            f"what was just written reads back differently: {problems[0]}",
            expected="the bytes that were written",
            fix="the disk or its driver is faulty: write to another one; older checkpoints are untouched",
            where=str(temporary.parent),
        )


def check_checkpoint(path: Path, *, step: int | None = None, with_hashes: bool = True) -> list[Problem]:
    """Everything wrong with one checkpoint: missing, extra, truncated or changed files, a wrong step. Empty: sound.

    `with_hashes=False` looks at names, sizes and headers only: a flipped bit then goes unseen.
    """
    try:
        record = read_json(path / "files.json")
        state = read_json(path / "state.json")
        listed = {str(item["name"]): (int(item["bytes"]), str(item["sha256"])) for item in record["files"]}
        steps = {int(record["step"]), int(state["step"])}
        groups = [str(group) for group in record["groups"]]
    except UserError as problem:
        return [Problem(problem.where, problem.what)]
    except (KeyError, TypeError, ValueError) as problem:
        return [Problem(str(path / "files.json"), f"not as zhibei writes it: {type(problem).__name__} {problem}")]
    problems = []
    if step is not None and steps != {step}:
        problems.append(Problem(str(path), f"holds step {sorted(steps)}, its name says {step}"))
    present = {item.name for item in path.iterdir()}
    problems += [
        Problem(str(path / name), "not in files.json, so not part of the checkpoint")
        for name in sorted(present - set(listed) - {"files.json"})
    ]
    problems += [
        Problem(str(path), f"no file of group {group}")
        for group in groups
        if not any(name.split(".")[0].split("-")[0] == group for name in listed)
    ]
    for name, (num_bytes, sha256) in listed.items():
        problem = _check_file(path / name, num_bytes=num_bytes, sha256=sha256 if with_hashes else None)
        if problem:
            problems.append(Problem(str(path / name), problem))
    return problems


def _check_file(path: Path, *, num_bytes: int, sha256: str | None) -> str | None:
    """What is wrong with one file, or None."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != num_bytes:
        return f"{'truncated to' if size < num_bytes else 'grown to'} {size:,} of {num_bytes:,} bytes"
    try:
        if path.suffix == ".safetensors" and read_header(path).file_bytes != num_bytes:
            return "its header promises another size"
        if sha256 is not None:
            drop_from_page_cache(path)
            found = sha256_of(path)
            if found != sha256:
                return f"hash differs: {found[:12]}… instead of {sha256[:12]}… (bits changed after writing)"
    except UserError as problem:
        return problem.what
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    return None


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


def load_checkpoint(path: Path) -> tuple[dict[str, TensorFolder], dict[str, Any]]:
    """The tensors of each group (read from disk when asked for) and the state. Verify first: see `newest_sound`."""
    record = read_json(path / "files.json")
    state = read_json(path / "state.json")
    return {group: read_tensors(path, stem=group) for group in record["groups"]}, state


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
