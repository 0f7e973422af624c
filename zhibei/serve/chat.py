"""A model that speaks: weights, tokenizer and the template it was trained with, as one. Knows no terminal.

The prompt comes from the same Template object that rendered the training rows, and ends where training taught it to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.data.encode import with_system
from zhibei.generate.decoding import context_tokens
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import Answer, Piece, generate, stream
from zhibei.model.language_model import LanguageModel
from zhibei.model.load import load_for_inference
from zhibei.model.locate import Located, locate
from zhibei.model.quantized import QuantizeKind
from zhibei.model.score_model import holds_scores
from zhibei.model.wording import choose_template, require_as_trained, tokenizer_place, trained_system
from zhibei.store.files import read_json
from zhibei.text.messages import Message
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from zhibei.serve.gguf_speaker import GgufSpeaker

# The share of the context that the history leaves to the answer, at least.
ANSWER_SHARE = 1 / 4


@dataclass(frozen=True)
class Prompt:
    """What the model gets: token ids, how many of the oldest messages did not fit, and what a person should know."""

    tokens: list[int]
    num_dropped: int = 0
    notice: str = ""


@dataclass(frozen=True)
class Speaker:
    """A loaded model with its tokenizer and template. `notes` say what a person should know before talking to it."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    template: Template
    notes: tuple[str, ...] = ()
    uses_adapters: bool = True
    system: str | None = None
    """The system prompt of conversations that bring none, as in training."""

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and answer together; None when the model states no limit."""
        return context_tokens(self.model.hf)

    @property
    def has_adapters(self) -> bool:
        return self.model.hf is not self.model.inner

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """EOS, the template's terminator, and what the model's generation_config.json names."""
        own = getattr(self.model.inner.generation_config, "eos_token_id", None)
        named = own if isinstance(own, list) else [] if own is None else [own]
        return tuple(dict.fromkeys((*self.tokenizer.stop_ids(self.template.terminator), *named)))

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt these messages give."""
        return len(self._encode(messages))

    def prompt(self, messages: Sequence[Message], options: SamplingOptions) -> Prompt:
        """The prompt after which the assistant speaks. Oldest turns are left out, never the system prompt, until a
        quarter of the context (or max_new_tokens, if that is less) is free for the answer.

        Raises UserError when the last message alone is too long, or when the template cannot express the messages.
        """
        return fitting_prompt(messages, self._encode, context=self.context_tokens, most_new=options.max_new_tokens)

    def stream(self, prompt: Prompt, options: SamplingOptions) -> Iterator[Piece]:
        """The answer to a prompt, piece by piece; the last piece carries the whole Answer."""
        with self._as_loaded():
            yield from stream(
                self.model.hf,
                prompt.tokens,
                options=self._fitting(options),
                stop_ids=self.stop_ids,
                decode=self.decode,
            )

    def answer(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[Answer]:
        """The answers to several prompts, generated together."""
        with self._as_loaded():
            return generate(
                self.model.hf,
                [prompt.tokens for prompt in prompts],
                options=self._fitting(options),
                stop_ids=self.stop_ids,
                pad_id=self.tokenizer.pad_id,
                decode=self.decode,
            )

    def decode(self, tokens: list[int]) -> str:
        """The words, without control tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def without_adapters(self) -> Speaker:
        """The base model under the adapters, with the same template and without loading anything again."""
        return replace(self, name="base", notes=(), uses_adapters=False)

    def _as_loaded(self) -> Any:
        return nullcontext() if self.uses_adapters else self.model.without_adapters()

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.encode(self.template.render(with_system(messages, self.system), answer_next=True).text)

    def _fitting(self, options: SamplingOptions) -> SamplingOptions:
        return with_stops(options, self.template.stop_strings)


def fitting_prompt(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], *, context: int | None, most_new: int
) -> Prompt:
    """The prompt of a history, without its oldest turns where it does not fit; see `Speaker.prompt`."""
    tokens = encode(messages)
    if context is None:
        return Prompt(tokens)
    room = context - min(most_new, int(context * ANSWER_SHARE))
    system, turns = _split_system(messages)
    num_dropped = 0
    while len(tokens) > room and len(turns) > 2:
        turns, num_dropped = turns[2:], num_dropped + 2
        tokens = encode([*system, *turns])
    if len(tokens) > room:
        raise UserError(
            f"the message is too long: {len(tokens)} prompt tokens",
            expected=f"at most {room} of the model's {context} tokens, so that an answer has room",
            fix="shorten the message or the system prompt, or lower max_new_tokens",
            where="chat",
        )
    notice = f"the oldest {num_dropped} messages no longer fit into {context} tokens" if num_dropped else ""
    return Prompt(tokens, num_dropped, notice)


def with_stops(options: SamplingOptions, own: Sequence[str]) -> SamplingOptions:
    """The options of a chat: answers also end at the template's own strings, and where the context is full."""
    stops = (*options.stop_strings, *(text for text in own if text))
    return replace(options, stop_strings=tuple(dict.fromkeys(stops)), overflow="fewer_tokens")


def open_speaker(
    path: str,
    *,
    base: str | None = None,
    template: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    quantize: QuantizeKind = "none",
) -> Any:
    """Load what lies at `path`, as a Speaker: a run directory, a Hugging Face folder, a hub id, a PEFT adapter folder.
    A GGUF file becomes a GgufSpeaker: the same methods for talking, run by llama.cpp in the types that the file holds.

    `base` names the model under an adapter, `template` overrides what the run's manifest or the tokenizer says,
    `quantize` holds the weights in 8 or 4 bits (under an adapter: those of its base).
    Raises UserError when something is missing (the folder, an adapter's base, a template), and when tokenizer, template
    or base are no longer those that the run's manifest names.
    """
    if is_gguf(path):
        return _open_gguf(path, template=template, device=device, base=base, precision=precision, quantize=quantize)
    _, tokenizer, chosen, notes, system = wording_of(path, base=base, template=template)
    model = load_for_inference(path, device=device, precision=precision, base=base, quantize=quantize)
    return Speaker(name=path, model=model, tokenizer=tokenizer, template=chosen, notes=notes, system=system)


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file."""
    return path.lower().endswith(".gguf")


def _open_gguf(path: str, *, template: str | None, device: str, **fixed: str | None) -> GgufSpeaker:
    from zhibei.serve.gguf_speaker import open_gguf

    for name, value in fixed.items():
        if value not in (None, "auto", "none"):
            raise UserError(
                f"--{name} {value}: a GGUF file is whole and keeps the types it was written in",
                expected=f"no --{name} with a .gguf file",
                fix=f"leave --{name} out, or export the model in another type",
                where=f"--{name}",
            )
    return open_gguf(path, template=template, device=device)


class Wording(NamedTuple):
    """What a model speaks with, besides its weights."""

    found: Located
    tokenizer: Tokenizer
    template: Template
    notes: tuple[str, ...]
    system: str | None


def wording_of(path: str, *, base: str | None = None, template: str | None = None) -> Wording:
    """What lies at a path, with its tokenizer, its template and what a person should know; reads no weights.

    Raises UserError as `open_speaker`.
    """
    found = locate(path, base=base)
    if holds_scores(found):
        raise UserError(
            f"{path} is a reward model: it gives scores and cannot talk",
            expected="a language model, such as a run of stage sft or dpo",
            fix="score answers with it in Python: zhibei.judge(PATH).score(messages); or talk to the "
            "model that it was made from",
            where="chat",
        )
    tokenizer = load_tokenizer(tokenizer_place(found))
    if found.run is not None:
        require_as_trained(found.run, tokenizer, asked=template)
    chosen, notes = choose_template(found, tokenizer, asked=template)
    return Wording(found, tokenizer, chosen, notes, trained_system(found))


def open_base(
    speaker: Speaker | GgufSpeaker,
    *,
    device: str = "auto",
    precision: str = "auto",
    base: str | None = None,
    quantize: QuantizeKind = "none",
) -> Speaker:
    """The model that the speaker's model was trained from, asked with the same template.

    With adapters these are switched off and nothing is loaded. Raises UserError when it is not known what the base was.
    """
    if isinstance(speaker, Speaker) and speaker.has_adapters:
        return speaker.without_adapters()
    found = locate(speaker.name) if isinstance(speaker, Speaker) else None
    named = base or (_trained_from(found) if found and found.run else None)
    if named is None or not isinstance(speaker, Speaker):
        raise UserError(
            f"it is not known which base model {speaker.name} was trained from",
            expected="a run directory, an adapter folder, or the path of the base",
            fix="name the other model: --compare PATH",
            where="--compare base",
        )
    model = load_for_inference(named, device=device, precision=precision, quantize=quantize)
    return replace(speaker, name=named, model=model, notes=())


def _trained_from(found: Located) -> str:
    """The base as the manifest names it (an adapter that training began with stands for its base and itself)."""
    assert found.run is not None
    base = read_json(found.run.manifest).get("base") if found.run.manifest.is_file() else None
    if isinstance(base, dict) and base.get("path"):
        return base.get("adapter") or base["path"]
    return read_run(str(found.run.resolved)).run.model.path


def _split_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    is_system = bool(messages) and messages[0].role == "system"
    return list(messages[:1] if is_system else ()), list(messages[1:] if is_system else messages)
