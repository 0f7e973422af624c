"""Rows that compare or judge answers (hh-rlhf, DPO, KTO) as records. Knows no files, no tokenizer and no template."""

from __future__ import annotations

import math
from typing import Any

from zhibei.data.dialogues import open_dialogue, split_dialogue
from zhibei.data.fields import checked_text, needs, present_name, rest
from zhibei.data.jsonlines import excerpt
from zhibei.data.records import Fault, Judged, Origin, Preference, Record
from zhibei.data.turns import Turns, check_order, parse_turns
from zhibei.text.messages import Message

PROMPT_FIELDS = ("prompt", "conversations", "context", "messages", "question", "instruction")
ANSWER_FIELDS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


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
                pitfall="empty-answers",
            )
    if chosen == rejected:
        raise Fault(
            "rejected",
            f"equal to 'chosen': {excerpt(chosen[-1].content, 40)}",
            expected="two different answers",
            fix="remove the record, or on_error: drop",
            pitfall="dpo-data-identical-pairs",
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
        margin = float(value)
    except (TypeError, ValueError):
        raise Fault("margin", excerpt(value), expected="a number") from None
    if not math.isfinite(margin):
        raise Fault("margin", excerpt(value), expected="a finite number")
    return margin


def is_turns(value: Any) -> bool:
    """Turns, also as JSON text in the cell of a table."""
    return not isinstance(value, str) or value.lstrip().startswith('[{"')


def side(value: Any, field: str, *, in_dialogue: bool = False) -> Turns:
    """One answer: text, one turn, or a list of turns. `in_dialogue`: the space after `Assistant:` is not part of it."""
    if is_turns(value):
        return parse_turns([value] if isinstance(value, dict) else value, field)
    if not value.strip():
        raise Fault(
            field,
            "empty answer",
            expected="some text (a model would learn only that it is longer)",
            pitfall="empty-answers",
        )
    text = checked_text(value, field)
    return Turns((Message("assistant", text.removeprefix(" ") if in_dialogue else text),), ({},))


def question(row: dict[str, Any], field: str) -> Turns:
    """The prompt of a row: text (with `input`), a dialogue as text, or turns; a `system` field goes before it."""
    turns = Turns((), ())
    if row.get("system"):
        turns = Turns((Message("system", checked_text(row["system"], "system")),), ({},))
    if not field:
        return turns
    if is_turns(row[field]):
        return turns + parse_turns(row[field], field)
    dialogue = open_dialogue(row[field], field)
    if dialogue:
        return turns + Turns(dialogue, ({},) * len(dialogue))
    text, context = checked_text(row[field], field), row.get("input") or ""
    return turns + Turns((Message("user", text, context=checked_text(context, "input", may_be_empty=True)),), ({},))


def read_preference(row: dict[str, Any], origin: Origin) -> list[Record]:
    names = next((pair for pair in ANSWER_FIELDS if pair[0] in row or pair[1] in row), ANSWER_FIELDS[0])
    field = next((name for name in PROMPT_FIELDS if row.get(name)), "")
    in_dialogue = bool(open_dialogue(row.get(field), field))
    chosen, rejected = (side(needs(row, name), name, in_dialogue=in_dialogue) for name in names)
    prompt = question(row, field)
    if field:
        chosen, rejected = without_prompt(chosen, prompt), without_prompt(rejected, prompt)
    else:
        shared = common_prefix(chosen.messages, rejected.messages)
        (common, chosen), (_, rejected) = chosen.cut(shared), rejected.cut(shared)
        prompt = prompt + common
    parts = prompt.messages, chosen.messages, rejected.messages
    check_pair(*parts)
    extra = rest(row, field, *names, "system", "input", "margin") | (prompt + chosen + rejected).kept()
    return [Preference(*parts, origin, margin=margin_of(row), extra=extra)]


def without_prompt(answer: Turns, prompt: Turns) -> Turns:
    """Some data sets repeat the prompt inside of both answers."""
    size = len(prompt.messages)
    repeats = len(answer.messages) > size and answer.messages[:size] == prompt.messages
    return answer.cut(size)[1] if repeats else answer


def label_of(row: dict[str, Any]) -> bool:
    """KTO's thumb: true or false, also as 1/0 or text."""
    field = present_name(row, ("label", "kto_tag"), "label")
    known = LABELS.get(str(row[field]).strip().lower())
    if known is None:
        raise Fault(field, f"{excerpt(row[field])!r}", expected="true or false")
    return known


def read_kto(row: dict[str, Any], origin: Origin) -> list[Record]:
    is_good = label_of(row)
    field = next((name for name in ("messages", "conversations") if name in row), "")
    if field:
        turns, name = question(row, field), field
        prompt, answer = turns.cut(len(turns.messages) - 1)
    else:
        field = present_name(row, PROMPT_FIELDS, "prompt")
        name = present_name(row, ("completion", "response", "output", "answer"), "completion")
        in_dialogue = bool(open_dialogue(row[field], field))
        prompt, answer = question(row, field), side(row[name], name, in_dialogue=in_dialogue)
    check_order(prompt.messages + answer.messages, field)
    if answer.messages[-1].role != "assistant":
        raise Fault(name, "does not end with an answer", expected="an assistant turn at the end")
    extra = rest(row, field, name, "input", "label", "kto_tag", "system") | (prompt + answer).kept()
    return [Judged(prompt.messages, answer.messages, is_good, origin, extra=extra)]
