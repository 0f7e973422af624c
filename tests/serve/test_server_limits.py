"""The door and the queue of the server, on an engine that answers when the test lets it."""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest

from tests.serve.live import serving, wait_for
from zhibei.config.errors import UserError
from zhibei.generate.answers import Answer, Piece
from zhibei.serve.hosted import Hosted
from zhibei.serve.settings import ServerSettings
from zhibei.serve.worker import Lane, Worker

pytest.importorskip("uvicorn")
BODY = {"model": "slow", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
KEY = "a-key-of-some-length"


class SlowEngine:
    """One slot; a letter a step, and a step only while `go` is set."""

    def __init__(self) -> None:
        self.go, self.cancelled, self.fault = threading.Event(), [], None
        self._waiting: deque = deque()
        self._active: dict = {}
        self._id = 0

    num_active = property(lambda self: len(self._active))
    num_waiting = property(lambda self: len(self._waiting))

    def submit(self, request) -> int:
        self._id += 1
        self._waiting.append((self._id, request.options.max_new_tokens))
        return self._id

    def step(self):
        if not self.go.wait(0.01):
            return []
        if self.fault:
            raise self.fault
        while self._waiting and not self._active:
            id, budget = self._waiting.popleft()
            self._active[id] = (budget, 0)
        pieces = []
        for id, (budget, done) in list(self._active.items()):
            self._active[id] = (budget, done + 1)
            answer = None
            if done + 1 == budget:
                del self._active[id]
                answer = Answer([5] * budget, [0.0] * budget, [0.0] * budget, "length", budget, "a" * budget)
            pieces.append((id, Piece("a", answer)))
        return pieces

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)
        self._active.pop(id, None)
        self._waiting = deque(entry for entry in self._waiting if entry[0] != id)


class Parrot:
    """A speaker whose prompt is a token a message."""

    name, stop_ids, context_tokens, notes = "slow", (2,), 10_000, ()
    template = SimpleNamespace(name="none", stop_strings=())

    def prompt(self, messages, options):
        return SimpleNamespace(tokens=[1] * len(messages), num_dropped=0)

    def count(self, messages) -> int:
        return len(messages)

    def decode(self, tokens) -> str:
        return "a" * len(tokens)


@contextmanager
def slow(**settings):
    engine = SlowEngine()
    worker = Worker({"slow": Lane(engine)}, most_open=1 + settings.pop("most_waiting", 2))
    hosted = {"slow": Hosted(name="slow", speaker=Parrot(), worker=worker, lane="slow", path="slow")}
    with serving(hosted, **settings) as live:
        yield live, engine


def in_background(function, *arguments, **named):
    found: list = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments, **named)), daemon=True)
    thread.start()
    return thread, found


def test_beyond_the_queue_comes_429_with_a_time_to_wait_and_the_others_are_answered():
    with slow(most_waiting=2) as (live, engine):
        waiting = [in_background(live.post, "/v1/chat/completions", BODY) for _ in range(3)]
        wait_for(lambda: live.hosted["slow"].worker.num_open == 3)
        refused = live.post("/v1/chat/completions", BODY)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        engine.go.set()
        for thread, found in waiting:
            thread.join(30)
            assert found[0].json()["choices"][0]["message"]["content"] == "aaaaa"
        assert live.post("/v1/chat/completions", BODY).status_code == 200


def test_all_choices_of_a_request_are_begun_or_none():
    with slow(most_waiting=2) as (live, engine):
        thread, found = in_background(live.post, "/v1/chat/completions", BODY)
        wait_for(lambda: live.hosted["slow"].worker.num_open == 1)
        assert live.post("/v1/chat/completions", {**BODY, "n": 3}).status_code == 429
        assert live.hosted["slow"].worker.num_open == 1
        engine.go.set()
        thread.join(30)
        assert found[0].status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_when_the_client_leaves_its_slot_is_free(streams):
    with slow() as (live, engine):
        raw = httpx.Request(
            "POST", live.url + "/v1/chat/completions", json={**BODY, "max_tokens": 5000, "stream": streams}
        )
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = live.say(f"{head}Content-Length: {len(raw.content)}\r\n\r\n".encode() + raw.content)
        wait_for(lambda: engine.num_waiting == 1)
        connection.close()
        wait_for(lambda: engine.cancelled == [1])
        live.wait_until_idle()
        engine.go.set()
        assert live.post("/v1/chat/completions", BODY).status_code == 200
        assert 'answers_cancelled_total{model="slow"} 1' in live.get("/metrics").text
        assert live.log[0]["status"] == 499 or streams


