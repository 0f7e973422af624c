"""Lists of measurements, and how a list is worked off within a time budget. Knows commands, not what they measure."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import Record, merge, read


@dataclass(frozen=True)
class Measurement:
    """One command line, and about how many seconds it takes (model creation and compilation included)."""

    words: str
    seconds: int


# To be run with `--layers 2 --steps 2`, so that a failure shows before time is spent.
SMOKE = [
    Measurement("ceiling", 10),
    Measurement("zhibei --method full --tokens 8192 --checkpointing selective", 45),
    Measurement("zhibei --method lora --tokens 16384", 45),
    Measurement("peer-trl --method full --liger --weights fp32 --batch 32 --checkpointing full", 30),
    Measurement("peer-unsloth --method lora --batch 32 --checkpointing none", 60),
    Measurement("peer-trl --method lora --liger --batch 32 --checkpointing none", 30),
    Measurement("peer-unsloth --method full --batch 32 --checkpointing none", 50),
]
MORE_SMOKE = [
    Measurement("zhibei --method full --tokens 8192", 45),
    Measurement("zhibei --method lora --tokens 16384 --checkpointing full --compile off", 25),
    Measurement("zhibei --method lora --tokens 8192 --padded --compile off", 25),
    Measurement("profile --method lora --tokens 8192", 45),
    Measurement("peer-trl --method lora --batch 8 --packing --checkpointing none", 35),
    Measurement("peer-unsloth --method lora --batch 32 --checkpointing unsloth", 60),
]

OURS = [
    Measurement("zhibei --method full --tokens 10240 --checkpointing selective --steps 6 --warmup 4", 65),
    Measurement("zhibei --method lora --tokens 16384 --steps 6 --warmup 4", 60),
    Measurement("zhibei --method lora --tokens 24576 --checkpointing full --steps 5 --warmup 4", 55),
    Measurement("zhibei --method full --tokens 16384 --checkpointing full --steps 5 --warmup 4", 65),
    Measurement("zhibei --method full --tokens 8192 --steps 5 --warmup 4", 65),
    Measurement("zhibei --method lora --tokens 16384 --checkpointing selective --steps 5 --warmup 4", 60),
    Measurement("zhibei --method lora --tokens 16384 --compile off --steps 4 --warmup 4", 45),
]

PEERS = [
    Measurement("peer-trl --method full --liger --weights fp32 --batch 32 --checkpointing full --steps 4", 80),
    Measurement("peer-unsloth --method lora --batch 32 --checkpointing none --steps 4", 100),
    Measurement("peer-unsloth --method lora --batch 32 --checkpointing unsloth --steps 4", 75),
    Measurement("peer-trl --method lora --liger --batch 32 --checkpointing none --steps 4", 60),
    Measurement("peer-unsloth --method full --batch 32 --checkpointing none --steps 4", 80),
    Measurement("peer-trl --method full --liger --weights bf16 --batch 32 --checkpointing none --steps 4", 60),
    Measurement("peer-trl --method lora --batch 8 --checkpointing full --steps 3 --warmup 1", 90),
    Measurement("peer-trl --method full --weights fp32 --batch 8 --checkpointing full --steps 3 --warmup 1", 120),
]

# Bases in 8 and 4 bits: within a 24 GiB card, the smallest, and int8.
QLORA = [
    Measurement("zhibei --method qlora --tokens 4096 --steps 4 --warmup 3", 60),
    Measurement("peer-unsloth --method qlora --weights nf4 --batch 32 --checkpointing unsloth --steps 3", 90),
    Measurement("zhibei --method qlora --tokens 4096 --checkpointing full --steps 4 --warmup 3", 50),
    Measurement("zhibei --method qlora --quantize int8 --tokens 8192 --checkpointing full --steps 3 --warmup 3", 50),
    Measurement("zhibei --method qlora --tokens 2048 --checkpointing full --steps 3 --warmup 3", 45),
    Measurement("zhibei --method qlora --tokens 16384 --checkpointing full --steps 3 --warmup 3", 50),
]

PLANS: dict[str, list[Measurement]] = {
    "smoke": SMOKE,
    "more-smoke": MORE_SMOKE,
    "ceiling": [Measurement("ceiling", 10)],
    "ours": OURS,
    "peers": PEERS,
    "qlora": QLORA,
    # Rivals and ours side by side, on one warm machine.
    "main": [
        Measurement("ceiling", 10),
        *(measurement for pair in itertools.zip_longest(OURS, PEERS) for measurement in pair if measurement),
    ],
}


def run_plan(
    plan: Sequence[Measurement],
    *,
    extra: Sequence[str],
    seconds: float,
    out: Path | None,
    peer_packages: str,
    only: str = "",
    skip: Path | None = None,
) -> list[Record]:
    """Run each measurement that still fits, in a process of its own; print and merge its record as it comes.

    `skip` names a result file: what it holds without an error is not measured again.
    """
    known = {record["command"] for record in read(skip) if "error" not in record} if skip is not None else set()
    began = time.monotonic()
    done: list[Record] = []
    for measurement in plan:
        if only not in measurement.words or " ".join(_command(measurement, extra)) in known:
            continue
        left = seconds - (time.monotonic() - began)
        if measurement.seconds > left:
            print(
                f"# not started ({left:.0f} s left, needs about {measurement.seconds}): {measurement.words}", flush=True
            )
            continue
        limit = min(left, 3 * measurement.seconds)
        records = _run_one(measurement, extra=extra, limit=limit, peer_packages=peer_packages)
        for record in records:
            print(json.dumps(record), flush=True)
        done += records
        if out is not None:
            merge(out, records)
    print(summary(done), flush=True)
    return done


def _command(measurement: Measurement, extra: Sequence[str]) -> list[str]:
    """The command line; a plan's own number of steps gives way to the one asked for."""
    words = measurement.words.split()
    fitting = [] if words[0] == "ceiling" else list(extra)
    if "--steps" in words and "--steps" in fitting:
        at = words.index("--steps")
        del words[at : at + 2]
    return ["python", "-m", "benchmarks.sft", *words, *fitting]


