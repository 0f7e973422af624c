"""Door, paths and process put together: models in, a server out that can be run. Knows none of their work."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from zhibei.serve.gatekeeper import Gatekeeper
from zhibei.serve.hosted import Hosted
from zhibei.serve.metrics import Metrics
from zhibei.serve.running import Running
from zhibei.serve.service import OPEN_PATHS, Handler, Service
from zhibei.serve.settings import ServerSettings

CONNECTIONS_IN_LINE = 512


def make_server(
    hosted: Mapping[str, Hosted],
    settings: ServerSettings,
    listener: socket.socket,
    *,
    pages: Mapping[str, Handler] | None = None,
    on_ready: Callable[[], None] = lambda: None,
    log: Callable[[str], None] | None = None,
) -> Running:
    """A server on a bound socket. `pages` are more paths, which need no key; `on_ready` is called when it listens."""
    metrics = Metrics()

    def begin() -> None:
        listener.listen(CONNECTIONS_IN_LINE)  # uvicorn would do it only after this has returned
        server.listen_for_signals()
        on_ready()

    service = Service(hosted, settings, metrics, pages=pages, on_begin=begin)
    open_paths = OPEN_PATHS | frozenset(pages or {})
    gate = Gatekeeper(service, settings, metrics, open_paths=open_paths, log=log)
    server = Running(gate, service, settings, listener)
    return server
