"""Answers as the documents of OpenAI's API: whole, or as the events of a stream. Knows no HTTP and no model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from zhibei.generate.answers import Answer


class Words(Protocol):
    """What turns token ids into text."""

    def decode(self, tokens: list[int]) -> str: ...
    def token_name(self, token: int) -> str: ...


@dataclass(frozen=True)
class Heading:
    """What all documents about one request begin with."""

    id: str
    model: str
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def document(self, **more: Any) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **more}

    def event(self, **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **more}


def usage(num_prompt: int, num_answer: int) -> dict[str, int]:
    """Tokens of a request; those of an answer include the one that ended it."""
    total = num_prompt + num_answer
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": total}


def chat_choice(index: int, answer: Answer, logprobs: Any) -> dict[str, Any]:
    """One whole answer of a chat."""
    message = {"role": "assistant", "content": answer.text or "", "refusal": None}
    shown = None if logprobs is None else {"content": logprobs, "refusal": None}
    return {"index": index, "message": message, "finish_reason": answer.finish, "logprobs": shown}


def text_choice(index: int, answer: Answer, logprobs: Any) -> dict[str, Any]:
    """One whole continuation of a text."""
    return {"index": index, "text": answer.text or "", "finish_reason": answer.finish, "logprobs": logprobs}


def chat_piece(index: int, text: str, *, finish: str | None, is_first: bool, logprobs: Any) -> dict[str, Any]:
    """What came since the last event of an answer of a chat."""
    delta = {**({"role": "assistant"} if is_first else {}), **({"content": text} if text or is_first else {})}
    shown = None if logprobs is None else {"content": logprobs, "refusal": None}
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": shown}


def text_piece(index: int, text: str, *, finish: str | None, is_first: bool, logprobs: Any) -> dict[str, Any]:
    """What came since the last event of a continuation."""
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}


def token_rows(answer: Answer, words: Words, *, num_top: int) -> list[dict[str, Any]]:
    """Each token of the visible text with its log-probability under the model itself (nats), and the `num_top`
    likeliest tokens in its place: the form of a chat's `logprobs.content`.

    A token that is no whole character has bytes null, since its text is not its own.
    """
    rows, text = [], ""
    for place, token in enumerate(answer.content_tokens):
        if len(text) >= len(answer.text or "") and text:
            break  # what follows belongs to a stop string
        before = answer.tokens[max(0, place - 4) : place]
        spelled = _spelling(token, before, words)
        text += spelled
        rows.append(
            {
                **_row(spelled, answer.model_logps[place]),
                "top_logprobs": [
                    _row(_spelling(other, before, words), logp)
                    for other, logp in _alternatives(answer, place)[:num_top]
                ],
            }
        )
    return rows


def text_logprobs(answer: Answer, words: Words, *, num_top: int) -> dict[str, Any]:
    """The same in the form of /v1/completions."""
    rows = token_rows(answer, words, num_top=num_top)
    offsets, so_far = [], 0
    for row in rows:
        offsets.append(so_far)
        so_far += len(row["token"])
    return {
        "tokens": [row["token"] for row in rows],
        "token_logprobs": [row["logprob"] for row in rows],
        "top_logprobs": [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in rows],
        "text_offset": offsets,
    }


def _alternatives(answer: Answer, place: int) -> Sequence[tuple[int, float]]:
    return answer.alternatives[place] if answer.alternatives else ()


def _spelling(token: int, before: list[int], words: Words) -> str:
    """What a token adds to the text: its leading space depends on the tokens before it. A control token, which adds
    nothing, by its name."""
    whole, first = words.decode([*before, token]), words.decode(before)
    added = whole[len(first) :] if whole.startswith(first) else words.decode([token])
    return added or words.token_name(token)


def _row(spelled: str, logp: float) -> dict[str, Any]:
    own = None if "\ufffd" in spelled else list(spelled.encode())
    return {"token": spelled, "logprob": max(logp, -9999.0), "bytes": own}
