"""The finished model of a quickstart as others can use it: merged if it is an adapter, as GGUF, proved to be the same.

Knows which forms are made, not how.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.export.gguf.hand_over import Wanted, hand_over_gguf
from zhibei.export.hand_over import merge
from zhibei.export.parity import ParityReport
from zhibei.export.parity_limits import Limits, limits_for
from zhibei.store.folders import remove_folder
from zhibei.store.run_dir import RunDir

KIND = "Q8_0"
PACKAGES = ("gguf", "xllamacpp")


@dataclass(frozen=True)
class Form:
    """One form of the model, its place, and how it was compared with what it was made of."""

    what: str
    path: Path
    parity: ParityReport
    limits: Limits


@dataclass(frozen=True)
class HandedOver:
    """`forms` in the order they were made; `note` says why one is missing."""

    forms: tuple[Form, ...] = ()
    note: str = ""


def hand_over(folder: Path, run: RunDir) -> HandedOver:
    """Write the model of `run` below `folder/exports`: merged (adapters only), and as GGUF of 8 bits.

    What lies there from an earlier try is made anew. What cannot be made, for want of a package or because it is not
    the model it was made of, is left out, and the note says so: everything before it stays worth having.
    """
    forms: list[Form] = []
    note = ""
    try:
        source = str(run.path)
        if (run.model / "adapter_config.json").is_file():
            forms += _merged(source, folder / "exports" / "merged")
            source = str(folder / "exports" / "merged")
        if any(importlib.util.find_spec(package) is None for package in PACKAGES):
            return HandedOver(tuple(forms), "no GGUF file was made: pip install 'zhibei[gguf]' brings what that needs")
        made = hand_over_gguf(source, out=_free(folder / "exports" / "gguf"), wanted=Wanted(types=(KIND,)))
        note = " ".join(made.notes)
        for one, report in zip(made.files, made.reports, strict=True):
            assert report is not None
            forms.append(Form(f"GGUF {KIND}", one.paths[0], report, limits_for(KIND)))
    except UserError as problem:
        note = f"not handed over: {problem}"
    return HandedOver(tuple(forms), note)


def _merged(source: str, place: Path) -> list[Form]:
    made = merge([source], out=_free(place))
    assert made.parity is not None
    return [Form("merged", place, made.parity, limits_for(made.parity.kind))]


def _free(place: Path) -> Path:
    """A form from before is removed: the model may be another one now."""
    if place.is_dir():
        remove_folder(place)
    return place
