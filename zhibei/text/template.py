"""What a template promises: messages to text with marked spans. Knows no tokenizer and no row files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from zhibei.text.messages import Message, Role

Part = Literal["content", "terminator"]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start:end` of the rendered text that belong to one message.

    `content` is what the speaker said, `terminator` what ends the turn (for an assistant: what the model must
    learn to emit in order to stop). Everything outside of spans is scaffold. `turn` counts messages from 0.
    """

    start: int
    end: int
    role: Role
    turn: int
    part: Part
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text exactly as the tokenizer gets it (special tokens spelled out, BOS too if the template has one)."""

    text: str
    spans: tuple[Span, ...]


class Template(Protocol):
    """One object for training, prompting, the server and GGUF metadata."""

    @property
    def name(self) -> str: ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings at which generation ends, besides the terminator's own token."""
        ...

    @property
    def terminator(self) -> str:
        """What ends an answer, as text; `Tokenizer.stop_ids` gives its ids."""
        ...

    def render(self, messages: Sequence[Message], *, answer_next: bool = False, tools: str = "") -> Rendered:
        """Messages to text; `answer_next` adds the scaffold after which the assistant speaks. `tools` is a JSON list.

        Raises UserError when the template cannot express the messages (no system slot, wrong role order).
        """
        ...

    def as_jinja(self) -> str:
        """The same template in the form Hugging Face folders, servers and GGUF files carry."""
        ...
