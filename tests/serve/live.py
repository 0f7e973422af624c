"""A server in a thread of this process, for tests. Knows no model but the tiny ones."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from zhibei.serve.hosted import Hosted
from zhibei.serve.opening import close_all
from zhibei.serve.running import Running, bind, url_of
from zhibei.serve.server import make_server
from zhibei.serve.settings import ServerSettings


@dataclass
class Live:
    """A running server: `url`, what it logged, and a client."""

    url: str
    server: Running
    hosted: Mapping[str, Hosted]
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def say(self, raw: bytes) -> socket.socket:
        """Send bytes as they are; the open connection."""
        connection = socket.create_connection(self.address, timeout=30)
        connection.sendall(raw)
        return connection

    def wait_until_idle(self) -> None:
        """Until no answer is under way."""
        workers = {one.worker for one in self.hosted.values()}
        wait_for(lambda: not any(worker.num_open for worker in workers))


def wait_for(is_so: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.01)


@contextmanager
def serving(hosted: Mapping[str, Hosted], has_page: bool = False, **settings: Any) -> Iterator[Live]:
    chosen = ServerSettings(port=0, **settings)
    listener = bind(chosen)
    ready = threading.Event()
    log: list[dict[str, Any]] = []
    server = make_server(
        hosted,
        chosen,
        listener,
        has_page=has_page,
        on_ready=ready.set,
        log=lambda line: log.append(json.loads(line)),
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield Live(url_of(listener), server, hosted, log)
    finally:
        server.leave_soon()
        thread.join(timeout=30)
        close_all(hosted)
        listener.close()
        assert not thread.is_alive()
