"""Fields of a stage that is no training, read as strictly as a run file. Knows what fields take, not what they mean."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.faults import show_value
from zhibei.config.layers import Merged
from zhibei.config.yaml_tree import KeyPath
from zhibei.pipeline.kinds import Setting


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TAKES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda value: isinstance(value, str) and bool(value.strip())),
    "texts": (
        "a list of texts",
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value),
    ),
    "count": (
        "a whole number of at least 1",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
    ),
    "number": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
}


def read_settings(merged: Merged, settings: Mapping[str, Setting], *, stage: str) -> dict[str, Any]:
    """Every field with its value or default. Raises UserError with the place of each unknown key and wrong value."""
    faults = list(_faults(merged, settings, stage=stage))
    if faults:
        raise faults[0] if len(faults) == 1 else SeveralErrors(faults, what=f"{len(faults)} faults in stage {stage}")
    return {name: merged.values.get(name, setting.default) for name, setting in settings.items()}


def _faults(merged: Merged, settings: Mapping[str, Setting], *, stage: str) -> Iterator[UserError]:
    for key, value in merged.values.items():
        layer = merged.setter((key,))
        setting = settings.get(key)
        if setting is None:
            near = difflib.get_close_matches(key, settings, n=1, cutoff=0.5)
            yield UserError(
                f"stage {stage}: unknown key {key!r}",
                expected=f"one of {', '.join(settings)}",
                fix=f"did you mean {near[0]}?" if near else "remove it",
                where=layer.where((key,), at_key=True) if layer else "",
            )
            continue
        expected, fits = TAKES[setting.takes]
        if not fits(value):
            yield UserError(
                f"stage {stage}: {key} is {show_value(value)}",
                expected=expected,
                fix=f"write {key}: [{value}]" if setting.takes == "texts" and isinstance(value, str)
                else f"give {key} {expected}, or remove it to use {setting.default!r}",
                where=layer.where((key,)) if layer else "",
            )  # fmt: skip


def value_at(values: Any, path: KeyPath) -> Any:
    """What lies under a path of keys; None where nothing does."""
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values
