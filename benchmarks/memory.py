"""Predicted and measured GPU memory over a grid of configurations, each in a process of its own.

Examples:

    python -m benchmarks.memory run --grid grid --seconds 480 --out memory.json
    python -m benchmarks.memory run --grid held-out --seconds 240 --out memory.json
    python -m benchmarks.memory run --grid grid --only llama-7b --explain
    python -m benchmarks.memory merge memory.json
    python -m benchmarks.memory predict

Counters are per process, so several configurations are measured side by side while their memory fits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory_grid import GRIDS, HELD_OUT_ROWS, Setting
from benchmarks.records import RESULTS, Record, merge, read, with_surroundings
from zhibei.plan.job import Job, adapted_names, attention_on
from zhibei.plan.machines import Gpu
from zhibei.plan.memory import MemoryPlan, predict
from zhibei.plan.shapes import read_shape

RESULT_FILE = RESULTS / "memory.json"
SPARE_GIB = 4.0
CARD = Gpu("a card with varlen attention", 80, (8, 0))
SECONDS_EACH = 75
LIMIT_SECONDS = 240


def one(options: argparse.Namespace) -> int:
    """Measure one configuration here; print its record as the last line."""
    from benchmarks.memory_one import measure

    setting = Setting(**json.loads(options.setting))
    figures = measure(setting, explains=options.explain)
    record = {"benchmark": "memory", "settings": vars(setting) | {"grid": options.grid}, **figures}
    print(json.dumps(with_surroundings(record, f"python -m benchmarks.memory run --grid {options.grid}")))
    return 0


def run(options: argparse.Namespace) -> int:
    """Measure every setting that still fits into the time; write each record as it comes."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    settings = [setting for setting in GRIDS[options.grid] if options.only in setting.words()]
    card_gib, began = _card_gib(), time.monotonic()
    room, lock = threading.Condition(), threading.Lock()
    state = {"free": card_gib - SPARE_GIB, "running": 0}

    def work(setting: Setting, need: float) -> None:
        left = options.seconds - (time.monotonic() - began)
        record = _in_process(setting, options, limit=min(LIMIT_SECONDS, max(5.0, left)))
        with lock:
            print(summary(record), flush=True)
            if options.out:
                merge(options.out, [record])
        with room:
            state["free"] += need
            state["running"] -= 1
            room.notify_all()

    threads = []
    for setting in sorted(settings, key=lambda each: -_room_gib(each)):
        need = min(_room_gib(setting), card_gib - SPARE_GIB)
        with room:
            room.wait_for(lambda need=need: state["free"] >= need and state["running"] < options.parallel)
            if options.seconds - (time.monotonic() - began) < SECONDS_EACH / 2:
                print(f"# not started, the time is over: {setting.words()}", flush=True)
                continue
            state["free"] -= need
            state["running"] += 1
        threads.append(threading.Thread(target=work, args=(setting, need)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print(f"# {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _card_gib() -> float:
    """Memory of the GPU, asked in another process: this one must hold none of it."""
    code = "import torch; print(torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 64)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(asked.stdout.split()[-1])


def _room_gib(setting: Setting) -> float:
    """Room to keep for a configuration while others run: a wrong guess would spoil its neighbours."""
    return plan_of(setting, setting.tokens, setting.passes).device_gib * 1.1 + 0.5


def heldout_tokens(setting: Setting, pass_tokens: int) -> int:
    """A pass over the few held-out rows of a measurement: spread evenly over the fewest passes."""
    tokens = HELD_OUT_ROWS * setting.row
    return -(-tokens // -(-tokens // pass_tokens))


def plan_of(setting: Setting, pass_tokens: int, num_passes: int) -> MemoryPlan:
    """What `zhibei plan` says about a configuration."""
    shape = read_shape(setting.config())
    targets = setting.targets if setting.targets == "all-linear" else setting.targets.split(",")
    attention = attention_on("auto", CARD, packing=setting.packing, precision=setting.precision, shape=shape)
    job = Job(
        pass_tokens=pass_tokens,
        num_passes=num_passes,
        row_tokens=setting.row,
        method=setting.method,
        quantize=setting.quantize,
        precision=setting.precision,
        optimizer=setting.optimizer,
        checkpointing=setting.checkpointing,
        is_compiled=setting.compile,
        packing=setting.packing,
        attention=attention,
        rank=setting.rank,
        targets=adapted_names(shape, targets) if setting.method != "full" else (),
        sample_tokens=16,
        heldout_tokens=heldout_tokens(setting, pass_tokens),
    )
    return predict(shape, job)


def _in_process(setting: Setting, options: argparse.Namespace, *, limit: float) -> Record:
    words = [sys.executable, "-m", "benchmarks.memory", "one", "--grid", options.grid]
    words += ["--setting", json.dumps(vars(setting))]
    if options.explain:
        words.append("--explain")
    failed: Record = {"benchmark": "memory", "who": "zhibei", "version": "", "method": setting.method}
    failed["settings"] = vars(setting) | {"grid": options.grid}
    began = time.monotonic()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
        if done.returncode == 0:
            record = json.loads(done.stdout.strip().splitlines()[-1])
            return with_prediction({**record, "seconds": round(time.monotonic() - began, 1)})
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        error = " | ".join(lines[-6:])[-1500:]
    except subprocess.TimeoutExpired:
        error = f"no result within {limit:.0f} s"
    return with_surroundings_of_nothing({**failed, "error": error})


def with_surroundings_of_nothing(record: Record) -> Record:
    """A failure's surroundings, without touching the GPU in this process."""
    return {
        **record,
        "device": "",
        "versions": {},
        "command": "",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def with_prediction(record: Record) -> Record:
    """The record with what the plan says about its configuration, and how far that is from what was measured.

    `predicted_gib` and `measured_gib` are the most that tensors held over all measured phases; `first_predicted_gib`
    is what the plan said before it was measured; `reserved_gib` is what torch's allocator took.
    """
    if "error" in record:
        return record
    fields = {key: value for key, value in record["settings"].items() if key != "grid"}
    plan = plan_of(Setting(**fields), record["pass_tokens"], record["num_passes"])
    measured = {name: figure["allocated_gib"] for name, figure in record["measured"].items()}
    phases = {name: plan.phase(name).gib for name in measured}
    most, promised = max(measured.values()), max(phases.values())
    return {
        **{key: value for key, value in record.items() if key not in ("explained", "saved")},
        "predicted": {name: round(value, 3) for name, value in phases.items()},
        "predicted_gib": round(promised, 3),
        "first_predicted_gib": record.get("first_predicted_gib", record.get("predicted_gib", round(promised, 3))),
        "measured_gib": round(most, 3),
        "error_percent": round(100 * (promised / max(most, 1e-9) - 1), 2),
        "reserved_gib": max(figure["reserved_gib"] for figure in record["measured"].values()),
        "peak_at": max((plan.phase(name) for name in measured), key=lambda phase: phase.gib).moment,
    }


def summary(record: Record) -> str:
    """One line: measured, predicted, which configuration, and the error of each phase."""
    settings: dict[str, Any] = record["settings"]
    words = " ".join(str(value) for key, value in settings.items() if key not in ("grid", "quantize"))
    if "error" in record:
        return f"FAILED {words}: {record['error'][:1000]}"
    figures = f"measured {record['measured_gib']:7.3f} predicted {record['predicted_gib']:7.3f} GiB"
    phases = " ".join(
        f"{name} {100 * (record['predicted'][name] / max(1e-9, figure['allocated_gib']) - 1):+.1f}%"
        for name, figure in record["measured"].items()
    )
    return f"{record.get('seconds', 0):4.0f}s {figures} {record['error_percent']:+6.2f}%  {words} | {phases}"


def predicted(options: argparse.Namespace) -> int:
    """Make the predictions of the result file anew and show both figures."""
    records = [with_prediction(record) for record in read(options.file)]
    for record in records:
        print(summary(record))
    errors = [abs(record["error_percent"]) for record in records if "error" not in record]
    if errors:
        print(f"{len(errors)} configurations: worst {max(errors):.2f} %, median {statistics.median(errors):.2f} %")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    running.add_argument("--grid", choices=tuple(GRIDS), default="grid")
    running.add_argument("--only", default="", help="only settings whose words contain this, e.g. shape=llama-7b")
    running.add_argument("--seconds", "--budget-seconds", type=float, default=480, help="start nothing after that")
    running.add_argument("--parallel", type=int, default=8, help="most configurations measured at the same time")
    running.add_argument("--out", type=Path, default=None, help="result file to merge into, after each record")
    running.add_argument("--explain", action="store_true", help="also say what lay in memory at the peak")
    single = verbs.add_parser("one")
    single.add_argument("--setting", required=True)
    single.add_argument("--grid", default="grid")
    single.add_argument("--explain", action="store_true")
    for name in ("merge", "predict"):
        verbs.add_parser(name).add_argument("file", type=Path, nargs="?", default=RESULT_FILE)
    return top


def merged(options: argparse.Namespace) -> int:
    """Take in the result file of another machine."""
    merge(RESULT_FILE, [with_prediction(record) for record in read(options.file)])
    print(f"{RESULT_FILE}: {len(read(RESULT_FILE))} records")
    return 0


VERBS = {"run": run, "one": one, "merge": merged, "predict": predicted}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return VERBS[options.verb](options)


if __name__ == "__main__":
    raise SystemExit(main())