def _run_one(measurement: Measurement, *, extra: Sequence[str], limit: float, peer_packages: str) -> list[Record]:
    command = _command(measurement, extra)
    words, shown = measurement.words.split(), " ".join(command)
    environment = dict(os.environ)
    if peer_packages and words[0].startswith("peer"):
        paths = [peer_packages, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    print(f"# {shown}", flush=True)
    began = time.monotonic()
    try:
        finished = subprocess.run(
            [sys.executable, *command[1:]], env=environment, capture_output=True, text=True, timeout=limit
        )
        output, errors, failed = finished.stdout, finished.stderr, finished.returncode != 0
    except subprocess.TimeoutExpired:
        output, errors, failed = "", f"no result within {limit:.0f} s", True
    print(f"# took {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        return [{**_surroundings(environment), **failure(words, errors), "command": shown}]
    for line in output.splitlines():
        if line and not line.startswith("{"):
            print(line)
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"benchmark"')]


def _surroundings(environment: dict[str, str]) -> Record:
    """Device, versions and date, asked in another process: this one must hold no GPU memory between measurements."""
    code = "import json; from benchmarks import records; print(json.dumps(records.with_surroundings({}, '')))"
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(asked.stdout.splitlines()[-1])


def failure(words: Sequence[str], errors: str) -> Record:
    """What did not run is recorded with its own words, so that a table can say so."""
    print(errors[-3000:], flush=True)
    last = [line for line in errors.strip().splitlines() if re.match(r"^\w[\w.]*(Error|Exception|Stopped)\b", line)]
    who = {"zhibei": "zhibei", "peer-trl": "TRL + Liger" if "--liger" in words else "TRL", "peer-unsloth": "Unsloth"}
    method = words[words.index("--method") + 1] if "--method" in words else words[0]
    return {
        "benchmark": "sft",
        "who": who.get(words[0], words[0]),
        "version": "",
        "method": method,
        "settings": {"arguments": " ".join(words)},
        "error": (last[-1] if last else errors.strip()[-300:])[:600],
    }


def summary(records: Sequence[Record]) -> str:
    """One short line per record, last in the output."""
    lines = [
        f"{'who':12s} {'method':6s} {'tok/s':>8s} {'TFLOP/s':>8s} {'s/step':>7s} {'peak':>6s} {'warm-up':>7s}  settings"
    ]
    for record in records:
        settings = record["settings"]
        shown = "; ".join(
            f"{settings[key]}" if key == "micro_batch" else f"{key} {settings[key]}"
            for key in ("micro_batch", "weights", "checkpointing", "packing", "compile", "arguments")
            if key in settings
        )
        if "error" in record:
            lines.append(f"{record['who']:12s} {record['method']:6s} FAILED {record['error'][:120]}  {shown}")
        elif record["benchmark"] == "sft":
            lines.append(
                f"{record['who']:12s} {record['method']:6s} {record['useful_tokens_per_s']:8.0f} "
                f"{record['model_tflops']:8.1f} {record['seconds']:7.3f} {record['peak_gib'] or 0:6.1f} "
                f"{record['warmup_seconds']:7.1f}  {shown}"
            )
        else:
            figure = record.get("model_tflops") or record.get("terabytes_per_s") or record.get("wall_milliseconds")
            lines.append(f"{record['who']:12s} {record['method']}: {figure}")
    return "\n".join(lines)
