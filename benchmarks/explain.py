"""How many known errors `zhibei explain` names from the words in which people reported them, and how fast it reads.

    python -m benchmarks.explain --symptoms pitfalls.jsonl

Each record of the file has an `id` and a `symptom`: the message or description of one pitfall. A symptom is `found`
when its own pitfall is named as the cause, `family` when a general family of messages is named (out of memory, a
missing file), `among` when it is among the further candidates or the pages that sound like it, `wrong` when another
pitfall is named, `unknown` when nothing is named. Many symptoms quote no message ("No error: ...");
`with_message` counts those that hold a quoted error or warning.
Writes benchmarks/results/explain.json.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, merge, version_of, with_surroundings
from zhibei.doctor.explain import explain_stream
from zhibei.doctor.pitfall import Pitfall
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.doctor.verdict import GENERAL, GENERAL_AREA

RESULT = RESULTS / "explain.json"
MESSAGE = re.compile(
    r"(?:Error|Exception|Warning|WARNING|ERROR|WARN)\b|exits? with|exitcode|return code|assert|Killed|OVERFLOW"
    r"|out of memory|grad_norm nan|mismatch|not found|failed|Unsloth:|CUDA SETUP|no longer allowed"
)
VERDICTS = ("found", "family", "among", "wrong", "unknown")
SPEED_BYTES = 64 * 2**20


def verdict_of(name: str, symptom: str, catalogue: Mapping[str, Pitfall]) -> tuple[str, str]:
    """(found, family, among, wrong or unknown; what was named)."""
    explanation = explain_stream(io.BytesIO(symptom.encode()), name, catalogue)
    named = explanation.cause.pitfall.id if explanation.cause else ""
    others = [one.pitfall.id for one in (*explanation.others, *explanation.harmless)]
    others += [one.id for one, _ in explanation.resembling]
    if named == name or (explanation.harmless and not named and name in others):
        return "found", name
    if name in others:
        return "among", named
    if explanation.cause and (explanation.cause.pitfall.area == GENERAL_AREA or named in GENERAL):
        return "family", named
    return ("wrong" if named else "unknown"), named


def rates(symptoms: Iterable[Mapping[str, Any]], catalogue: Mapping[str, Pitfall]) -> dict[str, Any]:
    """Counts and shares over all symptoms, and every one that was not found."""
    rows = [(one["id"], one["symptom"], *verdict_of(one["id"], one["symptom"], catalogue)) for one in symptoms]
    with_message = [row for row in rows if MESSAGE.search(row[1])]

    def shares(part: list[tuple[str, str, str, str]]) -> dict[str, float]:
        counts = Counter(row[2] for row in part)
        return {
            name: round(counts[name] / max(1, len(part)), 4)
            for name in ("found", "family", "among", "wrong", "unknown")
        }

    return {
        "symptoms": len(rows),
        "all": shares(rows),
        "with_message": {"symptoms": len(with_message), **shares(with_message)},
        "not_found": [
            {"id": name, "verdict": verdict, "named": named} for name, _, verdict, named in rows if verdict != "found"
        ],
    }


def speed(catalogue: Mapping[str, Pitfall]) -> dict[str, float]:
    """Megabytes per second of processor time, over figures of a trainer and over prose of changing words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]

    def figures() -> str:
        return f"{{'loss': {draw.random() * 3:.4f}, 'grad_norm': {draw.random():.6f}, 'epoch': {draw.random():.2f}}}"

    found: dict[str, float] = {}
    for name, line in {"figures": figures, "prose": lambda: " ".join(draw.choices(words, k=16))}.items():
        block = "\n".join(line() for _ in range(120_000)).encode() + b"\n"
        log = block * max(1, SPEED_BYTES // len(block)) if name == "figures" else block
        started = time.process_time()
        explain_stream(io.BytesIO(log), name, catalogue)
        found[f"{name}_mb_per_s"] = round(len(log) / 1e6 / (time.process_time() - started), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--symptoms", type=Path, help="JSON lines with id and symptom")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    catalogue = load_catalogue()
    result: Record = {
        "benchmark": "explain",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": "explain",
        "settings": {"symptoms": "given" if arguments.symptoms else "none"},
        "pitfalls": len(catalogue),
        "pitfalls_with_messages": sum(bool(one.errors) for one in catalogue.values()),
        "messages": sum(len(one.errors) for one in catalogue.values()),
        "speed": speed(catalogue),
    }
    if arguments.symptoms:
        lines = arguments.symptoms.read_text("utf-8").splitlines()
        result |= rates([json.loads(line) for line in lines if line.strip()], catalogue)
    merge(arguments.result, [with_surroundings(result, "python -m benchmarks.explain --symptoms FILE")])
    json.dump({key: value for key, value in result.items() if key != "not_found"}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
