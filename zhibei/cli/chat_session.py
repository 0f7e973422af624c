"""A conversation with one model or two: asking, asking again, going back. Knows no command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from zhibei.cli.chat_screen import Reply, Screen
from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.serve.conversation import Conversation

if TYPE_CHECKING:
    from zhibei.serve.chat import Prompt, Speaker


@dataclass
class Side:
    """One model and what was said with it; models beside each other remember their own answers."""

    speaker: Speaker
    conversation: Conversation
    num_dropped: int = 0

    def prompt(self, message: str, options: SamplingOptions) -> Prompt:
        return self.speaker.prompt(self.conversation.messages(message), options)


@dataclass
class Session:
    """`open_other` loads the model to compare with, when it is first needed."""

    side: Side
    options: SamplingOptions
    screen: Screen
    open_other: Callable[[Speaker], Speaker]
    other: Side | None = None
    is_comparing: bool = False
    num_asked: int = 0
    turns: list[tuple[str, list[Reply]]] = field(default_factory=list)
    """All that was asked and answered, for `--json`."""

    @property
    def sides(self) -> list[Side]:
        return [self.side, self.other] if self.is_comparing and self.other else [self.side]

    def compare(self, is_wanted: bool) -> None:
        """Show the other model's answers too, or no more. It joins with the history of the first."""
        if is_wanted and not self.is_comparing:
            speaker = self.other.speaker if self.other else self.open_other(self.side.speaker)
            said = self.side.conversation
            self.other = Side(speaker, Conversation(said.system, list(said.turns)))
        self.is_comparing = is_wanted

    def ask(self, message: str) -> list[Reply]:
        """Answer a message and remember both. Nothing is remembered when it raises UserError."""
        self._check(message)
        # A new seed each time, so that /regenerate says something else, and a fixed one for the whole session.
        options = replace(self.options, seed=(self.options.seed + self.num_asked) % 2**63)
        prompts = [side.prompt(message, options) for side in self.sides]
        for side, prompt in zip(self.sides, prompts, strict=True):
            if prompt.num_dropped > side.num_dropped:
                self.screen.remark(f"{side.speaker.name}: {prompt.notice}; it does not see them any more", "yellow")
            side.num_dropped = prompt.num_dropped
        replies = self.screen.show(
            [
                (side.speaker.name, lambda side=side, prompt=prompt: side.speaker.stream(prompt, options))
                for side, prompt in zip(self.sides, prompts, strict=True)
            ]
        )
        replies = [replace(reply, notice=prompt.notice) for reply, prompt in zip(replies, prompts, strict=False)]
        self.num_asked += 1
        for number, side in enumerate(self.sides):
            # A model that was not reached before Ctrl-C has nothing to remember but the question.
            side.conversation.turns.append((message, replies[number].text if number < len(replies) else ""))
        self.turns.append((message, replies))
        return replies

    def regenerate(self) -> None:
        """Answer the last message again. Raises UserError when there is none."""
        before = [(side, list(side.conversation.turns)) for side in self._all_sides()]
        message, _ = self._take_back("/regenerate")
        try:
            self.ask(message)
        except UserError:
            for side, turns in before:
                side.conversation.turns[:] = turns
            raise

    def undo(self) -> str:
        """Take the last message and its answer back; the message."""
        return self._take_back("/undo")[0]

    def reset(self) -> None:
        for side in self._all_sides():
            side.conversation.turns.clear()
            side.num_dropped = 0

    def set_system(self, text: str) -> None:
        for side in self._all_sides():
            side.conversation.system = text

    def put(self, conversation: Conversation) -> None:
        """Go on from another conversation."""
        for side in self._all_sides():
            side.conversation = Conversation(conversation.system, list(conversation.turns))
            side.num_dropped = 0

    def _all_sides(self) -> list[Side]:
        return [self.side, *([self.other] if self.other else [])]

    def _take_back(self, command: str) -> tuple[str, str]:
        if not self.side.conversation.turns:
            raise UserError("nothing was said yet", expected="an earlier message", fix="write one", where=command)
        turns = [turn for side in self._all_sides() if (turn := side.conversation.undo())]
        return turns[0]

    def _check(self, message: str) -> None:
        try:
            message.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                "the message holds bytes that are not UTF-8",
                expected="UTF-8 text",
                fix="set the terminal and LANG to UTF-8, or convert the input with iconv",
                where="chat",
            ) from None
        spelled = [text for text in self.side.speaker.tokenizer.special_strings if text in message]
        if spelled:
            self.screen.remark(f"the message spells {', '.join(spelled)}: the model reads a control token", "yellow")
