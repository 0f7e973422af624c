"""`$name` in a stage: which earlier stage it means, and the place of what that one made. Knows names, no files."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from zhibei.config.errors import UserError
from zhibei.config.layers import Layer, Merged, dotted
from zhibei.config.yaml_tree import KeyPath
from zhibei.pipeline.kinds import refers_to
from zhibei.pipeline.settings import value_at

if TYPE_CHECKING:
    from zhibei.pipeline.file import Stage

REFERENCE = re.compile(r"\$(\w+)")
BRACED = re.compile(r"\$\{\s*(\w*)\s*\}")
MADE = {
    "model": "a language model",
    "scorer": "a reward model",
    "scores": "no model",
    "files": "files for other programs",
}


def find_references(
    stage: Stage, merged: Merged, earlier: list[Stage], names: list[str]
) -> tuple[dict[str, str], list[UserError]]:
    """Which fields name which earlier stage, and what is wrong with those that do not."""
    found: dict[str, str] = {}
    faults: list[UserError] = []
    for key, makes in refers_to(stage.kind).items():
        path: KeyPath = tuple(key.split("."))
        value = value_at(merged.values, path)
        items = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for place, text in items:
            if not isinstance(text, str) or not text.startswith("$"):
                continue
            here = path if place is None else (*path, place)
            fault = _reference_fault(text, stage, makes, earlier, names)
            if fault is None:
                found[dotted(here)] = text[1:]
                continue
            layer = merged.setter(here)
            what, expected, fix = fault
            faults.append(UserError(f"{dotted(here)}: {what}", expected=expected, fix=fix,
                                    where=layer.where(here) if layer else stage.where))  # fmt: skip
    return found, faults


def _reference_fault(
    text: str, stage: Stage, makes: Sequence[str], earlier: list[Stage], names: list[str]
) -> tuple[str, str, str] | None:
    """What, expected and fix of a reference that cannot be; None where it can."""
    fitting = [one.name for one in earlier if one.about.makes in makes]
    expected = (
        f"one of {', '.join(f'${name}' for name in fitting)}" if fitting else "a path: no earlier stage fits here"
    )
    braced = BRACED.fullmatch(text)
    if braced:
        return f"{text} is not how stages are named here", expected, f"write ${braced[1] or 'NAME'}"
    match = REFERENCE.fullmatch(text)
    name = match[1] if match else text[1:]
    if name in fitting:
        return None
    known = {one.name: one for one in earlier}
    if name in known:
        return (
            f"stage {name} ({known[name].kind}) makes {MADE[known[name].about.makes]}",
            expected,
            "name a stage of the kind that is needed",
        )
    if name == stage.name or name in names:
        when = "is this stage itself" if name == stage.name else "comes later"
        return f"stage {name} {when}", expected, "a stage can only use what earlier ones made; change their order"
    near = difflib.get_close_matches(name, fitting or list(known), n=1, cutoff=0.4)
    return f"there is no stage {name!r}", expected, f"did you mean ${near[0]}?" if near else "name an earlier stage"


def with_places(layer: Layer, references: Mapping[str, str], places: Mapping[str, str]) -> Layer:
    """A layer with `$name` replaced by the place of what that stage made; a place of "" takes the field out."""
    value = copy.deepcopy(layer.tree.value)
    for key, name in references.items():
        *above, last = key.split(".")
        owner = value_at(value, tuple(above)) if above else value
        if isinstance(owner, dict) and owner.get(last) == f"${name}" and name in places:
            owner[last] = places[name]
            if places[name] == "":
                del owner[last]
    return replace(layer, tree=replace(layer.tree, value=value))
