"""What the later stages hold beyond supervised training: heads, references, critics, answers under way.

Knows sizes, not loops. The stages' own loops will be measured as the supervised one was; until then these are sums of
the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zhibei.plan.holdings import Holdings
from zhibei.plan.job import Job
from zhibei.plan.shapes import ModelShape

Causes = dict[str, float]


def stage_extras(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """Bytes that lie there all the time beside the model that learns."""
    return EXTRAS[job.stage](shape, job, held)


def _sft(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    return {}


def _reward(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    return {"score head": job.item_bytes * shape.hidden}


def _dpo(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """No second model: the reference is the base with adapters off, or was computed before the first step."""
    return {}


def _ppo(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """shared: the critic is adapters with a head on one base. separate: the critic and the reference are models too."""
    others = {**_reward_model(job, held), **_answers(shape, job)}
    if job.ppo_models == "shared":
        return {"critic": held.adapters + held.masters + held.states + held.gradients, **others}
    critic = held.weights + held.masters + held.states + held.gradients
    return {"critic": critic, "reference model": held.weights, **others}


def _grpo(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """No critic; the reference is a frozen copy, unless it is the same base with its adapters off."""
    reference = {} if job.trains_adapters else {"reference model": held.weights}
    return {**reference, **_reward_model(job, held), **_answers(shape, job)}


def _raft(shape: ModelShape, job: Job, held: Holdings) -> Causes:
    """As grpo, with a reference only where the KL to it counts."""
    return _grpo(shape, job, held) if job.has_reference else {**_reward_model(job, held), **_answers(shape, job)}


def _reward_model(job: Job, held: Holdings) -> Causes:
    """A model of its own, whole and taken to be of the policy's size, or one more adapter on the policy's base
    (train/reward_sources.py)."""
    if job.has_reward_model:
        return {"reward model": held.weights}
    return {"reward model": job.reward_adapter_bytes} if job.reward_adapter_bytes else {}


def _answers(shape: ModelShape, job: Job) -> Causes:
    tokens = job.rollout_batch * (job.row_tokens + job.max_new_tokens)
    cache = 2 * shape.key_width * job.item_bytes * shape.num_layers * tokens
    return {"KV cache": cache, "rollouts": tokens * 40 + 16 * job.rollout_batch * shape.vocabulary}


EXTRAS: Mapping[str, Callable[[ModelShape, Job, Holdings], Causes]] = {
    "sft": _sft, "reward": _reward, "dpo": _dpo, "ppo": _ppo,
    "grpo": _grpo, "raft": _raft,
}  # fmt: skip