def test_an_answer_that_takes_too_long_is_given_up():
    with slow(request_seconds=0.2) as (live, engine):
        assert live.post("/v1/chat/completions", BODY).status_code == 504
        live.wait_until_idle()
        streamed = live.post("/v1/chat/completions", {**BODY, "stream": True})
        assert streamed.status_code == 200, "a stream has begun before time is up"
        assert '"code": "timeout"' in streamed.text
        assert "[DONE]" not in streamed.text
        live.wait_until_idle()
        assert engine.cancelled == [1, 2]


def test_a_server_told_to_leave_ends_what_runs_and_begins_nothing():
    with slow() as (live, engine):
        thread, found = in_background(live.post, "/v1/chat/completions", BODY)
        wait_for(lambda: live.hosted["slow"].worker.num_open == 1)
        live.server.leave_soon()
        wait_for(lambda: live.get("/health").status_code == 503)
        assert live.get("/health").json()["status"] == "draining"
        refused = live.post("/v1/chat/completions", BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        engine.go.set()
        thread.join(30)
        assert found[0].json()["choices"][0]["message"]["content"] == "aaaaa"


def test_a_fault_of_one_step_is_told_and_the_engine_goes_on():
    with slow() as (live, engine):
        engine.fault = UserError("not finite", expected="finite", fix="look", where="answer")
        engine.go.set()
        failed = live.post("/v1/chat/completions", BODY)
        assert failed.status_code == 500
        assert "not finite" in failed.json()["error"]["message"]
        engine.fault = None
        assert live.post("/v1/chat/completions", BODY).status_code == 200


def test_an_engine_that_breaks_is_told_by_health():
    with slow() as (live, engine):
        engine.fault = RuntimeError("the device is gone")
        engine.go.set()
        assert live.post("/v1/chat/completions", BODY).status_code == 500
        health = live.get("/health")
        assert health.status_code == 503
        assert "the device is gone" in health.json()["failed"]["slow"]
        assert live.post("/v1/chat/completions", BODY).status_code == 503


def test_keys():
    with slow(api_keys=(KEY, "another-key")) as (live, engine):
        engine.go.set()
        bearer = {"Authorization": f"Bearer {KEY}"}
        assert live.post("/v1/chat/completions", BODY, headers=bearer).status_code == 200
        assert (
            live.post("/v1/chat/completions", BODY, headers={"Authorization": "bearer another-key"}).status_code == 200
        )
        for header in ({}, {"Authorization": KEY}, {"Authorization": "Bearer"}, {"Authorization": "Basic " + KEY}):
            refused = live.post("/v1/chat/completions", BODY, headers=header)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        wrong = [KEY + "x", KEY[:-1], "é" * 20]
        for key in wrong:
            given = {b"authorization": b"Bearer " + key.encode()}
            assert live.post("/v1/chat/completions", BODY, headers=given).status_code == 401
        assert live.get("/v1/models").status_code == live.get("/metrics").status_code == 401
        assert live.get("/health").status_code == 200, "those who watch over it need no key"
        assert KEY not in str(live.log)


def test_sizes_kinds_paths_and_methods():
    with slow(most_body_bytes=2000) as (live, _):
        big = {**BODY, "messages": [{"role": "user", "content": "x" * 3000}]}
        assert live.post("/v1/chat/completions", big).status_code == 413
        url = live.url + "/v1/chat/completions"
        chunks = httpx.post(url, content=iter([b"x" * 500] * 9), headers={"Content-Type": "application/json"})
        assert chunks.status_code == 413, "without a length the bytes are counted"
        as_text = httpx.post(url, content=b"{}", headers={"Content-Type": "text/plain"})
        assert as_text.status_code == 415, "browsers send text/plain from any page"
        assert live.get("/v1/nothing").status_code == 404
        assert live.get("/../../etc/passwd").status_code == 404
        wrong = live.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert live.post("/v1/chat/completions", {}).json()["error"]["param"] == "model"
        assert live.get("/health").status_code == 200


def test_pages_of_the_web_cannot_reach_a_server_on_localhost():
    with slow() as (live, _):
        rebound = live.get("/v1/models", headers={"Host": "evil.example"})
        assert rebound.status_code == 403
        from_page = live.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert from_page.status_code == 403
        assert "access-control-allow-origin" not in from_page.headers
        own = live.get("/v1/models", headers={"Origin": live.url})
        assert own.status_code == 200


def test_a_page_that_was_named_may():
    with slow(cors_origins=("https://good.example",)) as (live, _):
        allowed = live.get("/v1/models", headers={"Origin": "https://good.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://good.example"
        asked = httpx.options(
            live.url + "/v1/models",
            headers={"Origin": "https://good.example", "Access-Control-Request-Method": "POST"},
        )
        assert (asked.status_code, asked.headers["access-control-allow-methods"]) == (204, "GET, POST")


def test_requests_that_dribble_in_are_closed_and_others_are_served():
    with slow(read_seconds=0.3) as (live, engine):
        engine.go.set()
        half_head = [live.say(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc") for _ in range(20)]
        half_body = live.say(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        nothing = live.say(b"")
        assert live.post("/v1/chat/completions", BODY).status_code == 200
        for connection in (*half_head, nothing):
            connection.settimeout(5)
            assert connection.recv(100) == b""
        assert half_body.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\xff" * 50 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http_harms_nobody(raw):
    with slow(read_seconds=0.5) as (live, _):
        connection = live.say(raw)
        connection.settimeout(5)
        with suppress(ConnectionResetError):
            assert connection.recv(2000)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 200")
        assert live.get("/health").status_code == 200


def test_a_client_that_takes_nothing_is_let_go():
    with slow(read_seconds=0.5) as (live, engine):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(live.address)
        content = httpx.Request("POST", live.url, json={**BODY, "max_tokens": 9000, "stream": True}).content
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        engine.go.set()
        live.wait_until_idle()
        wait_for(lambda: len(live.log) == 1)
        connection.close()


def test_ids_and_lines_of_the_log():
    with slow() as (live, engine):
        engine.go.set()
        own = live.post("/v1/chat/completions", {**BODY, "user": "ann"}, headers={"X-Request-Id": "mine-1"})
        assert own.headers["x-request-id"] == "mine-1"
        other = live.post("/v1/chat/completions", BODY, headers={"X-Request-Id": 'bad"id\\ with spaces'})
        assert other.headers["x-request-id"].startswith("req-")
        wait_for(lambda: len(live.log) == 2)
        line = live.log[0]
        assert (line["request"], line["user"], line["model"], line["status"]) == ("mine-1", "ann", "slow", 200)
        assert (line["prompt_tokens"], line["answer_tokens"]) == (1, 5)


def test_metrics_count_requests_tokens_and_seconds():
    with slow() as (live, engine):
        engine.go.set()
        live.post("/v1/chat/completions", BODY)
        live.get("/no/such/path")
        text = live.get("/metrics").text
        assert 'zhibei_requests_total{path="/v1/chat/completions",status="200"} 1' in text
        assert 'zhibei_requests_total{path="other",status="404"} 1' in text
        assert 'zhibei_answer_tokens_total{model="slow"} 5' in text
        assert 'zhibei_request_seconds_count{path="/v1/chat/completions"} 1' in text
        assert 'zhibei_answers_active{model="slow"} 0' in text
        for line in text.splitlines():
            assert line.startswith("#") or float(line.rsplit(" ", 1)[1]) >= 0


def test_a_limit_of_the_operator_is_kept():
    with slow(most_new_tokens=8) as (live, engine):
        engine.go.set()
        assert live.post("/v1/chat/completions", {**BODY, "max_tokens": 9}).status_code == 400
        without = live.post("/v1/chat/completions", {name: BODY[name] for name in ("model", "messages")})
        assert without.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": "192.168.1.5"},
        {"api_keys": ("short",)},
        {"api_keys": ("with a space in it",)},
        {"cors_origins": ("*",)},
        {"slots": 0},
        {"port": 70_000},
        {"request_seconds": 0},
        {"most_new_tokens": 0},
    ],
)
def test_settings_that_cannot_work_or_leave_the_server_open_are_refused(settings):
    with pytest.raises(UserError):
        ServerSettings(**settings)


def test_with_a_key_it_may_listen_elsewhere():
    assert not ServerSettings(host="0.0.0.0", api_keys=(KEY,)).is_local
    for host in ("127.0.0.1", "localhost", "::1", "127.3.4.5"):
        assert ServerSettings(host=host).is_local
