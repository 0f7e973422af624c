"""What the later stages hold beyond supervised training: heads, references, critics, answers under way.

Knows sizes, not loops. `benchmarks/memory_stages.py` measures what is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from zhibei.plan.heads import LOGP_FORWARD, LOSS_CHUNK, head_elements
from zhibei.plan.holdings import Holdings
from zhibei.plan.job import Job
from zhibei.plan.moments import Causes, Moment
from zhibei.plan.rollout_cache import cache_bytes
from zhibei.plan.shapes import HEAD, ModelShape

PREFILL_TOKENS, CPU_PREFILL_TOKENS = 16384, 4096  # generate/engine.py
LOGIT_COPIES = 4
"""fp32 logits of a step and what is made of them before a token is drawn (generate/choosing.py)."""
PROMPTS_READ, ANSWERS_WRITTEN = "prompts are read", "answers are written"
WRITING = ("ppo", "grpo", "raft")
"""Stages that write answers of their own."""


def stage_extras(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """Bytes that lie there all the time beside the model that learns."""
    beside = {"engine": job.engine_bytes} if job.engine_bytes else {}
    return {**EXTRAS[job.stage](shape, job, held), **beside}


def _sft(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    return {}


def _reward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    return {"score head": 4 * shape.hidden}


def _dpo(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """No second model: the reference is the base with adapters off, or was computed before the first step."""
    return {}


def _ppo(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """shared: the critic is adapters with a head on one base. separate: the critic is a model of its own, and beside a
    policy without adapters the reference too. Gradients of the critic are gone before the policy has its own."""
    states = held.masters + held.states
    if job.ppo_models == "shared":
        return {"critic": held.adapters + states, **_reward_model(job, held)}
    # Nothing teaches the critic the head that continues text.
    taught = 1 - (0 if held.frozen_head or shape.is_tied else head_elements(shape) / max(1, held.trained))
    critic = held.weights + held.adapters + states * taught
    reference = {} if job.trains_adapters else {"reference model": held.weights}
    return {"critic": critic, **reference, **_reward_model(job, held)}


def _grpo(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """No critic; the reference is a frozen copy, unless it is the same base with its adapters off, or not needed."""
    reference = {} if job.trains_adapters or not job.has_reference else {"reference model": held.weights}
    return {**reference, **_reward_model(job, held)}


def _reward_model(job: Job, held: Holdings) -> Causes:
    """A model of its own, whole and taken to be of the policy's size, or one more adapter on the policy's base
    (train/reward_sources.py)."""
    if job.has_reward_model:
        return {"reward model": held.weights}
    return {"reward model": job.reward_adapter_bytes} if job.reward_adapter_bytes else {}


def body_of(shape: ModelShape) -> ModelShape:
    """The model without the head that continues text."""
    outside = {name: size for name, size in shape.outside.items() if not name.startswith(HEAD)}
    return replace(shape, outside=outside, is_tied=False)


def answering_moments(shape: ModelShape, job: Job, held: Holdings) -> list[list[Moment]]:
    """What comes on top while answers are written and looked at; one list, or none where a stage writes none.

    Prompts are read at most PREFILL_TOKENS at once (generate/engine.py); log-probabilities are computed pass by pass.
    """
    if job.stage not in WRITING:
        return []
    item, rows = job.item_bytes, job.rollout_batch
    wide = shape.mlp_width if not shape.num_experts else shape.experts_per_token * shape.expert_width
    per_token = item * (4 * wide + 4 * shape.hidden)
    cache_token = cache_bytes(shape, slots=1, tokens=1, item_bytes=item)
    cache = cache_bytes(shape, slots=rows, tokens=job.row_tokens, item_bytes=item)
    prompts = min(PREFILL_TOKENS if job.on_gpu else CPU_PREFILL_TOKENS, rows * (job.row_tokens - job.max_new_tokens))
    if job.engine_bytes:
        cache = cache_token = prompts = 0
    logits = 0 if job.engine_bytes else LOGIT_COPIES * 4 * rows * shape.vocabulary
    chunk = (item + LOGP_FORWARD) * min(LOSS_CHUNK, job.pass_tokens) * shape.vocabulary
    unpacked = {"working buffers": held.unpacked}
    return [[
        Moment(PROMPTS_READ, {"KV cache": cache, "activations": prompts * (per_token + cache_token), **unpacked}),
        Moment(ANSWERS_WRITTEN, {"KV cache": cache, "loss": logits, **unpacked}),
        Moment("answers are read by a layer", {"activations": job.pass_tokens * per_token, **unpacked}),
        Moment("log-probabilities", {"activations": item * job.pass_tokens * shape.hidden, "loss": chunk}),
    ]]  # fmt: skip


EXTRAS: Mapping[str, Callable[[ModelShape, Job, Holdings], Causes]] = {
    "sft": _sft, "reward": _reward, "dpo": _dpo, "ppo": _ppo,
    "grpo": _grpo, "raft": _grpo,
}  # fmt: skip
