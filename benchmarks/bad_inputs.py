"""What `zhibei train` and `zhibei check` say to bad inputs and to sound ones, judged by rule. Knows no single input.

Every input of tests/bad_inputs is made in a folder of its own and given to the command: the 68 each in a process of its
own, as a user would (their seconds count from the launch), variants and sound inputs in this process.
Verdict and grade come from the exit code, the figures that a run wrote, and regular expressions for what a message must
name; nothing here is judged by a person.

    python -m benchmarks.bad_inputs                    # all of them, about five minutes on two cores
    python -m benchmarks.bad_inputs --only c7 d11      # some, to look at; writes nothing
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, median_and_spread, merge, version_of, with_surroundings
from tests.bad_inputs.cases import CASES, VARIANTS
from tests.bad_inputs.controls import CONTROLS
from tests.bad_inputs.place import Models
from tests.bad_inputs.recipes import recipe_controls
from tests.bad_inputs.scenario import Scenario
from tests.bad_inputs.trial import run_control, run_scenario

FILE = RESULTS / "bad_inputs.json"
COMMAND = "python -m benchmarks.bad_inputs"

# Verdicts on the same 68 kinds of input, graded by hand, taken over and not measured here: each tool as pip installed
# it on 2026-11-24, on two cores without a GPU.
PEERS: dict[str, dict[str, int]] = {
    "trl 1.16.0": {
        "stopped before the first step": 38, "A": 3, "B": 16, "C": 17, "D": 2,
        "trained, with a warning": 1, "stopped late": 1, "silent": 24, "handled correctly": 4,
    },
    "llamafactory 0.9.5": {
        "stopped before the first step": 32, "A": 2, "B": 18, "C": 10, "D": 2,
        "trained, with a warning": 11, "stopped late": 1, "silent": 20, "handled correctly": 4,
    },
    "axolotl 0.19.0": {
        "stopped before the first step": 34, "A": 5, "B": 11, "C": 13, "D": 5,
        "trained, with a warning": 9, "stopped late": 1, "silent": 19, "handled correctly": 5,
    },
}  # fmt: skip


def try_scenarios(
    scenarios: Sequence[Scenario], folder: Path, models: Models, *, in_process: bool
) -> list[dict[str, Any]]:
    """One entry per bad input."""
    entries = []
    for scenario in scenarios:
        place, judgement, seen = run_scenario(scenario, folder / scenario.id, models, in_process=in_process)
        entries.append(
            {
                "id": scenario.id,
                "group": scenario.group,
                "breaks": scenario.breaks,
                "command": f"zhibei {place.verb}",
                "verdict": judgement.verdict,
                "grade": judgement.grade,
                "exit_code": seen.exit_code,
                "seconds": round(seen.seconds, 2),
                "cpu_seconds": round(seen.cpu_seconds, 2),
                "missing": list(judgement.missing),
                "faults": list(judgement.faults),
                "touched": list(seen.changed) if judgement.verdict != "handled" else [],
                "left_behind": list(seen.created) if seen.exit_code == 2 else [],
                "message": shortened(seen.text, folder),
            }
        )
        _tell(entries[-1])
    return entries


def try_controls(folder: Path, models: Models) -> list[dict[str, Any]]:
    """One entry per sound input: the small runs, and every shipped recipe on a small model of its family."""
    entries = []
    for control in [*CONTROLS, *recipe_controls()]:
        judgement, seen = run_control(control, folder / f"sound-{control.id}", models)
        entries.append(
            {
                "id": control.id,
                "verdict": judgement.verdict,
                "exit_code": seen.exit_code,
                "seconds": round(seen.seconds, 2),
                "findings": list(seen.findings),
                "faults": list(judgement.faults),
            }
        )
        _tell(entries[-1])
    return entries


def shortened(text: str, folder: Path, most: int = 1200) -> str:
    """The last part of an answer, with the temporary folder left out."""
    text = text.replace(f"{folder}{os.sep}", "").strip()
    return text if len(text) <= most else "…" + text[-most:]


def counts(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The lines of the comparison with other tools."""
    verdicts = Counter(entry["verdict"] for entry in entries)
    grades = Counter(entry["grade"] for entry in entries if entry["verdict"] == "stopped")
    return {
        "bad inputs": len(entries),
        "stopped before the first step": verdicts["stopped"],
        **{grade: grades[grade] for grade in "ABCD"},
        "trained, with a warning": verdicts["warned"],
        "stopped late": verdicts["stopped late"],
        "silent": verdicts["silent"],
        "crashed": verdicts["crashed"],
        "handled correctly": verdicts["handled"],
        "with exit code 2": sum(entry["exit_code"] == 2 for entry in entries),
        "touched what existed": sum(bool(entry["touched"]) for entry in entries),
        "left something behind": sum(bool(entry["left_behind"]) for entry in entries),
    }


def record_of(entries: list[dict[str, Any]], *, method: str, process: str, **more: Any) -> Record:
    """One record of the result file."""
    seconds = [entry["seconds"] for entry in entries]
    median, spread = median_and_spread(seconds)
    refused = [entry for entry in entries if entry["exit_code"] == 2]
    return {
        "benchmark": "bad_inputs",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": method,
        "settings": {"inputs": len(entries), "process": process},
        "seconds": round(median, 2),
        "spread": {"seconds": spread},
        "slowest_refusal_seconds": max((entry["seconds"] for entry in refused), default=None),
        "slowest_refusal_cpu_seconds": max((entry.get("cpu_seconds", 0.0) for entry in refused), default=None),
        "repeats": 1,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        **more,
        "inputs": entries,
    }


def _tell(entry: dict[str, Any]) -> None:
    faults = f"  <- {'; '.join(entry['faults'])}" if entry["faults"] else ""
    words = [f"{entry['id']:30}", f"{entry['verdict']:12}", entry.get("grade", ""), f"{entry['seconds']:6.1f} s"]
    print(*words, faults, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of ids; writes no result")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        os.environ["ZHIBEI_CACHE"] = str(folder / "cache")
        models = Models(folder / "models")
        if options.only:
            chosen = [case for case in [*CASES, *VARIANTS] if case.id.startswith(tuple(options.only))]
            print(counts(try_scenarios(chosen, folder, models, in_process=False)))
            return
        cases = try_scenarios(CASES, folder, models, in_process=False)
        variants = try_scenarios(VARIANTS, folder, models, in_process=True)
        controls = try_controls(folder, models)
    alarms = sum(entry["verdict"] == "false alarm" for entry in controls)
    sound = {"sound inputs": len(controls), "false alarms": alarms}
    records = [
        record_of(cases, method="the 68 bad inputs", process="own", counts=counts(cases), peers=PEERS),
        record_of(variants, method="variants of them", process="shared", counts=counts(variants)),
        record_of(controls, method="sound inputs", process="shared", counts=sound),
    ]
    merge(FILE, [with_surroundings(record, COMMAND) for record in records])


if __name__ == "__main__":
    main()
