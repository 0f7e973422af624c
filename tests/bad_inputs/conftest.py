"""One set of tiny models for all scenarios of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs.place import Models


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for all: most scenarios have the same sound rows, which need to be prepared only once."""
    monkeypatch.setenv("ZHIBEI_CACHE", str(session_cache))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(Path(tmp_path_factory.mktemp("models")))
