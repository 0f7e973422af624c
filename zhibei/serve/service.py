"""The paths of the server: OpenAI's API, health and metrics. An ASGI application; knows no door and no sockets."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zhibei import __version__
from zhibei.serve import said
from zhibei.serve.asked import Asked, read_body, read_chat, read_completion, read_embedding
from zhibei.serve.chat import Speaker
from zhibei.serve.embedding import as_written, embed
from zhibei.serve.exchange import Exchange, called, requests_for
from zhibei.serve.gatekeeper import Receive, Scope, Send, Visit, body_of, send_bytes, send_json
from zhibei.serve.hosted import Hosted, find
from zhibei.serve.metrics import Metrics
from zhibei.serve.refusals import Refusal, leaving
from zhibei.serve.reply import Reply, while_client_waits
from zhibei.serve.settings import ServerSettings
from zhibei.serve.shaped import mask_maker

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
MOST_TO_DRAW = 64
"""Answers of one request: prompts times choices."""
OPEN_PATHS = frozenset({"/health"})


class Service:
    """`pages` are more paths for GET. `on_begin` runs in the event loop before the first request."""

    def __init__(
        self,
        hosted: Mapping[str, Hosted],
        settings: ServerSettings,
        metrics: Metrics,
        *,
        pages: Mapping[str, Handler] | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        self._hosted, self._settings, self._metrics = dict(hosted), settings, metrics
        self._on_begin = on_begin
        self.is_leaving = False
        self._begun = int(time.time())
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._complete},
            "/v1/embeddings": {"POST": self._embed},
            "/v1/models": {"GET": self._models},
            "/health": {"GET": self._health},
            "/metrics": {"GET": self._show_metrics},
            **{path: {"GET": handler} for path, handler in (pages or {}).items()},
        }

    def leave(self) -> None:
        """Begin nothing new: running answers end, requests get 503."""
        self.is_leaving = True
        for hosted in self._hosted.values():
            hosted.worker.drain()

    @property
    def num_open(self) -> int:
        """Answers under way and waiting."""
        return sum(worker.num_open for worker in {hosted.worker for hosted in self._hosted.values()})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path, method = scope["path"], scope["method"]
        if path.startswith("/v1/models/"):
            methods: dict[str, Handler] = {"GET": self._model}
        elif path in self._routes:
            methods = self._routes[path]
        else:
            raise Refusal(404, f"there is no path {path[:200]}; see {', '.join(self._routes)}", None, "not_found")
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = ", ".join(methods)
            raise Refusal(405, f"{path[:200]} takes {allowed}, not {method[:20]}", None, "method", {"Allow": allowed})
        await handler(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup" and self._on_begin is not None:
                self._on_begin()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    # --- answers ---

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = read_chat(read_body(await body_of(receive)))
        hosted = self._find(asked, scope["visit"])
        prompts = [await asyncio.to_thread(hosted.chat_prompt, asked.messages)]
        await self._answer(asked, hosted, prompts, (scope, receive, send))

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = read_completion(read_body(await body_of(receive)))
        hosted = self._find(asked, scope["visit"])
        prompts = [await asyncio.to_thread(hosted.text_prompt, prompt) for prompt in asked.prompts]
        await self._answer(asked, hosted, prompts, (scope, receive, send))

    def _find(self, asked: Any, visit: Visit) -> Hosted:
        hosted = find(self._hosted, asked.model)
        visit.facts["model"] = hosted.name
        if asked.user:
            visit.facts["user"] = asked.user
        if self.is_leaving:
            raise leaving()
        return hosted

    async def _answer(
        self, asked: Asked, hosted: Hosted, prompts: Sequence[list[int]], ends: tuple[Scope, Receive, Send]
    ) -> None:
        scope, receive, send = ends
        param = "messages" if asked.messages else "prompt"
        if len(prompts) * asked.n > MOST_TO_DRAW:
            raise Refusal(
                400, f"{len(prompts)} prompts times n {asked.n} exceed {MOST_TO_DRAW} answers", "n", "too_many"
            )
        most = self._settings.most_new_tokens
        budgets = [hosted.budget(len(prompt), asked.max_tokens, param=param, most=most) for prompt in prompts]
        mask = await asyncio.to_thread(mask_maker, asked.response_format, hosted)
        requests = requests_for(asked, hosted, prompts, budgets, mask)
        exchange = Exchange(hosted, requests, seconds=self._settings.request_seconds)
        heading = said.Heading(
            f"{'chat' * bool(asked.messages)}cmpl-{secrets.token_hex(12)}", hosted.name, bool(asked.messages)
        )
        reply = Reply(asked, hosted, heading, sum(map(len, prompts)), scope["visit"], self._metrics)
        give = reply.stream(exchange, send) if asked.stream else reply.whole(exchange, send)
        try:
            await while_client_waits(give, receive)
        finally:
            if exchange.give_up():
                self._metrics.add("zhibei_answers_cancelled_total", model=hosted.name)

    async def _embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = read_embedding(read_body(await body_of(receive)))
        hosted = self._find(asked, scope["visit"])
        if not isinstance(hosted.speaker, Speaker):
            raise Refusal(
                400, f"{hosted.name} gives no hidden states, so there are no embeddings", "model", "no_embeddings"
            )
        rows = [await asyncio.to_thread(hosted.text_prompt, one) for one in asked.inputs]
        for row in rows:
            hosted.budget(len(row), None, param="input", most=None)
        vectors = await called(
            hosted, lambda: embed(hosted.speaker.model, rows), seconds=self._settings.request_seconds
        )
        data = [
            {"object": "embedding", "index": number, "embedding": as_written(vector, asked.encoding_format)}
            for number, vector in enumerate(vectors)
        ]
        num_tokens = sum(map(len, rows))
        used = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        await send_json(send, {"object": "list", "data": data, "model": hosted.name, "usage": used})

    # --- about the server ---

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        data = [self._card(hosted) for hosted in self._hosted.values()]
        await send_json(send, {"object": "list", "data": data})

    async def _model(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, self._card(find(self._hosted, scope["path"].removeprefix("/v1/models/"))))

    def _card(self, hosted: Hosted) -> dict[str, Any]:
        more = {"context_tokens": hosted.context_tokens, "template": hosted.speaker.template.name}
        parent = {"parent": Path(hosted.base).name} if hosted.base else {}
        return {
            "id": hosted.name,
            "object": "model",
            "created": self._begun,
            "owned_by": "zhibei",
            **parent,
            **more,
            "has_report": hosted.report is not None,
            "notes": list(hosted.notes),
        }

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed = {hosted.name: hosted.worker.failure for hosted in self._hosted.values() if hosted.worker.failure}
        status = "failed" if failed else "draining" if self.is_leaving else "ok"
        document = {"status": status, "version": __version__, "models": list(self._hosted), "failed": failed}
        await send_json(send, document, status=200 if status == "ok" else 503)

    async def _show_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = {hosted.name: hosted.worker.counts(hosted.lane) for hosted in self._hosted.values()}
        gauges = {
            "zhibei_answers_active": ("Answers that hold a slot.", {name: pair[0] for name, pair in counts.items()}),
            "zhibei_answers_waiting": ("Answers waiting for a slot.", {name: pair[1] for name, pair in counts.items()}),
        }
        text = self._metrics.text(gauges).encode()
        await send_bytes(send, text, kind="text/plain; version=0.0.4; charset=utf-8")
