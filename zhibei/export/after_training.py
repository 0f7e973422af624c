"""The forms that a run file asks for (`hand_over`), made of a finished run one after the other. Knows no screen.

Each lies in a folder of its own that appears when it is proved, so what is there is done, and a second call makes only
what is missing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.hand_over import needs_importance, parts_of
from zhibei.export.forms import Wanted, to_difference, to_hf, to_meta
from zhibei.export.gguf.hand_over import Wanted as GgufWanted
from zhibei.export.gguf.hand_over import hand_over_gguf
from zhibei.export.hand_over import HandedOver, Progress, Proving, merge
from zhibei.export.hub_folder import MADE_FROM
from zhibei.export.parity import ParityReport
from zhibei.export.parity_limits import limits_for
from zhibei.store.run_dir import RunDir

Watch = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Made:
    """One form: its folder, what it was compared by (None: by reading it back, or not at all), and notes."""

    form: str
    path: Path
    parity: ParityReport | None
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


def place_of(run: RunDir, form: str) -> Path:
    """`merged`, else `exports/` and the form, with - for its colon: exports/gguf-Q8_0."""
    return run.merged if form == "merged" else run.exports / form.replace(":", "-")


def pending_forms(run: RunDir, forms: Sequence[str]) -> list[str]:
    """Those that are not there yet, in the order asked."""
    return [form for form in forms if not _is_made(run, form)]


def _is_made(run: RunDir, form: str) -> bool:
    if (place_of(run, form) / MADE_FROM).is_file():
        return True
    kind, of = parts_of(form)
    # `zhibei export --to gguf` puts all types into one folder.
    return kind == "gguf" and any((run.exports / "gguf").glob(f"*-{of}.gguf"))


def make_forms(
    run: RunDir,
    forms: Sequence[str],
    *,
    device: str = "auto",
    watch: Watch = lambda record: None,
    on_made: Callable[[Made], Any] = lambda made: None,
    progress: Progress = lambda what, done, total: None,
) -> list[Made]:
    """Make what is missing of the forms; one that fails keeps no other from being made.

    `watch` gets a record for each. Raises UserError at the end, naming every form that could not be made: the run and
    the forms that were made stay as they are.
    """
    gc.collect()  # the model that was trained, where a caller has just let go of it
    made: list[Made] = []
    failed: dict[str, UserError] = {}
    for form in pending_forms(run, forms):
        try:
            one = _make(run, form, Proving(device=device, progress=progress))
        except UserError as problem:
            failed[form] = problem
            watch(_event("warning", f"{form} could not be made: {problem.what}"))
            continue
        made.append(one)
        watch(_event("handed over", _told(one), form=form, path=str(one.path), parity=_facts(one)))
        on_made(one)
    if failed:
        raise _failure(run, failed)
    return made


def _failure(run: RunDir, failed: dict[str, UserError]) -> UserError:
    reasons = "; ".join(f"{form}: {problem.what}" for form, problem in failed.items())
    remedies = " / ".join(dict.fromkeys(problem.fix for problem in failed.values()))
    return UserError(
        f"{run.model} is trained and kept, and of what hand_over asks for {', '.join(failed)} could not be made: "
        f"{reasons}",
        expected="every form that hand_over names",
        fix=f"{remedies}. Then `zhibei resume {run.path}` makes what is missing; `zhibei export {run.path}` makes any "
        "form, with options of its own",
        where="hand_over",
        pitfall=next((problem.pitfall for problem in failed.values() if problem.pitfall), ""),
    )


def _event(event: str, text: str, **facts: Any) -> dict[str, Any]:
    return {"kind": "event", "step": 0, "event": event, "text": text, **facts}


def _facts(made: Made) -> dict[str, Any] | None:
    return made.parity.as_dict(limits_for(made.parity.kind)) if made.parity is not None else None


def _told(made: Made) -> str:
    proof = "read back, equal bit for bit" if parts_of(made.form)[0] == "meta" else "; ".join(made.notes[:1])
    if made.parity is not None:
        proof = f"KL {made.parity.kl_mean:.2g} nats, likeliest token agrees in {made.parity.top1_agreement:.1%}"
    return f"{made.form} in {made.path}, {made.num_bytes / 2**20:,.1f} MiB: {proof}"


def _make(run: RunDir, form: str, proving: Proving) -> Made:
    return MAKERS[parts_of(form)[0]](run, form, proving)


def _gguf(run: RunDir, form: str, proving: Proving) -> Made:
    wanted = GgufWanted(types=(parts_of(form)[1],), imatrix_of_run=needs_importance(form))
    made = hand_over_gguf(str(run.path), out=place_of(run, form), wanted=wanted, proving=proving)
    return Made(form, made.path, made.reports[0], made.notes)


def _other(make: Callable[[str, Wanted], HandedOver]) -> Callable[[RunDir, str, Proving], Made]:
    def made_by(run: RunDir, form: str, proving: Proving) -> Made:
        shards = int(parts_of(form)[1] or 1)
        made = make(str(run.path), Wanted(out=place_of(run, form), shards=shards, proving=proving))
        return Made(form, made.path, made.parity, made.notes)

    return made_by


MAKERS: dict[str, Callable[[RunDir, str, Proving], Made]] = {
    "merged": _other(lambda path, wanted: merge([path], out=wanted.out, proving=wanted.proving)),
    "hf": _other(to_hf),
    "delta": _other(to_difference),
    "meta": _other(to_meta),
    "gguf": _gguf,
}
