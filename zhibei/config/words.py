"""What a field of the run file expects, in words a person understands. Knows types, not values or files."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zhibei.config.run import RunFile


def describe(annotation: Any, limits: list[Any] | None = None) -> str:
    """`Annotated[int, Field(ge=1)]` -> `a whole number of at least 1`."""
    annotation, limits = _bare(annotation, limits or [])
    if annotation in (int, float):
        noun = "a whole number" if annotation is int else "a number"
        return " ".join(part for part in (noun, _range(limits)) if part)
    plain = {bool: "true or false", str: "text", type(None): "null", Any: "anything"}
    if annotation in plain:
        return plain[annotation]
    if get_origin(annotation) is Literal:
        names = [str(name) for name in get_args(annotation)]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if get_origin(annotation) is list:
        return f"a list, each item {describe(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        return f"a mapping of {describe(key)} to {describe(value)}"
    if is_union(annotation):
        return _either([describe(choice) for choice in get_args(annotation) if choice is not type(None)])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with keys such as {', '.join(list(annotation.model_fields)[:3])}"
    return str(annotation)


def describe_field(field: FieldInfo) -> str:
    return describe(field.annotation, field.metadata)


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def field_at(path: tuple[str | int, ...]) -> tuple[Any, list[Any]] | None:
    """Annotation and limits of `("data", "sources", 0, "path")`, or None when the run file has no such place."""
    annotation: Any = RunFile
    limits: list[Any] = []
    for part in path:
        step = _step(annotation, part)
        if step is None:
            return None
        annotation, limits = step
    return annotation, limits


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section classes a value of this type may be (a source is a mapping or text)."""
    choices = get_args(annotation) if is_union(annotation) else [annotation]
    return [choice for choice in choices if is_section(choice)]


def leaf_fields(section: type[BaseModel] = RunFile, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field that is not itself a section, as (`sft.learning_rate`, its FieldInfo), in the order of the file."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from leaf_fields(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, field


def _step(annotation: Any, part: str | int) -> tuple[Any, list[Any]] | None:
    for choice in get_args(annotation) if is_union(annotation) else [annotation]:
        choice, _ = _bare(choice, [])
        if is_section(choice) and part in choice.model_fields:
            field = choice.model_fields[part]
            return field.annotation, field.metadata
        if get_origin(choice) is list and isinstance(part, int):
            return get_args(choice)[0], []
        if get_origin(choice) is dict:
            return get_args(choice)[1], []
    return None


def _bare(annotation: Any, limits: list[Any]) -> tuple[Any, list[Any]]:
    """Without Annotated; the limits of nested FieldInfos are flattened."""
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        limits = [*limits, *extra]
    flat: list[Any] = []
    for limit in limits:
        flat.extend(limit.metadata if isinstance(limit, FieldInfo) else [limit])
    return annotation, flat


def _range(limits: list[Any]) -> str:
    found = {
        name: value
        for limit in limits
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(limit, name, None)) is not None
    }
    if "lt" in found and found["lt"] >= 2**53:
        del found["lt"]
    low = f"at least {found['ge']:g}" if "ge" in found else f"above {found['gt']:g}" if "gt" in found else ""
    high = f"at most {found['le']:g}" if "le" in found else f"below {found['lt']:g}" if "lt" in found else ""
    if "ge" in found and "le" in found:
        return f"from {found['ge']:g} to {found['le']:g}"
    joined = " and ".join(part for part in (low, high) if part)
    return f"of {joined}" if joined.startswith("at least") else joined


def _either(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
