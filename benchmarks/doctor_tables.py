"""Tables of what the doctor finds, how fast, and how the catalogue is covered. Knows records, not how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.records import Record

VERDICTS = (
    "stopped before the first step",
    "A",
    "B",
    "C",
    "D",
    "handled correctly",
    "trained, with a warning",
    "stopped late",
    "silent",
)
GRADES = {
    "A": "of these: message names culprit and remedy",
    "B": "of these: culprit only",
    "C": "of these: internal text",
    "D": "of these: misleading or empty",
}
KINDS = ("check", "rehearsal", "watchdog", "gate", "construction", "explained")


def bad_inputs_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """One line per verdict; one column for the 68 bad inputs, one for their variants, one per rival."""
    by_method: dict[str, Record] = {record["method"]: record for record in records}
    known, variants = by_method["the 68 bad inputs"], by_method["variants of them"]
    columns: dict[str, dict[str, Any]] = {
        f"zhibei, {known['counts']['bad inputs']} inputs": known["counts"],
        f"zhibei, {variants['counts']['bad inputs']} variants": variants["counts"],
        **{f"{name}, 68 inputs": counts for name, counts in known["peers"].items()},
    }
    rows = [[GRADES.get(verdict, verdict), *(str(one[verdict]) for one in columns.values())] for verdict in VERDICTS]
    sound = by_method["sound inputs"]["counts"]
    rows.append([f"false alarms on {sound['sound inputs']} sound inputs", str(sound["false alarms"]), *[""] * 4])
    return ["", *columns], rows


def check_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Seconds of `zhibei check` as a process."""
    rows = []
    for record in records:
        for kind, words in (("audited", "audited before"), ("fresh", "fresh")):
            low, high = record["spread"][f"{kind}_seconds"]
            rows.append(
                [
                    f"{record['settings']['rows']:,} rows, {words}",
                    record["settings"]["tokenizer"],
                    f"{record[f'{kind}_seconds']:.1f} ({low:.1f} to {high:.1f})",
                    f"{record[f'{kind}_cpu_seconds']:.1f}",
                    f"{record['load_average_1m']:.1f}",
                    f"{len(record['false_alarms'])} of {record['recipes']}",
                ]
            )
    return ["data", "tokenizer", "seconds", "of processor time", "load of the machine", "recipes with an alarm"], rows


def coverage_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """How pitfalls are covered: those of the published list, and all of the catalogue."""
    record = records[-1]
    known, every = record["known_kinds"], record["kinds"]
    rows = [
        [kind, str(known.get(kind, 0)), f"{known.get(kind, 0) / sum(known.values()):.1%}", str(every.get(kind, 0))]
        for kind in KINDS
    ]
    rows.append(["all", str(sum(known.values())), "", str(sum(every.values()))])
    return ["covered by", "of the 217 collected beforehand", "share", "of the whole catalogue"], rows


def explain_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Shares of known symptoms that are named."""
    (record,) = records
    names = ("found", "family", "among", "wrong", "unknown")
    groups = {
        f"all {record['symptoms']} symptoms": record["all"],
        f"the {record['with_message']['symptoms']} that quote a message": record["with_message"],
    }
    rows = [[words, *(f"{shares[name]:.1%}" for name in names)] for words, shares in groups.items()]
    header = ["", "named", "a general family named", "among further candidates", "wrong", "said to be unknown"]
    return header, rows
