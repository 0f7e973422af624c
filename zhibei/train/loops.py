"""Which loop a stage runs through. Knows names, no method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zhibei.config.resolve import ResolvedRun
from zhibei.data.prepared import PreparedSet
from zhibei.store.run_dir import RunDir
from zhibei.train import grpo, materials, offline, ppo, raft
from zhibei.train.policy_materials import plan_without_models

LOOPS: dict[str, Callable[..., RunDir]] = {"ppo": ppo.train, "grpo": grpo.train, "raft": raft.train}
"""Stages that learn from answers of their own; all others learn from rows that are there before."""


def plan_without_model(resolved: ResolvedRun) -> tuple[PreparedSet, dict[str, Any]]:
    """The audited rows or prompts of a run and what would be done with them, without loading any weights."""
    plan = plan_without_models if resolved.run.stage in LOOPS else materials.plan_without_model
    return plan(resolved)


def train(resolved: ResolvedRun, **options: Any) -> RunDir:
    """Train as the run file's stage does; options and errors are those of `zhibei.train.offline.train`."""
    return LOOPS.get(resolved.run.stage, offline.train)(resolved, **options)
