"""What a client is told when its request is refused, in the shape of OpenAI's errors. Knows no server and no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zhibei.config.errors import UserError

# The kinds of OpenAI's API, from which its clients choose their exception.
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass
class Refusal(Exception):
    """A request that gets no answer. `param` is the field at fault, `code` a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON document of the response."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_value(param: str, came: object, expected: str) -> Refusal:
    """400 for a value that is not one of those that the field takes."""
    shown = repr(came)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return Refusal(400, f"{param} is {shown}; expected {expected}", param, "invalid_value")


def unsupported(param: str, why: str) -> Refusal:
    """400 for a field that this server would have to ignore."""
    return Refusal(400, f"{param} is not supported: {why}", param, "unsupported_parameter")


def from_user_error(error: UserError, param: str | None, *, status: int = 400) -> Refusal:
    """What a lower layer refused, as it said it."""
    return Refusal(status, f"{error.what}; expected {error.expected}; {error.fix}", param, "invalid_value")


def too_long(num_prompt: int, num_new: int, context: int, param: str) -> Refusal:
    """400 with OpenAI's own code: prompt and answer do not fit into the model's positions."""
    return Refusal(
        400,
        f"{num_prompt} prompt tokens and {num_new} new ones exceed the model's context of {context} tokens; "
        "shorten the messages or ask for fewer tokens",
        param,
        "context_length_exceeded",
    )


def busy(num_open: int, seconds: int) -> Refusal:
    """429: as many answers are under way or waiting as the server holds."""
    return Refusal(
        429,
        f"{num_open} answers are under way or waiting, which is as many as this server holds; try again",
        None,
        "queue_full",
        {"Retry-After": str(seconds)},
    )


def leaving() -> Refusal:
    """503: the server was asked to stop and only ends what it has begun."""
    return Refusal(503, "the server is shutting down and takes no new requests", None, "draining", {"Retry-After": "5"})
