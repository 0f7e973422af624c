"""Renders a native family: messages to text with exact spans, and the same as jinja. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from zhibei.config.errors import UserError
from zhibei.text.messages import Message, Role
from zhibei.text.template import Part, Rendered, Span

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """How a family spells a conversation; a pair is what stands before and after a text.

    `lead` is white space the model itself must emit before its words (the prompt ends without it), so it belongs to
    the answer's span. `terminator` ends an answer; `{eos}` stands for the tokenizer's end-of-sequence token.
    A family without `system` folds the system prompt into the first user turn (`fold`).
    """

    name: str
    about: str
    user: Pair
    header: str = ""
    """What is written before an answer, and what asks for one."""
    lead: str = ""
    terminator: str = "{eos}"
    after: str = ""
    """Scaffold that follows the terminator and that nobody has to learn."""
    user_again: str | None = None
    """What stands before a later user turn, where it differs from the first."""
    system: Pair | None = None
    fold: Pair = ("", "")
    default_system: str = ""
    default_system_with_context: str = ""
    context: Pair | None = None
    """A slot for Message.context; without one it is appended to the content after a newline."""
    tool: Pair | None = None
    bos: Literal["start", "each_user_turn"] = "start"
    is_any_order: bool = False
    """Roles in any order, system messages anywhere; otherwise user and assistant take turns after the system prompt."""
    is_trimmed: bool = False
    """White space around every text is removed, as the family's published template does."""
    needs_bos: bool = False
    """The published template spells the BOS token even where the tokenizer does not add one."""
    needed_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()


