"""A plan as one JSON document: plan.json of a run directory, and `zhibei plan --json`. Knows plans, not files."""

from __future__ import annotations

from typing import Any

from zhibei.plan.communication import Traffic
from zhibei.plan.machines import Machine
from zhibei.plan.memory import Phase
from zhibei.plan.search import Candidate, Search

GIB = 2**30


def as_document(
    found: Search, machine: Machine, *, alternatives: list[str] | None = None, price: float | None = None
) -> dict[str, Any]:
    """One JSON document: the chosen way, its figures, and the others."""
    plan = found.chosen.memory
    document: dict[str, Any] = {
        "machine": machine.name,
        "fits": found.chosen.fits,
        **_candidate(found.chosen, found),
        "peak_gib": round(plan.peak_gib, 3),
        "peak_phase": plan.peak.name,
        "peak_moment": plan.peak.moment,
        "device_gib": round(plan.device_gib, 3),
        "capacity_gib": plan.capacity_gib,
        "phases": [_phase(phase) for phase in plan.phases],
        "host_gib": round(plan.host_gib, 3),
        "host_capacity_gib": plan.host_capacity_gib,
        "host": {name: round(size / GIB, 3) for name, size in plan.host.items()},
        "steps": found.total_steps,
        "tokens": found.total_tokens,
        "alternatives": [_candidate(other, found) for other in found.others],
        "would_fit": alternatives or [],
    }
    if plan.disk is not None:
        files = {name: round(size / GIB, 3) for name, size in plan.disk.files.items()}
        document["disk"] = {"peak_gib": round(plan.disk.peak_gib, 3), "files_gib": files}
    if price is not None and found.hours is not None:
        document["cost"] = round(price * found.hours * found.chosen.job.num_gpus, 2)
    return document


def _candidate(candidate: Candidate, found: Search) -> dict[str, Any]:
    job, speed, tokens = candidate.job, candidate.speed, found.total_tokens
    return {
        "micro_batch_tokens": candidate.micro_batch_tokens,
        "pass_tokens": job.pass_tokens,
        "passes_per_step": job.num_passes,
        "activation_checkpointing": job.checkpointing,
        "sharding": job.sharding,
        "offload": job.offload,
        "num_gpus": job.num_gpus,
        "predicted_gib": round(candidate.memory.peak_gib, 3),
        "tokens_per_s": None if speed is None else round(speed.tokens_per_s),
        "efficiency": None if speed is None else round(speed.efficiency, 4),
        "communication_gib": None if speed is None else _traffic(speed.traffic),
        "hours": None if speed is None or tokens is None else round(speed.hours(tokens), 3),
    }


def _traffic(moved: Traffic) -> dict[str, float]:
    """GiB that one GPU receives in an optimiser step, by what it is for."""
    named = {"gathered": moved.gathered, "scattered": moved.scattered, "added_up": moved.added_up}
    return {name: round(size / GIB, 3) for name, size in named.items()}


def _phase(phase: Phase) -> dict[str, Any]:
    causes = {name: round(size / GIB, 4) for name, size in phase.causes.items()}
    return {"name": phase.name, "gib": round(phase.gib, 3), "moment": phase.moment, "causes_gib": causes}
