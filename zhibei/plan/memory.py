"""Peak memory of a run, by phase and cause, for one GPU and for the host. Knows shapes and jobs, not run directories.

`predict(shape, job)` adds what is held (`holdings`) to the heaviest moment of each phase (`moments`). What is promised
is `peak_gib`, the most that torch's tensors hold, as `peak_gib` in metrics.jsonl counts it; `device_gib` adds what the
allocator keeps in reserve and CUDA itself, and is what must fit onto the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zhibei.plan.holdings import Holdings, holdings_of
from zhibei.plan.job import PANEL_PROMPTS, Job
from zhibei.plan.moments import LOSS_CHUNK, Causes, Moment, moments_of, update
from zhibei.plan.shapes import ModelShape

GIB = 2**30
WORKSPACE_BYTES = 2 * 32 * 2**20
"""cuBLAS takes 32 MiB for each of two threads (forward and backward) on Hopper."""
CONTEXT_GIB = 0.75
"""CUDA's context and loaded kernels, beside torch's allocator; measured on an H200."""
RESERVE_SHARE = 0.03
"""What torch's allocator keeps beyond its tensors; 0.2 to 7 % in the grid of benchmarks/memory.py."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a run: bytes by cause at its heaviest moment."""

    name: str
    moment: str
    causes: Mapping[str, float]

    @property
    def gib(self) -> float:
        return sum(self.causes.values()) / GIB


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run will hold. All figures are of one GPU, and of one node's host."""

    job: Job
    phases: tuple[Phase, ...]
    host: Mapping[str, float] = field(default_factory=dict)
    """Bytes of host memory by cause."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.gib)

    @property
    def peak_gib(self) -> float:
        """Most that tensors hold; what metrics.jsonl calls peak_gib."""
        return self.peak.gib

    @property
    def device_gib(self) -> float:
        """What must fit onto the card: tensors, the allocator's reserve, and CUDA's own."""
        return device_gib(self.peak_gib)

    @property
    def host_gib(self) -> float:
        return sum(self.host.values()) / GIB

    def phase(self, name: str) -> Phase:
        """By name: load, first step, steady, evaluation, save, proof, merge. KeyError for another."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)


def device_gib(tensors_gib: float) -> float:
    """What the driver counts for tensors of that size."""
    return tensors_gib * (1 + RESERVE_SHARE) + CONTEXT_GIB


def predict(shape: ModelShape, job: Job) -> MemoryPlan:
    """Peak memory of every phase."""
    held = holdings_of(shape, job)
    always: Causes = {
        "weights": held.weights,
        "adapters": held.adapters,
        "master weights": held.masters,
        "optimiser states": held.states,
        "workspaces": WORKSPACE_BYTES,
    }
    before_update = {**always, "optimiser states": 0} if held.states_from_first_update else always
    moments = list(moments_of(shape, job, held))
    first = [_with(before_update, moment) for moment in moments if moment.name != "update"]
    first.append(_with(before_update, Moment("update", update(job, held, is_first=True))))
    steady = [_with(always if moment.name != "update" else before_update, moment) for moment in moments]
    phases = [
        Phase("load", "checking that weights are finite", _load(before_update, job, held)),
        _heaviest("first step", first),
        _heaviest("steady", steady),
        _heaviest("evaluation", [_with(always, moment) for moment in _evaluation(shape, job)]),
        Phase("save", "checking that weights are finite", {**always, "checks": _finite(job, held.largest_trained)}),
        Phase("proof", "the written model beside the trained one", _proof(always, job, held)),
    ]
    return MemoryPlan(job, tuple(phases))


def _with(held: Causes, moment: Moment) -> Moment:
    names = {**held, **moment.causes}
    return Moment(moment.name, {name: held.get(name, 0.0) + moment.causes.get(name, 0.0) for name in names})


def _heaviest(name: str, moments: list[Moment]) -> Phase:
    moment = max(moments, key=lambda each: each.total)
    return Phase(name, moment.name, {cause: size for cause, size in moment.causes.items() if size})


def _finite(job: Job, elements: int) -> float:
    """torch.isfinite: three flags and the absolute values of one tensor (model/load.py, check_finite)."""
    return (3 + job.item_bytes) * elements


def _load(always: Causes, job: Job, held: Holdings) -> Causes:
    checked = {"weights": held.weights, "checks": _finite(job, held.largest)}
    ready = {**always, "workspaces": WORKSPACE_BYTES / 2}
    return max(checked, ready, key=lambda causes: sum(causes.values()))


def _evaluation(shape: ModelShape, job: Job) -> list[Moment]:
    """Held-out loss without gradients, and the panel's answers, of which the cache of keys and values is the most."""
    tokens, item = job.pass_tokens, job.item_bytes
    wide = shape.mlp_width if not shape.num_experts else shape.experts_per_token * shape.expert_width
    forward = tokens * item * (4 * wide + 4 * shape.hidden)
    rows, has_earlier = min(LOSS_CHUNK, tokens), tokens > LOSS_CHUNK
    per_logit = item * (1 + has_earlier) if job.is_compiled else item * (1 + has_earlier) + 8
    answers = PANEL_PROMPTS * (job.row_tokens + job.sample_tokens) if job.sample_tokens else 0
    return [
        Moment("a layer", {"activations": forward}),
        Moment("loss", {"loss": per_logit * rows * shape.vocabulary, "activations": item * tokens * shape.hidden}),
        Moment(
            "sampled answers",
            {**sampling(shape, job, answers, PANEL_PROMPTS), "activations": item * answers * 2 * wide},
        ),
    ]


def sampling(shape: ModelShape, job: Job, tokens: int, num_rows: int) -> Causes:
    """Keys and values of all tokens in all layers, and a row of fp32 logits (and their copies) per answer."""
    cache = 2 * shape.key_width * job.item_bytes * shape.num_layers * tokens
    return {"KV cache": cache, "loss": 16 * num_rows * shape.vocabulary}


def _proof(always: Causes, job: Job, held: Holdings) -> Causes:
    """The finished model is read back beside the trained one (train/finish.py)."""
    return {**always, "model read back": held.weights + held.adapters + _finite(job, held.largest)}