class _Writer:
    """Text that grows, and the spans in it."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.spans: list[Span] = []

    def add(self, text: str) -> None:
        self.pieces.append(text)
        self.length += len(text)

    def mark(self, text: str, message: Message, *, turn: int, part: Part = "content") -> None:
        """An empty text gets a span too, so that every turn can be found."""
        start = self.length
        self.add(text)
        learn = message.learn if message.role == "assistant" else True
        self.spans.append(Span(start, self.length, message.role, turn, part, learn))


@dataclass(frozen=True, slots=True)
class NativeTemplate:
    """A family bound to the BOS and EOS spelling of one tokenizer (BOS "" where the text must not carry one)."""

    family: Family
    bos: str
    eos: str

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.family.stop_strings

    @property
    def terminator(self) -> str:
        return self.family.terminator.replace("{eos}", self.eos)

    def render(self, messages: Sequence[Message], *, answer_next: bool = False, tools: str = "") -> Rendered:
        if tools:
            raise UserError(
                f"template {self.name} has no place for a list of tools",
                expected="a template that renders tools",
                fix="use data.template: tokenizer with a model whose chat template knows tools, or remove `tools`",
                where="data.template",
            )
        writer = _Writer()
        if self.family.bos == "start":
            writer.add(self.bos)
        write = self._write_any_order if self.family.is_any_order else self._write_pairs
        write(writer, list(enumerate(messages)))
        if answer_next:
            self._check_answer_can_follow(messages)
            writer.add(self.family.header)
        return Rendered("".join(writer.pieces), tuple(writer.spans))

    def as_jinja(self) -> str:
        return family_as_jinja(self.family, has_bos=bool(self.bos))

    def _clean(self, text: str) -> str:
        return text.strip() if self.family.is_trimmed else text

    def _write_any_order(self, writer: _Writer, turns: list[tuple[int, Message]]) -> None:
        if not turns:
            raise self._misfit("the conversation has no messages", "at least one message")
        for turn, message in turns:
            if message.role == "assistant":
                self._write_answer(writer, turn, message)
            elif message.role == "system" and not self._clean(message.content):
                continue
            else:
                around = {"system": self.family.system, "user": self.family.user, "tool": self.family.tool}
                pair = around.get(message.role)
                if pair is None:
                    raise self._misfit(f"message {turn} has the role {message.role}", "system, user, assistant")
                self._write_turn(writer, (turn, message), before=pair[0], after=pair[1])

    def _write_pairs(self, writer: _Writer, turns: list[tuple[int, Message]]) -> None:
        family = self.family
        system = turns[0] if turns and turns[0][1].role == "system" else None
        turns = turns[1:] if system else turns
        if not turns:
            raise self._misfit("the conversation has no user message", "a user message")
        folded = self._write_system(writer, system, first=turns[0][1])
        for place, (turn, message) in enumerate(turns):
            expected: Role = "assistant" if place % 2 else "user"
            if message.role != expected:
                raise self._misfit(
                    f"message {turn} is from {message.role}, where the turn of {expected} is due",
                    "user and assistant in turn, after at most one system message",
                )
            if expected == "assistant":
                self._write_answer(writer, turn, message)
                continue
            if family.bos == "each_user_turn":
                writer.add(self.bos)
            before = family.user[0] if place == 0 or family.user_again is None else family.user_again
            self._write_turn(writer, (turn, message), before=before, after=family.user[1], folded=folded)
            folded = None

    def _write_system(
        self, writer: _Writer, system: tuple[int, Message] | None, *, first: Message
    ) -> tuple[int, Message] | None:
        """Writes the system prompt; returns it instead where the family folds it into the first user turn."""
        family = self.family
        if system is None:
            default = family.default_system_with_context if self._clean(first.context) else family.default_system
            if default and family.system:
                writer.add(family.system[0] + default + family.system[1])
            return None
        text = self._clean(system[1].content)
        if not text or family.system is None:
            return system if text else None
        writer.add(family.system[0])
        writer.mark(text, system[1], turn=system[0])
        writer.add(family.system[1])
        return None

    def _write_turn(
        self,
        writer: _Writer,
        numbered: tuple[int, Message],
        *,
        before: str,
        after: str,
        folded: tuple[int, Message] | None = None,
    ) -> None:
        turn, message = numbered
        content, context = self._clean(message.content), self._clean(message.context)
        writer.add(before)
        if folded:
            writer.add(self.family.fold[0])
            writer.mark(self._clean(folded[1].content), folded[1], turn=folded[0])
            writer.add(self.family.fold[1])
        if context and not self.family.context:
            content, context = f"{content}\n{context}", ""
        writer.mark(content, message, turn=turn)
        if context and self.family.context:
            writer.add(self.family.context[0])
            writer.mark(context, message, turn=turn)
            writer.add(self.family.context[1])
        terminator = self.terminator if after.startswith(self.terminator) else ""
        if terminator:
            writer.mark(terminator, message, turn=turn, part="terminator")
        writer.add(after[len(terminator) :])

    def _write_answer(self, writer: _Writer, turn: int, message: Message) -> None:
        writer.add(self.family.header)
        content = self._clean(message.content)
        if context := self._clean(message.context):
            content = f"{content}\n{context}"
        writer.mark(self.family.lead + content, message, turn=turn)
        writer.mark(self.terminator, message, turn=turn, part="terminator")
        writer.add(self.family.after)

    def _check_answer_can_follow(self, messages: Sequence[Message]) -> None:
        if not self.family.is_any_order and messages[-1].role == "assistant":
            raise self._misfit("an answer is asked for right after an answer", "a user message last")

    def _misfit(self, what: str, expected: str) -> UserError:
        return UserError(
            f"template {self.name} cannot express this conversation: {what}",
            expected=expected,
            fix="merge neighbouring messages of one role, start with the user, or use a template without an order "
            "of roles (chatml, llama3)",
            pitfall="roles-must-alternate",
        )


def bind(family: Family, *, bos: str, eos: str) -> NativeTemplate:
    """A family with the spelling of one tokenizer's special tokens."""
    return NativeTemplate(family, bos=bos, eos=eos)


def _quote(text: str) -> str:
    """A jinja string; `{eos}` inside becomes the variable `eos_token`."""
    plain = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    pieces = [f"'{piece}'" for piece in plain.split("{eos}")]
    return " + eos_token + ".join(pieces).replace("'' + ", "").replace(" + ''", "")


