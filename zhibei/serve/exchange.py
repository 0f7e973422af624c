"""From a checked request to its answers: submitted, collected as they come, given up when nobody waits. Knows no HTTP.

One Exchange is one request with all its choices. It lives in the server's event loop; the worker's thread hands pieces
over through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zhibei.config.errors import UserError
from zhibei.generate.answers import Answer
from zhibei.serve.asked import Asked
from zhibei.serve.hosted import Hosted
from zhibei.serve.refusals import Refusal, busy, from_user_error, leaving
from zhibei.serve.worker import Draining, Job, QueueFull

MakeMask = Callable[[], Any] | None


@dataclass(frozen=True)
class Arrived:
    """Text of one choice; the last of a choice carries its Answer."""

    choice: int
    text: str
    answer: Answer | None


class Exchange:
    """Begins all choices at once or none. Raises Refusal when the queue is full or the server is leaving."""

    def __init__(self, hosted: Hosted, requests: Sequence[Any], *, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._hosted, self._deadline, self._seconds = hosted, time.monotonic() + seconds, seconds
        self._arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._num_left = len(requests)
        begin = [(request, self._deliver_to(number)) for number, request in enumerate(requests)]
        self._jobs: list[Job] = []
        try:
            self._jobs = hosted.worker.submit(hosted.lane, begin)
        except QueueFull as full:
            raise busy(full.num_open, seconds=1 + full.num_open // 8) from None
        except Draining:
            raise _gone(hosted) from None

    async def pieces(self) -> AsyncIterator[Arrived]:
        """What comes, until every choice has ended. Raises Refusal when time is up or the engine failed."""
        while self._num_left:
            try:
                left = self._deadline - time.monotonic()
                number, came = await asyncio.wait_for(self._arrived.get(), max(left, 0.001))
            except (TimeoutError, asyncio.TimeoutError):
                raise Refusal(504, f"no answer within {self._seconds:g} s", None, "timeout") from None
            if isinstance(came, BaseException):
                raise refusal_of(came, self._hosted)
            self._num_left -= came.answer is not None
            yield Arrived(number, came.text, came.answer)

    def give_up(self) -> bool:
        """Free the slots of what has not ended; whether there was any."""
        if not self._num_left:
            return False
        self._hosted.worker.cancel(self._jobs)
        return True

    def _deliver_to(self, number: int) -> Callable[[Any], None]:
        def deliver(came: Any) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (number, came))

        return deliver


async def called(hosted: Hosted, function: Callable[[], Any], *, seconds: float) -> Any:
    """The result of a function that runs on the worker's thread. Raises Refusal."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(came: Any) -> None:
        if not future.done():
            future.set_exception(came) if isinstance(came, BaseException) else future.set_result(came)

    def hand_over(came: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, came)

    try:
        hosted.worker.call(hosted.lane, function, hand_over)
        return await asyncio.wait_for(future, seconds)
    except QueueFull as full:
        raise busy(full.num_open, seconds=1 + full.num_open // 8) from None
    except (TimeoutError, asyncio.TimeoutError):
        raise Refusal(504, f"no answer within {seconds:g} s", None, "timeout") from None
    except Exception as error:
        raise refusal_of(error, hosted) from error


def requests_for(
    asked: Asked, hosted: Hosted, prompts: Sequence[list[int]], budgets: Sequence[int], mask: MakeMask
) -> list[Any]:
    """One engine request for each prompt and choice; choice c of a prompt draws as row c under the request's seed."""
    from zhibei.generate.engine import Request

    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    stops = tuple(dict.fromkeys((*asked.stop, *hosted.stop_strings(is_chat=bool(asked.messages)))))
    made = []
    for prompt, budget in zip(prompts, budgets, strict=True):
        options = replace(asked.options(max_new_tokens=budget, seed=seed), stop_strings=stops)
        for choice in range(asked.n):
            shaped = {"mask": mask()} if mask else {}
            made.append(
                Request(
                    prompt=prompt,
                    options=options,
                    stop_ids=hosted.speaker.stop_ids,
                    number=choice,
                    decode=hosted.speaker.decode,
                    top_logprobs=asked.logprobs or 0,
                    pieces=asked.stream,
                    **shaped,
                )
            )
    return made


def refusal_of(error: BaseException, hosted: Hosted) -> Refusal:
    """What a client hears of an error in the worker."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Draining):
        return _gone(hosted)
    if isinstance(error, UserError):
        return from_user_error(
            error,
            error.where if error.where.isidentifier() else None,
            status=400 if error.where.startswith(("prompt", "top_", "mask")) else 500,
        )
    return Refusal(
        500, f"the model's engine failed ({type(error).__name__}); the server's log says more", None, "engine"
    )


def _gone(hosted: Hosted) -> Refusal:
    if hosted.worker.failure:
        return Refusal(503, f"the engine of {hosted.name} has failed; /health says why", None, "engine_failed")
    return leaving()
