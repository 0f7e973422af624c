"""What the operator of a server decides, checked when it is written down. Knows no server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from zhibei.config.errors import UserError

LEAST_KEY_CHARACTERS = 8


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and doors of a server. Raises UserError for values that cannot work or would leave it open."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    slots: int = 8
    """Answers computed together, for each model."""
    most_waiting: int = 64
    """Answers that may wait for a slot, for each set of weights; more get 429."""
    most_new_tokens: int | None = None
    """Longest answer of one request; None: as long as the context allows."""
    most_body_bytes: int = 4 << 20
    request_seconds: float = 600.0
    """From the first byte of a request to the end of its answer."""
    read_seconds: float = 20.0
    """For the head and body of a request to arrive, and for a client to take what it is sent."""
    drain_seconds: float = 60.0
    """How long running answers may go on after SIGTERM."""
    context_tokens: int | None = None
    """Prompt and answer together, for each slot; None: the model's context."""
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("slots", "most_body_bytes", "request_seconds", "read_seconds"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        for name in ("most_waiting", "drain_seconds"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("port", 0 <= self.port < 65536, "0 to 65535")
        for name in ("most_new_tokens", "context_tokens"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "more than 0")
        short = [key for key in self.api_keys if len(key) < LEAST_KEY_CHARACTERS or not key.isascii() or " " in key]
        if short:
            raise UserError(
                f"an API key of {len(short[0])} characters",
                expected=f"at least {LEAST_KEY_CHARACTERS} ASCII characters without spaces",
                fix="make one: python -c 'import secrets; print(secrets.token_urlsafe())'",
                where="--api-key",
            )
        if "*" in self.cors_origins and not self.api_keys:
            raise UserError(
                "any web page may use this server, and no key protects it",
                expected="an API key beside --cors-origin '*'",
                fix="name the pages (--cors-origin https://example.org), or set ZHIBEI_API_KEY",
                where="--cors-origin",
            )
        if not self.is_local and not self.api_keys:
            raise UserError(
                f"the server would be open to everyone who reaches {self.host}",
                expected="an API key where the server listens beyond this machine",
                fix="set ZHIBEI_API_KEY (or --api-key), or leave --host at 127.0.0.1 and use an SSH tunnel",
                where="--host",
                pitfall="server-open-without-a-key",
            )

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach the server."""
        return is_loopback(self.host)

    def _require(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            flag = "--" + name.replace("most_", "max_").replace("_", "-")
            raise UserError(f"{flag} is {getattr(self, name)}", expected=expected, fix="choose another", where=flag)


def is_loopback(host: str) -> bool:
    """Whether a host name or address stands for this machine alone."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
