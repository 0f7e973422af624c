"""Peak memory of a run, by phase and cause, for one GPU and for the host. Knows shapes and jobs, not run directories.

`predict(shape, job)` adds what is held (`holdings`) to the heaviest moment of each phase (`moments`). What is promised
is `peak_gib`, the most that torch's tensors hold, as `peak_gib` in metrics.jsonl counts it; `device_gib` adds what the
allocator keeps in reserve and CUDA itself, and is what must fit onto the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from zhibei.plan.disk import DiskPlan
from zhibei.plan.division import Divided, divided
from zhibei.plan.heads import LOGP_FORWARD, LOSS_CHUNK
from zhibei.plan.holdings import Holdings, holdings_of
from zhibei.plan.job import PANEL_PROMPTS, Job
from zhibei.plan.machines import Machine
from zhibei.plan.moments import Causes, Moment, moments_of, update
from zhibei.plan.rollout_cache import cache_bytes
from zhibei.plan.shapes import ModelShape
from zhibei.plan.stages import ANSWERS_WRITTEN, PROMPTS_READ, answering_moments, body_of, stage_extras

GIB = 2**30
WORKSPACE_BYTES = 2 * 32 * 2**20
"""cuBLAS takes 32 MiB for each of two threads (forward and backward) on Hopper."""
CONTEXT_GIB = 0.75
"""CUDA's context and loaded kernels, beside torch's allocator; measured on an H200."""
PROCESS_GPU_BYTES, PROCESS_CPU_BYTES = 3.5 * GIB, 0.8 * GIB
"""Python with torch, transformers and (on a GPU) CUDA's libraries and pinned buffers."""
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
    """Bytes of one node's memory by cause, all its processes together."""
    disk: DiskPlan | None = None
    capacity_gib: float | None = None
    """What a program can use of the card; None without one."""
    host_capacity_gib: float | None = None
    shape: ModelShape | None = None

    @property
    def peak(self) -> Phase:
        """The heaviest phase. The proof at the end is not among them: it moves to the host when the card is full."""
        return max((phase for phase in self.phases if phase.name not in LATER), key=lambda phase: phase.gib)

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

    @property
    def needed_host_gib(self) -> float:
        """Without a copy that is made only where there is room."""
        spared = self.host.get(COPY, 0.0) if self.job.saves_beside == "auto" else 0.0
        return self.host_gib - spared / GIB

    @property
    def fits(self) -> bool:
        """Card and host both hold it; what is not known counts as enough."""
        on_card = self.capacity_gib is None or self.device_gib <= self.capacity_gib
        return on_card and (self.host_capacity_gib is None or self.needed_host_gib <= self.host_capacity_gib)

    def phase(self, name: str) -> Phase:
        """By name: load, first step, steady, evaluation, answers, save, proof, merge. KeyError for another."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)


LATER = ("proof", "merge")
COPY = "copy of what is saved"
COPY_SHARE = 0.5
"""Of the free host memory: what the copy may take where nothing is asked for (train/saving.py)."""


def device_gib(tensors_gib: float) -> float:
    """What the driver counts for tensors of that size."""
    return tensors_gib * (1 + RESERVE_SHARE) + CONTEXT_GIB


def plan_memory(
    shape: ModelShape, job: Job, machine: Machine, *, held: Holdings | None = None, disk: DiskPlan | None = None
) -> MemoryPlan:
    """The prediction with what the machine has. `held` spares working the holdings out again."""
    gpu = machine.smallest_gpu
    capacity = None
    if gpu is not None:
        capacity = gpu.memory_gib if gpu.free_gib is None else gpu.free_gib
    free = machine.host_free_gib or machine.host_gib or None
    found = predict(shape, job, held)
    copy = found.host.get(COPY, 0.0)
    if job.saves_beside == "auto" and free is not None and copy > COPY_SHARE * free * GIB:
        found = replace(found, host={name: size for name, size in found.host.items() if name != COPY})
    return replace(found, disk=disk, capacity_gib=capacity, host_capacity_gib=free)


def predict(shape: ModelShape, job: Job, held: Holdings | None = None) -> MemoryPlan:
    """Peak memory of every phase."""
    shape = body_of(shape) if job.stage == "reward" else shape
    whole = held or holdings_of(shape, job)
    part = divided(shape, job, whole)
    mine = part.held
    always: Causes = {
        "weights": mine.weights,
        "adapters": mine.adapters,
        "master weights": mine.masters,
        "optimiser states": mine.states,
        "gathered layers": part.gathered,
        "workspaces": WORKSPACE_BYTES * job.on_gpu,
        **stage_extras(shape, job, mine),
    }
    before_update = {**always, "optimiser states": 0} if mine.states_from_first_update else always
    moments = list(moments_of(shape, job, mine))
    first = [_with(before_update, moment) for moment in moments if moment.name != "update"]
    first.append(_with(before_update, Moment("update", update(job, mine, is_first=True))))
    steady = [_with(always if moment.name != "update" else before_update, moment) for moment in moments]
    phases = [
        Phase("load", "checking that weights are finite", _shown(_load(before_update, job, mine))),
        _heaviest("first step", first),
        _heaviest("steady", steady),
        _heaviest("evaluation", [_with(always, moment) for moment in _evaluation(shape, job, mine)]),
        *(
            _heaviest("answers", [_with(_answering(always, m, part), m) for m in answers])
            for answers in answering_moments(shape, job, mine)
        ),
        Phase("save", "one tensor is checked", _shown({**always, "checks": _finite(job, mine.largest_trained)})),
        Phase("proof", "the written model beside the trained one", _shown(_proof(always, job, mine))),
    ]
    if job.trains_adapters:
        merged: Causes = {
            "weights": mine.weights,
            "adapters": mine.adapters,
            "checks": 3 * job.item_bytes * mine.largest,
        }
        phases.append(Phase("merge", "adapters are added to one matrix after the other", _shown(merged)))
    host = host_bytes(shape, job, whole, on_host=part.on_host, tensors=max(phase.gib for phase in phases) * GIB)
    if job.saves_beside:
        host[COPY] = copied_bytes(job, whole)
    return MemoryPlan(job, tuple(phases), host=host, shape=shape)


def _answering(always: Causes, moment: Moment, part: Divided) -> Causes:
    """What lies there while answers are written: all layers of a divided model."""
    writing = (PROMPTS_READ, ANSWERS_WRITTEN)
    return {**always, "gathered layers": max(part.gathered, part.all_gathered)} if moment.name in writing else always


def copied_bytes(job: Job, whole: Holdings) -> float:
    """Of a save: what the fullest node copies to its host memory (train/snapshot.py). Of whole copies only the first is
    saved, and with it all that its node holds."""
    saved = (whole.adapters if job.trains_adapters else whole.weights) + whole.masters + whole.states
    num_nodes = -(-job.num_gpus // job.gpus_per_node) if job.sharding in ("full_shard", "shard_grad_op") else 1
    return saved / num_nodes


def host_bytes(shape: ModelShape, job: Job, held: Holdings, *, on_host: float, tensors: float) -> dict[str, float]:
    """One node's memory: every process has Python, torch and CUDA; tensors pass through one at a time.

    Loading maps the files and copies them tensor by tensor (transformers with a device map), and what is written is
    streamed (store/shards.py): the only other copy there ever is is that of a save beside the training (COPY).
    """
    processes = min(job.num_gpus, job.gpus_per_node)
    largest = max(job.item_bytes * held.largest, 4 * held.largest_trained)
    found = {
        "processes": processes * (PROCESS_GPU_BYTES if job.on_gpu else PROCESS_CPU_BYTES),
        "one tensor on its way": 2.0 * processes * largest,
        "offloaded": processes * on_host,
    }
    if not job.on_gpu:
        found |= {"tensors": tensors}
    return {name: size for name, size in found.items() if size}


def _shown(causes: Causes) -> Causes:
    return {name: size for name, size in causes.items() if size}


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
    # A matrix that is packed lies there in the model's type, is looked at, and (int8) copied to fp16.
    packing = 3 * held.unpacked
    checked = {"weights": held.weights, "checks": max(_finite(job, held.largest), packing)}
    ready = {**always, "workspaces": WORKSPACE_BYTES / 2 * job.on_gpu}
    return max(checked, ready, key=lambda causes: sum(causes.values()))


def _evaluation(shape: ModelShape, job: Job, held: Holdings) -> list[Moment]:
    """Held-out loss without gradients, and the panel's answers, of which the cache of keys and values is the most."""
    tokens, item = job.heldout_tokens or job.pass_tokens, job.item_bytes
    wide = shape.mlp_width if not shape.num_experts else shape.experts_per_token * shape.expert_width
    forward = tokens * item * (4 * wide + 4 * shape.hidden)
    rows, has_earlier = min(LOSS_CHUNK, tokens), tokens > LOSS_CHUNK
    per_logit = item * (1 + has_earlier) if job.is_compiled else item * (1 + has_earlier) + 8
    if job.stage == "dpo":
        per_logit = item + LOGP_FORWARD
    elif job.stage != "sft":
        per_logit = 0  # scores, or answers (which have a phase of their own)
    answers = PANEL_PROMPTS * (job.row_tokens + job.sample_tokens) if job.sample_tokens else 0
    return [
        Moment("a layer", {"activations": forward, "working buffers": held.unpacked}),
        Moment("loss", {"loss": per_logit * rows * shape.vocabulary, "activations": item * tokens * shape.hidden}),
        Moment(
            "sampled answers",
            {
                **sampling(shape, job, answers, PANEL_PROMPTS),
                "activations": item * answers * 2 * wide,
                "working buffers": held.unpacked,
            },
        ),
    ]


def sampling(shape: ModelShape, job: Job, tokens: int, num_rows: int) -> Causes:
    """Keys and values of all tokens in all layers, and a row of fp32 logits (and their copies) per answer."""
    cache = cache_bytes(shape, slots=1, tokens=tokens, item_bytes=job.item_bytes)
    return {"KV cache": cache, "loss": 16 * num_rows * shape.vocabulary}


def _proof(always: Causes, job: Job, held: Holdings) -> Causes:
    """The finished model is read back beside the trained one (train/finish.py)."""
    return {**always, "model read back": held.weights + held.adapters + _finite(job, held.largest)}
