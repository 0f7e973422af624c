"""The plan of a run before it runs, on any machine: config.json and row lengths are enough. Knows no screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.run import RunFile
from zhibei.doctor.facts.places import folder_of
from zhibei.doctor.facts.planned import planned_rows
from zhibei.plan.document import as_document
from zhibei.plan.job import OFFLOADS, SHARDINGS, Rows
from zhibei.plan.machines import Machine
from zhibei.plan.search import Search, Wishes, search, what_would_fit, wishes_of
from zhibei.plan.shapes import ModelShape, read_shape


@dataclass(frozen=True, slots=True)
class Outlook:
    """`search.chosen` is the plan; `alternatives` are settings or machines that would do, when it does not fit."""

    search: Search
    machine: Machine
    rows: Rows
    alternatives: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.search.chosen.fits

    def as_dict(self, *, price: float | None = None) -> dict[str, Any]:
        """What `zhibei plan --json` prints. `price`: of one GPU for one hour."""
        document = as_document(self.search, self.machine, alternatives=list(self.alternatives), price=price)
        rows = self.rows
        document["rows"] = {"assumed_full": rows.is_assumed, "longest": rows.longest, "mean_tokens": rows.mean_tokens}
        return document


def look_ahead(run: RunFile, machine: Machine, *, sharding: str = "", offload: str = "") -> Outlook:
    """Plan a run. `sharding` and `offload`: by default the fastest that fits.

    Raises UserError when the model's sizes are not to be had, or a wish is none that exists.
    """
    shape, rows, wishes = shape_of(run), planned_rows(run), wishes_of(run)
    wishes = Wishes(
        wishes.micro_batch_tokens,
        wishes.checkpointing,
        _one_of(sharding, SHARDINGS, "--sharding") or wishes.sharding,
        _one_of(offload, OFFLOADS, "--offload") or wishes.offload,
    )
    found = search(run, shape, machine, rows, wishes)
    alternatives = () if found.chosen.fits else tuple(what_would_fit(run, shape, machine, rows))
    return Outlook(found, machine, rows, alternatives)


def _one_of(text: str, choices: tuple[str, ...], name: str) -> Any:
    if not text:
        return None
    if text not in choices:
        raise UserError(f"{name} {text}", expected=" or ".join(choices), fix=f"write one of {', '.join(choices)}")
    return text


def shape_of(run: RunFile) -> ModelShape:
    """The model's sizes, from its config.json and the heads of its weight files. Raises UserError where neither is."""
    from zhibei.model.locate import locate

    path = run.model.path
    # A folder with config.json alone is enough here; `locate` resolves runs and adapters.
    folder = folder_of(path, revision=run.model.revision) or folder_of(
        locate(path).weights, revision=run.model.revision
    )
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(
            f"model.path: {path} is not on this machine, so its sizes are not known",
            expected="a folder that holds at least the model's config.json",
            fix="download config.json (a few hundred bytes) into a folder and set model.path to it",
            where="model.path",
        )
    return read_shape(_config(folder), _tensors(folder))


def _config(folder: Path) -> Mapping[str, Any]:
    from zhibei.store.files import read_json

    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(
            f"holds {type(config).__name__} instead of settings by name",
            expected="a JSON object",
            fix="copy the file again from the model's source",
            where=str(folder / "config.json"),
        )
    return config


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    from zhibei.store.headers import read_header

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            found |= {name: (entry.dtype, entry.shape) for name, entry in read_header(path).entries.items()}
        except (UserError, OSError):
            return None  # a damaged file is `zhibei check`'s business; config.json still says the sizes
    return found or None
