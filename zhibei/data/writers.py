"""Records back to rows of a format: the reverse of the readers. Knows no files.

What a format has no field for is kept: turn by turn inside of the turns where there are turns, else under
`turn_fields`; other fields of the row stay beside the format's own. What cannot be kept is refused with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zhibei.data.jsonlines import excerpt
from zhibei.data.records import Conversation, Fault, Judged, PlainText, Preference, Prompt, Record
from zhibei.data.turns import ROLES
from zhibei.text.messages import Message

SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
INTERNAL = ("turn_fields", "unanswered")


def spoken(message: Message) -> str:
    """Content and context as one text, for formats without a field for the context."""
    return f"{message.content}\n{message.context}" if message.context else message.content


def leftovers(messages: Sequence[Message], extra: dict[str, Any]) -> list[dict[str, Any]]:
    """What each turn holds besides speaker and text."""
    kept = extra.get("turn_fields") or [{}] * len(messages)
    assert len(kept) == len(messages)
    return [
        {
            **fields,
            **({} if message.learn else {"weight": 0}),
            **({"input": message.context} if message.context else {}),
        }
        for message, fields in zip(messages, kept, strict=True)
    ]


def _openai_turn(role: str, text: str, fields: dict[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    if fields.get("speaker") == "developer":
        role = fields.pop("speaker")
    raw = fields.pop("raw", None)
    return {"role": role, **(raw or {"content": text}), **fields}


def _sharegpt_turn(role: str, text: str, fields: dict[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    name = SHAREGPT_NAMES[role]
    if ROLES.get(fields.get("speaker", "")) == role and fields["speaker"] != "developer":
        name = fields.pop("speaker")
    return {"from": name, "value": text, **fields}


Turn = Callable[[str, str, dict[str, Any]], dict[str, Any]]


def _turns(messages: Sequence[Message], fields: Sequence[dict[str, Any]], turn: Turn) -> list[dict[str, Any]]:
    return [turn(m.role, spoken(m), f) for m, f in zip(messages, fields, strict=True)]


def _unanswered(extra: dict[str, Any], turn: Turn) -> list[dict[str, Any]]:
    kept = extra.get("unanswered") or []
    return [turn(t["role"], t["content"], {k: v for k, v in t.items() if k not in ("role", "content")}) for t in kept]


def beside(extra: dict[str, Any], own: Sequence[str], *, hidden: Sequence[str] = INTERNAL) -> dict[str, Any]:
    """The other fields of the row; raises Fault when one has the name of a field of the format itself."""
    for name in extra:
        if name in own and name not in hidden:
            raise Fault(
                name,
                f"the row's own field {name!r} ({excerpt(extra[name], 30)}) has the name of a field of the format",
                expected="another name",
                fix="rename or remove the field in the file first",
            )
    return {name: value for name, value in extra.items() if name not in hidden}


def _tools(record: Conversation) -> dict[str, Any]:
    return {"tools": record.tools} if record.tools else {}


def _wanted(record: Record, kind: type, name: str) -> Any:
    if not isinstance(record, kind):
        have = type(record).__name__.lower()
        raise Fault(
            "",
            f"a {have} record cannot be written as {name}",
            expected=f"{kind.__name__.lower()} records",
            fix="choose a format of the same kind (zhibei data formats), or read the file with another --from",
        )
    return record


def write_sharegpt(record: Record) -> list[dict[str, Any]]:
    it: Conversation = _wanted(record, Conversation, "sharegpt")
    turns = _turns(it.messages, leftovers(it.messages, it.extra), _sharegpt_turn)
    turns += _unanswered(it.extra, _sharegpt_turn)
    return [{**beside(it.extra, ("conversations", "tools", "system")), "conversations": turns, **_tools(it)}]


def write_openai(record: Record) -> list[dict[str, Any]]:
    it: Conversation = _wanted(record, Conversation, "openai")
    turns = _turns(it.messages, leftovers(it.messages, it.extra), _openai_turn)
    turns += _unanswered(it.extra, _openai_turn)
    return [{**beside(it.extra, ("messages", "tools", "system")), "messages": turns, **_tools(it)}]


def _no_tool_turns(messages: Sequence[Message], name: str) -> None:
    found = [message for message in messages if message.role == "tool"]
    if found:
        raise Fault(
            "",
            f"a turn of a tool ({excerpt(found[0].content, 40)}) has no place in {name}",
            expected="user and assistant turns",
            fix="write it as openai or sharegpt",
        )


def write_alpaca(record: Record) -> list[dict[str, Any]]:
    it: Conversation = _wanted(record, Conversation, "alpaca")
    _no_tool_turns(it.messages, "alpaca")
    own = ("instruction", "input", "output", "response", "context", "system", "history", "tools")
    fields = leftovers(it.messages, it.extra)
    has_system = it.messages[0].role == "system"
    fields[-2].pop("input", None)
    pairs = it.messages[has_system:-2]
    question, answer = it.messages[-2:]
    row: dict[str, Any] = {"instruction": question.content, "input": question.context, "output": answer.content}
    if has_system:
        row["system"] = it.messages[0].content
    if pairs:
        row["history"] = [[spoken(pairs[i]), spoken(pairs[i + 1])] for i in range(0, len(pairs), 2)]
    if any(fields):
        row["turn_fields"] = fields
    return [{**row, **_tools(it), **beside(it.extra, own, hidden=("turn_fields",))}]


def write_prompt_completion(record: Record) -> list[dict[str, Any]]:
    it: Conversation = _wanted(record, Conversation, "prompt_completion")
    own = ("prompt", "completion", "system", "tools")
    fields = leftovers(it.messages, it.extra)
    plain = [message.role for message in it.messages] in (["user", "assistant"], ["system", "user", "assistant"])
    if plain and it.messages[0].content and not it.extra.get("unanswered"):
        row: dict[str, Any] = {"prompt": spoken(it.messages[-2]), "completion": it.messages[-1].content}
        if it.messages[0].role == "system":
            row["system"] = it.messages[0].content
        if any(fields):
            row["turn_fields"] = fields
    else:
        turns = _turns(it.messages, fields, _openai_turn)
        tail = _unanswered(it.extra, _openai_turn)
        row = {"prompt": turns[:-1], "completion": [turns[-1], *tail]}
    return [{**row, **_tools(it), **beside(it.extra, own)}]


def write_text(record: Record) -> list[dict[str, Any]]:
    it: PlainText = _wanted(record, PlainText, "text")
    return [{"text": it.text, **beside(it.extra, ("text",))}]


def write_prompts(record: Record) -> list[dict[str, Any]]:
    it: Prompt = _wanted(record, Prompt, "prompts")
    row: dict[str, Any]
    if len(it.messages) == 1:
        row = {"prompt": it.messages[0].content}
        if it.messages[0].context:
            row["input"] = it.messages[0].context
    else:
        row = {"prompt": _turns(it.messages, leftovers(it.messages, it.extra), _openai_turn)}
    if it.reference is not None:
        row["reference"] = it.reference
    return [{**row, **beside(it.extra, ("prompt", "input", "reference", "system"), hidden=("turn_fields",))}]


def write_instruction_wild(record: Record) -> list[dict[str, Any]]:
    it: Prompt = _wanted(record, Prompt, "instruction_wild")
    if len(it.messages) != 1 or it.messages[0].context or it.reference is not None:
        raise Fault(
            "",
            "more than one instruction (system prompt, turns, input or reference)",
            expected="a single instruction",
            fix="write it as prompts",
        )
    return [{"instruction": it.messages[0].content, **beside(it.extra, ("instruction",))}]


def _as_dialogue(messages: Sequence[Message]) -> str:
    for message in messages:
        if message.role not in ("user", "assistant") or message.context or not message.learn:
            what = f"a {message.role} turn" if message.role not in ("user", "assistant") else "an input or a weight"
            raise Fault("", f"{what} has no place in hh_rlhf", expected="plain turns", fix="write it as preference")
    return "".join(f"\n\n{'Human' if m.role == 'user' else 'Assistant'}: {m.content}" for m in messages)


def _margin(record: Preference) -> dict[str, Any]:
    return {} if record.margin is None else {"margin": record.margin}


def write_hh_rlhf(record: Record) -> list[dict[str, Any]]:
    it: Preference = _wanted(record, Preference, "hh_rlhf")
    if it.extra.get("turn_fields"):
        raise Fault(
            "", "fields of single turns have no place in hh_rlhf", expected="plain turns", fix="write preference"
        )
    row = {"chosen": _as_dialogue(it.prompt + it.chosen), "rejected": _as_dialogue(it.prompt + it.rejected)}
    return [{**row, **_margin(it), **beside(it.extra, ("chosen", "rejected", "margin", "prompt"))}]


def _parts(named: dict[str, tuple[Message, ...]], extra: dict[str, Any]) -> dict[str, Any]:
    """Prompt and answers as texts where each is one plain turn, else all of them as turns."""
    messages = [message for part in named.values() for message in part]
    fields = leftovers(messages, extra)
    prompt, *answers = named.values()
    is_single = len(prompt) == 1 and all(len(answer) == 1 for answer in answers)
    if is_single and all(set(f) <= {"input"} for f in fields[:1]) and not any(fields[1:]):
        row: dict[str, Any] = {name: part[0].content for name, part in named.items()}
        return row | ({"input": prompt[0].context} if prompt[0].context else {})
    turns = _turns(messages, fields, _openai_turn)
    row = {}
    for name, part in named.items():
        row[name], turns = turns[: len(part)], turns[len(part) :]
    return row


def write_preference(record: Record) -> list[dict[str, Any]]:
    it: Preference = _wanted(record, Preference, "preference")
    row = _parts({"prompt": it.prompt, "chosen": it.chosen, "rejected": it.rejected}, it.extra)
    own = ("prompt", "chosen", "rejected", "input", "system", "margin")
    return [{**row, **_margin(it), **beside(it.extra, own)}]


def write_kto(record: Record) -> list[dict[str, Any]]:
    """A judged answer; a preference becomes two of them, which share a `pair`."""
    own = ("prompt", "completion", "input", "system", "label", "messages")
    if isinstance(record, Preference):
        if record.extra.get("turn_fields"):
            raise Fault("", "fields of single turns have no place here", expected="plain turns", fix="keep preference")
        pair = {"pair": record.origin.index} | ({} if record.margin is None else {"margin": record.margin})
        return [
            {
                **_parts({"prompt": record.prompt, "completion": answer}, {}),
                "label": label,
                **pair,
                **beside(record.extra, own),
            }
            for answer, label in ((record.chosen, True), (record.rejected, False))
        ]
    it: Judged = _wanted(record, Judged, "kto")
    row = _parts({"prompt": it.prompt, "completion": it.answer}, it.extra)
    return [{**row, "label": it.is_good, **beside(it.extra, own)}]


WRITERS: dict[str, Callable[[Record], list[dict[str, Any]]]] = {
    "alpaca": write_alpaca,
    "sharegpt": write_sharegpt,
    "openai": write_openai,
    "prompt_completion": write_prompt_completion,
    "text": write_text,
    "hh_rlhf": write_hh_rlhf,
    "preference": write_preference,
    "kto": write_kto,
    "instruction_wild": write_instruction_wild,
    "prompts": write_prompts,
}
"""Formats that can be written."""
