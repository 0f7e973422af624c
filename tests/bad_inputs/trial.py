"""Runs a command line in a folder, in this process or in a new one, and records what came of it. Knows no scenario."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bad_inputs.place import Models, Place
from tests.bad_inputs.scenario import Control, Judgement, Scenario, Seen, judge, judge_control
from zhibei.cli.app import run_command

REPOSITORY = Path(__file__).parents[2]
FINDING = re.compile(r"^(?:STOP|WARNING)\s+(\S+)", re.MULTILINE)
MOST_BYTES_HASHED = 2**24
STEPS = ("train", "iteration")
"""Kinds of records that a step of a run leaves."""


def try_command(command: Sequence[str], folder: Path, *, in_process: bool = True) -> Seen:
    """One command line with `folder` as its working directory."""
    before = snapshot(folder)
    started, cpu_before = time.monotonic(), _cpu_of_children()
    exit_code, stdout, stderr = (_in_process if in_process else _as_process)(command, folder)
    seconds = time.monotonic() - started
    cpu_seconds = _cpu_of_children() - cpu_before
    after = snapshot(folder)
    return Seen(
        exit_code=exit_code,
        stdout=stdout,
        stderr=stderr,
        seconds=round(seconds, 3),
        cpu_seconds=round(cpu_seconds, 3),
        num_steps=steps_taken(folder, before),
        changed=tuple(sorted(path for path in before if after.get(path) != before[path])),
        created=tuple(sorted(path for path in after if path not in before)),
        findings=tuple(FINDING.findall(stdout + "\n" + stderr)),
    )


def run_scenario(
    scenario: Scenario, folder: Path, models: Models, *, in_process: bool = True, verb: str = ""
) -> tuple[Place, Judgement, Seen]:
    """Builds the scenario in `folder`, tries it and judges it; `verb` replaces `train`."""
    place = Place(folder, models, in_process=in_process)
    try:
        scenario.build(place)
        command = place.write()
        if verb and command[0] == "train":
            command[0] = verb
        seen = try_command(command, folder, in_process=place.in_process)
        return place, judge(scenario, seen, place), seen
    finally:
        for step in place.undo:
            step()


def run_control(control: Control, folder: Path, models: Models, *, in_process: bool = True) -> tuple[Judgement, Seen]:
    """Builds a sound input in `folder`, tries it and judges it."""
    place = Place(folder, models)
    control.build(place)
    seen = try_command(place.write(), folder, in_process=in_process)
    return judge_control(control, seen), seen


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below with a hash of its content; what cannot be read keeps its size."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file():
            found[name] = "link" if path.is_symlink() else "folder"
            continue
        if path.stat().st_size > MOST_BYTES_HASHED:
            found[name] = f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}"
            continue
        try:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            found[name] = str(path.stat().st_size)
    return found


def steps_taken(folder: Path, before: dict[str, str]) -> int:
    """Optimiser steps in metrics files, less those of runs that were there before."""
    most = 0
    for path in folder.rglob("metrics.jsonl"):
        if str(path.relative_to(folder)) in before:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
        most = max([most, *(int(record.get("step", 0)) for record in records if record.get("kind") == "train")])
    return most


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _in_process(command: Sequence[str], folder: Path) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    here = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            exit_code = run_command(list(command))
    finally:
        os.chdir(here)
    return exit_code, stdout.getvalue(), stderr.getvalue()


def _as_process(command: Sequence[str], folder: Path) -> tuple[int, str, str]:
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    done = subprocess.run(
        [sys.executable, "-m", "zhibei", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr
