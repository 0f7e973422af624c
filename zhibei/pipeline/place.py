"""Where a quickstart writes: a new folder, or one that was interrupted with the same order. Overwrites nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.pipeline.summary import SUMMARY_FILE
from zhibei.store.files import read_json, write_json_atomic

ORDER_FILE = "quickstart.json"
STAGES = ("sft", "reward", "ppo")
"""Where a quickstart can end, in order."""


@dataclass(frozen=True)
class Order:
    """What was asked for. Without `model` and `data` the small world is built; with them, the user's own is used, and
    only fine-tuned. `until`: the last of STAGES to be done."""

    seed: int = 0
    method: str = "full"
    model: str = ""
    data: str = ""
    template: str = "auto"
    steps: int = 100
    learning_rate: float | None = None
    until: str = "ppo"
    size: str = "standard"


@dataclass(frozen=True)
class Place:
    """A folder to work in. `goes_on`: a quickstart of the same order lies there that was interrupted, or that ended at
    an earlier stage. `skipped`: what was not touched because it is finished or of another order."""

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
    """Make the folder and note the order in it, so that an interrupted quickstart can be gone on with. What an earlier
    one found is no longer the whole story, and is written anew at the end."""
    place.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(place.folder / ORDER_FILE, asdict(order))
    (place.folder / SUMMARY_FILE).unlink(missing_ok=True)


def _state_of(folder: Path, order: Order) -> str:
    """free, same (interrupted or ended earlier, same order), or other."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "free"
    if not (folder / ORDER_FILE).is_file():
        return "other"
    try:
        noted = Order(**read_json(folder / ORDER_FILE))
        ended = STAGES.index(noted.until)
    except (UserError, json.JSONDecodeError, TypeError, ValueError):
        return "other"
    is_more = STAGES.index(order.until) > ended
    is_finished = (folder / SUMMARY_FILE).exists() and not is_more
    return "same" if replace(noted, until=order.until) == order and not is_finished else "other"
