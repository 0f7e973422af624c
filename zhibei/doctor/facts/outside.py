"""Programs and probes that are asked about the machine: with a time limit, and remembered. Knows no answer.

A probe is a piece of Python in a process of its own, so that a crash of a library is an answer and not our end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What a person should think of when a child dies by a signal. SIGBUS: bus error, shared memory ran out.
SIGNALS = {
    signal.SIGSEGV: "crashed inside native code (SIGSEGV): the builds of torch, CUDA and driver do not fit each other",
    signal.SIGKILL: "was killed (SIGKILL), most likely because the host memory ran out",
    signal.SIGBUS: "died of a bus error (SIGBUS), most likely because shared memory (/dev/shm) ran out",
    signal.SIGILL: "used an instruction this processor does not have (SIGILL): the build is for a newer processor",
    signal.SIGABRT: "aborted inside native code (SIGABRT)",
    signal.SIGFPE: "crashed inside native code (SIGFPE)",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program printed. `fault` is "" when it ended well in time."""

    output: str = ""
    fault: str = ""


def ask(command: Sequence[str], *, seconds: float = 10.0, variables: Mapping[str, str] | None = None) -> Answer:
    """Run a program; never raises. A program that is not there is a fault too."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Answer(fault=f"did not end within {seconds:g} seconds")
    except OSError as error:
        return Answer(fault=f"cannot be started: {error.strerror}")
    return Answer(done.stdout, "" if done.returncode == 0 else fault_of(done.returncode, done.stderr))


def fault_of(return_code: int, stderr: str) -> str:
    """Why a process ended badly: its signal in words, else the last line it wrote to stderr."""
    if return_code < 0 or return_code > 128:
        number = -return_code if return_code < 0 else return_code - 128
        with suppress(ValueError):
            return SIGNALS.get(signal.Signals(number), f"was ended by {signal.Signals(number).name}")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with exit code {return_code}"


def probe(code: str, *, seconds: float = 60.0, variables: Mapping[str, str] | None = None) -> Answer:
    """Run Python code with this interpreter."""
    return ask([sys.executable, "-c", code], seconds=seconds, variables=variables)


def remembered_probe(code: str, *, known_by: Mapping[str, str], seconds: float = 60.0) -> Answer:
    """The answer of a probe, kept under the cache root until the code, this interpreter or `known_by` (versions,
    driver, boot) changes. What ran out of time is not kept."""
    said = json.dumps([code, sys.executable, dict(known_by)], sort_keys=True)
    place = cache_folder() / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError):
        kept = json.loads(place.read_text(encoding="utf-8"))
        return Answer(str(kept["output"]), str(kept["fault"]))
    answer = probe(code, seconds=seconds)
    if not answer.fault.startswith("did not end"):
        with suppress(OSError):  # a read-only cache only costs time
            place.parent.mkdir(parents=True, exist_ok=True)
            new = place.with_name(f"{place.name}.{os.getpid()}")
            new.write_text(json.dumps({"output": answer.output, "fault": answer.fault}), encoding="utf-8")
            new.replace(place)
    return answer


def cache_folder() -> Path:
    """`probes` beside the prepared rows: ZHIBEI_CACHE, else ~/.cache/zhibei."""
    root = os.environ.get("ZHIBEI_CACHE") or Path.home() / ".cache" / "zhibei"
    return Path(root).expanduser() / "probes"


def read_quietly(path: Path) -> str:
    """A small file of /proc or /sys; "" when it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
