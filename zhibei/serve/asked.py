"""What a client asked for: a JSON body as checked values, every field read or refused. Knows no model.

Nothing is ignored: a field that is not known, or known to OpenAI's API and without effect here, is refused with 400.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zhibei.generate.options import SamplingOptions
from zhibei.serve.refusals import Refusal, bad_value, unsupported
from zhibei.text.messages import Message, Role

MOST_CHOICES = 64
MOST_PROMPTS = 256
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20
Prompt = str | list[int]
Reader = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Asked:
    """One request for answers. `messages` for a chat, else `prompts`; `options.max_new_tokens` is not set yet."""

    model: str
    messages: tuple[Message, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    """Alternatives to report beside each token; None reports nothing."""
    response_format: Mapping[str, Any] = field(default_factory=lambda: {"type": "text"})
    user: str = ""

    def options(self, *, max_new_tokens: int, seed: int) -> SamplingOptions:
        """How to draw. Values were checked when they were read."""
        return SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop_strings=self.stop,
        )


def read_body(raw: bytes) -> dict[str, Any]:
    """A JSON object; raises Refusal for anything else, NaN, infinity and names that come twice included."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once_each)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8", None, "invalid_body") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply", None, "invalid_body") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}", None, "invalid_body") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is a JSON {type(body).__name__}; expected an object", None, "invalid_body")
    return body


def read_chat(body: Mapping[str, Any]) -> Asked:
    """The body of /v1/chat/completions. Raises Refusal naming the field."""
    values = _read_fields(body, _CHAT)
    limits = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if len(limits) == 2:
        raise bad_value("max_tokens", values["max_tokens"], "either max_tokens or max_completion_tokens, not both")
    values["max_tokens"] = values.pop("max_completion_tokens", None) or values.get("max_tokens")
    top = values.pop("top_logprobs", None)
    wants = values.pop("logprobs", None)
    if top is not None and not wants:
        raise bad_value("top_logprobs", top, "logprobs: true beside it")
    return _asked(values, logprobs=(top or 0) if wants else None)


def read_completion(body: Mapping[str, Any]) -> Asked:
    """The body of /v1/completions. Raises Refusal naming the field."""
    values = _read_fields(body, _COMPLETION)
    best_of = values.pop("best_of", None)
    if best_of not in (None, values.get("n", 1)):
        raise unsupported("best_of", "choices are not ranked; ask for n answers")
    values["prompts"] = values.pop("prompt")
    values.setdefault("max_tokens", 16)  # OpenAI's default for this endpoint
    return _asked(values, logprobs=values.pop("logprobs", None))


@dataclass(frozen=True)
class EmbeddingAsked:
    """One request for embeddings."""

    model: str
    inputs: tuple[Prompt, ...]
    encoding_format: str = "float"
    user: str = ""


def read_embedding(body: Mapping[str, Any]) -> EmbeddingAsked:
    """The body of /v1/embeddings. Raises Refusal naming the field."""
    values = _read_fields(body, _EMBEDDING)
    values["inputs"] = values.pop("input")
    return EmbeddingAsked(**values)


def _asked(values: dict[str, Any], *, logprobs: int | None) -> Asked:
    wants_usage = values.pop("stream_options", None)
    if wants_usage is not None and not values.get("stream"):
        raise bad_value("stream_options", {"include_usage": wants_usage}, "stream: true beside it")
    asked = Asked(**values, logprobs=logprobs, include_usage=bool(wants_usage))
    if asked.temperature == 0:
        for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            # OpenAI's clients often send top_p beside temperature 0; for the others nobody has that habit.
            if name != "top_p" and getattr(asked, name) != off:
                raise bad_value(name, getattr(asked, name), "a temperature above 0, since 0 takes the likeliest token")
    return asked


def _read_fields(body: Mapping[str, Any], readers: Mapping[str, Reader]) -> dict[str, Any]:
    for name in body:
        if name not in readers and name not in NEUTRAL:
            raise _unknown(name, readers)
        if name in NEUTRAL and name not in readers and body[name] not in (None, *NEUTRAL[name][0]):
            raise unsupported(name, NEUTRAL[name][1])
    for name in _REQUIRED:
        if name in readers and body.get(name) is None:
            raise Refusal(400, f"{name} is missing", name, "missing_value")
    return {name: read(name, body[name]) for name, read in readers.items() if body.get(name) is not None}


def _unknown(name: str, readers: Mapping[str, Reader]) -> Refusal:
    near = difflib.get_close_matches(name, readers, n=1, cutoff=0.7)
    why = f"did you mean {near[0]}?" if near else "this server would have to ignore it"
    return unsupported(name[:80], why)


# --- values ---


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:80]!r} comes twice")
        found[name] = value
    return found


