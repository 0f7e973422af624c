"""Pydantic's errors as sentences with a place, what came, what was expected and the nearest right name.

Knows the run file's fields; not where a run file comes from.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from zhibei.config.effects import STAGES
from zhibei.config.errors import UserError
from zhibei.config.foreign import FOREIGN_NAMES, FOREIGN_VALUES
from zhibei.config.layers import COMMAND_LINE, Merged, dotted
from zhibei.config.rules import PartsDoNotFit
from zhibei.config.words import describe, field_at, leaf_fields, sections_of
from zhibei.config.yaml_tree import KeyPath

ABSENT = object()
MOST_NAMES_SHOWN = 12


def faults_of(error: ValidationError, merged: Merged) -> list[UserError]:
    """One UserError per faulty place, in the order of the files. Rules between fields are not among them."""
    found: dict[KeyPath, UserError] = {}
    for detail in error.errors():
        if isinstance(detail.get("ctx", {}).get("error"), PartsDoNotFit):
            continue
        path = _real_path(detail["loc"], merged.values, detail["type"])
        if path not in found and not _is_other_choice(detail, path, merged.values):
            found[path] = FAULTS.get(detail["type"], _wrong_value)(path, merged)
    return sorted(found.values(), key=_reading_order)


def place_of_fault(detail: Any, merged: Merged) -> KeyPath:
    """Where in the run file one of pydantic's complaints belongs; () for rules between fields."""
    if isinstance(detail.get("ctx", {}).get("error"), PartsDoNotFit):
        return ()
    return _real_path(detail["loc"], merged.values, detail["type"])


def show_value(value: Any) -> str:
    """A value as a person would name it: `text 'no'`, `true`, `the number 3`, `a list`."""
    if isinstance(value, str):
        return f"the text {value!r}"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"a mapping ({', '.join(list(value)[:4])})"
    if isinstance(value, list):
        return f"a list ({', '.join(str(item) for item in value[:3])}{', ...' if len(value) > 3 else ''})"
    return f"the number {value:g}" if isinstance(value, float) else f"the number {value}"


def _reading_order(fault: UserError) -> tuple[bool, str, int, int]:
    source, *place = fault.where.split(":")
    numbers = [int(part) for part in place if part.strip().isdigit()]
    line, column, *_ = [*numbers, 0, 0]
    return source == COMMAND_LINE, source, line, column


def _real_path(loc: KeyPath, values: Any, kind: str) -> KeyPath:
    """Pydantic's place without the names of union members, which are no keys of the file."""
    path: list[str | int] = []
    here = values
    for index, part in enumerate(loc):
        inside = _value_at(here, (part,))
        if inside is ABSENT and not (kind == "missing" and index == len(loc) - 1):
            continue
        here = inside
        path.append(part)
    return tuple(path)


def _is_other_choice(detail: Any, path: KeyPath, values: Any) -> bool:
    """A source may be text or a mapping: when it is a mapping, that it is no text is not the fault."""
    value = _value_at(values, path)
    wanted = field_at(path)
    could_be_section = wanted is not None and bool(sections_of(wanted[0]))
    return isinstance(value, dict) and could_be_section and detail["type"] == "string_type"


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return ABSENT
    return values


def _where(path: KeyPath, merged: Merged, *, at_key: bool = False) -> str:
    layer = merged.setter(path)
    return layer.where(path, at_key=at_key) if layer else "run file"


def _unknown_key(path: KeyPath, merged: Merged) -> UserError:
    name, section = str(path[-1]), dotted(path[:-1])
    known = _known_keys(path[:-1])
    return UserError(
        f"unknown key {dotted(path)!r}",
        expected=_choices(section, known),
        fix=nearest_name(name, path[:-1], stage=str(merged.values.get("stage", "sft"))),
        where=_where(path, merged, at_key=True),
    )


def _choices(section: str, known: list[str]) -> str:
    owner = section or "a run file"
    if len(known) <= MOST_NAMES_SHOWN:
        return f"one of the keys of {owner}: {', '.join(known)}"
    return f"one of the {len(known)} keys of {owner} (zhibei config --explain {section} lists them)"


