"""What was said so far, and its file. Knows no model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.text.messages import Message, Role

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


@dataclass
class Conversation:
    """A history of whole turns: a user message and its answer. `system` stands in front, if it is not empty."""

    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, next_message: str | None = None) -> list[Message]:
        """The history in the order it was said, and the message that waits for an answer."""
        said = [Message("system", self.system)] if self.system else []
        for question, answer in self.turns:
            said += [Message("user", question), Message("assistant", answer)]
        return said if next_message is None else [*said, Message("user", next_message)]

    def undo(self) -> tuple[str, str] | None:
        """Take the last turn back; None when there is none."""
        return self.turns.pop() if self.turns else None

    def save(self, path: Path) -> None:
        """Write it as one line of OpenAI messages, which `zhibei data` reads. Raises UserError; overwrites nothing."""
        rows = [{"role": message.role, "content": message.content} for message in self.messages()]
        text = json.dumps({"messages": rows}, ensure_ascii=False) + "\n"
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            raise UserError(
                "the file exists already",
                expected="a new name; nothing that exists is overwritten",
                fix="choose another name, or remove the file first",
                where=str(path),
            ) from None
        except OSError as problem:
            raise UserError(
                f"the conversation cannot be written: {problem.strerror}",
                expected="a folder that can be written",
                fix="choose another place",
                where=str(path),
            ) from None


def load_conversation(path: Path) -> Conversation:
    """Read what `Conversation.save` wrote, or any file whose first document is {"messages": [...]}.

    Raises UserError naming the message that does not fit.
    """
    rows = _read_messages(path)
    conversation = Conversation()
    if rows and rows[0][0] == "system":
        conversation.system = rows.pop(0)[1]
    for number, (role, _) in enumerate(rows):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise _misfit(path, f"message {number} is from {role}, where the turn of {expected} is due")
    if len(rows) % 2:
        raise _misfit(path, "the last message has no answer")
    for (_, question), (_, answer) in zip(rows[::2], rows[1::2], strict=True):
        conversation.turns.append((question, answer))
    return conversation


def _read_messages(path: Path) -> list[tuple[Role, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise UserError(
            f"the conversation cannot be read: {problem.strerror}",
            expected="a file that /save wrote",
            fix="check the path",
            where=str(path),
        ) from None
    except UnicodeDecodeError:
        raise _misfit(path, "the file is not UTF-8 text") from None
    try:
        document, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except ValueError as problem:
        raise _misfit(path, f"the file is not JSON: {problem}") from None
    rows = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise _misfit(path, "there is no list `messages`")
    return [_message(path, number, row) for number, row in enumerate(rows)]


def _message(path: Path, number: int, row: Any) -> tuple[Role, str]:
    role = ROLES.get(str(row.get("role"))) if isinstance(row, dict) else None
    if role is None or not isinstance(row.get("content"), str):
        raise _misfit(path, f"message {number} has no role of {', '.join(ROLES)} with a text as content")
    return role, row["content"]


def _misfit(path: Path, what: str) -> UserError:
    return UserError(
        what,
        expected='{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}',
        fix="mend the file, or save a conversation with /save and load that",
        where=str(path),
    )
