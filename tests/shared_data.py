"""Finds the real data and models some tests use; they are skipped with a reason where those are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def shared_root() -> Path:
    """The folder of shared test material: `ZHIBEI_SHARED`, else a folder `shared` beside the repository."""
    return Path(os.environ.get("ZHIBEI_SHARED", REPOSITORY.parent / "shared"))


def shared_path(*parts: str) -> Path:
    """`shared_path("data", "derived", "x.json")`; skips the calling test when it does not exist."""
    path = shared_root().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not there (set ZHIBEI_SHARED)")
    return path
