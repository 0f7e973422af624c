"""The tokenizer's own chat template, rendered as transformers renders it, with proved spans. Knows no tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from zhibei.config.errors import UserError
from zhibei.text.messages import Message
from zhibei.text.template import Rendered, Span

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
GENERATION_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
# Private-use characters do not occur in ordinary text, and no chat template trims or rewrites them.
SENTINEL = re.compile("\ue000(\\d+)([\ue001\ue002])")
THOUGHT_END = re.compile(r"</think>\s*")


def _open(turn: int) -> str:
    return f"\ue000{turn}\ue001"


def _close(turn: int) -> str:
    return f"\ue000{turn}\ue002"


def require_syntax(source: str, *, where: str) -> None:
    """Refuses a template that does not parse, before a row is blamed for it. Raises UserError with the line."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        # transformers knows one tag more than Jinja.
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_MARKS.sub("", source))
    except TemplateSyntaxError as error:
        raise UserError(
            f"it does not parse: line {error.lineno}: {error.message}",
            expected="a Jinja template",
            fix="repair it (chat_template.jinja, or chat_template in tokenizer_config.json), copy the file again, "
            "or name a template of zhibei with data.template",
            where=where,
        ) from None


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template as it lies in the tokenizer's folder.

    Spans come from `{% generation %}` marks where the template has them. Otherwise each text is rendered once more
    between sentinels; only when taking the sentinels out again gives the very same text are their places believed.
    `marks` are the strings the tokenizer reads as control tokens; the first of them after an answer ends it.
    With `answer_next` only generation marks give spans (a prompt has nothing to learn).
    """

    source: str
    special_tokens: Mapping[str, str]
    marks: tuple[str, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, e.g. `date_string` or `enable_thinking`."""
    name: str = "tokenizer"

    def as_jinja(self) -> str:
        return self.source

    @property
    def terminator(self) -> str:
        """What ends an answer at the end of a conversation."""
        return self._shape.terminator

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.terminator.strip(),)

    @property
    def names_a_date(self) -> bool:
        """Whether the text depends on the day it is rendered."""
        return "strftime_now" in self.source and "date_string" not in self.variables

    def render(self, messages: Sequence[Message], *, answer_next: bool = False, tools: str = "") -> Rendered:
        chat = [_as_dict(message) for message in messages]
        text, blocks = self._run(chat, answer_next=answer_next, tools=tools)
        num_answers = sum(message.role == "assistant" for message in messages)
        if blocks is not None and len(blocks) == num_answers:
            return Rendered(text, self._spans_of_blocks(text, messages, blocks))
        if answer_next:
            return Rendered(text, ())
        return Rendered(text, self._spans_of_sentinels(text, messages, tools=tools))

    def _run(
        self, chat: list[dict[str, Any]], *, answer_next: bool, tools: str = ""
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The rendered text, and the generation blocks where the template marks them."""
        # Imported here: transformers costs half a second that native families do not need.
        from transformers.utils.chat_template_utils import render_jinja_template

        has_marks = bool(GENERATION_MARK.search(self.source))
        if not chat:
            raise self._refusal("the conversation has no messages")
        try:
            found: Any = render_jinja_template(
                conversations=[chat],
                tools=_tool_list(tools),
                chat_template=self.source,
                return_assistant_tokens_mask=has_marks,
                add_generation_prompt=answer_next,
                **{**self.special_tokens, **self.variables},
            )
        except UserError:
            raise
        except Exception as error:  # a template may raise whatever it likes; what it says is for the user
            raise self._refusal(f"{type(error).__name__}: {error}") from error
        texts, blocks = found
        return texts[0], _merged(blocks[0]) if has_marks else None

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"the tokenizer's chat template refuses this conversation: {what}",
            expected="messages in the order and with the roles this template knows",
            fix="change the conversation, or name a template of zhibei with data.template",
            pitfall="roles-must-alternate",
        )

    def _unproved(self, what: str, *, pitfall: str = "turn-boundary-search-failure") -> UserError:
        return UserError(
            f"it cannot be proved which characters of the tokenizer's chat template are the answer: {what}",
            expected="a chat template that writes each answer once, followed by a token that ends it",
            fix="mark the answer with {% generation %} ... {% endgeneration %} in the chat template, "
            "or name a template of zhibei with data.template",
            pitfall=pitfall,
        )

    @cached_property
    def _shape(self) -> _Shape:
        """Found once, on a short conversation: what asks for an answer, and what ends one."""
        ask = {"role": "user", "content": _open(0) + "a" + _close(0)}
        reply = {"role": "assistant", "content": _open(1) + "b" + _close(1)}
        whole, _ = self._run([ask, reply], answer_next=False)
        longer, _ = self._run([ask, reply, {**ask, "content": "c"}], answer_next=False)
        before, _ = self._run([ask], answer_next=False)
        asking, _ = self._run([ask], answer_next=True)
        if whole.count(_open(1)) != 1 or whole.count(_close(1)) != 1:
            raise self._unproved("an answer is not written exactly once")
        tail = whole.split(_close(1))[1]
        header = asking[len(before) :] if asking.startswith(before) else ""
        is_prefix = whole.startswith(asking)
        lead = whole[len(asking) : whole.index(_open(1))] if is_prefix else ""
        return _Shape(header=header, lead=lead, terminator=self._terminator(tail, longer.split(_close(1))[-1]))

    def _terminator(self, tail: str, followed: str) -> str:
        """Up to and including the first control token; without one, what follows every answer."""
        ends = [tail.index(mark) + len(mark) for mark in self._all_marks if mark in tail]
        shared = tail[: min(ends)] if ends else _common_prefix(tail, followed)
        if not shared.strip():
            raise self._unproved(
                "nothing but white space follows an answer, so a model could never learn to stop",
                pitfall="eos-not-appended-in-sft",
            )
        return shared

    @cached_property
    def _all_marks(self) -> tuple[str, ...]:
        eos = self.special_tokens.get("eos_token", "")
        return tuple(mark for mark in (*self.marks, eos) if mark)

    def _spans_of_blocks(
        self, text: str, messages: Sequence[Message], blocks: list[tuple[int, int]]
    ) -> tuple[Span, ...]:
        """The template's own marks; a block without its terminator is extended to it."""
        spans: list[Span] = []
        answers = [(turn, message) for turn, message in enumerate(messages) if message.role == "assistant"]
        for (turn, message), (start, end) in zip(answers, blocks, strict=True):
            core = message.content.strip()
            found = text.rfind(core, start, end) if core else -1
            ends_at = found + len(core) if found >= 0 else self._first_mark(text, start, end)
            stop = end
            if not text[ends_at:end].strip():
                terminator = self._shape.terminator
                if not text.startswith(terminator, ends_at):
                    raise self._unproved(f"message {turn} is not followed by {terminator!r}")
                stop = max(end, ends_at + len(terminator))
            spans.append(Span(start, ends_at, "assistant", turn, "content", message.learn))
            spans.append(Span(ends_at, stop, "assistant", turn, "terminator", message.learn))
        return tuple(spans)

    def _first_mark(self, text: str, start: int, end: int) -> int:
        places = [text.find(mark, start, end) for mark in self._all_marks]
        return min((place for place in places if place >= 0), default=end)

    def _spans_of_sentinels(self, text: str, messages: Sequence[Message], *, tools: str) -> tuple[Span, ...]:
        if SENTINEL.search(text):
            raise self._unproved("the text itself contains private-use characters (U+E000 to U+E002)")
        wrapped = [_as_dict(message) | {"content": _wrap(message, turn)} for turn, message in enumerate(messages)]
        marked, _ = self._run(wrapped, answer_next=False, tools=tools)
        if SENTINEL.sub("", marked) != text:
            raise self._unproved("the template changes the text of a message")
        places = _places(marked)
        spans: list[Span] = []
        reached = 0
        for turn, message in enumerate(messages):
            opened, closed = places.get((turn, "\ue001"), []), places.get((turn, "\ue002"), [])
            if len(opened) != 1 or len(closed) != 1:
                if message.role == "assistant":
                    raise self._unproved(f"message {turn} is written {len(opened)} times")
                continue
            start, end = opened[0], closed[0]
            if message.role == "assistant":
                turn_spans = self._answer_spans(text, message, turn=turn, place=(reached, start, end))
                reached = turn_spans[-1].end
                spans.extend(turn_spans)
            else:
                spans.append(Span(start, end, message.role, turn, "content"))
                reached = max(reached, end)
        return tuple(spans)

    def _answer_spans(
        self, text: str, message: Message, *, turn: int, place: tuple[int, int, int]
    ) -> tuple[Span, Span]:
        """From where the prompt ends (what the model itself must write) to the end of the terminator."""
        reached, start, end = place
        shape = self._shape
        header_at = text.rfind(shape.header, reached, start) if shape.header else -1
        if header_at >= 0:
            start = header_at + len(shape.header)
        elif text.endswith(shape.lead, reached, start):
            start -= len(shape.lead)
        trailing = message.content[len(message.content.rstrip()) :]
        if trailing and text.startswith(trailing + shape.terminator, end):
            end += len(trailing)
        if not text.startswith(shape.terminator, end):
            raise self._unproved(f"message {turn} is not followed by {shape.terminator!r}")
        stop = end + len(shape.terminator)
        return (
            Span(start, end, "assistant", turn, "content", message.learn),
            Span(end, stop, "assistant", turn, "terminator", message.learn),
        )


@dataclass(frozen=True)
class _Shape:
    """`header` asks for an answer; `lead` stands between the end of a prompt and the answer's first word."""

    header: str
    lead: str
    terminator: str


def _as_dict(message: Message) -> dict[str, str]:
    content = f"{message.content}\n{message.context}" if message.context else message.content
    return {"role": message.role, "content": content}


def _wrap(message: Message, turn: int) -> str:
    """Sentinels around the text, inside of white space at its edges: trimming templates then trim as they would.

    After a thought (`</think>`) the sentinel stands before the answer proper, because templates cut thoughts off.
    """
    content = _as_dict(message)["content"]
    core = content.strip()
    left = len(content) - len(content.lstrip()) if core else 0
    thought = THOUGHT_END.search(core) if message.role == "assistant" else None
    head = core[: thought.end()] if thought else ""
    return content[:left] + head + _open(turn) + core[len(head) :] + _close(turn) + content[left + len(core) :]


def _places(marked: str) -> dict[tuple[int, str], list[int]]:
    """Where each sentinel stands, in characters of the text without sentinels."""
    places: dict[tuple[int, str], list[int]] = {}
    removed = 0
    for found in SENTINEL.finditer(marked):
        places.setdefault((int(found[1]), found[2]), []).append(found.start() - removed)
        removed += len(found[0])
    return places


def _tool_list(tools: str) -> list[Any] | None:
    if not tools:
        return None
    try:
        loaded = json.loads(tools)
    except ValueError as error:
        raise UserError(
            f"the list of tools is not JSON: {error}",
            expected="a JSON list of tool descriptions",
            fix="correct the field `tools`",
        ) from error
    return loaded if isinstance(loaded, list) else [loaded]


def _merged(blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Some templates mark an answer and its terminator separately; blocks that touch are one."""
    merged: list[tuple[int, int]] = []
    for start, end in blocks:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _common_prefix(left: str, right: str) -> str:
    length = next(
        (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    return left[:length]
