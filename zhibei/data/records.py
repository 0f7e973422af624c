"""The kinds of row every reader returns. Knows no file format, no template and no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zhibei.config.errors import UserError
from zhibei.text.messages import Message

REPAIR = "repair the record, or leave it out with on_error: drop"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from: `index` counts records of the file from 0, `line` counts its lines from 1."""

    source: str
    index: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.source}, record {self.index}" + (f" (line {self.line})" if self.line else "")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns to learn from (supervised fine-tuning). `extra` keeps the fields only a lossless conversion needs."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text to continue pre-training on; long rows are cut into chunks, never dropped."""

    text: str
    origin: Origin
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two continuations of one prompt, the first preferred (reward model, DPO and kin)."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin
    margin: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer with a thumb up or down (KTO)."""

    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    is_good: bool
    origin: Origin
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer, without an answer (PPO, GRPO). `reference` is a checkable result where there is one."""

    messages: tuple[Message, ...]
    origin: Origin
    reference: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """A record that cannot be learned from: which field is wrong, what came, what was expected, what to do.

    It is one entry of the ledger when the user chose `on_error: drop`, and a UserError otherwise.
    """

    origin: Origin
    field: str
    what: str
    expected: str
    fix: str
    pitfall: str = ""
    """The known pitfall that this is, where it is one (`zhibei pitfalls NAME`)."""

    @property
    def where(self) -> str:
        return f"{self.origin}, field '{self.field}'" if self.field else str(self.origin)

    def as_error(self, more: str = "") -> UserError:
        """The same facts as an error; `more` is said after what came (how many others there are)."""
        return UserError(self.what + more, expected=self.expected, fix=self.fix, where=self.where, pitfall=self.pitfall)


class Fault(Exception):
    """Raised inside the readers when a record is broken; becomes a BrokenRecord once its place is known."""

    def __init__(self, field: str, what: str, *, expected: str, fix: str = REPAIR, pitfall: str = "") -> None:
        super().__init__(what)
        self.field, self.what, self.expected, self.fix, self.pitfall = field, what, expected, fix, pitfall

    def at(self, origin: Origin) -> BrokenRecord:
        return BrokenRecord(origin, self.field, self.what, self.expected, self.fix, self.pitfall)


Record = Conversation | PlainText | Preference | Judged | Prompt

STAGE_OF_KIND = {
    "Conversation": ("conversations with answers", "sft"),
    "PlainText": ("plain text", "sft"),
    "Preference": ("pairs of a preferred and a rejected answer", "reward or stage: dpo"),
    "Judged": ("single answers with a thumb up or down", "dpo"),
    "Prompt": ("prompts without answers", "ppo"),
}
"""What each kind of record is, in words, and the stages that learn from it."""
