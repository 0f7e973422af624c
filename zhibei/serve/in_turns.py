"""An engine of a speaker that can only stream: answers take turns, a piece each. Knows no model.

For models that run elsewhere than in `zhibei.generate.engine`, such as GGUF files in llama.cpp.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from zhibei.config.errors import UserError
from zhibei.generate.answers import Piece
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import Prompt

_APART = 0x9E3779B97F4A7C15
"""Far from what a person adds to a seed (the fractional part of the golden ratio)."""


class InTurns:
    """`slots` answers under way at most; each step advances every one of them by one piece of text.

    What such a speaker cannot report (alternatives of a token) or obey (a mask) is refused when it is submitted.
    """

    def __init__(self, speaker: Any, *, name: str, slots: int = 1) -> None:
        self._speaker, self._name, self._slots = speaker, name, slots
        self._next_id = 0
        self._waiting: deque[tuple[int, Any]] = deque()
        self._active: dict[int, Iterator[Piece]] = {}

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Any) -> int:
        """Queue an answer; its id. Raises UserError for what the speaker cannot do."""
        for name in ("top_logprobs", "mask"):
            if getattr(request, name, None):
                raise UserError(
                    f"{name} was asked of {self._name}",
                    expected="an engine that reports and shapes its distribution",
                    fix=f"serve the Hugging Face folder in place of this file, or leave out {name}",
                    where=name,
                )
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def step(self) -> Sequence[tuple[int, Piece]]:
        """The next piece of every answer under way; the last piece of one carries the whole Answer."""
        while self._waiting and len(self._active) < self._slots:
            id, request = self._waiting.popleft()
            self._active[id] = self._speaker.stream(Prompt(list(request.prompt)), _own_draws(request))
        pieces: list[tuple[int, Piece]] = []
        for id, stream in list(self._active.items()):
            piece = next(stream)
            pieces.append((id, piece))
            if piece.answer is not None:
                self.cancel(id)
        return pieces

    def cancel(self, id: int) -> None:
        """Give up an answer, waiting or under way."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != id)
        stream = self._active.pop(id, None)
        if stream is not None:
            stream.close()  # type: ignore[attr-defined]


def _own_draws(request: Any) -> SamplingOptions:
    """Choices of one request draw differently; a speaker that streams knows seeds and no numbers of rows."""
    return replace(request.options, seed=(request.options.seed + request.number * _APART) % 2**63)
