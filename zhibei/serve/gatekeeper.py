"""The door of the server: who may come in, how much they may bring, and a line about each. Knows no model.

An ASGI application around another one. ASGI: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from zhibei.config.errors import UserError
from zhibei.serve.metrics import Metrics
from zhibei.serve.refusals import Refusal, from_user_error
from zhibei.serve.settings import ServerSettings, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENT_LEFT = 499
"""nginx's number for a client that went away before its answer; only the log and the metrics see it."""
COOKIE_PATH = "/report"
"""A page that a link opens, where no script can add a header: there a cookie may bring the key."""
_SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Visit:
    """What is known of a request for the log: handlers write into `facts`."""

    id: str
    begun: float
    status: int = CLIENT_LEFT
    facts: dict[str, Any] = field(default_factory=dict)
    has_begun_response: bool = False


class Gatekeeper:
    """Everything that is decided before a request is understood, and after its response is sent.

    `open_paths` need no key. `log` gets one line a request.
    """

    def __init__(
        self,
        app: App,
        settings: ServerSettings,
        metrics: Metrics,
        *,
        open_paths: frozenset[str],
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open_paths, self._log = open_paths, log or _to_stderr

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets: nothing here speaks them
            await send({"type": "websocket.close", "code": 1000})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked_id = headers.get("x-request-id", "")
        visit = Visit(asked_id if _SOUND_ID.fullmatch(asked_id) else f"req-{secrets.token_hex(8)}", time.monotonic())
        scope["visit"] = visit
        outward = self._outward(send, visit, headers.get("origin", ""))
        try:
            await self._admit(scope, headers, receive, outward)
        except (Refusal, UserError) as error:
            await self._refuse(outward, visit, error if isinstance(error, Refusal) else from_user_error(error, None))
        except (ConnectionError, TimeoutError, asyncio.TimeoutError):
            pass  # the client does not take what it asked for; there is nobody to tell
        except Exception:
            sys.stderr.write(f"request {visit.id} failed:\n{traceback.format_exc()}")
            await self._refuse(
                outward, visit, Refusal(500, f"the server failed; its log says more under {visit.id}", None, "internal")
            )
        finally:
            self._note(scope, visit)

    async def _admit(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        self._check_host(headers)
        origin = headers.get("origin", "")
        if origin and not self._is_welcome(origin, headers):
            raise Refusal(403, f"web pages of {origin[:200]} may not use this server (--cors-origin)", None, "origin")
        if scope["method"] == "OPTIONS" and origin and "access-control-request-method" in headers:
            await _answer_preflight(send)
            return
        if scope["path"] not in self._open_paths:
            self._check_key(headers, scope["path"])
        body = b""
        if scope["method"] in ("POST", "PUT", "PATCH"):
            self._check_kind(headers)
            body = await self._read(headers, receive)
        await self._app(scope, _after(body, receive), send)

    def _check_host(self, headers: dict[str, str]) -> None:
        """A page on the web can point its own name at 127.0.0.1 (DNS rebinding); the Host header gives it away."""
        if self._settings.api_keys or not self._settings.is_local:
            return
        name = urlsplit("//" + headers.get("host", "")).hostname or ""
        if not is_loopback(name):
            raise Refusal(403, f"this server answers to localhost only, not to {name[:200]!r}", None, "host")

    def _is_welcome(self, origin: str, headers: dict[str, str]) -> bool:
        own = urlsplit(origin).netloc == headers.get("host")
        return own or "*" in self._settings.cors_origins or origin in self._settings.cors_origins

    def _check_key(self, headers: dict[str, str], path: str) -> None:
        if not self._settings.api_keys:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        raw = given.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
        if not raw and path == COOKIE_PATH:
            raw = _cookie(headers.get("cookie", "")).encode()
        # Every key is compared, each in constant time, so that the time tells nothing about any of them.
        matches = [hmac.compare_digest(raw, key.encode()) for key in self._settings.api_keys]
        if not any(matches):
            what = "the API key is wrong" if raw else "an API key is needed: Authorization: Bearer KEY"
            raise Refusal(401, what, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def _check_kind(self, headers: dict[str, str]) -> None:
        """Browsers send text/plain from any page without asking; JSON they ask for first."""
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the body is {kind[:80] or 'of no kind'}; send application/json", None, "content_type")

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes:
        most = self._settings.most_body_bytes
        too_big = Refusal(413, f"the body is larger than {most:,} bytes", None, "body_too_large")
        said = headers.get("content-length", "")
        if said.isdigit() and int(said) > most:
            raise too_big

        async def collect() -> bytes:
            parts, size, is_more = [], 0, True
            while is_more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError
                parts.append(message.get("body", b""))
                size, is_more = size + len(parts[-1]), message.get("more_body", False)
                if size > most:
                    raise too_big
            return b"".join(parts)

        try:
            return await asyncio.wait_for(collect(), self._settings.read_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal(408, "the body did not arrive in time", None, "timeout", {"Connection": "close"}) from None

    def _outward(self, send: Send, visit: Visit, origin: str) -> Send:
        async def outward(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                visit.status, visit.has_begun_response = message["status"], True
                more = [(b"x-request-id", visit.id.encode()), (b"x-content-type-options", b"nosniff")]
                if origin and (origin in self._settings.cors_origins or "*" in self._settings.cors_origins):
                    more += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            # A client that takes nothing for so long holds memory for nobody.
            await asyncio.wait_for(send(message), self._settings.read_seconds)

        return outward

    async def _refuse(self, send: Send, visit: Visit, refusal: Refusal) -> None:
        if visit.has_begun_response:  # a status cannot be taken back; whoever streams reports within the stream
            return
        visit.facts["refused"] = refusal.code or refusal.param or "refused"
        with contextlib.suppress(ConnectionError, TimeoutError, asyncio.TimeoutError):
            await send_json(send, refusal.body(), status=refusal.status, headers=refusal.headers)

    def _note(self, scope: Scope, visit: Visit) -> None:
        seconds = time.monotonic() - visit.begun
        # Paths that nobody serves would make a label each.
        path = scope["path"] if visit.status != 404 else "other"
        self._metrics.add("zhibei_requests_total", path=path, status=str(visit.status))
        self._metrics.observe("zhibei_request_seconds", seconds, path=path)
        client = (scope.get("client") or ("-",))[0]
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": visit.id,
            "client": client,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": visit.status,
            "seconds": round(seconds, 4),
            **visit.facts,
        }
        self._log(json.dumps(line, ensure_ascii=True))


async def send_json(send: Send, document: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """One JSON document as a whole response."""
    body = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    await send_bytes(send, body, kind="application/json", status=status, headers=headers)


async def send_bytes(
    send: Send, body: bytes, *, kind: str, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    """One whole response. A header that is not ASCII is a fault of ours and raises."""
    pairs = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode("ascii")) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def body_of(receive: Receive) -> bytes:
    """The body of a request that came through the door, where it was read and measured."""
    return (await receive()).get("body", b"")


async def _answer_preflight(send: Send) -> None:
    allowed = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization, content-type, x-request-id",
        "access-control-max-age": "600",
    }
    raw = [(name.encode(), value.encode()) for name, value in allowed.items()]
    await send({"type": "http.response.start", "status": 204, "headers": raw})
    await send({"type": "http.response.body", "body": b""})


def _after(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read already, then what comes after it."""
    is_read = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _cookie(header: str) -> str:
    """The key in a Cookie header, or ""."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((unquote(value) for name, _, value in pairs if name == "zhibei_key"), "")


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
