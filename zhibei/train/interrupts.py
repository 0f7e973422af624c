"""Signals that ask a run to save and stop. Knows nothing of what is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from zhibei.model.ranks import current

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Set by the first signal; read by the loop between steps. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def agree(self, number: float = 0.0) -> float:
        """Let every rank know of a signal that any of them got; all stop after the same step.

        In the same message the ranks add up `number`; returns the sum.
        """
        ranks = current()
        asked, total = ranks.sum_on_host(float(self.name is not None), number)
        if ranks.are_several and asked:
            self.name = next(name for name in ranks.gathered(self.name) if name is not None)
        return total


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 set the request instead of ending the process (main thread only)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and request:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    try:
        for each in STOPPING:
            before[each] = signal.signal(each, ask)
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
