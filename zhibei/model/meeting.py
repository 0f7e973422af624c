"""Where the ranks of a run find one another before anything is added up: one store of texts. Knows addresses and what
JSON can hold, no tensor and no model.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from zhibei.config.errors import OUR_FAULT, RankLost, UserError, as_told, from_told
from zhibei.model.pulse import Pulse

POLL_SECONDS = 0.1
CONNECT_SECONDS = 300.0
FAREWELL_SECONDS = 10.0


class Meeting:
    """The store of this run's ranks, as this rank sees it, and its pulse. Values are what JSON can hold."""

    def __init__(self, store: Any, pulse: Pulse, *, rank: int, world: int) -> None:
        self.store, self.pulse, self.rank, self.world = store, pulse, rank, world

    def tell(self, name: str, value: Any) -> None:
        self.store.set(name, json.dumps(value))

    def heard(self, name: str) -> Any:
        """What was told under this name; None where nothing was."""
        return json.loads(self.store.get(name)) if self.store.check([name]) else None

    def wait_for(self, name: str, *, seconds: float) -> Any:
        """What is told under this name, at the latest after so many seconds; None after them."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.heard(name)
            if value is not None:
                return value
            self.pulse.progress.since = time.monotonic()  # waits on purpose
            time.sleep(POLL_SECONDS)
        return None

    def leave(self, error: BaseException | None) -> None:
        """Say to the others that this rank ends, and of what."""
        fault: dict[str, Any] | None = None
        if isinstance(error, UserError) and not isinstance(error, RankLost):
            fault = as_told(error)
        elif error is not None and not isinstance(error, RankLost):
            fault = _unexpected(f"{type(error).__name__}: {error}", fix="")
        told = {"host": socket.gethostname(), "fault": fault}
        with suppress(RuntimeError):
            self.tell(f"left/{self.rank}", told)

    def see_others_off(self, *, seconds: float) -> None:
        """Rank 0, who keeps the store, ends after the others have ended, or after so many seconds."""
        if self.rank != 0:
            return
        deadline = time.monotonic() + seconds
        missing = set(range(1, self.world))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if self.heard(f"left/{rank}") is None}
            time.sleep(0.02)


_OPEN: list[Meeting] = []
"""The meeting of this process; it has one or none."""


def present() -> Meeting | None:
    """The meeting that this process takes part in."""
    return _OPEN[0] if _OPEN else None


def mark(doing: str) -> None:
    """Note that this rank enters an operation among ranks, so that others can tell who has not."""
    if _OPEN:
        _OPEN[0].pulse.progress.mark(doing)


def note_step(step: int) -> None:
    """Note how far this rank has come."""
    if _OPEN:
        _OPEN[0].pulse.progress.step = step


@contextmanager
def meeting(*, rank: int, world: int, patience_seconds: float) -> Iterator[Meeting]:
    """The store of this run, connected while the block runs; a meeting that is open already is used and left open.

    Raises UserError when rank 0 cannot open the port, or another one cannot reach it.
    """
    if _OPEN:
        yield _OPEN[0]
        return
    seconds = min(CONNECT_SECONDS, patience_seconds)
    own = _connected(rank, seconds=seconds, may_serve=True)
    prefix = _prefix_of_round(own, rank)
    beats = PrefixStore(prefix, _connected(rank, seconds=seconds, may_serve=False))
    pulse = Pulse(beats, rank=rank, world=world, patience_seconds=patience_seconds)
    here = Meeting(PrefixStore(prefix, own), pulse, rank=rank, world=world)
    pulse.start()
    _OPEN.append(here)
    try:
        yield here
    except BaseException as error:
        here.leave(error)
        raise
    else:
        # No thread may be asking the store when its keeper ends: one that is cut off there takes the process along.
        pulse.stop()
        here.leave(None)
        here.see_others_off(seconds=FAREWELL_SECONDS)
    finally:
        _OPEN.clear()
        pulse.stop()


def _prefix_of_round(store: Any, rank: int) -> str:
    """A store that a launcher keeps outlives its ranks; whoever comes for the n-th time belongs to the n-th start.

    Raises UserError where another process has come as the same rank to a store that is made for one start.
    """
    arrivals = store.add(f"zhibei/came/{rank}", 1)
    own = f"{socket.gethostname()} (pid {os.getpid()})"
    if arrivals == 1 or _is_kept_by_launcher():
        store.set(f"zhibei/who/{rank}", own)
        return f"zhibei/{arrivals if _is_kept_by_launcher() else 1}"
    raise UserError(
        f"two processes are rank {rank}: {store.get(f'zhibei/who/{rank}').decode()} and {own}",
        expected="each rank once",
        fix="give every node its own --node-rank (or auto), and end what is left over of an earlier launch",
        where="environment",
    )


def _is_kept_by_launcher() -> bool:
    """torchrun says so; zhibei launch lets rank 0 keep the store, so that every start has a fresh one."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def master() -> tuple[str, int]:
    """Host and port of the meeting point. Raises UserError where the environment does not say them."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise UserError(
            f"MASTER_ADDR={host} and MASTER_PORT={port} do not say where the ranks meet",
            expected="a host and a port, as zhibei launch and torchrun set them",
            fix="start with  zhibei launch ...",
            where="environment",
        )
    return host, int(port)


def _connected(rank: int, *, seconds: float, may_serve: bool) -> Any:
    """A connection to the store; rank 0 opens it where no launcher and no process group has."""
    host, port = master()
    serves = may_serve and rank == 0 and not _is_kept_by_launcher() and not dist.is_initialized()
    try:
        return TCPStore(
            host, port, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=max(1.0, seconds))
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        if serves:
            raise UserError(
                f"rank 0 on {socket.gethostname()} cannot open port {port} for the others: {first}",
                expected="a free port",
                fix="end the process that holds it if it is a leftover of yours (ss -ltnp shows it), or take another "
                "port: zhibei launch --master HOST:PORT, or MASTER_PORT",
                where=f"{host}:{port}",
            ) from error
        raise UserError(
            f"rank {rank} on {socket.gethostname()} does not reach the meeting point {host}:{port} "
            f"({seconds:.0f} s tried): {first}",
            expected="the first node, listening there",
            fix="see that the first node is started, that this one can reach it (nc -vz HOST PORT), and that no "
            "firewall is between; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the interface",
            where=f"{host}:{port}",
        ) from error


def all_told(here: Meeting, name: str, value: Any, *, seconds: float) -> list[tuple[Any, float] | None]:
    """On rank 0: what every rank told under this name, and how many seconds its clock is ahead of this one's; None for
    those that did not come in time. Elsewhere: nothing, at once after rank 0 is there to look at the clocks."""
    if here.rank != 0:
        here.pulse.progress.mark(f"waits for rank 0: {name}")
        here.wait_for(f"{name}/begins", seconds=seconds)
        here.tell(f"{name}/{here.rank}", {"value": value, "clock": time.time()})
        return []
    here.tell(f"{name}/begins", value=True)
    deadline = time.monotonic() + seconds
    found: dict[int, tuple[Any, float]] = {0: (value, 0.0)}
    while len(found) < here.world and time.monotonic() < deadline:
        for rank in range(1, here.world):
            if rank not in found and (told := here.heard(f"{name}/{rank}")) is not None:
                found[rank] = (told["value"], told["clock"] - time.time())
        here.pulse.progress.since = time.monotonic()
        time.sleep(POLL_SECONDS)
    return [found.get(rank) for rank in range(here.world)]


def first_does(here: Meeting, name: str, action: Callable[[], Any]) -> Any:
    """What rank 0 finds when it does this alone, on every rank; the others wait as long as rank 0 is alive.

    It may take any time: unlike an operation among ranks it has no timeout. A UserError of rank 0 ends the others too
    (`told` says of what); it is rank 0 that shows it.
    """
    if here.rank == 0:
        here.pulse.progress.mark(name)
        value = action()
        here.tell(name, {"value": value})
        return value
    here.pulse.progress.mark(f"waits for rank 0: {name}")
    here.pulse.progress.is_patient = True
    try:
        while True:
            told, left = here.heard(name), here.heard("left/0")
            if told is not None:
                return told["value"]
            if left is not None:
                raise fault_of_first(left)
            time.sleep(POLL_SECONDS)
    finally:
        here.pulse.progress.is_patient = False


def fault_of_first(left: dict[str, Any]) -> UserError:
    """The error with which rank 0 ended, for the others to end with."""
    return from_told(left.get("fault") or _unexpected("rank 0 ended", fix="see rank 0"))


def _unexpected(what: str, *, fix: str) -> dict[str, Any]:
    """What is told of an end that is no UserError."""
    return {"what": what, "expected": "", "fix": fix, "where": "", "exit_code": OUR_FAULT}
