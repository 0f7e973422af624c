"""The server as a process: sockets, signals and the slow end of a running answer. Knows no API and no model."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from zhibei.config.errors import UserError
from zhibei.serve.gatekeeper import Gatekeeper
from zhibei.serve.service import Service
from zhibei.serve.settings import ServerSettings

INSTALL = "pip install 'zhibei[serve]'"
MOST_CONNECTIONS = 1024
_MOST_HEAD_BYTES = 32 << 10


def require_uvicorn() -> None:
    """Raises UserError, with the command to type, where the optional package is missing."""
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(
            "the server needs uvicorn, which is not installed here", expected="the extra `serve`", fix=INSTALL
        ) from None


def bind(settings: ServerSettings) -> socket.socket:
    """A listening socket, taken before anything is loaded. Raises UserError when the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol must be named: asyncio sends small pieces at once (TCP_NODELAY) only where it reads TCP there, and
    # each first piece would otherwise wait 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"{settings.host}:{settings.port} cannot be listened to: {error.strerror or error}",
            expected="an address of this machine and a free port",
            fix="choose another with --port (0 takes a free one), or end the program that has it",
            where="--port",
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address as a browser writes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Running:
    """One server on one socket. `run` returns when it has been told to leave and the last answer has ended."""

    def __init__(self, gate: Gatekeeper, service: Service, settings: ServerSettings, listener: socket.socket) -> None:
        import uvicorn

        self._service, self._settings, self._listener = service, settings, listener
        config = uvicorn.Config(
            gate,  # type: ignore[arg-type]
            http=patient_protocol(settings.read_seconds),  # type: ignore[arg-type]
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._leaving: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C; a second one ends it at once."""
        self._server.run(sockets=[self._listener])

    def listen_for_signals(self) -> None:
        """To be called in the event loop once it runs; without effect outside the main thread."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(NotImplementedError):  # Windows: uvicorn's own handlers end it at once
                    self._loop.add_signal_handler(number, self.leave)

    def leave(self) -> None:
        """Begin to leave: new requests get 503, running answers end, at most `drain_seconds` later all is over."""
        if self._leaving is not None:
            self._server.should_exit = self._server.force_exit = True
            return
        self._service.leave()
        self._leaving = self._loop.create_task(self._end_when_done())

    def leave_soon(self) -> None:
        """`leave`, from another thread."""
        self._loop.call_soon_threadsafe(self.leave)

    async def _end_when_done(self) -> None:
        until = time.monotonic() + self._settings.drain_seconds
        while self._service.num_open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self._server.should_exit = True


def patient_protocol(read_seconds: float) -> Callable[..., Any]:
    """uvicorn's HTTP protocol, which closes connections whose request head does not arrive in `read_seconds`.

    uvicorn waits for a head without end, so that clients who send a byte a minute could hold every connection.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        """A subclass is uvicorn's documented way to differ (Config.http)."""

        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before or (self.cycle is not None and not self.cycle.response_complete):
                self._forget()
            elif self._watch is None:
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            self._watch = self.loop.call_later(read_seconds, self._close_slow)

        def _forget(self) -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

        def _close_slow(self) -> None:
            self._watch = None
            if not self.transport.is_closing():
                self.transport.close()

    return Patient
