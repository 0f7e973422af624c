"""Door, paths and process put together: models in, a server out that can be run. Knows none of their work."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from zhibei.serve.gatekeeper import COOKIE_PATH, Gatekeeper
from zhibei.serve.hosted import Hosted
from zhibei.serve.metrics import Metrics
from zhibei.serve.pages import page_files, report_page
from zhibei.serve.running import Running
from zhibei.serve.service import OPEN_PATHS, Service
from zhibei.serve.settings import ServerSettings

CONNECTIONS_IN_LINE = 512


def make_server(
    hosted: Mapping[str, Hosted],
    settings: ServerSettings,
    listener: socket.socket,
    *,
    has_page: bool = False,
    on_ready: Callable[[], None] = lambda: None,
    log: Callable[[str], None] | None = None,
) -> Running:
    """A server on a bound socket. `has_page`: with the page for people, whose files need no key (they hold nothing of
    anyone); what it asks for does. `on_ready` is called when the server listens."""
    metrics = Metrics()

    def begin() -> None:
        listener.listen(CONNECTIONS_IN_LINE)  # uvicorn would do it only after this has returned
        server.listen_for_signals()
        on_ready()

    files = page_files() if has_page else {}
    pages = {**files, COOKIE_PATH: report_page(hosted)} if has_page else {}
    service = Service(hosted, settings, metrics, pages=pages, on_begin=begin)
    gate = Gatekeeper(service, settings, metrics, open_paths=OPEN_PATHS | frozenset(files), log=log)
    server = Running(gate, service, settings, listener)
    return server
