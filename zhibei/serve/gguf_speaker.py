"""A GGUF file that speaks, through llama.cpp in this process. Knows no terminal and opens no port.

From llama.cpp's logits tokens are drawn as everywhere in zhibei: the same filters, seeds and stop strings. Keys and
values of the conversation stay, so that a further turn reads only what is new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from zhibei.config.errors import UserError
from zhibei.generate.answers import Answer, Growing, Piece, Token
from zhibei.generate.choosing import Chooser
from zhibei.generate.gguf_words import (
    GgufTokenizer,
    Wording,
    default_system,
    prompt_tokens,
    stop_strings_of,
    terminator_of,
    wording_of,
)
from zhibei.generate.llama_cpp import GgufContext, GgufModel
from zhibei.generate.llama_library import library
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import Prompt, fitting_prompt, with_stops
from zhibei.text.messages import Message
from zhibei.text.template import Template

FIRST_ROOM = 2048
"""Tokens of the first context; a longer conversation opens a larger one, up to the model's own length."""


@dataclass
class GgufSpeaker:
    """A loaded GGUF file with its template. One answer at a time; `notes` are for a person to read before."""

    name: str
    model: GgufModel
    wording: Wording
    notes: tuple[str, ...] = ()
    has_adapters: bool = False
    _context: GgufContext | None = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> GgufTokenizer:
        return GgufTokenizer(self.model)

    @property
    def template(self) -> Template:
        return self.wording.template

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.model.context_tokens

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """EOS and every other token that ends an answer, as llama.cpp knows them, and the template's terminator."""
        ends = self.model.encode(terminator_of(self.template))
        own = ends if len(ends) == 1 and self.model.is_control(ends[0]) else []
        return tuple(dict.fromkeys((*self.model.stop_ids, *own)))

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt these messages give."""
        return len(self._encode(messages))

    def prompt(self, messages: Sequence[Message], options: SamplingOptions) -> Prompt:
        """The prompt after which the assistant speaks; as `Speaker.prompt`."""
        return fitting_prompt(messages, self._encode, context=self.context_tokens, most_new=options.max_new_tokens)

    def stream(self, prompt: Prompt, options: SamplingOptions) -> Iterator[Piece]:
        """The answer to a prompt, piece by piece; the last piece carries the whole Answer."""
        yield from self._answer(prompt, with_stops(options, stop_strings_of(self.template)), number=0, shows_text=True)

    def answer(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[Answer]:
        """The answers to several prompts, one after the other; draws differ by a prompt's number."""
        fitted = with_stops(options, stop_strings_of(self.template))
        found = []
        for number, prompt in enumerate(prompts):
            *_, last = self._answer(prompt, fitted, number=number, shows_text=False)
            assert last.answer is not None, "the last piece carries the answer"
            found.append(last.answer)
        return found

    def decode(self, tokens: list[int]) -> str:
        """The words, without control tokens."""
        return self.model.decode(tokens)

    def close(self) -> None:
        """Give the memory back."""
        self._context = None
        self.model.close()

    def _answer(self, prompt: Prompt, options: SamplingOptions, *, number: int, shows_text: bool) -> Iterator[Piece]:
        growing = Growing(
            prompt.tokens,
            number=number,
            context=self.context_tokens,
            options=options,
            decode=self.decode,
            shows_text=shows_text,
        )
        stops = frozenset(self.stop_ids)
        chooser = Chooser(1, torch.device("cpu"))
        chooser.admit(0, options, number=number, budget=growing.budget)
        context = self._room(len(growing.prompt) + growing.budget)
        known = _common(context.tokens, growing.prompt[:-1])
        context.keep(known)
        logits_BV = torch.from_numpy(context.feed(growing.prompt[len(context.tokens) :]))
        drawn = chooser.choose_first(logits_BV, [0], [growing.prompt])
        while True:
            token, logp, model_logp = drawn.packed()[:, 0].tolist()
            text = growing.take(Token(int(token), logp, model_logp), stops)
            if growing.ended:
                yield Piece(text, growing.answer())
                return
            if text:
                yield Piece(text)
            drawn = chooser.choose(torch.from_numpy(context.feed([int(token)])))

    def _room(self, wanted: int) -> GgufContext:
        """The open context, or a larger one: what was read before is read again there."""
        if self._context is None or self._context.room < wanted:
            if self._context is not None:
                self._context.close()
            room = max(FIRST_ROOM, 2 * wanted)
            self._context = self.model.open(context_tokens=max(wanted, min(room, self.context_tokens)))
        return self._context

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return prompt_tokens(self.model, self.wording, messages)


def open_gguf(path: str, *, template: str | None = None, device: str = "auto") -> GgufSpeaker:
    """Load a GGUF file, of a split one the first part, and the template it speaks with.

    Raises UserError when llama.cpp is not installed or cannot read the file, when there is no template, and for a
    device that this build of llama.cpp does not use.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"there is no file {path}",
            expected="a GGUF file, such as zhibei export writes",
            fix="check the path; of a split file name the first part, -00001-of-...",
            where="model",
        )
    if device not in ("auto", "cpu") and not library().call("llama_supports_gpu_offload"):
        raise UserError(
            f"--device {device}: the installed llama.cpp was built for the CPU",
            expected="auto or cpu",
            fix="install a GPU build of xllamacpp (see its page), or serve the Hugging Face folder",
            where="--device",
        )
    model = GgufModel.load(file)
    try:
        wording = wording_of(model, asked=template)
    except UserError:
        model.close()
        raise
    return GgufSpeaker(name=path, model=model, wording=wording, notes=_notes(model, wording.template, template))


def _notes(model: GgufModel, chosen: Template, asked: str | None) -> tuple[str, ...]:
    if asked is not None and model.chat_template and chosen.as_jinja() != default_system(model.chat_template)[1]:
        return (f"the file carries a template of its own, not {chosen.name}",)
    return ()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest beginning that both share."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
