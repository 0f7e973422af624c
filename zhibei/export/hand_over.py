"""A whole model is made of a run and proved: merge, and the complete Hugging Face folder. Knows the order of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.export.card import open_points
from zhibei.export.hub_folder import add_card, complete_folder, copy_model, new_folder, write_merged
from zhibei.export.merge import Merged
from zhibei.export.parity import ParityReport, Side
from zhibei.export.parity_limits import limits_for
from zhibei.export.proof import measure, note_hand_over, write_parity
from zhibei.export.sides import FolderSide
from zhibei.export.sources import MergeSource, find_merge, local_folder, weighted_path
from zhibei.model.locate import Located, locate
from zhibei.store.files import write_json_atomic

KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Proving:
    """How the new form is compared with its source. `is_wanted` false: not at all, and the report says so."""

    is_wanted: bool = True
    text: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    progress: Progress = lambda what, done, total: None


@dataclass(frozen=True)
class HandedOver:
    """What was made: its place, the figures of the merge (None: nothing was merged) and of the comparison."""

    path: Path
    merged: Merged | None
    parity: ParityReport | None
    open_points: tuple[str, ...] = ()
    """Lines of its model card that say what is not recorded."""
    notes: tuple[str, ...] = ()
    """What else a person should know."""


def merge(
    paths: Sequence[str],
    *,
    base: str | None = None,
    out: Path | None = None,
    dtype: str = "as-base",
    proving: Proving | None = None,
) -> HandedOver:
    """Merge adapters (`runs/a`, or several as `runs/a:0.7 runs/b:0.3`) into their base and prove the result.

    The result is a complete Hugging Face folder: `out`, else `runs/a/merged`. Raises UserError when something does not
    fit, and when the merged model is not the one that base and adapters were; then nothing is left behind.
    """
    source = find_merge(paths, base=base)
    place = out or default_place(paths, source)
    how = proving or Proving()
    with new_folder(place, purpose="the merged model") as folder:
        merged = write_merged(
            source, folder, dtype=dtype, progress=lambda done, total: how.progress("merge", done, total)
        )
        reference = reference_of(paths, base=str(source.base), proving=how)
        kind = KINDS.get(merged.dtype, "merge")
        report = prove(reference, folder_side(folder, place, how), folder, kind=kind, proving=how)
        add_card(folder, source.located, base=source.base, parity=as_facts(report))
    note_hand_over(source.run, "merge", place, report)
    return HandedOver(place, merged, report, tuple(open_points(place)))


def export_hf(
    path: str,
    *,
    base: str | None = None,
    out: Path | None = None,
    dtype: str = "as-base",
    proving: Proving | None = None,
) -> HandedOver:
    """A complete Hugging Face folder with a model card, merged where the source is an adapter. Raises as `merge`."""
    located = locate(path, base=base)
    place = out or default_export(located, "hf")
    if located.adapter is not None:
        return merge([path], base=base, out=place, dtype=dtype, proving=proving)
    if dtype != "as-base":
        raise UserError(
            f"--dtype {dtype} has no effect: {path} holds whole weights, which are copied as they are",
            expected="no --dtype",
            fix="leave it out",
            where="--dtype",
        )
    how = proving or Proving()
    weights = local_folder(located.weights)
    with new_folder(place, purpose="the exported model") as folder:
        copy_model(weights, folder, progress=partial(how.progress, "copy"))
        complete_folder(folder, located, base=weights)
        write_json_atomic(folder / "made_from.json", {"what": "hf", "source": weights.name})
        reference = reference_of([path], base=base, proving=how)
        report = prove(reference, folder_side(folder, place, how), folder, kind="same", proving=how)
        add_card(folder, located, base=None if located.run is not None else weights, parity=as_facts(report))
    note_hand_over(located.run, "hf", place, report)
    return HandedOver(place, None, report, tuple(open_points(place)))


def default_place(paths: Sequence[str], source: MergeSource) -> Path:
    """`runs/a/merged` of a run, a sibling `-merged` of a PEFT folder; several adapters need a name."""
    if len(paths) > 1:
        raise UserError(
            "several adapters are merged: the result belongs to none of their runs",
            expected="a place for it",
            fix="add --out PATH",
            where="--out",
        )
    if source.run is not None:
        return source.run.merged
    folder = source.adapters[0].folder.resolve()
    return folder.with_name(f"{folder.name}-merged")


def default_export(located: Located, kind: str) -> Path:
    """`runs/a/exports/KIND` of a run, a sibling `-KIND` of a folder."""
    if located.run is not None:
        return located.run.exports / kind
    folder = (located.adapter or Path(located.weights)).resolve()
    return folder.with_name(f"{folder.name}-{kind}")


def reference_of(paths: Sequence[str], *, base: str | None, proving: Proving) -> FolderSide:
    """What a new form is compared with: the source as it is, adapters beside their base."""
    (first, weight), *others = [weighted_path(path) for path in paths]
    folders = tuple((str(locate(path, base=base).adapter), share) for path, share in others)
    return FolderSide(
        first, base, others=folders, weight=weight, device=proving.device, precision=proving.precision,
        label=" + ".join(paths),
    )  # fmt: skip


def folder_side(folder: Path, place: Path, proving: Proving) -> FolderSide:
    """A folder that is being written, under the name it will have."""
    return FolderSide(str(folder), device=proving.device, precision=proving.precision, label=str(place))


def prove(reference: FolderSide, other: Side, folder: Path, *, kind: str, proving: Proving) -> ParityReport | None:
    """Compare a new form with its source and put the figures into its folder; None when no proof is wanted.

    Raises UserError beyond the limits of its kind: the caller's folder must not get its name then.
    """
    if not proving.is_wanted:
        return None
    report = measure(reference, other, kind=kind, text=proving.text, progress=proving.progress)
    limits = limits_for(kind)
    report.require(limits)
    write_parity(folder, report, limits)
    return report


def as_facts(report: ParityReport | None) -> dict[str, Any] | None:
    return None if report is None else report.as_dict(limits_for(report.kind))
