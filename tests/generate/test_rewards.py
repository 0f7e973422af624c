"""Rewards: verifiers give what they promise, and a source that fails in any way is named instead of believed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from zhibei.config.errors import UserError
from zhibei.generate import rewards
from zhibei.generate.rewards import Answered, RewardSource, needs_references, reward_source, summed
from zhibei.generate.verifiers import contains, exact, last_number, same_number

ASKED = Answered(["2 + 2?", "3 + 3?"], ["It is 4.", "It is 5."], ["4", "#### 6"], [[1, 2], [1, 3]])


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 apples and 4", "4"), ("1,234.50 in all", "1234.50"), ("steps 1 2 #### -7", "-7"), ("#### 18\n", "18")],
)
def test_the_last_number_is_read_as_people_write_it(text: str, number: str) -> None:
    assert str(last_number(text)) == number


def test_verifiers_compare_results_and_not_spelling() -> None:
    assert last_number("no number") is None
    assert same_number("it costs $12.00", "a b #### 12") == 1
    assert same_number("12 and then 13", "12") == 0
    assert same_number("no number", None) == 0
    assert exact(" Paris \n", "paris") == 1
    assert exact("Paris.", "Paris") == 0
    assert contains("It is paris , I think", "Paris") == 1
    assert contains("comparison", "paris") == 0
    assert contains("anything", None) == 0


def test_sources_are_made_from_what_a_run_file_says(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def length(prompts, answers, references):\n    return [len(answer) for answer in answers]\n")
    assert reward_source("number", seconds=5)(ASKED) == [1, 0]
    assert reward_source(r"regex:is \d\.", seconds=5)(ASKED) == [1, 1]
    length = reward_source(f"python:{file}:length", seconds=5)
    assert length(ASKED) == [8, 8]
    assert summed([length, reward_source("number", seconds=5)])(ASKED) == [9, 8]
    assert needs_references("number")
    assert not needs_references("regex:a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "is not known"),
        ("regex:(", "cannot be read"),
        ("python:no_such_module_at_all:f", "cannot be loaded"),
        ("python:math:no_such_function", "has no function"),
        ("python:math", "names no function"),
        ("python:math:sqrt", "cannot be called as"),
    ],
)
def test_a_source_that_cannot_be_is_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        reward_source(text, seconds=1, where="ppo.reward")
    assert caught.value.where == "ppo.reward"


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda _: 1 / 0, r"raised ZeroDivisionError: .*test_rewards.py, line"),
        (lambda _: time.sleep(30), "did not answer within 0.2 s"),
        (lambda _: [1.0], "gave 1 rewards for 2 answers"),
        (lambda _: [1.0, float("nan")], "gave nan for answer 1: 'It is 5.'"),
        (lambda _: [1.0, None], "gave None for answer 1"),
        (lambda _: 3.0, "gave float instead of a list"),
        (lambda _: "10", "gave str instead of a list"),
    ],
)
def test_a_source_that_fails_is_named(score, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        RewardSource("python:x:y", score, 0.2)(ASKED)
    assert "the reward python:x:y" in caught.value.what


@pytest.fixture
def server() -> Iterator[tuple[str, dict]]:
    state: dict = {"reply": b"[1, 2.5]", "asked": None}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state["calls"] = state.get("calls", 0) + 1
            state["asked"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(state.get("statuses", {}).get(state["calls"], state.get("status", 200)))
            self.end_headers()
            self.wfile.write(state["reply"])

        def log_message(self, *_: object) -> None:
            """Not into the test's output."""

    running = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/score", state
    running.shutdown()
    running.server_close()


def test_a_server_is_asked_and_its_faults_are_named(server: tuple[str, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "RETRY_SECONDS", (0.0,))
    address, state = server
    source = reward_source(address, seconds=5)
    assert source(ASKED) == [1, 2.5]
    assert state["asked"] == {"prompts": ASKED.prompts, "answers": ASKED.answers, "references": ASKED.references}
    state["reply"] = b'{"rewards": [3, 4]}'
    assert source(ASKED) == [3, 4]
    state["reply"] = b"not json"
    with pytest.raises(UserError, match=r"the reward server .* failed"):
        source(ASKED)
    state |= {"reply": b"[1, 2]", "status": 500}
    with pytest.raises(UserError, match="500"):
        source(ASKED)
    with pytest.raises(UserError, match="failed"):
        reward_source("http://127.0.0.1:9/nobody", seconds=2)(ASKED)


def test_a_server_that_stumbles_is_asked_again(server: tuple[str, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(rewards, "time", SimpleNamespace(sleep=pauses.append))
    address, state = server
    state["statuses"] = {1: 503, 2: 429}
    assert reward_source(address, seconds=5)(ASKED) == [1, 2.5]
    assert (state["calls"], pauses) == (3, [1.0, 4.0])
    state |= {"calls": 0, "statuses": {}, "status": 500}
    with pytest.raises(rewards.RewardFailed, match=r"asked 4 times: .*500"):
        reward_source(address, seconds=5)(ASKED)
    assert (state["calls"], pauses) == (4, [1.0, 4.0, *rewards.RETRY_SECONDS])
    # What the server says is wrong with the request, and what is no JSON, stays so.
    for state["status"], state["reply"] in ((404, b""), (200, b"not json")):
        state["calls"] = 0
        with pytest.raises(rewards.RewardFailed, match="failed: "):
            reward_source(address, seconds=5)(ASKED)
        assert state["calls"] == 1
