"""How to speak to a GGUF file: its tokenizer as llama.cpp applies it, and its template. Loads no weights.

A file of ours carries our template as Jinja; where its text is that of a named family, the family itself is taken,
which also knows the strings at which an answer ends. Files of other people speak through the Jinja text they carry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from zhibei.config.errors import UserError
from zhibei.data.encode import with_system
from zhibei.generate.llama_cpp import GgufModel
from zhibei.text.families import ALIASES, TEMPLATES
from zhibei.text.jinja import JinjaTemplate, require_syntax
from zhibei.text.messages import Message
from zhibei.text.native import bind
from zhibei.text.template import Template


@dataclass(frozen=True)
class GgufTokenizer:
    """What chat and server ask of a tokenizer, answered by llama.cpp."""

    model: GgufModel

    @property
    def bos_id(self) -> int | None:
        return self.model.special("bos")

    @property
    def eos_id(self) -> int | None:
        return self.model.special("eos")

    @property
    def adds_bos(self) -> bool:
        return self.model.adds_bos

    @cached_property
    def bos(self) -> str:
        return "" if self.bos_id is None else self.model.text_of(self.bos_id)

    @cached_property
    def eos(self) -> str:
        return "" if self.eos_id is None else self.model.text_of(self.eos_id)

    @cached_property
    def special_strings(self) -> tuple[str, ...]:
        """Texts that are read as one control token, longest first."""
        model = self.model
        found = (model.text_of(token) for token in range(model.num_tokens) if model.is_control(token))
        return tuple(sorted(found, key=len, reverse=True))

    def __len__(self) -> int:
        return self.model.num_tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are spelled out; nothing is added."""
        return self.model.encode(text)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.model.decode(tokens, keep_control=not skip_special_tokens)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        return [self.model.text_of(token) for token in tokens]


SYSTEM_HEAD = re.compile(
    r"\A\{%- if messages\[0\]\['role'\] != 'system' -%\}\{%- set messages = \[\{'role': 'system', 'content': "
    r"(\".*?\")\}\] \+ messages -%\}\{%- endif -%\}",
    re.DOTALL,
)


def with_default_system(jinja: str, system: str | None) -> str:
    """A chat template that begins conversations without a system prompt with this one, as the training rows did."""
    if system is None:
        return jinja
    return (
        "{%- if messages[0]['role'] != 'system' -%}{%- set messages = [{'role': 'system', 'content': "
        f"{json.dumps(system, ensure_ascii=False)}}}] + messages -%}}{{%- endif -%}}{jinja}"
    )


def default_system(jinja: str) -> tuple[str | None, str]:
    """The default system prompt of a template that `with_default_system` wrote, and the template without it."""
    found = SYSTEM_HEAD.match(jinja)
    return (json.loads(found.group(1)), jinja[found.end() :]) if found else (None, jinja)


@dataclass(frozen=True)
class Wording:
    """The template of a file, and the system prompt that begins conversations which bring none."""

    template: Template
    system: str | None = None


def wording_of(model: GgufModel, *, asked: str | None = None) -> Wording:
    """The template to prompt with: the one asked for by name, else the file's own.

    Raises UserError for an unknown name, for markers that are no tokens of this file, and when there is none.
    """
    tokenizer = GgufTokenizer(model)
    if asked is not None and asked not in ("tokenizer", "auto"):
        return Wording(_named(asked, tokenizer, where=str(model.path)))
    system, source = default_system(model.chat_template)
    if not source:
        raise UserError(
            "this file has no chat template in its metadata (tokenizer.chat_template)",
            expected=f"a template, or one of {', '.join(TEMPLATES)}",
            fix="choose the one the model was trained with: --template NAME (for a base model, alpaca is a fair try)",
            where=str(model.path),
            pitfall="gguf-runtime-template-missing",
        )
    for family in TEMPLATES.values():
        for bos in dict.fromkeys((tokenizer.bos, "")):
            native = bind(family, bos=bos, eos=tokenizer.eos)
            if native.as_jinja() == source:
                return Wording(native, system)
    require_syntax(source, where=f"{model.path}, tokenizer.chat_template")
    specials = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    own = JinjaTemplate(source=source, special_tokens=specials, marks=tokenizer.special_strings)
    return Wording(own, system)


def _named(asked: str, tokenizer: GgufTokenizer, *, where: str) -> Template:
    family = TEMPLATES.get(ALIASES.get(asked.lower(), asked.lower()))
    if family is None:
        raise UserError(
            f"no template is called {asked!r}",
            expected=f"one of {', '.join(TEMPLATES)}",
            fix="leave --template out to take the one in the file",
            where="--template",
        )
    missing = [token for token in family.needed_tokens if token not in tokenizer.special_strings]
    if missing:
        raise UserError(
            f"template {family.name} is made of {', '.join(missing)}, which are not tokens of this file",
            expected="a file that reads each of these markers as one token",
            fix="leave --template out to take the one in the file",
            where=where,
            pitfall="wrong-family-template",
        )
    has_bos = tokenizer.adds_bos or family.needs_bos
    return bind(family, bos=tokenizer.bos if has_bos else "", eos=tokenizer.eos)


def terminator_of(template: Template) -> str:
    """What ends an answer, or "" where a template of other people does not show it: the file's own ends remain."""
    try:
        return template.terminator.strip()
    except UserError:
        return ""


def stop_strings_of(template: Template) -> tuple[str, ...]:
    """The texts at which an answer ends, as far as the template shows them."""
    try:
        return tuple(text for text in template.stop_strings if text)
    except UserError:
        return ()


def prompt_tokens(model: GgufModel, wording: Wording, messages: Sequence[Message]) -> list[int]:
    """The tokens after which the assistant speaks. BOS stands in front once where the file adds one, whether or not
    the template writes it: never twice."""
    said = with_system(messages, wording.system)
    tokens = model.encode(wording.template.render(said, answer_next=True).text)
    bos = model.special("bos")
    if bos is None or not model.adds_bos:
        return tokens
    while tokens[:2] == [bos, bos]:
        tokens = tokens[1:]
    return tokens if tokens[:1] == [bos] else [bos, *tokens]
