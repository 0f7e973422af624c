"""zhibei beside the transformers Trainer on a real small LLaMA and real Alpaca rows: every step's loss, compared.

    python -m benchmarks.parity_trainer --model MODEL_FOLDER --data alpaca.json

Writes benchmarks/results/parity_trainer.json: one record for full training and one for LoRA. CPU, fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, merge, version_of, with_surroundings
from benchmarks.reference_trainer import Curve
from benchmarks.side_by_side import difference, run_ours, run_theirs
from zhibei.config.read import read_run

RESULT_FILE = RESULTS / "parity_trainer.json"
METHODS = {"full": (1e-4, ()), "lora": (1e-3, ("model.method=lora", "lora.rank=8", "lora.alpha=16"))}
MAX_TOKENS = 384


def compare(method: str, options: argparse.Namespace, folder: Path) -> Record:
    """One record: the settings, how far the curves are apart, and the curves themselves."""
    rate, overrides = METHODS[method]
    rows = folder / "rows.json"
    everything = json.loads(options.data.read_text(encoding="utf-8"))
    rows.write_text(json.dumps(everything[: options.rows], ensure_ascii=False), encoding="utf-8")
    content: dict[str, Any] = {
        "name": method,
        "runs": str(folder / "runs"),
        "model": {"path": str(options.model), "precision": "fp32"},
        "data": {
            "sources": [str(rows)],
            "template": "alpaca",
            "max_tokens": MAX_TOKENS,
            "validation": options.heldout,
            "on_error": "drop",
        },
        "sft": {
            "global_batch": options.global_batch,
            "micro_batch_tokens": 2048,
            "max_steps": options.steps,
            "learning_rate": rate,
            "warmup_steps": max(1, options.steps // 10),
            "evaluate_every": 1,
            "save_every": 0,
            "sample_tokens": 0,
        },
        "log": {"tensorboard": False},
    }
    run_file = folder / f"{method}.yaml"
    run_file.write_text(json.dumps(content), encoding="utf-8")
    began = time.monotonic()
    ours, prepared, run = run_ours(read_run(str(run_file), overrides))
    our_seconds, began = time.monotonic() - began, time.monotonic()
    theirs = run_theirs(run, prepared, batch=options.batch)
    return {
        "benchmark": "parity_trainer",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": method,
        "rival": f"transformers Trainer {version_of('transformers')}",
        "settings": {
            "model": options.model.name,
            "data": options.data.name,
            "rows": len(prepared.train),
            "heldout_rows": len(prepared.heldout),
            **{key: content["sft"][key] for key in ("global_batch", "max_steps", "learning_rate", "warmup_steps")},
            "max_tokens": MAX_TOKENS,
            "ours": "packed, micro-batches of 2048 tokens",
            "theirs": f"padded, micro-batches of {options.batch} rows, accumulated",
        },
        "seconds": round(our_seconds, 1),
        "rival_seconds": round(time.monotonic() - began, 1),
        "difference": {name: asdict(difference(getattr(ours, name), getattr(theirs, name))) for name in vars(Curve())},
        "ours": vars(ours),
        "theirs": vars(theirs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both methods and merge the records into the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small LLaMA")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows as JSON")
    parser.add_argument("--rows", type=int, default=2000, help="use the first so many records")
    parser.add_argument("--heldout", type=int, default=16, help="held-out rows, evaluated after every step")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="rows per micro-batch of the Trainer")
    parser.add_argument("--out", type=Path, default=RESULT_FILE)
    options = parser.parse_args(arguments)
    command = f"python -m benchmarks.parity_trainer --model {options.model.name} --data {options.data.name}"
    for method in METHODS:
        with tempfile.TemporaryDirectory(prefix="parity-trainer-") as folder:
            record = with_surroundings(compare(method, options, Path(folder)), command)
        shown = ("method", "difference", "seconds", "rival_seconds")
        print(json.dumps({key: record[key] for key in shown}), flush=True)
        merge(options.out, [record])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
