"""Which loop a stage runs through. Knows names, no method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zhibei.config.resolve import ResolvedRun
from zhibei.store.run_dir import RunDir
from zhibei.train import grpo, offline, ppo

LOOPS: dict[str, Callable[..., RunDir]] = {"ppo": ppo.train, "grpo": grpo.train}
"""Stages that learn from answers of their own; all others learn from rows that are there before."""


def train(resolved: ResolvedRun, **options: Any) -> RunDir:
    """Train as the run file's stage does; options and errors are those of `zhibei.train.offline.train`."""
    return LOOPS.get(resolved.run.stage, offline.train)(resolved, **options)
