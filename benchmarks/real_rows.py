"""A real small LLaMA fine-tuned on real rows of three kinds, full and LoRA: does every kind learn, and how fast?

    python -m benchmarks.real_rows --model MODEL_FOLDER --alpaca alpaca.json --conversations sharegpt.json --cot FOLDER

Writes benchmarks/results/real_rows.json: one record per kind and method. CPU, fp32, through `zhibei.train`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, median_and_spread, merge, version_of, with_surroundings
from zhibei.config.read import read_run
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.offline import train

RESULT_FILE = RESULTS / "real_rows.json"
TEMPLATES = {"alpaca": "alpaca", "conversations": "vicuna_v1.1", "cot": "alpaca_lora"}
RATES = {"full": 3e-4, "lora": 3e-3}


def run_file(kind: str, method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run file of one measurement."""
    return {
        "name": f"{kind}-{method}",
        "runs": str(folder / "runs"),
        "model": {"path": str(options.model), "method": method, "precision": "fp32"},
        "data": {
            "sources": [str(getattr(options, kind))],
            "template": TEMPLATES[kind],
            "max_tokens": 512,
            "too_long": "cut",
            "on_error": "drop",
            "validation": 64,
            "cache": str(folder / "cache"),
        },
        "sft": {
            "global_batch": 16,
            "max_steps": options.steps,
            "learning_rate": RATES[method],
            "evaluate_every": 0,
            "save_every": 0,
            "sample_tokens": 0,
        },
        "log": {"tensorboard": False},
    }


def measure(kind: str, method: str, options: argparse.Namespace, folder: Path) -> Record:
    """Held-out loss before and after, and the speed of the steps in between."""
    path = folder / f"{kind}-{method}.yaml"
    path.write_text(json.dumps(run_file(kind, method, options, folder)), encoding="utf-8")
    began = time.monotonic()
    run_dir: RunDir = train(read_run(path))
    seconds = time.monotonic() - began
    records = read_metrics(run_dir.metrics)
    heldout = [record["loss"] for record in records if record["kind"] == "heldout"]
    rate, spread = median_and_spread([record["tokens_per_s"] for record in records if record["kind"] == "train"])
    audit = json.loads(run_dir.audit.read_text(encoding="utf-8"))
    proofs = json.loads(run_dir.proofs.read_text(encoding="utf-8"))
    return {
        "benchmark": "real_rows",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": method,
        "settings": {
            "rows": kind,
            "model": options.model.name,
            "template": TEMPLATES[kind],
            "steps": options.steps,
            "global_batch": 16,
            "learning_rate": RATES[method],
        },
        "rows_kept": audit["rows_kept"],
        "rows_dropped": sum(audit["dropped"].values()),
        "heldout_loss_before": heldout[0],
        "heldout_loss_after": heldout[-1],
        "proofs_passed": all(proof["passed"] for proof in proofs),
        "useful_tokens_per_s": rate,
        "seconds": round(seconds, 2),
        "spread": {"useful_tokens_per_s": spread},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each kind of rows with each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    for kind in TEMPLATES:
        parser.add_argument(f"--{kind}", type=Path, required=True, help="file or folder of rows")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args(arguments)
    names = " ".join(f"--{kind} {getattr(options, kind).name}" for kind in TEMPLATES)
    command = f"python -m benchmarks.real_rows --model {options.model.name} {names}"
    for kind in TEMPLATES:
        for method in RATES:
            with tempfile.TemporaryDirectory() as folder:
                record = with_surroundings(measure(kind, method, options, Path(folder)), command)
            print(json.dumps(record), flush=True)
            merge(RESULT_FILE, [record])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
