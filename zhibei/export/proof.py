"""The proof behind every merge and export: compare it with what it was made of, keep the figures, refuse what is worse.

The proof runs on the new folder before it gets its final name, so that what fails leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from zhibei.export.parity import ParityReport, Side, compare
from zhibei.export.parity_limits import Limits, limits_for
from zhibei.export.probes import ALL, CONVERSATIONS, Probes, choose_rows
from zhibei.export.sides import FolderSide
from zhibei.store.files import write_json_atomic
from zhibei.store.ledger import read_ledger, write_ledger
from zhibei.store.manifest import now
from zhibei.store.run_dir import RunDir

PARITY_FILE = "parity.json"
Progress = Callable[[str, int, int], Any]


def measure(
    reference: FolderSide,
    other: Side,
    *,
    kind: str,
    text: Path | None = None,
    progress: Progress = lambda *_: None,
    probes: Probes = ALL,
) -> ParityReport:
    """Compare a new form with its source, on the named text, else the run's held-out rows, else the model's own words;
    tokenizers and templates on `probes`.

    Raises UserError for an unknown kind, and when one of the two cannot be loaded.
    """
    limits_for(kind)
    rows, rows_from = choose_rows(
        reference.found.run, reference.tokenizer, text=text, own=lambda: reference.rows_of_its_own(CONVERSATIONS)
    )
    report = compare(
        reference, other, rows=rows, conversations=probes.conversations, probes=probes.texts, progress=progress
    )
    return replace(report, kind=kind, rows_from=rows_from)


def write_parity(folder: Path, report: ParityReport, limits: Limits, *, name: str = PARITY_FILE) -> None:
    """Put the figures beside what they are about."""
    write_json_atomic(folder / name, report.as_dict(limits))


def note_hand_over(run: RunDir | None, what: str, place: Path, report: ParityReport | None) -> None:
    """Note in the run what was made of it, for its report page; nothing for a model without a run."""
    if run is None or not run.path.is_dir():
        return
    parity = report.as_dict(limits_for(report.kind)) if report is not None else None
    entry = {"time": now(), "what": what, "path": str(place.resolve()), "parity": parity}
    write_ledger(run.handed_over, [*read_ledger(run.handed_over), entry])
