"""Answers on their way to a client: as one document or as events, while the client waits. Knows no model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from zhibei.generate.answers import Answer
from zhibei.serve import said
from zhibei.serve.asked import Asked
from zhibei.serve.exchange import Arrived, Exchange
from zhibei.serve.gatekeeper import Receive, Send, Visit, send_json
from zhibei.serve.hosted import Hosted
from zhibei.serve.metrics import Metrics
from zhibei.serve.refusals import Refusal

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


@dataclass
class Reply:
    """How one request is answered. `visit` is its line in the log."""

    asked: Asked
    hosted: Hosted
    heading: said.Heading
    num_prompt: int
    visit: Visit
    metrics: Metrics

    async def whole(self, exchange: Exchange, send: Send) -> None:
        """All answers in one document."""
        answers: dict[int, Answer] = {}
        async for arrived in exchange.pieces():
            if arrived.answer is not None:
                answers[arrived.choice] = arrived.answer
        make = said.chat_choice if self.heading.is_chat else said.text_choice
        choices = [make(number, answers[number], self._logprobs(answers[number])) for number in sorted(answers)]
        used = self._used([answers[number] for number in sorted(answers)])
        await send_json(send, self.heading.document(choices=choices, usage=used))

    async def stream(self, exchange: Exchange, send: Send) -> None:
        """Events as text comes. An error after the first event is an event too, and no [DONE] follows it."""
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        begun: set[int] = set()
        answers: list[Answer] = []
        try:
            async for arrived in exchange.pieces():
                self._note_first()
                if arrived.text or arrived.answer:
                    await send(_event(self._piece(arrived, is_first=arrived.choice not in begun)))
                    begun.add(arrived.choice)
                if arrived.answer is not None:
                    answers.append(arrived.answer)
        except Refusal as refusal:
            self.visit.facts["refused"] = refusal.code
            await send({**_event(refusal.body()), "more_body": False})
            return
        used = self._used(answers)
        if self.asked.include_usage:
            await send(_event(self.heading.event(choices=[], usage=used)))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _piece(self, arrived: Arrived, *, is_first: bool) -> dict[str, Any]:
        make = said.chat_piece if self.heading.is_chat else said.text_piece
        finish = arrived.answer.finish if arrived.answer else None
        # Log-probabilities come with an answer's last event: only then it is known which tokens are part of the text.
        logprobs = self._logprobs(arrived.answer) if arrived.answer else None
        piece = make(arrived.choice, arrived.text, finish=finish, is_first=is_first, logprobs=logprobs)
        more = {"usage": None} if self.asked.include_usage else {}
        return self.heading.event(choices=[piece], **more)

    def _logprobs(self, answer: Answer) -> Any:
        if self.asked.logprobs is None:
            return None
        make = said.token_rows if self.heading.is_chat else said.text_logprobs
        return make(answer, self.hosted, num_top=self.asked.logprobs)

    def _note_first(self) -> None:
        if "first_seconds" not in self.visit.facts:
            seconds = time.monotonic() - self.visit.begun
            self.visit.facts["first_seconds"] = round(seconds, 4)
            self.metrics.observe("zhibei_first_piece_seconds", seconds, model=self.hosted.name)

    def _used(self, answers: list[Answer]) -> dict[str, int]:
        num_answer = sum(len(answer.tokens) for answer in answers)
        self.visit.facts.update(prompt_tokens=self.num_prompt, answer_tokens=num_answer)
        self.metrics.add("zhibei_prompt_tokens_total", self.num_prompt, model=self.hosted.name)
        self.metrics.add("zhibei_answer_tokens_total", num_answer, model=self.hosted.name)
        return said.usage(self.num_prompt, num_answer)


async def while_client_waits(give: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `give` to its end, or until the client has left; then raises ConnectionResetError."""
    work, leaving = asyncio.ensure_future(give), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ConnectionResetError("the client left")
        work.result()
    finally:
        for task in (work, leaving):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(document: dict[str, Any]) -> dict[str, Any]:
    body = b"data: " + json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
    return {"type": "http.response.body", "body": body, "more_body": True}
