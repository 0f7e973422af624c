"""The trials of `zhibei doctor`: which there are for a machine, run in a process that may crash. Knows no screen."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from zhibei.doctor.facts.outside import fault_of
from zhibei.plan.machines import Gpu, Machine

Status = Literal["works", "broken", "absent"]
DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")
GIB = 2**30
# A card that is this much slower than the others of its kind holds them all up.
SLOW_SHARE = 0.85
COMMAND = (sys.executable, "-m", "zhibei.doctor.trial_scripts")


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to try. `is_needed`: training here stops or goes wrong without it."""

    group: str
    name: str
    spec: dict[str, Any]
    is_needed: bool = True
    seconds: float = 90.0
    to_do: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial went. `words` is what was seen, or why it is broken or absent."""

    trial: Trial
    status: Status
    words: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def blocks(self) -> bool:
        return self.status == "broken" and self.trial.is_needed

    def as_dict(self) -> dict[str, Any]:
        return {
            "group": self.trial.group,
            "name": self.trial.name,
            "status": self.status,
            "words": self.words,
            "figures": self.figures,
            "needed": self.trial.is_needed,
            "to_do": self.trial.to_do if self.status == "broken" else "",
            "seconds": round(self.seconds, 2),
        }


def trials_for(machine: Machine, folder: Path) -> tuple[list[Trial], list[Outcome]]:
    """(what to try here, what is known to be absent). Fast and needed things come first. `folder`: of the runs."""
    devices: list[tuple[str, Gpu | None]] = [("cpu", None)]
    devices += [(f"cuda:{number}", gpu) for number, gpu in enumerate(machine.gpus)]
    trials, absent = [], []
    for device, gpu in devices:
        for dtype in DTYPES:
            trial = _multiply(device, dtype, gpu)
            if why := lacking(dtype, gpu):
                absent.append(Outcome(trial, "absent", why))
            else:
                trials.append(trial)
    for device, gpu in devices:
        trials += _attention(device, gpu)
    for device, gpu in devices:
        trials += _packages(device, gpu)
    trials += _storage(machine, folder)
    trials += _several(machine)
    # Where there is a card, layers are compiled for it; on a processor only when a run file asks for it.
    compiled = [device for device, gpu in devices if gpu is not None][:1] or ["cpu"]
    trials += [_compile(device) for device in compiled]
    if not machine.gpus:
        absent.append(Outcome(_all_reduce("nccl", 2), "absent", "no cards here"))
    return trials, absent


def lacking(dtype: str, gpu: Gpu | None) -> str:
    """Why a device cannot compute in a dtype by its make; "" when it should."""
    if gpu is None:
        return f"processors have no {dtype}" if dtype in ("tf32", "fp8") else ""
    if gpu.vendor == "amd" and dtype in ("tf32", "fp8"):
        return f"{dtype} of AMD cards is not used here"
    has = {"bf16": gpu.has_bf16, "tf32": gpu.has_tf32, "fp8": gpu.has_fp8}.get(dtype, True)
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    return "" if has else f"{gpu.name} (compute capability {capability}) has no {dtype} units"


def _multiply(device: str, dtype: str, gpu: Gpu | None) -> Trial:
    """On a processor training is in fp32 unless asked; nothing here computes in fp8."""
    return Trial(
        "arithmetic",
        f"multiply in {dtype} on {device}",
        {"kind": "multiply", "device": device, "dtype": dtype, "card": gpu.name if gpu else "processor"},
        is_needed=dtype != "fp8" and (gpu is not None or dtype == "fp32"),
        to_do="reinstall torch for this driver and card (https://pytorch.org); if results are wrong, the card is ill",
    )


def _attention(device: str, gpu: Gpu | None) -> list[Trial]:
    about = {"device": device, "has_bf16": gpu is not None and gpu.has_bf16}
    backends = ("math", "flash") if gpu is None else ("math", "flash", "efficient", "cudnn")
    found = [
        Trial(
            "attention",
            f"sdpa {backend} on {device}",
            {"kind": "sdpa", "backend": backend, **about},
            is_needed=backend == "math",
            to_do="reinstall torch for this driver and card; model.attention: eager avoids it",
        )
        for backend in backends
    ]
    for kernel in ("documents", "varlen") if gpu is not None else ("documents",):
        found.append(
            Trial(
                "attention",
                f"packed rows by {kernel} on {device}",
                {"kind": "packed", "kernel": kernel, **about},
                to_do=f"set {'model.attention: documents' if kernel == 'varlen' else 'data.packing: false'}",
            )
        )
    return found


def _packages(device: str, gpu: Gpu | None) -> list[Trial]:
    """4 and 8 bits are needed by some runs only, and `zhibei check` stops those."""
    found = [
        Trial(
            "4 and 8 bits",
            f"{words} on {device}",
            {"kind": "quantise", "bits": bits, "device": device},
            is_needed=False,
            to_do='pip install -U "zhibei[bnb]"; python -m bitsandbytes says more',
        )
        for bits, words in ((4, "nf4 weights"), (8, "8-bit AdamW"))
    ]
    if gpu is not None:
        found.append(
            Trial(
                "memory and disk",
                f"pinned memory to {device}",
                {"kind": "copy", "device": device},
                is_needed=False,
                to_do="raise the limit of locked memory (ulimit -l unlimited)",
            )
        )
    return found


def _storage(machine: Machine, folder: Path) -> list[Trial]:
    place = nearest_folder(folder)
    return [
        Trial(
            "memory and disk",
            "host memory",
            {"kind": "host", "free_gib": machine.host_free_gib},
            to_do="give the container or job more memory",
        ),
        Trial(
            "memory and disk",
            "shared memory",
            {"kind": "shared"},
            is_needed=len(machine.gpus) > 1,
            to_do="start the container with --shm-size=16g or --ipc=host",
        ),
        Trial(
            "memory and disk",
            f"write to {place}",
            {"kind": "disk", "folder": str(place)},
            to_do="free some room, or choose another folder: --runs FOLDER (run file: runs)",
        ),
    ]


def nearest_folder(path: Path) -> Path:
    """The path itself or the nearest folder above that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _several(machine: Machine) -> list[Trial]:
    found = [_all_reduce("gloo", 2)]
    return [*found, _all_reduce("nccl", len(machine.gpus))] if len(machine.gpus) > 1 else found


