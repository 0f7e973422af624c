"""Rows that compare or judge answers (hh-rlhf, DPO, KTO) as records. Knows no files, no tokenizer and no template."""

from __future__ import annotations

import re
from typing import Any

from zhibei.data.fields import checked_text, needs, present_name, rest
from zhibei.data.jsonlines import excerpt
from zhibei.data.records import Fault, Judged, Origin, Preference, Record
from zhibei.data.turns import Turns, check_order, parse_turns
from zhibei.text.messages import Message, Role

SPEECH = re.compile(r"(?:^|\n\n)(Human|Assistant):")
PROMPT_FIELDS = ("prompt", "conversations", "context", "messages", "question", "instruction")
ANSWER_FIELDS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def split_dialogue(text: Any, field: str) -> tuple[Message, ...]:
    """`\\n\\nHuman: …\\n\\nAssistant: …` as messages."""
    text = checked_text(text, field)
    marks = list(SPEECH.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise Fault(
            field, f"does not begin with 'Human:': {excerpt(text, 40)}", expected="\\n\\nHuman: …\\n\\nAssistant: …"
        )
    messages: list[Message] = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        said = text[mark.end() : following.start() if following else len(text)]
        role: Role = "user" if mark[1] == "Human" else "assistant"
        messages.append(Message(role, said.removeprefix(" ")))
    return tuple(messages)


def common_prefix(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """How many messages both share; at least one of each is left over."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))


def check_pair(prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> None:
    """Raises Fault for an empty or equal pair, and for turns out of order."""
    if not prompt:
        raise Fault(
            "prompt",
            "no prompt: the two conversations share no turn",
            expected="a common beginning, or a field 'prompt'",
            fix="add the prompt, or on_error: drop",
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        check_order(prompt + answer, f"prompt+{name}")
        if not answer or answer[-1].role != "assistant":
            raise Fault(name, "does not end with an answer", expected="an assistant turn at the end")
        if not answer[-1].content.strip():
            raise Fault(
                name,
                "empty answer",
                expected="some text (a model would learn only that it is longer)",
                fix="fill it, or on_error: drop",
            )
    if chosen == rejected:
        raise Fault(
            "rejected",
            f"equal to 'chosen': {excerpt(chosen[-1].content, 40)}",
            expected="two different answers",
            fix="remove the record, or on_error: drop",
        )


def read_hh_rlhf(row: dict[str, Any], origin: Origin) -> list[Record]:
    for name in ("chosen", "rejected"):
        if name not in row:
            needs(row, name)
    chosen, rejected = split_dialogue(row["chosen"], "chosen"), split_dialogue(row["rejected"], "rejected")
    shared = common_prefix(chosen, rejected)
    parts = chosen[:shared], chosen[shared:], rejected[shared:]
    check_pair(*parts)
    return [Preference(*parts, origin, margin=margin_of(row), extra=rest(row, "chosen", "rejected", "margin"))]


def margin_of(row: dict[str, Any]) -> float | None:
    value = row.get("margin")
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Fault("margin", excerpt(value), expected="a number") from None


def side(value: Any, field: str) -> Turns:
    """One answer: text, one turn, or a list of turns."""
    if isinstance(value, str) and not value.lstrip().startswith('[{"'):
        if not value.strip():
            raise Fault(
                field,
                "empty answer",
                expected="some text (a model would learn only that it is longer)",
                fix="fill it, or on_error: drop",
            )
        return Turns((Message("assistant", checked_text(value, field)),), ({},))
    if isinstance(value, dict):
        return parse_turns([value], field)
    return parse_turns(value, field)


def question(row: dict[str, Any], origin_field: str) -> tuple[Message, ...]:
    """The prompt of a row: text (with `input`), or turns."""
    value = row[origin_field]
    if isinstance(value, str) and not value.lstrip().startswith('[{"'):
        context = row.get("input") or ""
        return (
            Message(
                "user", checked_text(value, origin_field), context=checked_text(context, "input", may_be_empty=True)
            ),
        )
    return parse_turns(value, origin_field).messages


def with_system(prompt: tuple[Message, ...], row: dict[str, Any]) -> tuple[Message, ...]:
    system = row.get("system")
    if not system:
        return prompt
    return (Message("system", checked_text(system, "system")), *prompt)


def read_preference(row: dict[str, Any], origin: Origin) -> list[Record]:
    names = next((pair for pair in ANSWER_FIELDS if pair[0] in row or pair[1] in row), ANSWER_FIELDS[0])
    for name in names:
        if name not in row:
            needs(row, name)
    chosen, rejected = side(row[names[0]], names[0]), side(row[names[1]], names[1])
    field = next((name for name in PROMPT_FIELDS if row.get(name)), "")
    if field:
        prompt = question(row, field)
        parts = with_system(prompt, row), strip_prompt(chosen.messages, prompt), strip_prompt(rejected.messages, prompt)
    else:
        shared = common_prefix(chosen.messages, rejected.messages)
        parts = with_system(chosen.messages[:shared], row), chosen.messages[shared:], rejected.messages[shared:]
    check_pair(*parts)
    extra = rest(row, field, *names, "system", "input", "margin")
    return [Preference(*parts, origin, margin=margin_of(row), extra=extra)]


def strip_prompt(answer: tuple[Message, ...], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Some data sets repeat the prompt inside of both answers."""
    return answer[len(prompt) :] if len(answer) > len(prompt) and answer[: len(prompt)] == prompt else answer


def label_of(row: dict[str, Any]) -> bool:
    """KTO's thumb: true or false, also as 1/0 or text."""
    field = present_name(row, ("label", "kto_tag"), "label")
    value = row[field]
    known = LABELS.get(str(value).strip().lower())
    if known is None:
        raise Fault(field, f"{excerpt(value)!r}", expected="true or false")
    return known


def read_kto(row: dict[str, Any], origin: Origin) -> list[Record]:
    is_good = label_of(row)
    used = ["label", "kto_tag", "system"]
    turns_field = next((name for name in ("messages", "conversations") if name in row), None)
    if turns_field:
        messages = with_system(parse_turns(row[turns_field], turns_field).messages, row)
        check_order(messages, turns_field)
        if messages[-1].role != "assistant":
            raise Fault(turns_field, "does not end with an answer", expected="an assistant turn at the end")
        used.append(turns_field)
        return [Judged(messages[:-1], messages[-1:], is_good, origin, extra=rest(row, *used))]
    field = present_name(row, PROMPT_FIELDS, "prompt")
    name = present_name(row, ("completion", "response", "output", "answer"), "completion")
    prompt, answer = with_system(question(row, field), row), side(row[name], name).messages
    check_order(prompt + answer, f"{field}+{name}")
    if answer[-1].role != "assistant":
        raise Fault(name, "does not end with an answer", expected="an assistant turn")
    return [Judged(prompt, answer, is_good, origin, extra=rest(row, field, name, "input", *used))]