def nearest_name(name: str, section: KeyPath = (), *, stage: str = "sft") -> str:
    """What to do about an unknown key: our name for it, the section it belongs to, or the nearest spelling.

    Of the fields that every stage has, the one of this run's `stage` is meant.
    """
    known = _known_keys(section)
    here = f"{dotted(section)}." if section else ""
    others = tuple(f"{other}." for other in STAGES if other != stage)
    leaves = [key for key, _ in leaf_fields() if stage not in STAGES or not key.startswith(others)]
    elsewhere = [key for key in leaves if key.rpartition(".")[2] == name]
    if elsewhere:
        return " or ".join(
            f"{name} belongs in {key.rpartition('.')[0] or 'the top level'}: write {key}" for key in elsewhere
        )
    if name.lower() in FOREIGN_NAMES:
        ours = _of_stage(FOREIGN_NAMES[name.lower()], stage, leaves)
        return f"here it is called {ours}" if ours in leaves else ours
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean {here}{near[0]}?"
    by_last = {key.rpartition(".")[2]: key for key in leaves}
    if near := difflib.get_close_matches(name, list(by_last), n=1, cutoff=0.75):
        return f"did you mean {by_last[near[0]]}?"
    return "remove it; `zhibei config --explain FIELD` explains each field"


def _of_stage(advice: str, stage: str, leaves: list[str]) -> str:
    """`sft.learning_rate` is `dpo.learning_rate` in a run of stage dpo."""
    own = advice.replace("sft.", f"{stage}.")
    named = [word.strip("(),:;") for word in own.split() if word.startswith(f"{stage}.")]
    return own if named and all(word in leaves for word in named) else advice


def _known_keys(section: KeyPath) -> list[str]:
    wanted = field_at(section)
    classes = sections_of(wanted[0]) if wanted else []
    return [name for cls in classes for name in cls.model_fields]


def _missing(path: KeyPath, merged: Merged) -> UserError:
    layer = merged.setter(path[:-1]) or next(iter(merged.setters.values()), None)
    wanted = field_at(path)
    example = EXAMPLES.get(dotted(path), f"{dotted(path)}: ...")
    return UserError(
        f"{dotted(path)} is missing",
        expected=describe(*wanted) if wanted else "a value",
        fix=f"add it, for example  {example}",
        where=layer.source if layer and layer.source != COMMAND_LINE else "run file",
    )


def _wrong_value(path: KeyPath, merged: Merged) -> UserError:
    value = _value_at(merged.values, path)
    wanted = field_at(path)
    expected = describe(*wanted) if wanted else "another value"
    return UserError(
        f"{dotted(path) or 'the run file'} is {show_value(value)}",
        expected=expected,
        fix=_remedy(path, value, wanted[0] if wanted else None, expected),
        where=_where(path, merged),
    )


def _remedy(path: KeyPath, value: Any, annotation: Any, expected: str) -> str:
    name = dotted(path)
    if isinstance(value, str):
        if value.lower() in FOREIGN_VALUES.get(name, {}):
            return FOREIGN_VALUES[name][value.lower()]
        choices = expected.removeprefix("one of ").split(", ")
        if near := difflib.get_close_matches(value, choices, n=1, cutoff=0.5):
            return f"did you mean {name}: {near[0]}?"
        if "true or false" in expected and value.lower() in ("yes", "no", "on", "off"):
            return f"write {name}: {'true' if value.lower() in ('yes', 'on') else 'false'}"
        try:
            float(value)
        except ValueError:
            pass
        else:
            return f"write the number without quotes: {name}: {value}"
    if value is None:
        return f"give it a value, or remove {name} to use the default"
    if expected == "text" and isinstance(value, (int, float)):
        shown = str(value).lower() if isinstance(value, bool) else value
        return f'put it in quotes: {name}: "{shown}"'
    if isinstance(value, float) and expected.startswith("a whole number") and value == int(value):
        return f"write {name}: {int(value)}"
    if not isinstance(value, (list, dict)) and expected.startswith("a list"):
        return f"write {name}: [{value}]"
    return f"give {name} {expected}"


def _empty_list(path: KeyPath, merged: Merged) -> UserError:
    return UserError(
        f"{dotted(path)} is empty",
        expected="at least one item",
        fix=f"add one, for example  {EXAMPLES.get(dotted(path), dotted(path) + ': [...]')}",
        where=_where(path, merged),
    )


FAULTS = {"extra_forbidden": _unknown_key, "missing": _missing, "too_short": _empty_list}

EXAMPLES = {
    "model": "model: {path: huggyllama/llama-7b}",
    "model.path": "model: {path: huggyllama/llama-7b}",
    "data": "data: {sources: [alpaca_data.json]}",
    "data.sources": "data: {sources: [alpaca_data.json]}",
}
