"""Dialogues written as one text (`\\n\\nHuman: …\\n\\nAssistant: …`, as in hh-rlhf and rm-static). Knows no rows."""

from __future__ import annotations

import re
from typing import Any

from zhibei.data.fields import checked_text
from zhibei.data.jsonlines import excerpt
from zhibei.data.records import Fault
from zhibei.text.messages import Message, Role

SPEECH = re.compile(r"(?:^|\n\n)(Human|Assistant):")
OPEN_DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
"""A dialogue that waits for an answer, as the prompts of rm-static are written."""


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


def open_dialogue(text: Any, field: str) -> tuple[Message, ...]:
    """The turns of a prompt that is a whole dialogue up to `Assistant:`; nothing where it is another text."""
    if not isinstance(text, str) or not OPEN_DIALOGUE.fullmatch(text):
        return ()
    return split_dialogue(text.strip(), field)[:-1]
