"""The models of a server by name: what each is asked with, and which worker answers for it. Knows no HTTP."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.serve.refusals import Refusal, from_user_error, too_long
from zhibei.serve.worker import Worker
from zhibei.text.messages import Message

_ONE_TOKEN = SamplingOptions(max_new_tokens=1)


@dataclass(frozen=True)
class Hosted:
    """One name that clients choose by `model`. `lane` is its place among those that share the worker's weights."""

    name: str
    speaker: Any
    worker: Worker
    lane: str
    path: str
    base: str = ""
    """The weights under an adapter."""
    report: Path | None = None
    """The page about the run that made it."""
    most_tokens: int | None = None
    """Prompt and answer together, where the engine holds less than the model's context."""
    notes: tuple[str, ...] = ()
    threads: int | None = None
    """With how many it answers fastest on a CPU; None where that was not asked."""

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and answer together; None when nothing states a limit."""
        limits = [limit for limit in (self.speaker.context_tokens, self.most_tokens) if limit is not None]
        return min(limits, default=None)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids that training would have put before the answer. Nothing is left out of a history that is too
        long: that is refused. Raises Refusal."""
        try:
            prompt = self.speaker.prompt(messages, _ONE_TOKEN)
        except UserError as error:
            if "too long" in error.what:
                raise self._beyond(self.speaker.count(messages), "messages") from None
            raise from_user_error(error, "messages") from None
        if prompt.num_dropped:
            raise self._beyond(self.speaker.count(messages), "messages")
        return prompt.tokens

    def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a text, with BOS where the tokenizer puts one; given ids as they are. Raises Refusal."""
        tokenizer = self.speaker.tokenizer
        if isinstance(prompt, str):
            tokens = tokenizer.encode(prompt)
            bos = tokenizer.bos_id if tokenizer.adds_bos else None
            return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]
        if max(prompt) >= len(tokenizer):
            raise Refusal(400, f"token {max(prompt)} is beyond the vocabulary of {len(tokenizer)}", "prompt", "token")
        return prompt

    def budget(self, num_prompt: int, asked: int | None, *, param: str, most: int | None) -> int:
        """How many tokens an answer may get. Raises Refusal when what was asked for does not fit."""
        context = self.context_tokens
        if asked is not None and most is not None and asked > most:
            raise Refusal(400, f"max_tokens is {asked}; this server gives at most {most}", "max_tokens", "too_many")
        room = None if context is None else context - num_prompt
        if room is not None and room < (asked or 1):
            raise self._beyond(num_prompt, param, num_new=asked or 1)
        limits = [limit for limit in (asked, room, most) if limit is not None]
        return min(limits, default=4096)

    def decode(self, tokens: list[int]) -> str:
        """The words, without control tokens."""
        return self.speaker.decode(tokens)

    def token_name(self, token: int) -> str:
        """A token as the vocabulary spells it."""
        return self.speaker.tokenizer.token_texts([token])[0]

    def stop_strings(self, *, is_chat: bool) -> tuple[str, ...]:
        """Texts at which the template ends an answer."""
        return tuple(text for text in self.speaker.template.stop_strings if text) if is_chat else ()

    def _beyond(self, num_prompt: int, param: str, num_new: int = 1) -> Refusal:
        return too_long(num_prompt, num_new, self.context_tokens or 0, param)


def find(hosted: Mapping[str, Hosted], name: str) -> Hosted:
    """The model of that name. Raises Refusal (404) naming those there are."""
    if name in hosted:
        return hosted[name]
    near = difflib.get_close_matches(name, hosted, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise Refusal(404, f"there is no model {name!r}, only {', '.join(hosted)}{hint}", "model", "model_not_found")