def _whole(low: int, high: int) -> Reader:
    def read(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_value(param, value, f"a whole number from {low} to {high}")
        return value

    return read


def _number(low: float, high: float, *, above_low: bool = False) -> Reader:
    def read(param: str, value: Any) -> float:
        # NaN is in no range, and infinity beyond every one.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (low < value <= high or (value == low and not above_low)):
            raise bad_value(param, value, f"a number {'above' if above_low else 'from'} {low:g} up to {high:g}")
        return float(value)

    return read


def _switch(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad_value(param, value, "true or false")
    return value


def _text(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_value(param, value, "a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(
            400, f"{param} holds half of a surrogate pair, which is no character", param, "invalid_value"
        ) from None
    return value


def _name(param: str, value: Any) -> str:
    if len(_text(param, value)) > 256:
        raise bad_value(param, value, "at most 256 characters")
    return value


def _stop(param: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise bad_value(param, value, f"a text, or up to {MOST_STOPS} texts, none of them empty")
    return tuple(_text(param, text) for text in texts)


def _stream_options(param: str, value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
        raise bad_value(param, value, '{"include_usage": true}')
    if value.get("include_obfuscation"):
        raise unsupported("stream_options.include_obfuscation", "pieces are sent as they are")
    return _switch("stream_options.include_usage", value.get("include_usage", False))


def _format(param: str, value: Any) -> Mapping[str, Any]:
    kinds = ("text", "json_object", "json_schema")
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in kinds:
        raise bad_value(param, value, f'an object whose "type" is one of {", ".join(kinds)}')
    more = {"json_schema"} if kind == "json_schema" else set()
    if set(value) != {"type", *more}:
        raise bad_value(param, value, "these names and no other: " + ", ".join(sorted({"type", *more})))
    named = value.get("json_schema")
    if more:
        if not isinstance(named, dict) or set(named) - {"name", "schema", "strict", "description"}:
            raise bad_value(f"{param}.json_schema", named, 'an object with "name" and "schema"')
        if not isinstance(named.get("schema"), dict):
            raise bad_value(f"{param}.json_schema.schema", named.get("schema"), "a JSON schema")
    return value


def _prompts(param: str, value: Any) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of either."""
    several = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(several, list) or not several or len(several) > MOST_PROMPTS:
        raise bad_value(param, value, f"a text, token ids, or a list of up to {MOST_PROMPTS} of them")
    for one in several:
        if not (isinstance(one, str) or _are_ids(one)):
            raise bad_value(param, one, "a text, or a list of token ids")
        if not one:
            raise bad_value(param, one, "at least one character or token")
    return tuple(_text(param, one) if isinstance(one, str) else one for one in several)


def _are_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31 for one in value)


# --- messages ---

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PART_OF_MESSAGE = ("role", "content")


def _messages(param: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise bad_value(param, value, "a list of at least one message")
    messages = tuple(_message(f"{param}[{number}]", one) for number, one in enumerate(value))
    if messages[-1].role != "user":
        raise bad_value(f"{param}[{len(messages) - 1}].role", value[-1]["role"], "a last message of the user")
    if any(message.role == "system" for message in messages[1:]):
        raise bad_value(param, "a system message further down", "the system message in front, and one only")
    return messages


def _message(param: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise bad_value(param, value, 'an object with "role" and "content"')
    role = value.get("role")
    if role in ("tool", "function"):
        raise unsupported(f"{param}.role", "this server calls no tools, so a message cannot be a tool's result")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_value(f"{param}.role", role, "system, user or assistant")
    for name, extra in value.items():
        if name not in _PART_OF_MESSAGE and extra not in (None, []):
            raise unsupported(f"{param}.{name}"[:120], "a message has a role and a content; the template knows no more")
    return Message(_ROLES[role], _content(f"{param}.content", value.get("content")))


def _content(param: str, value: Any) -> str:
    if isinstance(value, str):
        return _text(param, value)
    if not isinstance(value, list) or not value:
        raise bad_value(param, value, "a text, or a list of parts of type text")
    return "".join(_part(f"{param}[{number}]", part) for number, part in enumerate(value))


def _part(param: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text" and set(value) == {"type", "text"}:
        return _text(f"{param}.text", value["text"])
    if isinstance(kind, str) and kind != "text":
        raise unsupported(param, f"parts of type {kind[:40]!r}; this model reads text only")
    raise bad_value(param, value, '{"type": "text", "text": "..."}')


# --- which fields there are ---

_SAMPLING: dict[str, Reader] = {
    "temperature": _number(0, 100),
    "top_p": _number(0, 1, above_low=True),
    "top_k": _whole(0, 2**31 - 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0, 100, above_low=True),
    "stop": _stop,
    "n": _whole(1, MOST_CHOICES),
    "seed": _whole(0, 2**63 - 1),
    "stream": _switch,
    "stream_options": _stream_options,
    "response_format": _format,
    "max_tokens": _whole(1, 2**31 - 1),
    "user": _name,
}
_CHAT: dict[str, Reader] = {
    "model": _name,
    "messages": _messages,
    **_SAMPLING,
    "max_completion_tokens": _whole(1, 2**31 - 1),
    "logprobs": _switch,
    "top_logprobs": _whole(0, MOST_TOP_LOGPROBS),
}
_COMPLETION: dict[str, Reader] = {
    "model": _name,
    "prompt": _prompts,
    **_SAMPLING,
    "logprobs": _whole(0, 5),
    "best_of": _whole(1, MOST_CHOICES),
}
_EMBEDDING: dict[str, Reader] = {
    "model": _name,
    "input": _prompts,
    "encoding_format": lambda param, value: _one_of(param, value, ("float", "base64")),
    "user": _name,
}
_REQUIRED = ("model", "messages", "prompt", "input")

# Fields of OpenAI's API that change nothing at these values, and why no other value is taken.
NEUTRAL: dict[str, tuple[Sequence[Any], str]] = {
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "presence_penalty": ((0,), "use repetition_penalty"),
    "logit_bias": (({},), "tokens cannot be biased one by one"),
    "tools": (([],), "this server calls no tools"),
    "tool_choice": (("none",), "this server calls no tools"),
    "functions": (([],), "this server calls no tools"),
    "function_call": (("none",), "this server calls no tools"),
    "parallel_tool_calls": ((), "this server calls no tools"),
    "modalities": ((["text"],), "this server writes text only"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "text is continued, not filled in"),
    "dimensions": ((), "an embedding has the model's own size"),
}


def _one_of(param: str, value: Any, words: Sequence[str]) -> str:
    if value not in words:
        raise bad_value(param, value, " or ".join(words))
    return value
