"""The form of a measurement and the files that keep it. Knows no model and no rival.

A record holds `benchmark`, `who`, `version`, `method`, `settings`, figures (medians where repeated, with `spread` =
{figure: [lowest, highest]} and `repeats`), `device`, `versions`, `command` and `date`; or `error` instead of figures.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WATCHED_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "liger-kernel",
    "unsloth",
    "unsloth-zoo",
    "xformers",
)

Record = dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of what is installed and matters for a measurement."""
    found = {"python": platform.python_version()}
    for name in WATCHED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def version_of(package: str) -> str:
    """The version of an installed package; zhibei's own is read from the package, which may run from a checkout."""
    if package == "zhibei":
        import zhibei

        return str(getattr(zhibei, "__version__", "0.1.0"))
    return importlib.metadata.version(package)


def device_name() -> str:
    """The GPU in the vendor's words, or the processor with its number of cores."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def median_and_spread(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and [lowest, highest]."""
    return statistics.median(values), [min(values), max(values)]


def with_surroundings(record: Record, command: str) -> Record:
    """The record with where, with what and when it was measured."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        **record,
        "device": device_name(),
        "versions": versions(),
        "command": command,
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def identity(record: Record) -> str:
    """What makes two records the same measurement: a newer one replaces the older."""
    keys = ("benchmark", "who", "method", "settings", "device")
    return json.dumps({key: record.get(key) for key in keys}, sort_keys=True)


def read(path: Path) -> list[Record]:
    """The records of a result file; none when it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def merge(path: Path, new: Iterable[Record]) -> list[Record]:
    """Add records to a result file. A success is never replaced by a failure of the same measurement."""
    kept = {identity(record): record for record in read(path)}
    for record in new:
        older = kept.get(identity(record))
        if "error" in record and older is not None and "error" not in older:
            continue
        kept[identity(record)] = record
    records = sorted(kept.values(), key=lambda record: (record["benchmark"], record["who"], identity(record)))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return records
