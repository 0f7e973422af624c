"""What `zhibei quickstart` reaches and how long it takes, over several seeds. Knows the command, not what is inside.

    python -m benchmarks.quickstart_seeds                 run three seeds, write results and the table of the docs
    python -m benchmarks.quickstart_seeds --docs-only     only write the table again from the result file

Each seed is a process of its own, as a person would start it, so the seconds include starting Python. The table of
docs/quickstart.md is made from benchmarks/results/quickstart.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, merge, read, version_of, with_surroundings

FILE = RESULTS / "quickstart.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quickstart.md"
BEGIN, END = "<!-- quickstart table: begin -->", "<!-- quickstart table: end -->"
COMMAND = "python -m benchmarks.quickstart_seeds"


def measure(seed: int, method: str) -> Record:
    """One quickstart in a fresh folder: its summary, scores by task, seconds of the clock and of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["quickstart", "--seed", str(seed), "--method", method, "--runs", folder, "--json"]
        environment = {**os.environ, "ZHIBEI_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        started, cpu_before = time.monotonic(), _cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "zhibei", *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - cpu_before
    found = json.loads(done.stdout)
    record = {
        "benchmark": "quickstart",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": method,
        "settings": {"seed": seed},
        "stages": found["stages"],
        "by_task": found["by_task"],
        "paired": found["paired"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    return with_surroundings(record, COMMAND)


def _cpu_seconds() -> float:
    """Processor time of all finished children, over all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(records: list[Record]) -> str:
    """The Markdown table of the docs."""
    shown = sorted(
        (record for record in records if record["benchmark"] == "quickstart"),
        key=lambda record: (record["method"], record["settings"]["seed"]),
    )
    tasks = list(shown[0]["by_task"]) if shown else []
    lines = [
        "| method | seed | base, % right | tuned, % right (95 % interval) | "
        + " | ".join(tasks)
        + " | seconds | processor seconds |",
        "| --- | --- | --- | --- | " + " | ".join("---" for _ in tasks) + " | --- | --- |",
    ]
    for record in shown:
        base, tuned = record["stages"][0], record["stages"][-1]
        by_task = " | ".join(f"{100 * record['by_task'][task]['tuned']:.0f}" for task in tasks)
        lines.append(
            f"| {record['method']} | {record['settings']['seed']} | {_percent(base)} | {_percent(tuned)} "
            f"| {by_task} | {record['seconds']:.0f} | {record['cpu_seconds']:.0f} |"
        )
    device = sorted({f"{record['device']}, torch {record['versions']['torch']}" for record in shown})
    return "\n".join([*lines, "", f"Measured on: {'; '.join(device)}. Command: `{COMMAND}`."])


def _percent(stage: dict[str, Any]) -> str:
    return f"{100 * stage['score']:.1f} ({100 * stage['low']:.1f} to {100 * stage['high']:.1f})"


def write_table() -> None:
    """Put the table between its marks in docs/quickstart.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(read(FILE))}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--docs-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.docs_only:
        for seed in arguments.seeds:
            record = measure(seed, arguments.method)
            merge(FILE, [record])
            print(f"seed {seed}: {_percent(record['stages'][-1])} in {record['seconds']:.0f} s", flush=True)
    write_table()


if __name__ == "__main__":
    main()
