"""report.html of a run: which sections, in which order. Knows the list, not the sections' contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from zhibei.report.audit import audit
from zhibei.report.beforehand import BEFOREHAND_SECTIONS
from zhibei.report.handed_over import handed_over
from zhibei.report.html import Section, both, page
from zhibei.report.inputs import RunInputs, read_inputs
from zhibei.report.judged import has_judgements, judged
from zhibei.report.policy import health_board
from zhibei.report.provenance import PROVENANCE_SECTIONS
from zhibei.report.rows import dropped_rows
from zhibei.report.training import TRAINING_SECTIONS, written_at
from zhibei.store.files import write_text_atomic
from zhibei.store.run_dir import RunDir

SECTIONS: dict[str, Callable[[RunInputs], Section]] = {
    **TRAINING_SECTIONS,
    "judged": judged,
    "health_board": health_board,
    **BEFOREHAND_SECTIONS,
    "handed_over": handed_over,
    "audit": audit,
    "dropped_rows": dropped_rows,
    **PROVENANCE_SECTIONS,
}
TRAINING_PAGE = (
    "verdict",
    "key_figures",
    "curves",
    "samples",
    "proofs",
    "check",
    "rehearsal",
    "plan",
    "audit",
    "dropped_rows",
    "run_file",
    "manifest",
    "events",
    "files",
    "commands",
)


def sections_of(inputs: RunInputs) -> Sequence[str]:
    """The sections of a page: those of its kind of training, and what was made of the run since."""
    names = list(_sections_of_training(inputs))
    if inputs.handed_over:
        names.insert(names.index("proofs") + 1, "handed_over")
    return names


def _sections_of_training(inputs: RunInputs) -> Sequence[str]:
    """Runs that compare answers have one more, reward models write no samples, and policies have a health board
    instead of losses."""
    if inputs.iterations:
        return ["health_board" if name == "curves" else name for name in TRAINING_PAGE if name != "key_figures"]
    if not has_judgements(inputs):
        return TRAINING_PAGE
    names = [name for name in TRAINING_PAGE if name != "samples" or inputs.samples]
    names.insert(names.index("curves") + 1, "judged")
    return names


def write_report(run_dir: RunDir, *, sections: Sequence[str] | None = None) -> Path:
    """Make `report.html` of a run from the files in its folder, and return its path.

    One self-contained file that reads from file://, without JavaScript and on paper. A missing or damaged input never
    stops it: the section says what is missing. `sections`: names from SECTIONS, in their order on the page; by default
    those that this run has something for.
    """
    inputs = read_inputs(run_dir)
    sections = sections_of(inputs) if sections is None else sections
    when = max(
        map(written_at, [*inputs.train[-1:], *inputs.iterations[-1:], *inputs.heldout[-1:], *inputs.events[-1:]]),
        default="",
    )
    subtitle = both("training report", "训练报告")
    if when:
        subtitle += both(f", last record {when} UTC", f"，最后记录 {when} UTC")
    text = page(run_dir.path.resolve().name, subtitle=subtitle, sections=[SECTIONS[name](inputs) for name in sections])
    write_text_atomic(run_dir.report, text)
    return run_dir.report
