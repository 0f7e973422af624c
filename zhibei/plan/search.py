"""The fastest way to run that fits: micro-batch, checkpointing, sharding and offload. Knows sizes, no trainer.

`search(...)` tries all of them (a few hundred sums, well under a second), keeps what fits with a margin, and takes the
fastest by `speed_of`. When nothing fits, `what_would_fit` says which card, number of cards, method or length does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from zhibei.config.policy_rules import prompts_per_iteration
from zhibei.config.run import RunFile
from zhibei.config.training import TOKENS_PER_PASS
from zhibei.plan.disk import disk_of
from zhibei.plan.division import why_whole
from zhibei.plan.holdings import Holdings, holdings_of
from zhibei.plan.job import OFFLOADS, SHARDINGS, Job, Offload, Rows, Sharding, Ways, job_of, with_answers
from zhibei.plan.machines import Machine, parse_machine
from zhibei.plan.memory import MemoryPlan, plan_memory
from zhibei.plan.shapes import ModelShape
from zhibei.plan.speed import Speed, speed_of
from zhibei.plan.stages import WRITING, body_of
from zhibei.store.reward_models import shared_judge

MARGIN = 0.03
"""Share of the card that a proposed plan leaves free: more than the worst error of the measured grid."""
DIVIDING_MUST_EARN = 0.97
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
CHECKPOINTINGS = ("none", "selective", "full")
CPU_BUDGET, CPU_CHECKPOINTING = TOKENS_PER_PASS, "none"
CARDS_TO_TRY = ("rtx4090", "v100-32g", "a100-40g", "l40s", "a100-80g", "h200")
CARD_COUNTS = (2, 4, 8)
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the run or the person fixed; None is left to the search."""

    micro_batch_tokens: int | None = None
    checkpointing: str | None = None
    sharding: Sharding | None = None
    offload: Offload | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """Which run, model, machine and rows are planned. `judge`: the adapter folder of a reward model that the run's base
    carries."""

    run: RunFile
    shape: ModelShape
    machine: Machine
    rows: Rows
    judge: Path | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run: settings, memory and speed."""

    micro_batch_tokens: int
    memory: MemoryPlan
    speed: Speed | None

    @property
    def job(self) -> Job:
        return self.memory.job

    @property
    def fits(self) -> bool:
        """With the margin."""
        plan = self.memory
        if plan.capacity_gib is not None and plan.device_gib > plan.capacity_gib * (1 - MARGIN):
            return False
        return plan.fits

    @property
    def words(self) -> str:
        """`8,192 tokens a pass, selective checkpointing, full_shard over 4 GPUs`."""
        job = self.job
        said = [
            f"{self.micro_batch_tokens:,} tokens a pass",
            f"{job.checkpointing} checkpointing".replace("none", "no"),
        ]
        if job.num_gpus > 1:
            said.append(f"{job.sharding} over {job.num_gpus} GPUs")
        if job.offload != "none":
            said.append(f"{'optimiser' if job.offload == 'optimizer' else 'everything'} on the host")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Search:
    """`chosen`: the fastest that fits, or the smallest when none does. `others`: next best ways of another kind."""

    chosen: Candidate
    others: tuple[Candidate, ...]
    total_steps: int | None
    """None where the number of rows is not known. Of a policy: iterations."""
    total_tokens: float | None
    """None also for a policy: how long its answers become, and what writing and scoring take, is not estimated."""

    @property
    def hours(self) -> float | None:
        if self.chosen.speed is None or self.total_tokens is None:
            return None
        return self.chosen.speed.hours(self.total_tokens)


def wishes_of(run: RunFile) -> Wishes:
    """What the run file itself fixes."""
    budget, how = run.training.micro_batch_tokens, run.model.activation_checkpointing
    sharding, offload = run.distributed.sharding, run.distributed.offload
    return Wishes(
        budget if isinstance(budget, int) else None,
        None if how == AUTO else how,
        None if sharding == AUTO else sharding,
        None if offload == "none" else offload,
    )


def search(run: RunFile, shape: ModelShape, machine: Machine, rows: Rows, wishes: Wishes | None = None) -> Search:
    """The fastest plan that fits, within the wishes (by default those of the run file)."""
    wishes, rows = wishes or wishes_of(run), with_answers(run, rows)
    steps = total_steps(run, rows)
    tokens = None
    if steps is not None and run.stage not in WRITING:
        tokens = steps * run.training.global_batch * rows.mean_tokens
    candidates = list(_candidates(Question(run, shape, machine, rows, shared_judge(run)), wishes, steps))
    fitting = sorted((each for each in candidates if each.fits), key=_slowness)
    smallest = sorted(candidates, key=_overflow)
    ordered = fitting or smallest
    return Search(ordered[0], _others(ordered), steps, tokens)


def total_steps(run: RunFile, rows: Rows) -> int | None:
    """Optimiser steps of the run, iterations of a policy; None where the number of rows is not known."""
    section = run.training
    if section.max_steps is not None:
        return section.max_steps
    if rows.num_rows is None:
        return None
    rows_per_step = prompts_per_iteration(run) if run.stage in WRITING else section.global_batch
    return max(1, -(-round(section.epochs * rows.num_rows) // rows_per_step))


def _overflow(candidate: Candidate) -> float:
    """How far beyond card or host, whichever is worse."""
    plan = candidate.memory
    on_card = plan.device_gib / plan.capacity_gib if plan.capacity_gib else 0.0
    return max(on_card, plan.needed_host_gib / plan.host_capacity_gib if plan.host_capacity_gib else 0.0)


def _slowness(candidate: Candidate) -> tuple[float, float]:
    speed = 0.0 if candidate.speed is None else -candidate.speed.tokens_per_s
    # Dividing must earn more than the model of throughput can know. Of equally fast ways, the one with more room.
    factor = DIVIDING_MUST_EARN if candidate.job.num_gpus > 1 and candidate.job.sharding != "no_shard" else 1.0
    return round(speed * factor, 0), candidate.memory.device_gib


def _others(ordered: list[Candidate], most: int = 4) -> tuple[Candidate, ...]:
    """The best of each kind of checkpointing, sharding and offload that is not the chosen one."""
    seen = {_kind(ordered[0])}
    found = []
    for candidate in ordered[1:]:
        if _kind(candidate) not in seen:
            seen.add(_kind(candidate))
            found.append(candidate)
    return tuple(found[:most])


def _kind(candidate: Candidate) -> tuple[str, str, str]:
    return candidate.job.checkpointing, candidate.job.sharding, candidate.job.offload


def _candidates(question: Question, wishes: Wishes, steps: int | None) -> Iterator[Candidate]:
    machine, rows = question.machine, question.rows
    on_gpu, known = bool(machine.gpus), {}
    can_divide = machine.num_gpus > 1 and why_whole(question.run) is None
    for sharding in _choices(wishes.sharding, SHARDINGS if can_divide else ("no_shard",)):
        if sharding == "hybrid" and machine.num_nodes < 2 and wishes.sharding is None:
            continue
        offloads = OFFLOADS if machine.num_gpus > 1 and sharding != "no_shard" else OFFLOADS[:2]
        for offload in _choices(wishes.offload, offloads if on_gpu else ("none",)):
            for how in _choices(wishes.checkpointing, CHECKPOINTINGS if on_gpu else (CPU_CHECKPOINTING,)):
                for budget in budgets_of(question.run, rows, wishes, on_gpu=on_gpu):
                    yield candidate_of(question, Ways(budget, how, sharding, offload), known, steps=steps)


def _choices(wish: str | None, every: tuple) -> tuple:
    return every if wish is None else (wish,)


def budgets_of(run: RunFile, rows: Rows, wishes: Wishes, *, on_gpu: bool) -> list[int]:
    """Tokens per pass worth trying: from the longest row up to all rows of a step at once."""
    if wishes.micro_batch_tokens is not None:
        return [wishes.micro_batch_tokens]
    if not on_gpu:
        return [max(CPU_BUDGET, rows.longest)]
    most = max(rows.longest, run.training.global_batch * rows.longest)
    found = [budget for budget in BUDGETS if rows.longest <= budget < most]
    return [*found, most] if most <= BUDGETS[-1] or not found else found


def candidate_of(question: Question, ways: Ways, known: dict[bool, Holdings | None], *, steps: int | None) -> Candidate:
    """Memory, disk and speed of one way. `known` keeps the holdings, by whether a step has several passes."""
    run, shape, machine, rows = question.run, question.shape, question.machine, question.rows
    section = run.training
    job = job_of(run, shape, machine, rows, ways, judge=question.judge)
    key = job.num_passes > 1
    held = known.setdefault(key, None) or holdings_of(body_of(shape) if job.stage == "reward" else shape, job)
    known[key] = held
    disk = disk_of(run, job, held, rows, num_steps=steps, num_parameters=shape.num_parameters)
    memory = plan_memory(shape, job, machine, held=held, disk=disk)
    speed = speed_of(shape, job, machine, tokens_per_step=section.global_batch * rows.mean_tokens)
    return Candidate(ways.micro_batch_tokens, memory, speed)


ONE_CARD = Wishes(sharding="no_shard", offload="none")
"""One process that keeps everything on its card."""


def what_would_fit(
    run: RunFile, shape: ModelShape, machine: Machine, rows: Rows, *, wishes: Wishes | None = None
) -> list[str]:
    """What would have to give, a line per way that works: another method, another card, more of them, shorter rows.

    With `wishes=ONE_CARD` only ways for one process, without offloading.
    """
    wishes = wishes or Wishes()
    is_planned_only = wishes != ONE_CARD
    found = []
    for method in {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[run.model.method]:
        other = run.model_copy(update={"model": run.model.model_copy(update={"method": method})})
        if search(other, shape, machine, rows, wishes).chosen.fits:
            found.append(f"model.method: {method} on this machine")
            break
    card = machine.smallest_gpu
    if card is not None and is_planned_only:
        for count in CARD_COUNTS:
            if count > len(machine.gpus):
                more = replace(machine, gpus=(card,) * count, gpu_link=machine.gpu_link)
                if (best := search(run, shape, more, rows, wishes).chosen).fits:
                    found.append(f"{count} such GPUs ({best.words})")
                    break
    for name in CARDS_TO_TRY:
        other_machine = parse_machine(name)
        gpu = other_machine.smallest_gpu
        if gpu is None or (card is not None and gpu.memory_gib <= card.memory_gib):
            continue
        if (best := search(run, shape, other_machine, rows, wishes).chosen).fits:
            found.append(f"one {gpu.name} ({best.words})")
            break
    if rows.longest > 512:
        shorter = replace(rows, longest=512, mean_tokens=min(rows.mean_tokens, 512.0), step_tokens=())
        if search(run, shape, machine, shorter, wishes).chosen.fits:
            found.append("data.max_tokens: 512 on this machine")
    return found
