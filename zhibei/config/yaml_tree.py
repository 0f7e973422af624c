"""YAML text to plain values, with the line and column of every key and value. Knows YAML, not the run file.

Read as YAML 1.2 does: `1e-4` is a number, `no`, `on` and dates are text, only true and false are booleans.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zhibei.config.errors import UserError

KeyPath = tuple[str | int, ...]
MAX_NODES = 100_000
STANDARD_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Line and column, both counted from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Tree:
    """What a YAML text says: `value`, and for each path of keys and list positions where key and value stand."""

    value: Any = None
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Composes nodes only; its resolvers are those of the YAML 1.2 core schema."""

    yaml_implicit_resolvers = {}


_NUMBER_STARTS = list("-+.0123456789")
for _tag, _pattern, _starts in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", _NUMBER_STARTS),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        _NUMBER_STARTS,
    ),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(STANDARD_TAG + _tag, re.compile(_pattern), _starts)


def _whole_number(text: str) -> int:
    prefixed = text.startswith(("0o", "0x"))
    return int(text, 0) if prefixed else int(text)


def _number(text: str) -> float:
    return float(
        text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lower().replace(".nan", "nan")
    )


SCALARS = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _whole_number,
    "float": _number,
    "str": str,
    "merge": str,
}


def read_text(path: Path) -> str:
    """A run file's text. Raises UserError when it is missing, a folder, binary, or not UTF-8."""
    if path.is_dir():
        inside = sorted(entry.name for entry in path.glob("*.y*ml"))
        hint = f"give one of the files in it: {', '.join(inside[:5])}" if inside else "give the path of a .yaml file"
        raise UserError("this is a folder", expected="a YAML run file", fix=hint, where=str(path))
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            "no such file", expected="a YAML run file", fix=near_files(path) or "check the path", where=str(path)
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}",
            expected="a readable file",
            fix="check its permissions",
            where=str(path),
        ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise UserError(
            f"byte {raw[error.start]:#04x} is not UTF-8",
            expected="a text file in UTF-8",
            fix=f"save the file as UTF-8, for example: iconv -f GB18030 -t UTF-8 {path.name}",
            where=f"{path}:{line}:{column}",
        ) from None
    if "\0" in text:
        raise UserError(
            "this is a binary file",
            expected="a YAML run file, which is text",
            fix="give the run file, not a model or data file",
            where=f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}:1",
        )
    return text


