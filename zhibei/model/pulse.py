"""Whether the ranks are alive and get on: each writes beats where they met, and names who fell behind.

Knows threads and a store of texts, no tensor.

A beat says how many operations among ranks this process has entered, its step, and, once it has stood still for a
while, where its main thread stands. Others' beats are read only by a rank that waits, so that hundreds of ranks cost
one small write each per second.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from zhibei.config.errors import RankLost, UserError, from_told

BEAT_SECONDS = 1.0
BEATS_PER_PATIENCE = 20
SILENCE_SECONDS = 30.0
MOST_FRAMES = 12
BEATS_TO_LOOK = 6
GONE = "is gone: its process has ended"
STANDS_STILL = "has stood still for"


class Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str) -> object: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. `count`: operations among ranks it has entered; `still_seconds`: since the last."""

    rank: int
    host: str
    pid: int
    number: int = 0
    count: int = 0
    step: int = 0
    doing: str = "starting"
    still_seconds: float = 0.0
    stack: tuple[str, ...] = ()
    machine: str = ""
    """What only processes that see one another have alike; host names may be given twice."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass
class Seen:
    """What one rank knows of another: its newest beat, and when (own clock) the beat last changed."""

    beat: Beat
    changed_at: float


@dataclass
class Progress:
    """Where this process stands; written by its main thread only."""

    count: int = 0
    step: int = 0
    doing: str = "starting"
    since: float = field(default_factory=time.monotonic)
    is_patient: bool = False
    """Whether this rank waits for work of rank 0 alone, which may take any time while rank 0 lives."""

    def mark(self, doing: str) -> None:
        self.count, self.doing, self.since = self.count + 1, doing, time.monotonic()


def blamed(own: Beat, seen: Iterable[Seen], *, now: float, silence_seconds: float) -> list[tuple[Beat, str]]:
    """Who holds this rank up, with what is known of it: those that give no sign of life; else those that have entered
    fewer operations than this one; nobody where this rank itself is among the last."""
    others = list(seen)
    silent = [one.beat for one in others if now - one.changed_at >= silence_seconds]
    if silent:
        return [(beat, state_of(beat, own.machine)) for beat in silent]
    fewest = min([own.count, *(one.beat.count for one in others)])
    behind = [one.beat for one in others if one.beat.count == fewest]
    if own.count == fewest:
        return []
    return [(beat, f"{STANDS_STILL} {beat.still_seconds:.0f} s") for beat in behind]


def machine_here() -> str:
    """This boot of this machine, and the namespaces of this process: containers number their processes anew."""
    told = []
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        told += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    return " ".join(told) or socket.gethostname()


def state_of(beat: Beat, own_machine: str) -> str:
    """What has become of a rank that gives no sign of life; more is known where it runs on this machine."""
    if beat.machine != own_machine:
        return "gives no sign of life: its process or its node is gone, or the link to it is cut"
    try:
        text = Path(f"/proc/{beat.pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return GONE
    state = text.rpartition(")")[2].split()[0]
    states = {"T": "is stopped (SIGSTOP)", "Z": GONE, "D": "waits for a disk or a driver"}
    return states.get(state, "gives no sign of life, though its process is there")


def lost_error(blame: list[tuple[Beat, str]], own: Beat, *, where: str) -> RankLost:
    """The error that names them. Their stacks are part of the message where they could still tell them."""
    parts = []
    for beat, state in blame:
        # What it said last may be old: others' beats are read only by a rank that waits.
        known = f"; it was last heard of in step {beat.step + 1}: {beat.doing}" if beat.step or not own.step else ""
        parts.append(f"{beat} {state}{known}")
        if state.startswith(STANDS_STILL):
            parts += [f"    {line}" for line in beat.stack]
    what = "\n  ".join(parts)
    return RankLost(
        f"{what}\n  (rank {own.rank} on {own.host}, in step {own.step + 1}, waited {own.still_seconds:.0f} s for it: "
        f"{own.doing})",
        expected="every rank at work",
        fix="look on that host for what happened to it (dmesg for a lack of memory, nvidia-smi for a card that fell "
        f"off, its network link); go on from the newest checkpoint with: zhibei launch --resume {where or 'RUN_DIR'}",
        where=where,
    )


def stack_of_main() -> tuple[str, ...]:
    """Where the main thread of this process stands, innermost last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ()
    frames = traceback.extract_stack(frame)[-MOST_FRAMES:]
    told = [f"{one.filename}:{one.lineno} {one.name}: {one.line or ''}".rstrip(": ") for one in frames]
    return tuple(line for line in told if not line.startswith("<frozen"))


