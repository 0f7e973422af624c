"""One message of a conversation, whatever file it came from. Knows no file format and no template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """What one speaker said.

    `context` is Alpaca's `input`: templates with a slot for it use the slot, others append it to `content`
    after a newline. `learn=False` keeps an assistant message out of the loss (OpenAI's `weight: 0`).
    """

    role: Role
    content: str
    context: str = ""
    learn: bool = True
