"""The stages that hand a model on: merged, as a Hugging Face folder, as GGUF files; each proved against its source.

Knows which function of `zhibei.export` does it, and what is kept of its proof.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei.pipeline.asked import HANDED_FILE
from zhibei.store.files import write_json_atomic

if TYPE_CHECKING:
    from zhibei.pipeline.run import Work


def merge_stage(work: Work) -> None:
    """Merge the adapters of a run into their base; the whole model lies in `model`. Raises UserError as `zhibei merge`,
    and leaves nothing then."""
    from zhibei.export.hand_over import merge

    made = merge([_source(work)], out=_place(work), dtype=str(work.stage.settings["dtype"]))
    _keep(work, made.path, [made.parity], notes=made.notes)


def export_stage(work: Work) -> None:
    """A complete Hugging Face folder with a model card, in `model`. Raises UserError as `zhibei export --to hf`."""
    from zhibei.export.hand_over import export_hf

    made = export_hf(_source(work), out=_place(work), dtype=str(work.stage.settings["dtype"]))
    _keep(work, made.path, [made.parity], notes=made.notes)


def gguf_stage(work: Work) -> None:
    """GGUF files for llama.cpp, in `model`. Raises UserError as `zhibei export --to gguf`."""
    from zhibei.export.gguf.hand_over import Wanted, hand_over_gguf

    settings = work.stage.settings
    wanted = Wanted(types=tuple(settings["types"]), imatrix_of_run=settings["imatrix"] == "run",
                    imatrix=_file(settings["imatrix"]))  # fmt: skip
    made = hand_over_gguf(_source(work), out=_place(work), wanted=wanted)
    _keep(work, made.path, list(made.reports), notes=made.notes)


def _source(work: Work) -> str:
    text = str(work.stage.settings["model"])
    return work.pipeline.product(text[1:]) if text.startswith("$") else text


def _place(work: Work) -> Path:
    folder = work.pipeline.folder / work.stage.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "model"


def _file(text: str | None) -> Path | None:
    return None if text in (None, "run") else Path(text)


def _keep(work: Work, place: Path, reports: list[Any], *, notes: tuple[str, ...]) -> None:
    """The proofs as a document beside the model, and told as they are."""
    from zhibei.export.parity_limits import limits_for

    proofs = [report.as_dict(limits_for(report.kind)) for report in reports if report is not None]
    document = {"path": str(place), "proofs": proofs, "notes": list(notes)}
    write_json_atomic(work.pipeline.folder / work.stage.name / HANDED_FILE, document)
    sizes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    counted = f"{len(proofs)} comparison{'s' * (len(proofs) != 1)} passed"
    text = f"{place}, {sizes / 2**20:.1f} MiB, {counted}"
    work.watch({"kind": "event", "step": 0, "event": "handed over", "text": text})
