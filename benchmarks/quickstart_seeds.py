"""What `zhibei quickstart` reaches at every stage and how long it takes, over several seeds. Knows the command only.

    python -m benchmarks.quickstart_seeds                 run three seeds, write results and the table of the docs
    python -m benchmarks.quickstart_seeds --docs-only     only write the tables again from the result file
    python -m benchmarks.quickstart_seeds --together      all seeds at the same time: their scores are the same, their
                                                          seconds are not those of a quiet machine

Each seed is a process of its own, as a person would start it, so the seconds include starting Python. The tables of
docs/quickstart.md are made from benchmarks/results/quickstart.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, merge, read, version_of, with_surroundings

FILE = RESULTS / "quickstart.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quickstart.md"
BEGIN, END = "<!-- quickstart table: begin -->", "<!-- quickstart table: end -->"
COMMAND = "python -m benchmarks.quickstart_seeds"
ORIGINS = {"hedge": "hedged right answer", "own": "its own mistake", "slip": "planted mistake"}
"""What the worse answer of a pair is."""


def measure(seed: int, method: str, *, note: str) -> Record:
    """One quickstart in a fresh folder: its summary, scores by task, seconds of the clock and of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["quickstart", "--seed", str(seed), "--method", method, "--runs", folder, "--json"]
        environment = {**os.environ, "ZHIBEI_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "zhibei", *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said = process.stdout.read()
        # Processor seconds of this one process, also while others run beside it.
        _, status, used = os.wait4(process.pid, 0)
        seconds, cpu_seconds = time.monotonic() - started, used.ru_utime + used.ru_stime
    if status != 0:
        raise SystemExit(f"seed {seed} ended with status {status}")
    took = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return record_of(json.loads(said), seed=seed, method=method, used=took, note=note)


def record_of(found: dict[str, Any], *, seed: int, method: str, used: dict[str, float], note: str) -> Record:
    """What the command said with --json, and what it took, as a record of the result file."""
    record = {
        "benchmark": "quickstart",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": method,
        "settings": {"seed": seed},
        "stages": found["stages"],
        "by_task": found["by_task"],
        "steps": found["steps"],
        "reward": found["reward"],
        "course": found["course"],
        **{name: round(value, 1) for name, value in used.items()},
        "load_average": round(os.getloadavg()[0], 2),
        "note": note,
    }
    return with_surroundings(record, COMMAND)


def tables(records: list[Record]) -> str:
    """The Markdown tables of the docs: scores by stage, by task, the reward model, and PPO on its way."""
    shown = sorted(
        (record for record in records if record["benchmark"] == "quickstart"),
        key=lambda record: (record["method"], record["settings"]["seed"]),
    )
    parts = [_stages(shown), _by_task(shown), _reward(shown), _course(shown)]
    device = sorted({f"{record['device']}, torch {record['versions']['torch']}" for record in shown})
    notes = sorted({record["note"] for record in shown if record.get("note")})
    return "\n\n".join([*parts, f"Measured on: {'; '.join(device)}. Command: `{COMMAND}`. {' '.join(notes)}".strip()])


def _grid(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _who(record: Record) -> list[str]:
    return [record["method"], str(record["settings"]["seed"])]


def _stages(shown: list[Record]) -> str:
    head = ["method", "seed", "base, % right", "SFT", "PPO", "SFT to PPO, points", "gained / lost", "seconds",
            "processor seconds"]  # fmt: skip
    rows = []
    for record in shown:
        pair = record["steps"][-1]["paired"]
        change = f"{100 * pair['difference']:+.1f} ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})"
        rows.append(
            [
                *_who(record),
                *(_percent(stage) for stage in record["stages"]),
                change,
                f"{pair['gained']} / {pair['lost']}",
                f"{record['seconds']:.0f}",
                f"{record['cpu_seconds']:.0f}",
            ]
        )
    return _grid(head, rows)


def _by_task(shown: list[Record]) -> str:
    tasks = list(shown[0]["by_task"]) if shown else []
    rows = [
        [
            *_who(record),
            *(
                " → ".join(f"{100 * found[stage]['score']:.0f}" for stage in ("sft", "ppo"))
                for found in (record["by_task"][task] for task in tasks)
            ),
        ]
        for record in shown
    ]
    return _grid(["method", "seed", *(f"{task}, SFT → PPO" for task in tasks)], rows)


def _reward(shown: list[Record]) -> str:
    rows = []
    for record in shown:
        found = record["reward"]
        parts = [found["by_origin"].get(origin) for origin in ORIGINS]
        rows.append([*_who(record), *("–" if part is None else _interval(part) for part in parts), _interval(found)])
    head = ["method", "seed", *(f"{words}, % of pairs" for words in ORIGINS.values()), "all"]
    return _grid(head, rows)


def _interval(found: dict[str, Any]) -> str:
    return f"{100 * found['accuracy']:.0f} ({100 * found['low']:.0f} to {100 * found['high']:.0f})"


def _course(shown: list[Record]) -> str:
    rows = [
        [
            *_who(record),
            str(point["step"]),
            f"{point['learned_reward']:+.2f}",
            "–" if point["true_score"] is None else f"{100 * point['true_score']:.1f}",
            f"{point['kl']:.3f}",
        ]
        for record in shown
        for point in record["course"]
    ]
    head = ["method", "seed", "iteration of PPO", "learned reward", "true score, % right", "KL, nats per token"]
    return _grid(head, rows)


def _percent(stage: dict[str, Any]) -> str:
    return f"{100 * stage['score']:.1f} ({100 * stage['low']:.1f} to {100 * stage['high']:.1f})"


def write_tables() -> None:
    """Put the tables between their marks in docs/quickstart.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(read(FILE))}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--docs-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.docs_only:
        with ThreadPoolExecutor(len(arguments.seeds) if arguments.together else 1) as pool:
            for record in pool.map(lambda seed: measure(seed, arguments.method, note=arguments.note), arguments.seeds):
                merge(FILE, [record])
                scores = " → ".join(_percent(stage) for stage in record["stages"])
                print(f"seed {record['settings']['seed']}: {scores} in {record['seconds']:.0f} s", flush=True)
    write_tables()


if __name__ == "__main__":
    main()
