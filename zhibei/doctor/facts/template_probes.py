"""Small conversations through a template and a tokenizer: what comes out, in ids. Knows no rows and no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from zhibei.config.errors import UserError
from zhibei.text.jinja import JinjaTemplate
from zhibei.text.messages import Message, Role
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

SYSTEM, ASK, REPLY = Message("system", "Be kind."), Message("user", "Say hello."), Message("assistant", "Hello there.")
AGAIN, LAST = Message("user", "Once more."), Message("assistant", "Hello again.")
SEQUENCES: tuple[tuple[Role, ...], ...] = (
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "user", "assistant"),
    ("assistant", "user", "assistant"),
    ("user", "assistant", "assistant"),
    ("user", "tool", "assistant"),
)
# <|im_end|>, <start_of_turn>, </s>, <bos>, [INST], <<SYS>>, <｜User｜>; plain words in angle brackets are no marks.
MARK = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<<?/?SYS>>?|\[/?[A-Z_]{3,30}\]|</?s>"
    r"|<(?:bos|eos|pad|unk)>|</?[a-z]+(?:_[a-z]+)+>"
)
SPLIT_BY_DESIGN = re.compile(r"<<?/?SYS>>?|\[/?[A-Z_]+\]")
"""LLaMA-2 and early Mistral spell these in several pieces, and were trained so."""
THINKING = re.compile(r"\benable_thinking\b|<think>")
MODES: dict[str, Mapping[str, bool]] = {
    "default": {},
    "enable_thinking=true": {"enable_thinking": True},
    "enable_thinking=false": {"enable_thinking": False},
}


@dataclass(frozen=True, slots=True)
class Probe:
    """One text of a conversation and its ids, as training and chatting make them."""

    text: str
    ids: tuple[int, ...]


def text_of(template: Template, messages: Sequence[Message], *, answer_next: bool = False) -> str | None:
    """The rendered conversation; None where the template refuses it."""
    try:
        return template.render(messages, answer_next=answer_next).text
    except UserError:
        return None


def probe(template: Template, tokenizer: Tokenizer, messages: Sequence[Message], *, asks: bool = False) -> Probe | None:
    """A conversation as the run encodes it; None where the template refuses it."""
    text = text_of(template, messages, answer_next=asks)
    return None if text is None else Probe(text, tuple(tokenizer.encode(text)))


def refusals(template: Template) -> dict[str, str]:
    """Role sequences that the template refuses, with its words."""
    found: dict[str, str] = {}
    for roles in SEQUENCES:
        messages = [Message(role, f"{role} says {number}") for number, role in enumerate(roles)]
        try:
            template.render(messages)
        except UserError as error:
            found["/".join(roles)] = error.what
    return found


def widest(template: Template, tokenizer: Tokenizer) -> Probe | None:
    """The longest probe conversation that the template takes: all marks it writes around texts are in it."""
    for messages in ([SYSTEM, ASK, REPLY, AGAIN, LAST], [ASK, REPLY, AGAIN, LAST], [ASK, REPLY]):
        found = probe(template, tokenizer, messages)
        if found is not None:
            return found
    return None


def marks_in(text: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The control strings of a rendered text in their order: by their look, or because the tokenizer has them."""
    known = [token for token in tokenizer.special_strings if token in text]
    found = {mark: None for mark in MARK.findall(text)}
    found.update(dict.fromkeys(known))
    return tuple(sorted(found, key=text.find))


def leading(ids: Sequence[int], wanted: int | None) -> int:
    """How many times in a row `wanted` stands at the beginning."""
    count = 0
    while wanted is not None and count < len(ids) and ids[count] == wanted:
        count += 1
    return count


def prompt_difference(template: Template, tokenizer: Tokenizer) -> str:
    """Where the ids before an answer are others in training than in chatting; "" when they are the same.

    A token that holds the end of the prompt and the beginning of the answer is no difference here: the audit counts
    those over the real rows.
    """
    for before, answer in (([ASK], REPLY), ([ASK, REPLY, AGAIN], LAST)):
        prompt = probe(template, tokenizer, before, asks=True)
        whole = probe(template, tokenizer, [*before, answer])
        if prompt is None or whole is None:
            continue
        if not whole.text.startswith(prompt.text):
            return (
                f"before {'/'.join(m.role for m in [*before, answer])} the text differs: training has "
                f"{_at_difference(whole.text, prompt.text)!r}, chatting {_at_difference(prompt.text, whole.text)!r}"
            )
    return ""


def _at_difference(mine: str, other: str, *, around: int = 24) -> str:
    place = next((at for at, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    return mine[max(0, place - around) : place + around]


def rewrites_earlier_turns(template: Template) -> bool:
    """Whether an answer and its end are written differently once later turns follow (an opened thought, another end).

    Thoughts that are cut off earlier answers do not count: rows without thoughts are not changed by that.
    """
    short, long = text_of(template, [ASK, REPLY]), text_of(template, [ASK, REPLY, AGAIN, LAST])
    if short is None or long is None or REPLY.content not in short:
        return False
    end = short.rindex(REPLY.content) + len(REPLY.content) + len(template.terminator.rstrip())
    return not long.startswith(short[:end])


def knows_thinking(template: Template) -> bool:
    """Whether the template opens or closes thoughts."""
    return isinstance(template, JinjaTemplate) and bool(THINKING.search(template.source))


def thinking_modes(template: Template) -> tuple[str, ...]:
    """Modes of a template with thoughts whose prompt is how training rows begin; () for other templates."""
    if not isinstance(template, JinjaTemplate) or not knows_thinking(template):
        return ()
    whole = text_of(template, [ASK, REPLY])
    found = []
    for mode, variables in MODES.items():
        if variables and "enable_thinking" not in template.source:
            continue
        # The mode is the server's choice; training rows are always rendered with the run's own template.
        prompt = text_of(replace(template, variables={**template.variables, **variables}), [ASK], answer_next=True)
        if whole is not None and prompt is not None and whole.startswith(prompt):
            found.append(mode)
    return tuple(found)


def doubled_end(whole: Probe, *, terminator: str, eos: str) -> str:
    """An EOS between a turn's terminator and the next turn, where the terminator is another token; else ""."""
    if not terminator.strip() or terminator.strip().endswith(eos):
        return ""
    # At the very end some families close the whole conversation with EOS (Phi-3).
    found = re.search(re.escape(terminator.strip()) + r"\s*" + re.escape(eos) + r"(?=\s*\S)", whole.text)
    return found[0] if found else ""
