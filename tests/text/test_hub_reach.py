"""A hub that does not answer is found out at once; one that does is asked; folders never ask."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zhibei.config.errors import UserError
from zhibei.text.hub import hub_options, silence
from zhibei.text.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_listens_is_asked(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", listening)
    assert silence() == ""
    assert hub_options("owner/model") == {}


def test_a_closed_door_means_earlier_downloads_only(
    closed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed)
    assert closed in silence()
    assert hub_options("owner/model") == {"local_files_only": True}
    assert hub_options(str(tmp_path)) == {}
    with pytest.raises(UserError, match="cannot be reached"):
        load_tokenizer("owner/model-that-is-not-here")


def test_behind_a_proxy_only_trying_tells(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert hub_options("owner/model") == {}


def test_offline_by_wish_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert silence() == "HF_HUB_OFFLINE is set"


def test_importing_libraries_fetches_no_kernels(tmp_path: Path) -> None:
    """A package `kernels` that is installed and would fetch code: bitsandbytes must not find it."""
    pytest.importorskip("peft")
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels were asked for')\n")
    script = (
        "from zhibei.model.lora import import_peft\nimport_peft()\nimport sys\n"
        "assert 'kernels' not in sys.modules\nimport importlib.util\nassert importlib.util.find_spec('kernels')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit" not in done.stderr