def _all_reduce(backend: str, ranks: int) -> Trial:
    hints = {
        "gloo": "check that this machine's own name resolves (/etc/hosts); set GLOO_SOCKET_IFNAME=lo",
        "nccl": "run again with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1; in a virtual machine switch ACS off",
    }
    return Trial(
        "several processes",
        f"all-reduce by {backend}",
        {"kind": "all_reduce", "backend": backend, "ranks": ranks},
        is_needed=False,  # this version trains in one process
        to_do=hints[backend],
    )


def _compile(device: str) -> Trial:
    return Trial(
        "compile",
        f"torch.compile on {device}",
        {"kind": "compile", "device": device},
        is_needed=device != "cpu",
        seconds=180.0,
        to_do="install a C compiler (apt-get install gcc g++), or set model.compile: false",
    )


def run_trials(trials: Sequence[Trial], *, on_start: Callable[[Trial], None] = lambda _trial: None) -> list[Outcome]:
    """Every trial in order. A crash or a trial out of time is an outcome, and the rest goes on in a new process."""
    outcomes: list[Outcome] = []
    rest = list(trials)
    while rest:
        done = list(_run_together(rest, on_start))
        if not done:  # the process did not even begin: every trial would end the same way
            fault = f"cannot be tried: {sys.executable} does not start"
            return outcomes + [Outcome(trial, "broken", fault) for trial in rest]
        outcomes += done
        rest = rest[len(done) :]
    return outcomes


def _run_together(trials: Sequence[Trial], on_start: Callable[[Trial], None]) -> Iterator[Outcome]:
    """Outcomes until the process ends or one trial is out of time."""
    child = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        start_new_session=True,
    )
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps([{"name": trial.name, **trial.spec} for trial in trials]).encode())
        child.stdin.close()
        yield from _listen(child, trials, on_start)
    finally:
        _end(child)


def _listen(child: Any, trials: Sequence[Trial], on_start: Callable[[Trial], None]) -> Iterator[Outcome]:
    lines, errors = _Lines(child), b""
    for trial in trials:
        on_start(trial)
        started = time.monotonic()
        line = lines.next(trial.seconds)
        if line is not None and "started" in line:
            line = lines.next(trial.seconds - (time.monotonic() - started))
        seconds = time.monotonic() - started
        if line is None:
            errors = lines.errors
            fault = f"did not end within {trial.seconds:g} seconds"
            if lines.is_closed:
                fault = fault_of(child.wait(), errors.decode(errors="replace"))
            yield Outcome(trial, "broken", fault, seconds=seconds)
            return
        yield _outcome(trial, line, seconds)


def _outcome(trial: Trial, line: dict[str, Any], seconds: float) -> Outcome:
    if "absent" in line:
        return Outcome(trial, "absent", line["absent"], seconds=seconds)
    if "fault" in line:
        return Outcome(trial, "broken", line["fault"], seconds=seconds)
    return Outcome(trial, "works", line["words"], line["figures"], seconds)


class _Lines:
    """The child's answers, each waited for with a time limit; what it writes to stderr is kept."""

    def __init__(self, child: Any) -> None:
        self.pending, self.errors, self.is_closed = b"", b"", False
        self.selector = selectors.DefaultSelector()
        self.stdout, self.stderr = child.stdout, child.stderr
        for stream in (child.stdout, child.stderr):
            self.selector.register(stream, selectors.EVENT_READ)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None when time is up or the child has ended (`is_closed`)."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.pending:
            left = deadline - time.monotonic()
            if left <= 0 or not self.selector.get_map():
                return None
            for key, _ in self.selector.select(left):
                self._read(key.fileobj)
            if self.is_closed and b"\n" not in self.pending:
                return None
        line, _, self.pending = self.pending.partition(b"\n")
        return json.loads(line)

    def _read(self, stream: Any) -> None:
        data = os.read(stream.fileno(), 65536)
        if not data:
            self.selector.unregister(stream)
            self.is_closed = self.is_closed or stream is self.stdout
        elif stream is self.stdout:
            self.pending += data
        else:
            self.errors = (self.errors + data)[-65536:]


def _end(child: Any) -> None:
    """The child and what it started: they are a process group of their own."""
    try:
        os.killpg(child.pid, 9)
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.wait()
    for stream in (child.stdout, child.stderr):
        stream.close()


def slow_cards(outcomes: Sequence[Outcome]) -> list[str]:
    """Cards slower than the others of their kind here: `cuda:3 reaches 60% of the usual speed of its kind in bf16`."""
    rates: dict[tuple[str, str], dict[str, float]] = {}
    for one in outcomes:
        spec = one.trial.spec
        if "tflops" in one.figures and spec["device"] != "cpu":
            rates.setdefault((spec["card"], spec["dtype"]), {})[spec["device"]] = one.figures["tflops"]
    found: dict[str, str] = {}
    for (_, dtype), each in rates.items():
        usual = median(each.values()) if len(each) > 2 else max(each.values())
        for device, rate in each.items():
            if rate < SLOW_SHARE * usual:
                words = f"{device} reaches {rate / usual:.0%} of the usual speed of its kind in {dtype}"
                found.setdefault(device, words)
    return list(found.values())
