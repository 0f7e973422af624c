"""The formats of rows: what marks each and how it is read. `FORMATS` lists them all. Knows no files.

Recognisers look at field names, and disjointly: a row that two of them claim is ambiguous and the user must choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zhibei.data.instructions import (
    PAIR_FIELDS,
    read_alpaca,
    read_instruction_wild,
    read_openai,
    read_plain_text,
    read_prompt_completion,
    read_prompts,
    read_self_instruct,
    read_sharegpt,
)
from zhibei.data.preferences import read_hh_rlhf, read_kto, read_preference
from zhibei.data.records import Origin, Record

WILD_FIELDS = {"instruction", "instruction_type", "special_tag", "id"}


@dataclass(frozen=True)
class Format:
    """One format: its fields (`needed` all, of each `a|b` one), what it becomes, and a row as an example."""

    name: str
    summary: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    becomes: str
    example: str
    recognise: Callable[[Any], bool]
    read: Callable[[Any, Origin], list[Record]]

    @property
    def fields(self) -> set[str]:
        return {name for group in (*self.needed, *self.optional) for name in group.split("|")}


def _has(*names: str) -> Callable[[Any], bool]:
    """All of the names are fields of the row; of `a|b` one is enough."""
    groups = [name.split("|") for name in names]
    return lambda row: isinstance(row, dict) and all(any(name in row for name in group) for group in groups)


def _lacks(row: Any, *names: str) -> bool:
    return isinstance(row, dict) and not any(name in row for name in names)


def _is_sharegpt(row: Any) -> bool:
    if isinstance(row, list):
        return bool(row) and isinstance(row[0], dict) and ("role" in row[0] or "from" in row[0])
    return _has("conversations|conversation|items")(row) and _lacks(row, "chosen", "rejected", "label")


def _is_wild(row: Any) -> bool:
    return isinstance(row, dict) and "instruction" in row and set(row) <= WILD_FIELDS


def _is_hh(row: Any) -> bool:
    return (
        _has("chosen", "rejected")(row)
        and isinstance(row["chosen"], str)
        and row["chosen"].lstrip().startswith("Human:")
        and "prompt" not in row
    )


def _is_preference(row: Any) -> bool:
    return (_has("chosen", "rejected")(row) and not _is_hh(row)) or _has("chosen_messages", "rejected_messages")(row)


def _is_pair(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and any(a in row and b in row for a, b in PAIR_FIELDS)
        and _lacks(row, "label", "chosen", "instruction")
    )


def _is_prompts(row: Any) -> bool:
    if not isinstance(row, dict) or any(b in row for _, b in PAIR_FIELDS) or "chosen" in row or "instruction" in row:
        return False
    turns = row.get("turns")
    return "prompt" in row or (isinstance(turns, list) and all(isinstance(turn, str) for turn in turns))


_ALL = (
    Format(
        name="alpaca",
        summary="one instruction, an optional input, one answer (Stanford Alpaca, Alpaca-CoT, LLaMA-Factory, Dolly)",
        needed=("instruction", "output|response"),
        optional=("input|context", "system", "history", "tools", "turn_fields"),
        becomes="conversation",
        example='{"instruction": "Add the numbers.", "input": "2, 3", "output": "5"}',
        recognise=lambda row: (
            _has("instruction", "output|response")(row) and _lacks(row, "instances", "label", "chosen")
        ),
        read=read_alpaca,
    ),
    Format(
        name="self_instruct",
        summary="seed tasks: one instruction with several instances",
        needed=("instruction", "instances"),
        optional=(),
        becomes="conversation",
        example='{"instruction": "Add the numbers.", "instances": [{"input": "2, 3", "output": "5"}]}',
        recognise=_has("instruction", "instances"),
        read=read_self_instruct,
    ),
    Format(
        name="sharegpt",
        summary="turns with from/value under conversations or items (or role/content; or a bare list of turns)",
        needed=("conversations|conversation|items",),
        optional=("system", "tools"),
        becomes="conversation",
        example='{"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]}',
        recognise=_is_sharegpt,
        read=read_sharegpt,
    ),
    Format(
        name="openai",
        summary="turns with role/content under messages; content parts, tool_calls, weight 0 or 1",
        needed=("messages",),
        optional=("system", "tools"),
        becomes="conversation",
        example='{"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}',
        recognise=lambda row: _has("messages")(row) and _lacks(row, "label", "chosen", "rejected"),
        read=read_openai,
    ),
    Format(
        name="prompt_completion",
        summary="two texts (or lists of turns): prompt/completion, prompt/response, question/answer, query/response",
        needed=("prompt|question|query|key", "completion|response|answer|value"),
        optional=("system", "tools", "turn_fields"),
        becomes="conversation",
        example='{"prompt": "2+3?", "completion": "5"}',
        recognise=_is_pair,
        read=read_prompt_completion,
    ),
    Format(
        name="text",
        summary="text to continue pre-training on; a .txt or .md file is one record",
        needed=("text",),
        optional=(),
        becomes="plain text",
        example='{"text": "Once upon a time ..."}',
        recognise=lambda row: isinstance(row, dict) and "text" in row and _lacks(row, "label", "prompt", "instruction"),
        read=read_plain_text,
    ),
    Format(
        name="hh_rlhf",
        summary="two whole dialogues as text; their common beginning is the prompt",
        needed=("chosen", "rejected"),
        optional=("margin",),
        becomes="preference",
        example='{"chosen": "\\n\\nHuman: 2+3?\\n\\nAssistant: 5", "rejected": "\\n\\nHuman: 2+3?\\n\\nAssistant: 6"}',
        recognise=_is_hh,
        read=read_hh_rlhf,
    ),
    Format(
        name="preference",
        summary="a prompt (text, turns, or rm-static's dialogue) with two answers; or two whole conversations",
        needed=("chosen|chosen_messages", "rejected|rejected_messages"),
        optional=("prompt|conversations|context|messages|question|instruction", "input", "system", "margin"),
        becomes="preference",
        example='{"prompt": "2+3?", "chosen": "5", "rejected": "6"}',
        recognise=_is_preference,
        read=read_preference,
    ),
    Format(
        name="kto",
        summary="one answer with a thumb: messages + label, or prompt + completion + label",
        needed=("label|kto_tag",),
        optional=(
            "messages|conversations|prompt|instruction|question|context",
            "completion|response|output|answer",
            "input",
            "system",
        ),
        becomes="judged",
        example='{"prompt": "2+3?", "completion": "5", "label": true}',
        recognise=lambda row: _has("label|kto_tag")(row) and _has("messages|conversations|completion|response")(row),
        read=read_kto,
    ),
    Format(
        name="instruction_wild",
        summary="instructions without answers",
        needed=("instruction",),
        optional=("instruction_type", "special_tag", "id"),
        becomes="prompt",
        example='{"instruction": "Add 2 and 3.", "instruction_type": "Generation"}',
        recognise=_is_wild,
        read=read_instruction_wild,
    ),
    Format(
        name="prompts",
        summary="questions only (also MT-bench's turns); an answer in the row becomes the checkable reference",
        needed=("prompt|question|instruction|query|turns|messages|conversations",),
        optional=("input", "system", "reference", "answer|completion|output|response"),
        becomes="prompt",
        example='{"prompt": "2+3?", "reference": "5"}',
        recognise=_is_prompts,
        read=read_prompts,
    ),
)

FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
"""Every format by name, in the order in which `zhibei data formats` lists them."""
