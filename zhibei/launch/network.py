"""Addresses, interfaces and ports of this node, as a launch needs them. Knows sockets, no ranks."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from collections.abc import Callable

from zhibei.config.errors import UserError
from zhibei.doctor.facts.launch import port_owner

SIOCGIFADDR = 0x8915
"""linux/sockios.h: the IPv4 address of an interface."""
TRY_SECONDS = 1.0


def parse_master(text: str) -> tuple[str, int]:
    """HOST:PORT. Raises UserError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--master {text} is no HOST:PORT",
            expected="the first node's address and a free port there, e.g. 10.0.0.1:29500",
            fix="the address is shown by  hostname -I  on the first node",
            where="--master",
        )
    return host.strip("[]"), int(port)


def address_of(host: str) -> str:
    """The IP address of a host name. Raises UserError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(
            f"{host} has no address here: {error.strerror or error}",
            expected="a name or address of the first node that every node knows",
            fix="give its IP address: --master 10.0.0.1:29500 (hostname -I shows it there)",
            where="--master",
        ) from None


def is_own(address: str) -> bool:
    """Whether this node has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.bind((address, 0))
        return True
    except OSError:
        return False


def own_address_towards(address: str) -> str:
    """The address of this node on the route to another one; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.connect((address, 9))
            return str(tried.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"there is no route to {address}: {error.strerror or error}",
            expected="a network interface that leads to the first node",
            fix="look at  ip route get ADDRESS, and whether the interface is up (ip link)",
            where="--master",
        ) from None


def interface_of(address: str) -> str:
    """The name of the interface that has this IPv4 address; "" where it cannot be told."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tried:
            try:
                told = fcntl.ioctl(tried.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
        if socket.inet_ntoa(told[20:24]) == address:
            return name
    return ""


def require_free(host: str, port: int) -> None:
    """Raises UserError, naming the holder, where the meeting point's port is taken on this node."""
    owner = port_owner(port)
    if owner:
        raise UserError(
            f"port {port} of this node is held by {owner}",
            expected="a free port for the ranks to meet",
            fix=f"end that process if it is a leftover of yours, or take another port: --master {host}:{port + 1}",
            where=f"{host}:{port}",
        )


def require_reachable(host: str, port: int, *, seconds: float, say: Callable[[str], None]) -> None:
    """Wait until the first node listens. `say` gets one line when it does not at once. Raises UserError after it."""
    deadline, problem = time.monotonic() + seconds, "nobody answers"
    has_said = False
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=TRY_SECONDS):
                return
        except OSError as error:
            problem = error.strerror or str(error)
        if not has_said:
            say(f"waiting up to {seconds:.0f} s for the first node at {host}:{port} ({problem})")
            has_said = True
        time.sleep(min(TRY_SECONDS, seconds / 10))
    raise UserError(
        f"the first node does not answer at {host}:{port} ({seconds:.0f} s tried): {problem}",
        expected="zhibei launch running on the first node, with the same --master",
        fix="start it there; see that this node reaches it (nc -vz HOST PORT) and that no firewall is between",
        where=f"{host}:{port}",
    )
