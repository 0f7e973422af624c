"""One set of tiny models for all scenarios of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs.place import Models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(Path(tmp_path_factory.mktemp("models")))
