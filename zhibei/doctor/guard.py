"""Training as it should be started: checked before it begins, watched while it runs, and both kept beside the run.

Knows what surrounds a loop; no loop, and no screen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zhibei.config.resolve import ResolvedRun
from zhibei.doctor.checkup import Checkup, check
from zhibei.doctor.facts.gather import gather_facts
from zhibei.store.files import write_json_atomic
from zhibei.store.run_dir import RunDir
from zhibei.train.beginning import run_dir_of

if TYPE_CHECKING:
    from zhibei.train.record import Watch


def train_guarded(
    resolved: ResolvedRun,
    *,
    watch: Watch,
    resume: RunDir | None = None,
    on_rows: Callable[[int, str], None] | None = None,
    rehearse: Callable[[ResolvedRun], dict[str, Any] | None] | None = None,
) -> RunDir:
    """Check the run, rehearse it where `rehearse` is given and the run is new, train it under its watchdogs, and make
    the forms of it that the run file asks for.

    `watch` gets every record; the warnings of the check come first, as events. Raises UserError, naming all of them,
    when findings stop the run (no weights are loaded then, and nothing is written), and what training raises.
    """
    found = check(gather_facts(resolved, on_rows=on_rows, resume=resume))
    if found.blocks:
        raise found.as_error()
    for record in warnings_of(found):
        watch(record)
    rehearsed = rehearse(resolved) if rehearse is not None and resume is None else None
    documents = {"check": found.as_dict(), "rehearsal": rehearsed}
    run_dir = train_watched(resolved, documents, watch=watch, resume=resume, on_rows=on_rows)
    hand_over(resolved, run_dir, watch=watch)
    return run_dir


def hand_over(resolved: ResolvedRun, run_dir: RunDir, *, watch: Watch, **options: Any) -> None:
    """Make what is missing of the forms that the run file asks for; rank 0 does it, alone.

    `options` are `on_made` and `progress`. Raises UserError naming the forms that could not be made; the run stays.
    """
    if not resolved.run.hand_over:
        return
    from zhibei.export.after_training import make_forms
    from zhibei.model.ranks import current

    if current().is_first:
        make_forms(run_dir, resolved.run.hand_over, device=resolved.run.device, watch=watch, **options)


def train_watched(
    resolved: ResolvedRun, documents: Mapping[str, dict[str, Any] | None], *, watch: Watch, **options: Any
) -> RunDir:
    """Train a run that was checked, under its watchdogs; `documents` (check, rehearsal) are kept in its directory.

    `options` are `resume` and `on_rows` of training.
    """
    # Torch is loaded only now: a run that is refused is refused within a second or two.
    from zhibei.doctor.watchdogs import watch_over
    from zhibei.train.loops import train

    resumed = options.get("resume")
    keeping = keep_beside(documents, resumed or run_dir_of(resolved.run), watch)
    return train(resolved, watch=watch_over(resolved.run, also=keeping, resumed=resumed), **options)


def warnings_of(found: Checkup) -> list[dict[str, Any]]:
    """What does not stop the run, in the form of the records that a loop gives to its watcher."""
    return [
        {
            "kind": "event",
            "step": 0,
            "event": one.finding.level,
            "text": f"{one.id or 'check'}: {one.finding.what}; {one.finding.to_do}",
        }
        for one in found.findings
        if not one.blocks
    ]


def keep_beside(documents: Mapping[str, dict[str, Any] | None], run_dir: RunDir, watch: Watch) -> Watch:
    """Passes records on; the first one comes when training has made its directory, which then gets check.json and
    rehearsal.json (`documents` by these names)."""
    places = {"check": run_dir.check, "rehearsal": run_dir.rehearsal}
    pending = {name: document for name, document in documents.items() if document is not None}

    def keep(record: dict[str, Any]) -> Any:
        while pending:
            name, document = pending.popitem()
            write_json_atomic(places[name], document)
        return watch(record)

    return keep
