"""Whether the hub answers, found out in seconds; and what may not be fetched from it. Knows addresses, not models.

huggingface_hub tries a hub that is out of reach for the better part of a minute, once for each file.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE_SECONDS = 4.0
DEFAULT_ENDPOINT = "https://huggingface.co"


def hub_options(place: str) -> dict[str, Any]:
    """What `from_pretrained` is told beside a name: for a hub id, when no hub answers, earlier downloads only."""
    return {"local_files_only": True} if not Path(place).exists() and silence() else {}


def silence() -> str:
    """Why the hub cannot be asked; "" when it can, or when a proxy stands between and only trying would tell."""
    endpoint = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")):
        return ""
    return _silence_of(endpoint)


@functools.cache
def _silence_of(endpoint: str) -> str:
    address = urlsplit(endpoint)
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    said = [f"{endpoint} does not answer within {PATIENCE_SECONDS:.0f} s"]

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=PATIENCE_SECONDS).close()
            said[:] = [""]
        except OSError as error:
            said[:] = [f"{endpoint} cannot be reached ({error.strerror or type(error).__name__})"]

    # Looking a name up has no time limit of its own.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return said[0]


@contextmanager
def no_fetched_kernels() -> Iterator[None]:
    """Within this the package `kernels` is not found.

    On some processors bitsandbytes 0.50.2 fetches code from the hub through it while it is imported
    (backends/cpu/ops.py).
    No run asked for that.
    """
    if "kernels" in sys.modules:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        yield
    finally:
        del sys.modules["kernels"]
