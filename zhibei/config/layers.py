"""Recipe, file and command line laid over one another, remembering who set what. Knows no field of the run file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.yaml_tree import KeyPath, Place, Tree, parse

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of values. `rank` grows from recipe over file to command line; the higher wins. `prefix` stands
    before a setting of the command line that belongs to one run of several."""

    rank: int
    source: str
    tree: Tree
    prefix: str = ""

    def where(self, path: KeyPath, *, at_key: bool = False) -> str:
        """`run.yaml:3:5`, or `command line: sft.learning_rat`, for the nearest place that is known."""
        if self.source == COMMAND_LINE:
            return f"{COMMAND_LINE}: {self.prefix}{dotted(path)}"
        place = self.place(path, at_key=at_key)
        return f"{self.source}:{place.line}:{place.column}" if place else self.source

    def place(self, path: KeyPath, *, at_key: bool = False) -> Place | None:
        first, second = (self.tree.keys, self.tree.values) if at_key else (self.tree.values, self.tree.keys)
        while path:
            if path in first:
                return first[path]
            if path in second:
                return second[path]
            path = path[:-1]
        return first.get((), second.get(()))

    def origin(self, path: KeyPath) -> str:
        """`recipe alpaca-7b`, `run.yaml:12` or `command line`."""
        if self.source == COMMAND_LINE or self.source.startswith(("recipe ", "compat ")):
            return self.source
        place = self.place(path, at_key=True)
        return f"{self.source.rpartition('/')[2]}:{place.line}" if place else self.source


@dataclass(slots=True)
class Merged:
    """The values of all layers, and the layer that set each path (mappings merge, lists and the rest replace)."""

    values: dict[str, Any] = field(default_factory=dict)
    setters: dict[KeyPath, Layer] = field(default_factory=dict)

    def add(self, layer: Layer) -> None:
        self._lay(self.values, layer.tree.value or {}, (), layer)

    def _lay(self, below: dict[str, Any], above: dict[str, Any], path: KeyPath, layer: Layer) -> None:
        for key, value in above.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(below.get(key), dict):
                self._lay(below[key], value, here, layer)
                continue
            for stale in [other for other in self.setters if other[: len(here)] == here]:
                del self.setters[stale]
            below[key] = {} if isinstance(value, dict) else value
            self.setters[here] = layer
            if isinstance(value, dict):
                self._lay(below[key], value, here, layer)

    def setter(self, path: KeyPath) -> Layer | None:
        """The layer that set this path or the nearest one above it."""
        while path:
            if path in self.setters:
                return self.setters[path]
            path = path[:-1]
        return None

    def remove(self, path: KeyPath) -> None:
        """Take one value out again, and the mappings this leaves empty."""
        while path:
            owner: Any = self.values
            for part in path[:-1]:
                owner = owner[part]
            del owner[path[-1]]
            self.setters.pop(path, None)
            if owner:
                return
            path = path[:-1]


def dotted(path: KeyPath) -> str:
    """`("data", "sources", 0, "path")` -> `data.sources[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def command_line_layer(overrides: Sequence[str], *, rank: int) -> Layer:
    """`["sft.learning_rate=1e-4", "data.sources=[a.json]"]` as a layer; the last one of equal keys wins.

    Raises UserError for an argument without `=` or whose value is not YAML.
    """
    tree = Tree(value={})
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(part.isidentifier() for part in parts):
            raise UserError(
                f"{override!r} is not a setting",
                expected="section.field=value, such as sft.learning_rate=1e-4",
                fix="write it with = and no spaces around it" if not equals else "use only names and dots before the =",
                where=COMMAND_LINE,
            )
        value = parse(text, source=f"{COMMAND_LINE}: {key}").value
        target = tree.value
        for depth, part in enumerate(parts[:-1]):
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UserError(
                    f"{'.'.join(parts[: depth + 1])} is given a value and a field",
                    expected="one of the two",
                    fix="remove one of the settings",
                    where=f"{COMMAND_LINE}: {key}",
                )
            target = inner
        target[parts[-1]] = value
    return Layer(rank, COMMAND_LINE, tree)
