"""Lists of turns (from/value, role/content) as messages, and what can be wrong with them. Knows no file formats.

What a Message cannot hold is kept beside it, turn by turn, so that a conversion loses nothing: see `Turns.fields`.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from dataclasses import dataclass
from typing import Any

from zhibei.data.fields import as_list, checked_text
from zhibei.data.jsonlines import excerpt
from zhibei.data.records import Fault
from zhibei.text.messages import Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""Every speaker's name that is understood, and whom it means."""

PLAIN_NAMES = {"system", "human", "user", "gpt", "assistant", "tool", "observation"}
"""Names that a conversion may respell; any other one is kept in the turn's field `speaker`."""

NEXT_ROLES: dict[str, tuple[Role, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Who may speak after whom; "" is the beginning."""

SPEAKER_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
WEIGHT_KEYS = ("weight", "loss_weight", "train")


@dataclass(frozen=True, slots=True)
class Turns:
    """Messages, for each of them the fields a Message has no place for, aligned with them."""

    messages: tuple[Message, ...]
    fields: tuple[dict[str, Any], ...]

    def __add__(self, other: Turns) -> Turns:
        return Turns(self.messages + other.messages, self.fields + other.fields)

    def cut(self, at: int) -> tuple[Turns, Turns]:
        """The first `at` turns, and the rest."""
        return Turns(self.messages[:at], self.fields[:at]), Turns(self.messages[at:], self.fields[at:])

    def kept(self) -> dict[str, Any]:
        """The fields of the turns as an entry of `extra`, if there are any."""
        return {"turn_fields": list(self.fields)} if any(self.fields) else {}


def role_of(name: Any, field: str) -> Role:
    """Whom a speaker's name means; raises Fault with the nearest known name."""
    known = ROLES.get(name) if isinstance(name, str) else None
    if known is None and isinstance(name, str):
        known = ROLES.get(name.strip().lower())
    if known is None:
        near = difflib.get_close_matches(str(name), ROLES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise Fault(
            field,
            f"unknown speaker {excerpt(name)!r}",
            expected=f"one of {', '.join(ROLES)}",
            fix=f"{hint}Rename the speaker, or on_error: drop",
            pitfall="dataset-role-tags-mismatch",
        )
    return known


def _part_text(part: Any, field: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    value = next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None) if kind else None
    if kind in ("text", "input_text", "output_text") and isinstance(value, str):
        return value
    if kind in ("reasoning", "thinking") and isinstance(value, str):
        return _thought(value)
    if kind == "tool_call":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    raise Fault(
        field,
        f"a part of type {kind!r}",
        expected="parts of type text, reasoning or tool_call (text models see no images)",
        fix="remove the part, or on_error: drop",
    )


def _thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


def _call_text(call: Any, field: str) -> str:
    """One tool call as one line {"name": ..., "arguments": {...}}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Fault(
            field, f"a tool call without a name: {excerpt(call)}", expected='{"function": {"name": …, "arguments": …}}'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def calls_of(raw: dict[str, Any]) -> list[Any]:
    """The tool calls of a turn; `function_call` is the older spelling for a single one."""
    return raw.get("tool_calls") or ([raw["function_call"]] if raw.get("function_call") else [])


def spoken_text(raw: dict[str, Any], field: str, *, may_be_empty: bool) -> str:
    """What the model reads of `content`, `reasoning_content` and `tool_calls`: the thought between <think> tags,
    the text, then one line of JSON per call."""
    content, calls = raw.get("content"), calls_of(raw)
    if isinstance(content, list):
        pieces = [(part.get("type") if isinstance(part, dict) else "text", _part_text(part, field)) for part in content]
        text = ""
        for kind, piece in pieces:
            text += ("\n" if kind == "tool_call" and text and not text.endswith("\n") else "") + piece
    elif content is None and calls:
        text = ""
    else:
        text = checked_text(content, field, may_be_empty=may_be_empty or bool(calls))
    if raw.get("reasoning_content"):
        text = _thought(checked_text(raw["reasoning_content"], field)) + text
    lines = [_call_text(call, field) for call in calls]
    text = "\n".join([text, *lines] if text else lines)
    return checked_text(text, field, may_be_empty=may_be_empty)


def _learns(turn: dict[str, Any], keys: list[str], field: str) -> bool:
    value = turn[keys[0]] if keys else 1
    if value not in (0, 1):
        raise Fault(
            f"{field}.{keys[0]}",
            f"weight {excerpt(value)}",
            expected="0 (not learned) or 1",
            fix="round it; rows are weighted by their source",
        )
    return bool(value)


RAW_KEYS = ("content", "tool_calls", "function_call", "reasoning_content")


def _turn(turn: Any, field: str) -> tuple[Message, dict[str, Any]]:
    """One turn as a message, and the rest of its fields."""
    if not isinstance(turn, dict):
        raise Fault(
            field,
            f"{excerpt(turn)} where a turn is needed",
            expected='{"from": …, "value": …} or {"role": …, "content": …}',
        )
    nulls = [key for key in CONTENT_KEYS if key in turn and turn[key] is None]
    turn = {key: value for key, value in turn.items() if value is not None}
    speaker = next((key for key in SPEAKER_KEYS if key in turn), None)
    if speaker is None:
        raise Fault(
            f"{field}.from",
            "no speaker",
            expected='"from" or "role"',
            fix=f"name the speaker; the turn has {', '.join(turn)}",
        )
    name = turn.pop(speaker)
    role = role_of(name, f"{field}.{speaker}")
    key = next((key for key in CONTENT_KEYS if key in turn), "value" if speaker == "from" else "content")
    place = f"{field}.{key}"
    content = turn.pop(key, None)
    weights = [name for name in WEIGHT_KEYS if name in turn]
    learn = _learns(turn, weights, field)
    fields = {
        name: value for name, value in turn.items() if name not in (*WEIGHT_KEYS[:2], *RAW_KEYS[1:], "raw", "input")
    }
    if "train" in weights:
        fields.pop("train")
    if name not in PLAIN_NAMES:
        fields["speaker"] = name
    raw = turn.get("raw") or {"content": content, **{name: turn[name] for name in RAW_KEYS[1:] if turn.get(name)}}
    may_be_empty = role in ("system", "tool")
    if content is None and "raw" not in turn and not calls_of(raw):
        present = ", ".join(turn) or "nothing else"
        raise Fault(
            place,
            "null" if nulls else "missing",
            expected="the turn's text",
            fix=f"add it; the turn has {present}; or on_error: drop",
        )
    text = spoken_text(raw, place, may_be_empty=may_be_empty)
    if turn.get("raw") and isinstance(content, str) and content != text:
        raise Fault(
            place, "the text differs from its field 'raw'", expected="both alike", fix="remove 'raw' from the turn"
        )
    is_plain = isinstance(raw["content"], str) or (isinstance(raw["content"], list) and len(raw["content"]) == 1)
    if (
        set(raw) != {"content"}
        or not is_plain
        or (isinstance(raw["content"], list) and _kind(raw["content"][0]) != "text")
    ):
        fields["raw"] = raw
    context = turn.get("input", "")
    if context and isinstance(context, str) and text.endswith("\n" + context):
        return Message(role, text[: -len(context) - 1], context=context, learn=learn), fields
    if "input" in turn:
        fields["input"] = turn["input"]
    return Message(role, text, learn=learn), fields


def _kind(part: Any) -> str:
    return part.get("type", "") if isinstance(part, dict) else "text"


def parse_turns(value: Any, field: str) -> Turns:
    """Turns as messages; each is looked at alone, their order is the business of `check_order`."""
    turns = as_list(value, field)
    parsed = [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]
    return Turns(tuple(message for message, _ in parsed), tuple(fields for _, fields in parsed))


def check_order(messages: tuple[Message, ...], field: str) -> None:
    """Raises Fault unless: an optional system turn, then user and assistant in turn, tools answering the assistant."""
    before = ""
    for index, message in enumerate(messages):
        if message.role not in NEXT_ROLES[before]:
            said = f"after {before}" if before else "at the beginning"
            expected = " or ".join(NEXT_ROLES[before])
            fix = "join the two turns" if before == message.role else "remove or reorder the turn"
            raise Fault(
                f"{field}[{index}]",
                f"{message.role} speaks {said}: {excerpt(message.content, 40)}",
                expected=expected,
                fix=f"{fix}, or on_error: drop",
                pitfall="sharegpt-turn-order-or-empty",
            )
        before = message.role


def split_unanswered(turns: Turns, field: str) -> tuple[Turns, Turns]:
    """A conversation up to its last answer, and what follows it (user turns nobody answered)."""
    last = max((index for index, message in enumerate(turns.messages) if message.role == "assistant"), default=-1)
    if last < 0:
        raise Fault(
            field,
            "no answer to learn from",
            expected="at least one assistant turn",
            fix="add the answer, on_error: drop, or format: prompts to use it as a question",
            pitfall="sharegpt-turn-order-or-empty",
        )
    return turns.cut(last + 1)
