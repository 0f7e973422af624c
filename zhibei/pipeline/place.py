"""Where a quickstart writes: a new folder, or one that was interrupted with the same order. Overwrites nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.pipeline.summary import SUMMARY_FILE
from zhibei.store.files import read_json, write_json_atomic

ORDER_FILE = "quickstart.json"


@dataclass(frozen=True)
class Order:
    """What was asked for. Without `model` and `data` the small world is built; with them, the user's own is used."""

    seed: int = 0
    method: str = "full"
    model: str = ""
    data: str = ""
    template: str = "auto"
    steps: int = 100
    learning_rate: float | None = None
    size: str = "standard"


@dataclass(frozen=True)
class Place:
    """A folder to work in. `goes_on`: an interrupted quickstart of the same order lies there. `skipped`: what was not
    touched because it is finished or of another order."""

    folder: Path
    goes_on: bool = False
    skipped: tuple[Path, ...] = ()


def find_place(runs: Path, name: str, order: Order, *, is_named: bool) -> Place:
    """`runs/name` if it is free or can be gone on with; else, unless the user named it, the next free `name-2`, ...

    Raises UserError when the user named a folder that holds something else.
    """
    skipped: list[Path] = []
    for number in count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        state = _state_of(folder, order)
        if state != "other":
            return Place(folder, goes_on=state == "same", skipped=tuple(skipped))
        if is_named:
            raise UserError(
                f"{folder} exists already",
                expected="a new name; nothing that exists is overwritten",
                fix=f"talk to it with: zhibei chat {folder}; or choose another name with --name",
                where="--name",
            )
        skipped.append(folder)
    raise AssertionError("count() does not end")


def take_place(place: Place, order: Order) -> None:
    """Make the folder and note the order in it, so that an interrupted quickstart can be gone on with."""
    if place.goes_on:
        return
    place.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(place.folder / ORDER_FILE, asdict(order))


def _state_of(folder: Path, order: Order) -> str:
    """free, same (interrupted, same order), or other."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "free"
    if (folder / SUMMARY_FILE).exists() or not (folder / ORDER_FILE).is_file():
        return "other"
    try:
        noted = read_json(folder / ORDER_FILE)
    except (UserError, json.JSONDecodeError):
        return "other"
    return "same" if noted == asdict(order) else "other"