def near_files(path: Path) -> str:
    """`did you mean ...?` for a path that does not exist; empty when its folder has nothing similar."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not near:
        near = [name for name in names if name.endswith((".yaml", ".yml"))][:5]
    return f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""


def compose(text: str) -> yaml.Node | None:
    """The nodes of the one document in `text`, with their marks; raises yaml.YAMLError."""
    return yaml.compose(text, Loader=_Loader)


def parse(text: str, *, source: str) -> Tree:
    """The one document in `text`; `source` names it in errors.

    Raises UserError with line and column on broken YAML, tabs, duplicate keys, tags, and aliases inside themselves.
    """
    try:
        node = compose(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"character {error.character!r} is not allowed in YAML",
            expected="printable text",
            fix="remove that character",
            where=f"{source}:{line}",
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _broken_yaml(error, text, source) from None
    tree = Tree()
    if node is not None:
        tree.value = _Builder(tree, source).build(node, (), ())
    return tree


# Words of PyYAML's message -> what happened, what to do, and whether the place is where the construct was opened.
BROKEN: list[tuple[str, str, str, bool]] = [
    ("'\\t'", "a tab is used for indentation", "indent with spaces; YAML does not allow tabs", False),
    (
        "expected a single document",
        "a second YAML document begins here",
        "keep one document; remove the line ---",
        False,
    ),
    ("mapping values are not allowed", "", 'put a text with ": " in quotes, or check the indentation', False),
    ("undefined alias", "", "define the anchor (&name) before its alias; put text that begins with * in quotes", False),
    ("quoted scalar", "", "close the quotes or brackets opened here", True),
    ("flow sequence", "", "close the quotes or brackets opened here", True),
    ("flow mapping", "", "close the quotes or brackets opened here", True),
    ("", "", "check the indentation, the colon and the quotes of this line and the one above", False),
]


def _broken_yaml(error: yaml.MarkedYAMLError, text: str, source: str) -> UserError:
    problem = error.problem or "broken YAML"
    message = f"{error.context} {problem}"
    lines = text.splitlines()
    broken_line = lines[error.problem_mark.line] if error.problem_mark and error.problem_mark.line < len(lines) else ""
    if "\t" in broken_line[: len(broken_line) - len(broken_line.lstrip())]:
        message = "'\\t'"
    _, what, fix, is_opening = next(case for case in BROKEN if case[0] in message)
    mark = (error.context_mark if is_opening else None) or error.problem_mark
    place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    expected = "a YAML mapping, such as  model: {path: ...}"
    return UserError(what or f"not valid YAML ({problem})", expected=expected, fix=fix, where=place)


class _Builder:
    """Turns nodes into values and notes their places; counts nodes so that nested aliases cannot explode."""

    def __init__(self, tree: Tree, source: str) -> None:
        self.tree, self.source, self.num_nodes = tree, source, 0

    def build(self, node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> Any:
        self.num_nodes += 1
        if any(node is parent for parent in above):
            raise self.error(node, "an alias contains itself", "a finite file", "write the value out")
        if self.num_nodes > MAX_NODES:
            raise self.error(node, f"more than {MAX_NODES:,} values", "a run file", "remove the nested aliases")
        self.tree.values[path] = _place(node)
        kind = node.tag.removeprefix(STANDARD_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node, path, (*above, node))
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.build(item, (*path, index), (*above, node)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in SCALARS:
            try:
                return SCALARS[kind](node.value)
            except (ValueError, KeyError):
                raise self.error(
                    node, f"{node.value!r} is not of type {kind}", f"a value of type {kind}", "remove the tag"
                ) from None
        tag = node.tag.replace(STANDARD_TAG, "!!")
        raise self.error(node, f"the YAML tag {tag} is not read", "plain values", "remove the tag")

    def mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        """Own keys win over merged ones (`<<: *anchor`), as in YAML 1.1."""
        result: dict[str, Any] = {}
        own = [(key, value) for key, value in node.value if key.tag != STANDARD_TAG + "merge"]
        for key, value in node.value:
            if key.tag == STANDARD_TAG + "merge":
                self.merge(result, value, path, above)
        seen: dict[str, Place] = {}
        for key, value in own:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None:
                raise self.error(key, "a key must be plain text", "key: value", "use text as the key")
            if name in seen:
                dotted = ".".join(str(part) for part in (*path, name))
                raise self.error(
                    key,
                    f"{dotted} appears twice (first in line {seen[name].line})",
                    "each key once",
                    "remove one of the two",
                )
            seen[name] = _place(key)
            self.forget((*path, name))
            self.tree.keys[(*path, name)] = _place(key)
            result[name] = self.build(value, (*path, name), above)
        return result

    def merge(self, result: dict[str, Any], node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> None:
        for part in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                raise self.error(part, "<<: must merge a mapping", "<<: *anchor of a mapping", "merge a mapping")
            if any(part is parent for parent in above):
                raise self.error(part, "an alias contains itself", "a finite file", "write the value out")
            result.update(self.mapping(part, path, (*above, part)))

    def forget(self, path: KeyPath) -> None:
        for places in (self.tree.keys, self.tree.values):
            for stale in [other for other in places if other[: len(path)] == path]:
                del places[stale]

    def error(self, node: yaml.Node, what: str, expected: str, fix: str) -> UserError:
        place = _place(node)
        return UserError(what, expected=expected, fix=fix, where=f"{self.source}:{place.line}:{place.column}")


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)
