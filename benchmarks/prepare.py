"""How long the way from a data file to masked, audited token ids on disk takes, and how long a second run takes.

It reads, renders, encodes, masks, splits, audits and writes; the second run finds what was written.

    python -m benchmarks.prepare alpaca_data.json --tokenizers llama2_tokenizer llama3_tokenizer
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import RESULTS, Record, median_and_spread, merge, version_of, with_surroundings

FILE = RESULTS / "prepare.json"
GIB = 2**30
KIB = 2**10


def _cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(data: Path, *, tokenizer: Path, template: str, workers: int, repeats: int) -> Record:
    """One record. The tokenizer is loaded before the clock starts, as a training run needs it anyway."""
    from zhibei.config.run import DataSection, ModelSection, RunFile
    from zhibei.data.prepare import prepare
    from zhibei.text.families import find_template
    from zhibei.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(str(tokenizer))
    found = find_template(template, loaded)
    seconds, cpu_seconds, cached_seconds = [], [], []
    audit: Record = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            section = DataSection(sources=[str(data)], on_error="drop", workers=workers, cache=cache)
            run = RunFile(name="prepare", model=ModelSection(path="unused"), data=section)
            begun, cpu_begun = time.perf_counter(), _cpu_seconds()
            audit = prepare(run, loaded, found).audit
            seconds.append(time.perf_counter() - begun)
            cpu_seconds.append(_cpu_seconds() - cpu_begun)
            begun = time.perf_counter()
            prepare(run, loaded, found)
            cached_seconds.append(time.perf_counter() - begun)
    median, spread = median_and_spread(seconds)
    cpu_median, cpu_spread = median_and_spread(cpu_seconds)
    peak = max(resource.getrusage(whose).ru_maxrss for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "benchmark": "prepare",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": "read, render, encode, mask, split, audit, write",
        "settings": {
            "data": data.name,
            "rows": audit["rows_read"],
            "tokenizer": tokenizer.name,
            "template": template,
            "workers": workers,
        },
        "seconds": round(median, 2),
        "cpu_seconds": round(cpu_median, 2),
        "cached_seconds": round(median_and_spread(cached_seconds)[0], 3),
        "rows_per_s": round(audit["rows_read"] / median),
        "tokens": audit["tokens"],
        "useful_tokens_per_s": round(audit["tokens"] / median),
        "peak_gib": round(peak * KIB / GIB, 2),
        "model_tflops": None,
        "load_average_1m": round(os.getloadavg()[0], 1),
        "spread": {
            "seconds": [round(value, 2) for value in spread],
            "cpu_seconds": [round(value, 2) for value in cpu_spread],
        },
        "repeats": repeats,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizers", type=Path, nargs="+", required=True)
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    names = " ".join(path.name for path in chosen.tokenizers)
    command = f"python -m benchmarks.prepare {chosen.data.name} --tokenizers {names} --repeats {chosen.repeats}"
    for tokenizer in chosen.tokenizers:
        for workers in chosen.workers:
            record = measure(
                chosen.data,
                tokenizer=tokenizer,
                template=chosen.template,
                workers=workers,
                repeats=chosen.repeats,
            )
            merge(FILE, [with_surroundings(record, command)])
            print(tokenizer.name, "workers", workers, record["seconds"], "s,", record["rows_per_s"], "rows/s,", end=" ")
            print(record["cpu_seconds"], "processor seconds, load", record["load_average_1m"])


if __name__ == "__main__":
    main()