class Pulse:
    """The beats of this rank and its watch over the others, in threads of their own.

    `on_end` is called once, from a thread, when this rank has waited in vain; it tells the error and returns the exit
    code with which the process ends, since a main thread that hangs inside an operation cannot raise anything.
    """

    def __init__(self, store: Store, *, rank: int, world: int, patience_seconds: float) -> None:
        self.store, self.rank, self.world, self.patience_seconds = store, rank, world, patience_seconds
        self.progress = Progress()
        self.interval = min(BEAT_SECONDS, patience_seconds / BEATS_PER_PATIENCE)
        self.silence_seconds = min(SILENCE_SECONDS, 0.75 * patience_seconds)
        self.folder: Path | None = None
        self.on_end: Callable[[UserError], int] = _print_and_code
        self._seen: dict[int, Seen] = {}
        self._left: dict[str, dict] = {}
        self._number, self._stored_at, self._read_at, self._always_reads = 0, time.monotonic(), 0.0, False
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._host, self._machine = socket.gethostname(), machine_here()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]

    def start(self) -> None:
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(self.own())))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more beats; waits for a beat that is under way, unless the store does not answer any more."""
        self._ended.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=max(5.0, 2 * self.interval))

    def own(self) -> Beat:
        still = time.monotonic() - self.progress.since
        told = stack_of_main() if still > max(2.0, self.silence_seconds / 3) else ()
        now = self.progress
        return Beat(
            rank=self.rank,
            host=self._host,
            pid=os.getpid(),
            number=self._number,
            count=now.count,
            step=now.step,
            doing=now.doing,
            still_seconds=still,
            stack=told,
            machine=self._machine,
        )

    def explain(self, *, beats: int = BEATS_TO_LOOK) -> UserError | None:
        """Why an operation among ranks failed, as far as the others show it: the fault that ended one of them, or who
        is gone. Takes a few beats of time, in which a launcher that ends the other ranks is not obeyed."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not self._ending.acquire(blocking=False):
            time.sleep(10 * self.interval)  # the watching thread is about to end this process and tells why
        self._always_reads = True
        started = time.monotonic()
        while time.monotonic() - started < beats * self.interval:
            time.sleep(self.interval / 2)
            if self._read_at < started:
                continue
            fault = self._fault_of_another()
            if fault is not None:
                return fault
            gone = [(beat, state) for beat, state in self._states() if state == GONE]
            if gone:
                return self._lost(gone)
        now = time.monotonic()
        out_of_reach = self._out_of_reach(now, seconds=beats * self.interval / 2)
        if out_of_reach:
            return self._lost(out_of_reach)
        # The others beat on while they look for the culprit, as this one does.
        silent_seconds = (beats - 2) * self.interval
        silent = [(b, state) for b, state in self._states() if now - self._seen[b.rank].changed_at >= silent_seconds]
        return self._lost(silent) if silent else None

    def _states(self) -> list[tuple[Beat, str]]:
        """What seems to have become of each other rank that has not said why it ends."""
        beats = [one.beat for one in list(self._seen.values()) if f"left/{one.beat.rank}" not in self._left]
        return [(beat, state_of(beat, self._machine)) for beat in beats]

    def is_first_of_those_left(self, blame_ranks: set[int]) -> bool:
        """Whether this rank is the one to speak, where several say the same."""
        return all(self.rank <= rank for rank in range(self.world) if rank not in blame_ranks)

    def _beat(self) -> None:
        while not self._ended.wait(self.interval):
            self._number += 1
            with suppress(RuntimeError):
                self.store.set(f"beat/{self.rank}", json.dumps(asdict(self.own())))
                if self._always_reads or time.monotonic() - self.progress.since > 2 * self.interval:
                    self._read()
                self._stored_at = time.monotonic()

    def _read(self) -> None:
        """Only here is anything asked of the store: behind a link that is cut an answer never comes, and this thread
        alone waits for it."""
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        keys = [f"beat/{rank}" for rank in ranks]
        if not keys or not self.store.check(keys):
            return
        now = time.monotonic()
        for rank, text in zip(ranks, self.store.multi_get(keys), strict=True):
            told = json.loads(text)
            beat = Beat(**{**told, "stack": tuple(told["stack"])})
            known = self._seen.get(rank)
            is_same = known is not None and known.beat.number == beat.number
            self._seen[rank] = Seen(beat, known.changed_at if is_same and known is not None else now)
        ended = [key for key in (f"left/{rank}" for rank in ranks) if self.store.check([key])]
        texts = self.store.multi_get(ended) if ended else []
        self._left = {key: json.loads(text) for key, text in zip(ended, texts, strict=True)}
        self._read_at = time.monotonic()

    def _fault_of_another(self) -> UserError | None:
        for key, told in list(self._left.items()):
            if told.get("fault"):
                fault = from_told(told["fault"])
                fault.what = f"rank {key.partition('/')[2]} on {told['host']}: {fault.what}"
                return fault
        return None

    def _out_of_reach(self, now: float, *, seconds: float) -> list[tuple[Beat, str]]:
        """The store itself does not answer: the node that keeps it is gone, and so are the ranks there."""
        if now - self._stored_at < seconds:
            return []
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        state = f"cannot be reached, nor can the meeting point {address}: that node is down, or the link to it is cut"
        there = [one.beat for one in self._seen.values() if one.beat.rank == 0]
        return [(beat, state) for beat in there] or [(Beat(0, str(os.environ.get("MASTER_ADDR")), 0), state)]

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if now - before > 10 * self.interval:
                # This process itself was stopped, or had no core: what it did not see meanwhile is no silence.
                self._stored_at = now
                for one in self._seen.values():
                    one.changed_at = now
                before = now
                continue
            before = now
            still = now - self.progress.since
            if still >= self.silence_seconds / 2:
                self._write_stack()
            blame = self._verdict(now, still)
            if blame:
                self._give_up(self._lost(blame))
                return

    def _verdict(self, now: float, still: float) -> list[tuple[Beat, str]]:
        if still < self.silence_seconds:
            return []
        # Rank 0 falls silent together with its store: that no answer comes at all says more.
        out_of_reach = self._out_of_reach(now, seconds=0.8 * self.silence_seconds)
        if out_of_reach:
            return out_of_reach
        blame = blamed(self.own(), list(self._seen.values()), now=now, silence_seconds=self.silence_seconds)
        is_silent = any(now - self._seen[beat.rank].changed_at >= self.silence_seconds for beat, _ in blame)
        gives_up = still >= self.patience_seconds and not self.progress.is_patient
        return blame if is_silent or gives_up else []

    def _lost(self, blame: list[tuple[Beat, str]]) -> RankLost:
        error = lost_error(blame, self.own(), where=str(self.folder or ""))
        error.is_told_here = self.is_first_of_those_left({beat.rank for beat, _ in blame})
        return error

    def _give_up(self, error: UserError) -> None:
        if not self._ending.acquire(blocking=False):
            return
        error = self._fault_of_another() or error
        self._write_stack()
        code = self.on_end(error)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)

    def _write_stack(self) -> None:
        """Where this rank stands, into ranks/rank-N.json of the run directory, for whoever looks for the cause."""
        if self.folder is None or not self.folder.is_dir():
            return
        own = self.own()
        own = replace(own, stack=own.stack or stack_of_main())
        with suppress(OSError):
            place = self.folder / "ranks"
            place.mkdir(exist_ok=True)
            text = json.dumps({**asdict(own), "time": time.time()}, indent=2)
            (place / f"rank-{self.rank}.json").write_text(text, encoding="utf-8")


def _print_and_code(error: UserError) -> int:
    if getattr(error, "is_told_here", True):
        sys.stderr.write(f"{error}\n")
    return error.exit_code
