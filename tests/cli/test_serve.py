"""`zhibei serve` and `zhibei web` as processes: what they print, how they end, and what they refuse before loading."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.tiny import tiny_model_folder
from zhibei.cli.app import run_command

pytest.importorskip("uvicorn")


@contextmanager
def process(*arguments: str, **environment: str):
    """A server that prints JSON, and what it printed when it was ready."""
    command = [sys.executable, "-m", "zhibei", *arguments, "--json", "--port", "0", "--device", "cpu"]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert started.stdout is not None
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(started.stdout.readline())
            assert lines[-1], started.stderr.read() if started.stderr else ""
        yield started, json.loads("".join(lines))
    finally:
        started.kill()
        started.wait()


@pytest.mark.slow
def test_sigterm_lets_a_running_answer_end_and_the_command_succeeds(tmp_path):
    folder = tiny_model_folder(tmp_path)
    with process("serve", f"tiny={folder}", "--template", "vicuna_v1.1") as (started, said):
        assert said["models"] == [{"id": "tiny", "path": str(folder), "notes": []}]
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 200, "temperature": 1, "seed": 1, "stream": True}
        with httpx.stream("POST", said["url"] + "/v1/completions", json=body, timeout=60) as response:
            pieces = response.iter_lines()
            next(pieces)
            started.send_signal(signal.SIGTERM)
            rest = list(pieces)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        out, err = started.communicate(timeout=60)
        assert started.returncode == 0
        assert out == ""
        assert "the server has ended" in err
        line = next(json.loads(row) for row in err.splitlines() if row.startswith("{"))
        assert (line["path"], line["status"], line["model"]) == ("/v1/completions", 200, "tiny")


@pytest.mark.slow
def test_the_page_has_a_key_of_its_own_each_time(tmp_path):
    folder = tiny_model_folder(tmp_path)
    with process("web", str(folder), "--template", "vicuna_v1.1") as (_, said):
        url, _, key = said["page"].partition("#key=")
        assert len(key) > 20
        assert httpx.get(url).status_code == 200
        assert httpx.get(url + "v1/models").status_code == 401
        assert httpx.get(url + "v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--host", "0.0.0.0"], "open to everyone"),
        (["--port", "99999"], "--port is 99999"),
        (["--slots", "0"], "--slots is 0"),
        (["--context-tokens", "-1"], "--context-tokens is -1"),
        (["--api-key", "short"], "API key of 5 characters"),
        (["--cors-origin", "*"], "no key protects"),
        (["--port", "0", "--adapter", "no-name"], "--adapter no-name"),
        ([], "there is no folder"),
        (["--temperature", "1"], "temperature"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(arguments, what, tmp_path, capsys):
    assert run_command(["serve", str(tmp_path / "nowhere"), *(arguments or ["--port", "0"])]) == 2
    assert what in capsys.readouterr().err


def test_a_port_that_is_taken_is_found_before_anything_is_loaded(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_command(["web", str(tmp_path / "nowhere"), "--port", str(port)]) == 2
    assert "cannot be listened to" in capsys.readouterr().err


def test_a_reward_model_and_a_file_are_refused(tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    assert run_command(["serve", str(file), "--port", "0"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_without_uvicorn_it_says_what_to_install(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run_command(["serve", str(tmp_path)]) == 2
    assert "zhibei[serve]" in capsys.readouterr().err
