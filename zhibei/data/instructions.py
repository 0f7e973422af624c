"""Rows of instructions, conversations, prompts and text as records. Knows no files, no tokenizer and no template."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from zhibei.data.dialogues import open_dialogue
from zhibei.data.fields import answer_text, as_list, checked_text, first_present, needs, optional_text, rest, tools_text
from zhibei.data.jsonlines import excerpt
from zhibei.data.records import Conversation, Fault, Origin, PlainText, Prompt, Record
from zhibei.data.turns import Turns, check_order, parse_turns, split_unanswered
from zhibei.text.messages import Message

ANSWER_FIELDS = ("output", "response")
CONTEXT_FIELDS = ("input", "context")
PAIR_FIELDS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("key", "value"),
)
CONVERSATION_FIELDS = ("conversations", "conversation", "items")
FINAL_NUMBER = re.compile(r"####\s*(\S[^\n]*)\s*$")


def with_turn_fields(messages: list[Message], row: dict[str, Any]) -> tuple[list[Message], dict[str, Any]]:
    """Puts back what a conversion kept in `turn_fields` (weights, contexts, names of speakers)."""
    kept = row.get("turn_fields")
    if not isinstance(kept, list) or len(kept) != len(messages) or not all(isinstance(item, dict) for item in kept):
        return messages, {} if kept is None else {"turn_fields": kept}
    restored = []
    for message, fields in zip(messages, kept, strict=True):
        tail, content = "\n" + str(fields.get("input", "")), message.content
        if "input" in fields and content.endswith(tail):
            message = replace(message, content=content[: -len(tail)], context=fields["input"])
        restored.append(replace(message, learn=fields.get("weight", 1) != 0))
    left = [{name: value for name, value in fields.items() if name not in ("weight", "input")} for fields in kept]
    return restored, {"turn_fields": left} if any(left) else {}


def read_alpaca(row: dict[str, Any], origin: Origin) -> list[Record]:
    answer, context = first_present(row, ANSWER_FIELDS), first_present(row, CONTEXT_FIELDS)
    messages: list[Message] = []
    system = optional_text(row, "system")
    if system.strip():
        messages.append(Message("system", system))
    for index, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Fault(f"history[{index}]", excerpt(pair), expected="a pair [question, answer]")
        messages.append(Message("user", checked_text(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", checked_text(pair[1], f"history[{index}][1]")))
    question = checked_text(needs(row, "instruction"), "instruction")
    messages.append(Message("user", question, context=optional_text(row, context)))
    messages.append(Message("assistant", answer_text(row, answer)))
    messages, fields = with_turn_fields(messages, row)
    extra = rest(row, "instruction", answer, context, "system", "history", "turn_fields", "tools") | fields
    return [Conversation(tuple(messages), origin, tools=tools_text(row), extra=extra)]


def read_self_instruct(row: dict[str, Any], origin: Origin) -> list[Record]:
    question = checked_text(needs(row, "instruction"), "instruction")
    records: list[Record] = []
    for index, instance in enumerate(as_list(needs(row, "instances"), "instances")):
        if not isinstance(instance, dict):
            raise Fault(f"instances[{index}]", excerpt(instance), expected='{"input": …, "output": …}')
        try:
            context, answer = optional_text(instance, "input"), answer_text(instance, "output")
        except Fault as fault:
            raise Fault(
                f"instances[{index}].{fault.field}", fault.what, expected=fault.expected, fix=fault.fix
            ) from None
        messages = (Message("user", question, context=context), Message("assistant", answer))
        extra = rest(row, "instruction", "instances") | rest(instance, "input", "output")
        records.append(Conversation(messages, origin, extra=extra))
    return records


def conversation(turns: Turns, row: dict[str, Any], field: str, origin: Origin) -> Conversation:
    """A checked conversation; a `system` field becomes its first turn, turns nobody answers go to `extra`."""
    system = optional_text(row, "system")
    used = [field, "tools"]
    if system.strip():
        if turns.messages[0].role == "system":
            raise Fault(
                "system",
                "a system prompt in the field and in the first turn",
                expected="one of them",
                fix="remove one, or on_error: drop",
            )
        turns = Turns((Message("system", system), *turns.messages), ({}, *turns.fields))
    used.append("system")
    check_order(turns.messages, field)
    turns, unanswered = split_unanswered(turns, field)
    extra = rest(row, *used) | turns.kept()
    if unanswered.messages:
        names = [
            {"role": m.role, "content": m.content} | f
            for m, f in zip(unanswered.messages, unanswered.fields, strict=True)
        ]
        extra["unanswered"] = names
    return Conversation(turns.messages, origin, tools=tools_text(row), extra=extra)


def read_sharegpt(row: Any, origin: Origin) -> list[Record]:
    if isinstance(row, list):
        return [conversation(parse_turns(row, "turns"), {}, "turns", origin)]
    field = first_present(row, CONVERSATION_FIELDS)
    return [conversation(parse_turns(needs(row, field), field), row, field, origin)]


def read_openai(row: dict[str, Any], origin: Origin) -> list[Record]:
    return [conversation(parse_turns(needs(row, "messages"), "messages"), row, "messages", origin)]


def read_instruction_wild(row: dict[str, Any], origin: Origin) -> list[Record]:
    question = checked_text(needs(row, "instruction"), "instruction")
    return [Prompt((Message("user", question),), origin, extra=rest(row, "instruction"))]


def pair_of(row: dict[str, Any]) -> tuple[str, str]:
    """Which two fields hold question and answer."""
    return next((pair for pair in PAIR_FIELDS if pair[0] in row and pair[1] in row), PAIR_FIELDS[0])


def read_prompt_completion(row: dict[str, Any], origin: Origin) -> list[Record]:
    asked, answered = pair_of(row)
    if asked not in row:
        asked, answered = next((pair for pair in PAIR_FIELDS if pair[1] in row or pair[0] in row), (asked, answered))
    question, answer = needs(row, asked), needs(row, answered)
    if isinstance(question, list) or isinstance(answer, list):
        turns, more = parse_turns(question, asked), parse_turns(answer, answered)
        return [conversation(turns + more, {k: v for k, v in row.items() if k != answered}, asked, origin)]
    system = optional_text(row, "system")
    messages = [Message("system", system)] if system.strip() else []
    dialogue, said = open_dialogue(question, asked), answer_text(row, answered)
    messages += dialogue or [Message("user", checked_text(question, asked))]
    messages.append(Message("assistant", said.removeprefix(" ") if dialogue else said))
    messages, fields = with_turn_fields(messages, row)
    extra = rest(row, asked, answered, "system", "turn_fields", "tools") | fields
    final = FINAL_NUMBER.search(answer)
    if final and "reference" not in extra:
        extra["reference"] = final[1]
    return [Conversation(tuple(messages), origin, tools=tools_text(row), extra=extra)]


def read_plain_text(row: dict[str, Any], origin: Origin) -> list[Record]:
    return [PlainText(checked_text(needs(row, "text"), "text"), origin, extra=rest(row, "text"))]


QUESTION_FIELDS = ("prompt", "question", "instruction", "query", "turns", "messages", *CONVERSATION_FIELDS)
ANSWER_KEYS = ("answer", "completion", "output", "response")


def read_prompts(row: dict[str, Any], origin: Origin) -> list[Record]:
    """Only the question is used; a checkable answer becomes the reference."""
    field = first_present(row, QUESTION_FIELDS)
    value = needs(row, field)
    reference, extra = row.get("reference"), rest(row, field, "input", "reference", "system")
    if isinstance(value, list) and value and isinstance(value[0], str):
        messages = [Message("user", checked_text(value[0], f"{field}[0]"))]
        if value[1:]:
            extra["next_turns"] = [checked_text(text, f"{field}[{i}]") for i, text in enumerate(value[1:], start=1)]
    elif isinstance(value, list):
        turns = parse_turns(value, field)
        check_order(turns.messages, field)
        while turns.messages and turns.messages[-1].role == "assistant":
            turns, answer_turns = turns.cut(len(turns.messages) - 1)
            extra["answer_turns"] = [{"role": m.role, "content": m.content} for m in answer_turns.messages]
        messages = list(turns.messages)
        extra |= turns.kept()
        if not messages or messages[-1].role == "system":
            raise Fault(field, "no question", expected="a user turn", fix="remove the record, or on_error: drop")
    elif dialogue := open_dialogue(value, field):
        messages = list(dialogue)
    else:
        messages = [Message("user", checked_text(value, field), context=optional_text(row, "input"))]
    system = optional_text(row, "system")
    if system.strip():
        messages.insert(0, Message("system", system))
    if isinstance(reference, list):
        extra["references"], reference = reference, next((text for text in reference if isinstance(text, str)), None)
    answer = next((row[key] for key in ANSWER_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if reference is None and answer is not None:
        final = FINAL_NUMBER.search(answer)
        reference = final[1] if final else answer
    return [Prompt(tuple(messages), origin, reference=None if reference is None else str(reference), extra=extra)]