def family_as_jinja(family: Family, *, has_bos: bool) -> str:
    """The family as a chat template; Alpaca's input may come along as `message['context']`."""
    make = _any_order_as_jinja if family.is_any_order else _pairs_as_jinja
    return make(family, "{{- bos_token -}}" if has_bos else "")


def _text(name: str, family: Family) -> str:
    return f"({name} | trim)" if family.is_trimmed else name


def _turn_as_jinja(family: Family, *, before: str, after: str) -> str:
    content, context = _text("message['content']", family), _text("message['context']", family)
    around = family.context or ("\n", "")
    slot = f"{_quote(around[0])} + {context}" + (f" + {_quote(around[1])}" if around[1] else "")
    return (
        f"{{{{- {before} + {content} -}}}}{{%- if message['context'] and {context} -%}}"
        + f"{{{{- {slot} -}}}}{{%- endif -%}}"
        + (f"{{{{- {_quote(after)} -}}}}" if after else "")
    )


def _answer_as_jinja(family: Family) -> str:
    start = _quote(family.header + family.lead)
    return _turn_as_jinja(replace(family, context=None), before=start, after=family.terminator + family.after)


def _any_order_as_jinja(family: Family, bos: str) -> str:
    assert family.system
    system = _text("message['content']", family)
    branches = [
        f"{{%- if message['role'] == 'system' -%}}{{%- if {system} -%}}"
        + _turn_as_jinja(family, before=_quote(family.system[0]), after=family.system[1])
        + "{%- endif -%}",
        "{%- elif message['role'] == 'user' -%}"
        + _turn_as_jinja(family, before=_quote(family.user[0]), after=family.user[1]),
        "{%- elif message['role'] == 'assistant' -%}" + _answer_as_jinja(family),
    ]
    if family.tool:
        tool = _turn_as_jinja(family, before=_quote(family.tool[0]), after=family.tool[1])
        branches.append("{%- elif message['role'] == 'tool' -%}" + tool)
    return (
        f"{bos}{{%- for message in messages -%}}{''.join(branches)}{{%- else -%}}"
        "{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {_quote(family.header)} -}}}}{{%- endif -%}}"
    )


def _pairs_as_jinja(family: Family, bos: str) -> str:
    default = _quote(family.default_system if family.system else "")
    with_context = _quote(family.default_system_with_context if family.system else "")
    first = _text("messages[0]['content']", family)
    head = (
        "{%- if messages[0]['role'] == 'system' -%}"
        f"{{%- set system = {first} -%}}{{%- set turns = messages[1:] -%}}"
        f"{{%- else -%}}{{%- set turns = messages -%}}{{%- set system = {with_context} "
        f"if turns[0]['context'] else {default} -%}}{{%- endif -%}}"
        "{%- if not turns -%}{{- raise_exception('the conversation has no user message') -}}{%- endif -%}"
    )
    around = family.system or family.fold
    system = (f"{_quote(around[0])} + " if around[0] else "") + "system" + f" + {_quote(around[1])}"
    if family.system:
        head += (bos if family.bos == "start" else "") + f"{{%- if system -%}}{{{{- {system} -}}}}{{%- endif -%}}"
        before = _quote(family.user[0])
    else:
        head += bos if family.bos == "start" else ""
        before = f"{_quote(family.user[0])} + (({system}) if system and loop.first else '')"
    if family.user_again is not None:
        before = f"({before} if loop.first else {_quote(family.user_again)})"
    each = bos if family.bos == "each_user_turn" else ""
    answer_asked = (
        "{%- if turns[-1]['role'] == 'assistant' -%}"
        "{{- raise_exception('an answer is asked for right after an answer') -}}{%- endif -%}"
    )
    header = f"{{{{- {_quote(family.header)} -}}}}" if family.header else ""
    return (
        f"{head}{{%- for message in turns -%}}"
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
        "{{- raise_exception('user and assistant must take turns') -}}{%- endif -%}"
        f"{{%- if message['role'] == 'user' -%}}{each}{_turn_as_jinja(family, before=before, after=family.user[1])}"
        f"{{%- else -%}}{_answer_as_jinja(family)}{{%- endif -%}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{answer_asked}{header}{{%- endif -%}}"
    )
