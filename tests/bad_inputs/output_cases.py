"""Places where a run cannot or must not write. Knows only what is broken."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from unittest import mock

from tests.bad_inputs.place import Place
from tests.bad_inputs.scenario import Build, Scenario


def _existing_run(place: Place) -> None:
    """A finished run of the same name."""
    finish_run(place)


def finish_run(place: Place, *more: str) -> Path:
    """Runs the place's sound run file once, before anything is broken."""
    from tests.bad_inputs.trial import try_command

    seen = try_command([*place.write(), *more], place.folder)
    assert seen.exit_code == 0, seen.text
    return place.folder / "runs" / "tried"


def _foreign_checkpoint(place: Place) -> None:
    """What transformers' Trainer leaves in its output directory."""
    folder = place.folder / "runs" / "tried" / "checkpoint-6"
    folder.mkdir(parents=True)
    for name, content in {
        "trainer_state.json": {"global_step": 6, "log_history": []},
        "config.json": {"model_type": "llama"},
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04not to be opened")
    (folder / "model.safetensors").write_bytes(b"somebody else's")


def _read_only(place: Place) -> None:
    """A folder without write permission; for root, to whom permissions mean nothing, one on /proc."""
    folder = place.folder / "locked"
    folder.mkdir(parents=True)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    place.undo.append(lambda: folder.chmod(stat.S_IRWXU))
    place.set("runs", "/proc/locked" if os.access(folder, os.W_OK) else "locked/runs")


def full_disk(free_bytes: int) -> Build:
    """A file system with so much room left: a small one of its own, or in this process one that reports so."""

    def build(place: Place) -> None:
        runs = place.folder / "runs"
        runs.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={free_bytes}", "tmpfs", str(runs)]
        if not place.in_process and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            place.undo.append(lambda: subprocess.run(["umount", str(runs)], check=False))
            return
        place.in_process = True
        real = os.statvfs

        def statvfs(path: int | str | os.PathLike[str]) -> os.statvfs_result:
            found = real(path)
            blocks = free_bytes // found.f_frsize
            return os.statvfs_result((*tuple(found)[:3], blocks, blocks, *tuple(found)[5:10]))

        patch = mock.patch("os.statvfs", statvfs)
        patch.start()
        place.undo.append(patch.stop)

    return build


OUTPUT_CASES = [
    Scenario(
        "o1_existing_run",
        "A finished run of the same name.",
        _existing_run,
        value="exists already|already",
        where=r"runs/tried",
        remedy="zhibei resume|name=|another name",
    ),
    Scenario(
        "o1b_foreign_ckpt",
        "Somebody else's checkpoint in the output directory.",
        _foreign_checkpoint,
        value="checkpoint-6|Trainer",
        where=r"runs/tried",
        remedy="name=|another name",
    ),
    Scenario(
        "o2_read_only",
        "An output directory that cannot be written to.",
        _read_only,
        value="not writable|cannot be made|read-only|permission",
        where=r"\bruns\b",
        remedy="to do:.*runs",
    ),
    Scenario(
        "o3_full_disk",
        "A disk with 100 KB left.",
        full_disk(100_000),
        value=r"\b(100|0\.1|97\.\d|98)\b.*(KB|KiB|MB|MiB|GB|GiB)|no room|free",
        where=r"runs",
        remedy="to do:.*",
    ),
]
