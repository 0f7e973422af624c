"""What was asked, in words, and the known result of it, for rewards that compare. Knows no tokens and no rewards."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from zhibei.config.run import DataSection
from zhibei.data.encode import row_id
from zhibei.data.readers import read_sources
from zhibei.data.records import BrokenRecord, Conversation, Judged, Preference, Prompt, Record
from zhibei.text.messages import Message


@dataclass(frozen=True, slots=True)
class Question:
    """`text`: what the last message says before the answer. `reference`: the record's own answer or checkable result,
    where it has one. `messages`: everything that is said before the answer."""

    text: str
    reference: str | None = None
    messages: tuple[Message, ...] = ()


def read_questions(data: DataSection, row_ids: Collection[str] | None = None) -> dict[str, Question]:
    """The questions of these rows (`source#record`), or of all, from the run's sources and its validation file."""
    wanted = None if row_ids is None else set(row_ids)
    found: dict[str, Question] = {}
    held = [data.model_copy(update={"sources": [data.validation]})] if isinstance(data.validation, str) else []
    for section in (data, *held):
        for _, record in read_sources(section):
            if isinstance(record, BrokenRecord) or (wanted is not None and row_id(record.origin) not in wanted):
                continue
            found[row_id(record.origin)] = question_of(record)
    return found


def question_of(record: Record) -> Question:
    """Question and reference of one record: an answer it brings is the reference."""
    if isinstance(record, Conversation):
        answers = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
        if not answers:
            return _asked(record.messages, None)
        return _asked(record.messages[: answers[-1]], record.messages[answers[-1]].content)
    if isinstance(record, Prompt):
        return _asked(record.messages, record.reference)
    if isinstance(record, Preference):
        return _asked(record.prompt, _last_text(record.chosen))
    if isinstance(record, Judged):
        return _asked(record.prompt, _last_text(record.answer) if record.is_good else None)
    return Question(record.text)


def _asked(messages: tuple[Message, ...], reference: str | None) -> Question:
    return Question(_last_text(messages), reference, messages)


def _last_text(messages: tuple[Message, ...]) -> str:
    if not messages:
        return ""
    message = messages[-1]
    return f"{message.content}\n{message.context}" if message.context else message.content
