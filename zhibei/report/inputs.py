"""Everything a report shows, read from a run directory. Knows files and their shapes, not pages.

Nothing here raises for a missing or damaged file: the report is what a person opens when something went wrong, so
what cannot be read is left empty and its reason is kept in `problems`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir

MOST_LEDGER_ENTRIES = 200_000


@dataclass(frozen=True)
class SamplePanel:
    """What base and tuned model answered at one evaluation."""

    step: int
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class RunInputs:
    """A run as the report sees it.

    `seconds`: from start to last record, without the pauses before a resume. `problems`: file name -> why it could not
    be read, or only in part.
    """

    run_dir: RunDir
    seconds: float = 0.0
    train: list[dict[str, Any]] = field(default_factory=list)
    heldout: list[dict[str, Any]] = field(default_factory=list)
    iterations: list[dict[str, Any]] = field(default_factory=list)
    """Of a policy: one record per iteration."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Of a policy: the reward of held-out prompts."""
    events: list[dict[str, Any]] = field(default_factory=list)
    num_replaced_steps: int = 0
    audit: dict[str, Any] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    samples: list[SamplePanel] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    proofs: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    rehearsal: dict[str, Any] = field(default_factory=dict)
    handed_over: list[dict[str, Any]] = field(default_factory=list)
    """What merge and export made of the run."""
    resolved: str = ""
    problems: dict[str, str] = field(default_factory=dict)


def read_inputs(run_dir: RunDir) -> RunInputs:
    """Read what is there; what is not is empty."""
    problems: dict[str, str] = {}
    records = read_records(run_dir.metrics, problems)
    train, num_replaced_steps = newest_per_step([r for r in records if r.get("kind") == "train" and "step" in r])
    heldout, _ = newest_per_step([r for r in records if r.get("kind") == "heldout" and "step" in r])
    iterations, num_repeated = newest_per_step([r for r in records if r.get("kind") == "iteration" and "step" in r])
    evaluations, _ = newest_per_step([r for r in records if r.get("kind") == "evaluation" and "step" in r])
    proofs = read_json(run_dir.proofs, problems)
    if isinstance(proofs, dict):
        proofs = proofs.get("proofs", [proofs])
    return RunInputs(
        run_dir=run_dir,
        seconds=seconds_of_sessions(records),
        train=train,
        heldout=heldout,
        iterations=iterations,
        evaluations=evaluations,
        events=[r for r in records if r.get("kind") == "event"],
        num_replaced_steps=num_replaced_steps + num_repeated,
        audit=as_dict(read_json(run_dir.audit, problems)),
        ledger=read_json_lines(run_dir.ledger, problems, most=MOST_LEDGER_ENTRIES),
        samples=read_samples(run_dir.samples, problems),
        manifest=as_dict(read_json(run_dir.manifest, problems)),
        handed_over=read_json_lines(run_dir.handed_over, problems) if run_dir.handed_over.exists() else [],
        plan=as_dict(read_json(run_dir.plan, problems)),
        check=as_dict(read_json(run_dir.check, problems)),
        rehearsal=as_dict(read_json(run_dir.rehearsal, problems)),
        proofs=[proof for proof in proofs if isinstance(proof, dict)] if isinstance(proofs, list) else [],
        resolved=read_text(run_dir.resolved, problems),
        problems=problems,
    )


def read_records(path: Path, problems: dict[str, str]) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; what is readable of them when the file is damaged."""
    notes: list[str] = []
    if not path.exists():
        problems[path.name] = "missing"
    try:
        records = read_metrics(path, notes=notes)
    except (UserError, OSError, ValueError) as error:
        records = read_json_lines(path, problems)
        notes.append(str(error).splitlines()[0])
    if notes:
        problems[path.name] = "; ".join(notes)
    return records


def seconds_of_sessions(records: list[dict[str, Any]]) -> float:
    """Time from first to last record of each uninterrupted stretch, summed."""
    total = 0.0
    first = last = None
    for record in records:
        now = seconds_since_epoch(record.get("time"))
        if now is None:
            continue
        if record.get("kind") == "event" and record.get("event") in ("started", "resumed") and first is not None:
            total += (last or first) - first
            first = None
        first = now if first is None else first
        last = now
    return total + ((last or first) - first if first is not None else 0.0)


def newest_per_step(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The last record of each step, in order of steps, and how many were replaced.

    A run that was killed after its last checkpoint repeats the steps since then when it is resumed.
    """
    by_step = {record["step"]: record for record in records if isinstance(record["step"], int)}
    return [by_step[step] for step in sorted(by_step)], len(records) - len(by_step)


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def read_text(path: Path, problems: dict[str, str]) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        problems[path.name] = "missing"
    except OSError as error:
        problems[path.name] = str(error.strerror or error)
    return ""


def read_json(path: Path, problems: dict[str, str]) -> Any:
    text = read_text(path, problems)
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        problems[path.name] = f"not JSON: {error}"
        return None


def read_json_lines(path: Path, problems: dict[str, str], *, most: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A torn line (the process died while writing it) is left out and counted."""
    records: list[dict[str, Any]] = []
    num_broken = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                if most is not None and len(records) >= most:
                    problems[path.name] = f"only the first {most:,} lines were read"
                    break
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError:
                    num_broken += 1
                    continue
                if isinstance(value, dict):
                    records.append(value)
    except FileNotFoundError:
        problems[path.name] = "missing"
    except OSError as error:
        problems[path.name] = str(error.strerror or error)
    if num_broken:
        problems[path.name] = f"{num_broken} unreadable line(s) left out"
    return records


def read_samples(folder: Path, problems: dict[str, str]) -> list[SamplePanel]:
    """The panels of samples/step-*.json, in order of steps."""
    panels = []
    for path in sorted(folder.glob("step-*.json")) if folder.is_dir() else []:
        digits = path.stem.removeprefix("step-")
        value = read_json(path, problems)
        rows = value.get("samples") if isinstance(value, dict) else value
        if digits.isdigit() and isinstance(rows, list):
            panels.append(SamplePanel(int(digits), [row for row in rows if isinstance(row, dict)]))
    return sorted(panels, key=lambda panel: panel.step)


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def seconds_since_epoch(value: Any) -> float | None:
    """A record's `time`, which may be a number or an ISO 8601 text."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        except ValueError:
            return None
    return finite(value)
