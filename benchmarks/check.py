"""How long `zhibei check` takes on 52,002 rows, fresh and audited before, and what the catalogue covers by what.

Each time is that of a whole process with an own cache. Rows are made up: words at random, as many per field as in
Alpaca's. Every shipped recipe is checked too, with these rows and a small model in place of its own; a finding there is
a false alarm, unless it says that this version does not train what the recipe describes.

    python -m benchmarks.check --tokenizer llama2_tokenizer
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, median_and_spread, merge, version_of, with_surroundings
from zhibei.config.read import read_run, recipe_names

FILE = RESULTS / "check.json"
KNOWN = Path(__file__).parents[1] / "tests" / "doctor" / "known_pitfalls.txt"
NUM_ROWS = 52_002
WORDS = """the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were her all she there would their we him been has when who will more no if out so said what up its about
into than them can only other new some could time these two may then do first any my now such like our over man me even
most made after also did many before must through back years where much your way well down should because each"""


def write_rows(path: Path, num_rows: int) -> None:
    """Alpaca's three fields; four rows in ten have an input, and answers have 44 words in the mean."""
    chance = random.Random(0)

    def words(mean: int) -> str:
        return " ".join(chance.choices(WORDS.split(), k=1 + int(chance.expovariate(1 / mean))))

    rows = [
        {
            "instruction": f"{words(9)} {number}?",
            "input": words(10) if chance.random() < 0.4 else "",
            "output": f"{words(44)} {number}.",
        }
        for number in range(num_rows)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_model(folder: Path, tokenizer: Path | None) -> None:
    """A LLaMA of two narrow layers with random weights, beside the tokenizer that was given (or a tiny one)."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(loaded), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, bos_token_id=loaded.bos_token_id, eos_token_id=loaded.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    loaded.save_pretrained(folder)


def check(arguments: Sequence[str], cache: Path) -> tuple[dict[str, Any], float, float]:
    """What one `zhibei check --json` said, its seconds on the clock and its processor seconds."""
    command = [sys.executable, "-m", "zhibei", "check", *arguments, "--json"]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    answer = subprocess.run(
        command, env={**os.environ, "ZHIBEI_CACHE": str(cache)}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    if not answer.stdout:
        raise RuntimeError(f"zhibei check said nothing: {answer.stderr[-2000:]}")
    return json.loads(answer.stdout), seconds, processor


def timed(folder: Path, *, repeats: int) -> Record:
    """The file checked with an empty cache, and again."""
    times: dict[str, list[float]] = {"fresh": [], "fresh_cpu": [], "audited": [], "audited_cpu": []}
    found: dict[str, Any] = {}
    for number in range(repeats):
        for state in ("fresh", "audited"):
            found, seconds, processor = check([str(folder / "run.yaml")], folder / f"cache-{number}")
            times[state].append(seconds)
            times[f"{state}_cpu"].append(processor)
        shutil.rmtree(folder / f"cache-{number}")
    figures = {name: median_and_spread(values) for name, values in times.items()}
    return {
        "fresh_seconds": round(figures["fresh"][0], 2),
        "audited_seconds": round(figures["audited"][0], 2),
        "fresh_cpu_seconds": round(figures["fresh_cpu"][0], 2),
        "audited_cpu_seconds": round(figures["audited_cpu"][0], 2),
        "findings": [one["id"] for one in found["findings"]],
        "checks": found["checks"],
        "spread": {
            f"{name}_seconds": [round(value, 2) for value in low_high] for name, (_, low_high) in figures.items()
        },
        "repeats": repeats,
        "load_average_1m": round(os.getloadavg()[0], 1),
    }


def false_alarms(folder: Path) -> Record:
    """What is found in the shipped recipes, with rows and model that are sound."""
    alarms: dict[str, list[str]] = {}
    for name in recipe_names():
        if read_run(name).run.stage != "sft":
            continue  # the rows here are to be imitated, not compared
        settings = [
            f"model.path={folder / 'model'}",
            f"data.sources=[{folder / 'rows.json'}]",
            f"runs={folder / 'runs'}",
        ]
        machine = ["--machine", "a100-80g:8"] if name != "alpaca-7b-v100" else ["--machine", "v100-32g:4"]
        found, _, _ = check([name, *settings, *machine], folder / "cache-recipes")
        names = [one["id"] or one["what"] for one in (*found["findings"], *found["defects"])]
        alarms[name] = names
    return {"recipes": len(alarms), "false_alarms": {name: found for name, found in alarms.items() if found}}


def coverage() -> Record:
    """Pitfalls by how they are covered."""
    from zhibei.doctor.pitfalls import load_catalogue

    catalogue = load_catalogue()
    lines = [line for line in KNOWN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    known = [name for line in lines for name in line.partition(":")[2].split()]
    return {
        "pitfalls": len(catalogue),
        "known_kinds": dict(Counter(catalogue[name].kind for name in known if name in catalogue).most_common()),
        "kinds": dict(Counter(entry.kind for entry in catalogue.values()).most_common()),
        "areas": dict(Counter(entry.area for entry in catalogue.values())),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder of a real tokenizer; by default one of 300 tokens")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "rows.json", NUM_ROWS)
        write_rows(folder / "few.json", NUM_ROWS // 6)
        write_model(folder / "model", chosen.tokenizer)
        settings = {
            "name": "check",
            "runs": str(folder / "runs"),
            "model": {"path": str(folder / "model")},
            "data": {"sources": [str(folder / "rows.json")], "template": "alpaca", "max_tokens": 1024},
            "sft": {"learning_rate": 1e-3},
        }
        (folder / "run.yaml").write_text(json.dumps(settings), encoding="utf-8")
        figures = timed(folder, repeats=chosen.repeats) | false_alarms(folder) | coverage()
    record = {
        "benchmark": "check",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": "zhibei check RUN --json as a process",
        "settings": {"rows": NUM_ROWS, "tokenizer": chosen.tokenizer.name if chosen.tokenizer else "tiny"},
        **figures,
    }
    given = f" --tokenizer {chosen.tokenizer.name}" if chosen.tokenizer else ""
    merge(FILE, [with_surroundings(record, f"python -m benchmarks.check{given}")])
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
