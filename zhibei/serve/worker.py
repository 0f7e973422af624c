"""One thread that drives the engines of one set of weights; requests join and leave at any time. Knows no HTTP.

An engine is not safe for several threads, and adapters of one base are switched between steps, so everything that
touches the weights happens in this thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from zhibei.config.errors import UserError

Deliver = Callable[[Any], None]
"""Gets each Piece of an answer, or the exception that ended it; called in the worker's thread."""


class AnswerEngine(Protocol):
    """What answers requests, a step at a time. `zhibei.generate.engine.Engine` is one."""

    def submit(self, request: Any) -> int: ...
    def step(self) -> Sequence[tuple[int, Any]]: ...
    def cancel(self, id: int) -> None: ...
    @property
    def num_active(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...


class QueueFull(Exception):
    """As many answers are open as may be; `num_open` of them."""

    def __init__(self, num_open: int) -> None:
        super().__init__(f"{num_open} answers are open")
        self.num_open = num_open


class Draining(Exception):
    """No new answers are begun."""


@dataclass(eq=False)
class Job:
    """One answer, or one `call`, on its way. Handles are given back to who asked, to cancel with."""

    engine: str
    request: Any
    deliver: Deliver
    call: Callable[[], Any] | None = None
    id: int | None = None
    is_done: bool = False


@dataclass
class Lane:
    """An engine and what makes the weights its own (its adapter) before a step."""

    engine: AnswerEngine
    activate: Callable[[], None] = lambda: None
    jobs: dict[int, Job] = field(default_factory=dict)


class Worker:
    """`lanes` share weights: at most one of them is active at a time, and each gets a step in turn.

    `most_open` limits answers under way and waiting, all lanes together. `around` is a context for the thread's life
    (the model set up to answer).
    """

    def __init__(self, lanes: Mapping[str, Lane], *, most_open: int, around: Callable[[], Any] | None = None) -> None:
        self._lanes, self._most_open, self._around = dict(lanes), most_open, around
        self._changed = threading.Condition()
        self._commands: deque[tuple[str, Job]] = deque()
        self._num_open = 0
        self._stopping = self._draining = False
        self._last_lane = ""
        self.failure = ""
        self._thread = threading.Thread(target=self._run, name="zhibei-engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Answers under way and waiting."""
        return self._num_open

    def counts(self, lane: str) -> tuple[int, int]:
        """(answers that hold a slot, answers that wait for one) of a lane."""
        engine = self._lanes[lane].engine
        return engine.num_active, engine.num_waiting

    def submit(self, engine: str, requests: Sequence[tuple[Any, Deliver]]) -> list[Job]:
        """Begin all of these answers, or none. Raises QueueFull or Draining."""
        jobs = [Job(engine, request, deliver) for request, deliver in requests]
        return self._enter(jobs)

    def call(self, engine: str, function: Callable[[], Any], deliver: Deliver) -> Job:
        """Run something else on the weights, between two steps; its result is delivered."""
        return self._enter([Job(engine, None, deliver, call=function)])[0]

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up these answers where they have not ended; their slots are free after the step under way."""
        with self._changed:
            self._commands.extend(("cancel", job) for job in jobs)
            self._changed.notify()

    def drain(self) -> None:
        """Begin nothing new; what is under way goes on."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """End the thread after the step under way; open answers get Draining."""
        with self._changed:
            self._stopping = self._draining = True
            self._changed.notify()
        self._thread.join(timeout=60)

    def _enter(self, jobs: list[Job]) -> list[Job]:
        with self._changed:
            if self._draining or self.failure:
                raise Draining
            # A request for more answers than the server ever holds may run alone.
            if self._num_open and self._num_open + len(jobs) > self._most_open:
                raise QueueFull(self._num_open)
            self._num_open += len(jobs)
            self._commands.extend(("begin", job) for job in jobs)
            self._changed.notify()
        return jobs

    # --- in the thread ---

    def _run(self) -> None:
        try:
            if self._around is None:
                self._serve()
            else:
                with self._around():
                    self._serve()
        except BaseException as error:  # nobody else would hear of it: every waiting client does, and /health
            self.failure = f"{type(error).__name__}: {error}"
            self._give_up(error)
        else:
            self._give_up(Draining())

    def _serve(self) -> None:
        acts = {"begin": self._begin, "cancel": self._cancel}
        while True:
            with self._changed:
                while not self._commands and not self._has_work() and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                commands = list(self._commands)
                self._commands.clear()
            for name, job in commands:
                acts[name](job)
            for name, lane in self._lanes.items():
                if lane.jobs:
                    self._step(name, lane)

    def _has_work(self) -> bool:
        return any(lane.jobs for lane in self._lanes.values())

    def _begin(self, job: Job) -> None:
        lane = self._lanes[job.engine]
        try:
            if job.call is not None:
                self._make_active(job.engine, lane)
                self._finish(job, job.call())
                return
            job.id = lane.engine.submit(job.request)
        except Exception as error:
            self._finish(job, error)
            return
        lane.jobs[job.id] = job

    def _cancel(self, job: Job) -> None:
        lane = self._lanes[job.engine]
        if job.is_done or job.id is None:
            return
        lane.jobs.pop(job.id)
        self._finish(job, None)
        lane.engine.cancel(job.id)

    def _step(self, name: str, lane: Lane) -> None:
        self._make_active(name, lane)
        try:
            pieces = lane.engine.step()
        except Exception as error:
            self._fail(lane, error)
            return
        for id, piece in pieces:
            job = lane.jobs.get(id)
            if job is None:
                continue
            if piece.answer is None:
                job.deliver(piece)
            else:
                del lane.jobs[id]
                self._finish(job, piece)

    def _make_active(self, name: str, lane: Lane) -> None:
        if self._last_lane != name:
            lane.activate()
            self._last_lane = name

    def _fail(self, lane: Lane, error: Exception) -> None:
        """A step that failed leaves no answer of its lane whole; the engine goes on without them.

        Where even giving up fails, or the fault is not one of a request, the thread ends and /health says so.
        """
        failed, lane.jobs = dict(lane.jobs), {}
        for id, job in failed.items():
            self._finish(job, error)
            lane.engine.cancel(id)
        if not isinstance(error, (UserError, MemoryError)) and "out of memory" not in str(error):
            raise error

    def _finish(self, job: Job, last: Any) -> None:
        job.is_done = True
        with self._changed:
            self._num_open -= 1
        if last is not None:
            job.deliver(last)

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            self._draining = True
            waiting = [job for name, job in self._commands if name == "begin"]
            self._commands.clear()
        for lane in self._lanes.values():
            waiting += lane.jobs.values()
            lane.jobs = {}
        for job in waiting:
            if not job.is_done:
                self._finish(job, error)
