"""What all tests share: the folder of real data, quiet libraries, and no network beyond this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shared_data import shared_path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture
def shared() -> Callable[..., Path]:
    """`shared("data", "derived")`: a path of the shared test material, or a skip."""
    return shared_path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache of prepared rows."""
    monkeypatch.setenv("ZHIBEI_CACHE", str(tmp_path / "zhibei-cache"))
