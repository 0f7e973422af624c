"""Changes values in the text of a YAML run file and keeps everything else as it stands: comments, order, layout.

Knows YAML text, not what the values mean. A change that cannot be made in place raises CannotEdit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from zhibei.config.resolve import yaml_value
from zhibei.config.yaml_tree import KeyPath, compose, parse


class CannotEdit(ValueError):
    """This text cannot be changed in place without rewriting more than the value."""


def path_of(dotted: str) -> KeyPath:
    """`data.sources[0].limit` -> ("data", "sources", 0, "limit")."""
    path: list[str | int] = []
    for part in dotted.split("."):
        name, *indices = part.replace("]", "").split("[")
        path += [name, *map(int, indices)]
    return tuple(path)


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """The same text with these values (`{"model.precision": "fp16"}`) changed or added.

    The result is read back: it says the new values and, but for them, what it said before. Raises CannotEdit.
    """
    if "\r\n" in text:
        return edited(text.replace("\r\n", "\n"), changes).replace("\n", "\r\n")
    expected = parse(text, source="run file").value
    for dotted, value in changes.items():
        path = path_of(dotted)
        text = _with_value(text, path, value)
        expected = _replaced(expected, path, value)
    if parse(text, source="run file").value != expected:
        raise CannotEdit("the changed text would say something else as well")
    return text


def _replaced(whole: Any, path: KeyPath, value: Any) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        return [_replaced(item, rest, value) if index == head else item for index, item in enumerate(whole)]
    inner = whole if isinstance(whole, dict) else {}
    return {**inner, head: _replaced(inner.get(head), rest, value)}


def _with_value(text: str, path: KeyPath, value: Any) -> str:
    root = compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise CannotEdit("the file is no mapping")
    node: yaml.Node = root
    for depth, part in enumerate(path):
        child = _child(node, part)
        if child is None:
            return _added(text, node, path[depth:], value)
        if _is_empty(child) and depth + 1 < len(path):
            return _filled(text, node, path[depth:], value)
        node = child
    start, end = node.start_mark.index, _end_of(text, node)
    is_glued = start == end and text[start - 1 : start] == ":"
    return text[:start] + (" " if is_glued else "") + yaml_value(value) + text[end:]


def _child(node: yaml.Node, part: str | int) -> yaml.Node | None:
    """The node of a key or list position; None when the key is not there."""
    if isinstance(part, int):
        if isinstance(node, yaml.SequenceNode) and part < len(node.value):
            return node.value[part]
        raise CannotEdit(f"there is no item {part}")
    if not isinstance(node, yaml.MappingNode):
        raise CannotEdit(f"{part} would go into something that is no mapping")
    for key, child in node.value:
        if key.value == part:
            if child.start_mark.index < key.end_mark.index:
                raise CannotEdit(f"{part} is an alias of a value elsewhere in the file")
            return child
    return None


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.start_mark.index == node.end_mark.index


def _end_of(text: str, node: yaml.Node) -> int:
    """Where the node's own text ends; PyYAML lets blocks run on to the next token, over comments and blank lines."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        end = _end_of(text, last[1] if isinstance(last, tuple) else last)
        key_end = last[0].end_mark.index + 1 if isinstance(last, tuple) else 0
        return max(end, key_end)
    end = node.end_mark.index
    return node.start_mark.index + len(text[node.start_mark.index : end].rstrip())


def _line_end(text: str, index: int) -> int:
    """Just behind the line break of the line that `index` is in; a missing last line break counts as there."""
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1


def _spelled(path: KeyPath, value: Any, indent: int) -> str:
    """New block lines: `sft:` and below it `max_steps: 10`."""
    if any(isinstance(part, int) for part in path):
        raise CannotEdit("a new list item has no place")
    lines = [f"{' ' * (indent + 2 * depth)}{part}:" for depth, part in enumerate(path)]
    lines[-1] += f" {yaml_value(value)}"
    return "\n".join(lines) + "\n"


def _inserted(text: str, at: int, lines: str) -> str:
    before = text[:at]
    return before + ("" if not before or before.endswith("\n") else "\n") + lines + text[at:]


def _added(text: str, mapping: yaml.Node, path: KeyPath, value: Any) -> str:
    """A new key behind the last entry of a mapping."""
    assert isinstance(mapping, yaml.MappingNode)
    if mapping.flow_style:
        inner = yaml_value(_replaced(None, path[1:], value))
        closing = mapping.end_mark.index - 1
        body = text[mapping.start_mark.index + 1 : closing].rstrip()
        comma = "" if not body.strip() or body.endswith(",") else ","
        at = mapping.start_mark.index + 1 + len(body)
        space = " " if body.strip() else ""
        return f"{text[:at]}{comma}{space}{path[0]}: {inner}{text[at:]}"
    first_key = mapping.value[0][0]
    if first_key.start_mark.index < mapping.start_mark.index:
        raise CannotEdit("the mapping is an alias")
    at = _line_end(text, _end_of(text, mapping))
    lines = _spelled(path, value, first_key.start_mark.column)
    is_new_section = len(path) > 1 and first_key.start_mark.column == 0
    return _inserted(text, at, "\n" + lines if is_new_section else lines)


def _filled(text: str, mapping: yaml.Node, path: KeyPath, value: Any) -> str:
    """`sft:` with nothing (or only comments) below it gets its first entry, on the line behind it."""
    assert isinstance(mapping, yaml.MappingNode)
    key = next(key for key, _ in mapping.value if key.value == path[0])
    if mapping.flow_style:
        raise CannotEdit(f"{path[0]} is empty inside braces")
    at = _line_end(text, key.end_mark.index)
    return _inserted(text, at, _spelled(path[1:], value, key.start_mark.column + 2))
