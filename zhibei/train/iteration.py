"""What every iteration of learning from rewards does around its learning: ask, probe, record. Knows no method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zhibei.config.errors import RunStopped
from zhibei.generate.rewards import RewardFailed
from zhibei.train.collect import Collected, answers_to, collect, seed_of
from zhibei.train.experience import on_grid
from zhibei.train.health import board_of
from zhibei.train.learned import Learned
from zhibei.train.policy_loss import log_probabilities
from zhibei.train.policy_materials import PolicyMaterials
from zhibei.train.policy_run import PolicyRun, bad_step, stopped_for_reward
from zhibei.train.step import NonFiniteStep

PROBED_ANSWERS = 8
# Nats per token by which two forward passes over the same tokens may differ: rounding, not another distribution.
SHALLOW = 8
"""Layers up to which the bounds are what they say."""
SAME_LOGPS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}


def write_and_score(going: PolicyRun, *, group: int = 1) -> Collected:
    """The answers of the iteration that comes next, `group` to each prompt; before the first update they are probed.

    Raises RunStopped when the reward fails (what was learned so far is saved first) and when a probe does.
    """
    iteration = going.progress.step
    try:
        collected = collect(going.parts, iteration, going.state.scale, group=group)
    except RewardFailed as problem:
        raise stopped_for_reward(going, problem) from problem
    if iteration == 0:
        probe_before_learning(going, collected)
    return collected


@contextmanager
def learning(going: PolicyRun, collected: Collected) -> Iterator[Learned]:
    """Where an iteration's steps are taken; their records go into what it gives. A step that is not finite ends the run
    with the ids of its prompts; after the first update the policy must be another one."""
    stepper, learned = going.parts.materials.stepper, Learned()
    was_untouched = stepper.effective_steps == 0
    started = time.monotonic()
    try:
        yield learned
    except NonFiniteStep as problem:
        raise bad_step(problem, going, collected) from None
    learned.seconds = time.monotonic() - started
    if was_untouched and stepper.effective_steps:
        probe_after_learning(going, collected)


def record_iteration(
    going: PolicyRun, collected: Collected, learned: Learned, *, learned_tokens: int, **figures: Any
) -> dict[str, Any]:
    """Count the iteration as done and write its record: the health board, what its steps did, `figures` of the method,
    and where the time went. Returns the board."""
    parts, progress = going.parts, going.progress
    board = board_of(collected)
    seconds = sum(collected.seconds.values()) + learned.seconds
    going.state.answers += len(collected.rollout)
    progress.step += 1
    progress.tokens += int(collected.rows.lengths.sum())
    progress.learned_tokens += learned_tokens
    progress.seconds += seconds
    going.recorder.write(
        "iteration",
        progress.step,
        **board,
        **learned.figures(),
        **figures,
        epoch=round(parts.cursor.epoch_at(progress.step), 6),
        answers=len(collected.rollout),
        tokens=sum(collected.rollout.lengths),
        **{name: round(value, 4) for name, value in collected.seconds.items()},
        learning_seconds=round(learned.seconds, 4),
        seconds=round(seconds, 4),
        peak_gib=going.recorder.peak_gib(),
    )
    return board


def same_logps(parts: PolicyMaterials) -> float:
    """How far log-probabilities may lie apart that are the same but for rounding, in nats. It grows like the root of
    the number of layers: a random model of the 7B shape in bf16 had 0.05 between sampler and trainer."""
    num_layers = len(parts.roles.policy.layers())
    return SAME_LOGPS[parts.materials.precision] * max(1.0, (num_layers / SHALLOW) ** 0.5)


def probe_before_learning(going: PolicyRun, collected: Collected) -> None:
    """At update 0 the ratio is 1 and the KL to the reference 0, or everything that follows is learned from a fault.

    Raises RunStopped. The sampler's own log-probabilities are compared only where it draws from the whole distribution.
    """
    parts, mask_BT = going.parts, collected.mask_BT
    bound = same_logps(parts)
    again_BT = logps_now(going, collected)
    pairs = {"the ratio to itself is not 1": again_BT}
    if draws_from_all(parts):
        pairs["the sampler draws from another distribution than the one that learns"] = collected.engine_logps_BT
    if collected.reference_BT is not None:
        pairs["the KL to the reference is not 0"] = collected.reference_BT
    for what, other_BT in pairs.items():
        gap = float((collected.old_logps_BT - other_BT)[mask_BT].abs().mean())
        if not gap <= bound:
            raise RunStopped(
                f"before anything was learned, {what}: {gap:.3g} nats per token apart",
                expected=f"at most {bound:g}",
                fix="look for dropout in the model's config.json, use another precision or attention, and report this "
                "family if it stays",
                where=str(going.run_dir.path),
            )


def probe_after_learning(going: PolicyRun, collected: Collected) -> None:
    """After the first update the policy gives other log-probabilities. Raises RunStopped when it does not."""
    now_BT = logps_now(going, collected)
    if float((now_BT - collected.old_logps_BT)[collected.mask_BT].abs().max()) == 0:
        raise RunStopped(
            "the first update changed no log-probability of the policy",
            expected="another distribution after an update at a rate above 0",
            fix="raise learning_rate (updates may be lost in rounding), and look at whether rewards differ at all",
            where=str(going.run_dir.path),
        )
    probe_engine(going, collected, now_BT)


def probe_engine(going: PolicyRun, collected: Collected, now_BT: torch.Tensor) -> None:
    """After the first update the engine writes with the new weights. Raises RunStopped when it has the old ones.

    A few of the iteration's prompts are answered once more with the same draws. Tokens up to the first that differs
    have two log-probabilities by the trainer, before the update and after it; the engine's must be with the latter.
    """
    parts, count = going.parts, min(PROBED_ANSWERS, len(collected.rollout))
    before = collected.rollout
    again = answers_to(
        parts,
        parts.materials.rows.train,
        collected.prompt_numbers[:count],
        seed=seed_of(parts.run.seed, going.progress.step),
    )
    old, now, drawn = [], [], []
    for row in range(count):
        pairs = zip(before.answers[row], again.answers[row], strict=False)
        length = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
        length = min(len(before.answers[row]), len(again.answers[row])) if length is None else length
        old += collected.old_logps_BT[row, :length].tolist()
        now += now_BT[row, :length].tolist()
        drawn += again.logps[row][:length]
    old_N, now_N, drawn_N = (torch.tensor(values, dtype=torch.float64) for values in (old, now, drawn))
    moved = float((now_N - old_N).abs().sum())
    is_same = again.answers == before.answers[:count] and again.logps == before.logps[:count]
    # Only where the update moved more than the two sides are apart anyway can one be told from the other.
    noise = float((collected.engine_logps_BT - collected.old_logps_BT)[collected.mask_BT].abs().mean()) * len(old)
    is_stale = moved > 4 * noise and float((drawn_N - old_N).abs().sum()) < float((drawn_N - now_N).abs().sum())
    if moved > 0 and (is_same or (is_stale and draws_from_all(parts))):
        raise RunStopped(
            "after the first update the engine still writes answers with the weights from before it",
            expected="log-probabilities of the updated policy",
            fix="report this; with engine: vllm, look at whether it takes the weights it is sent",
            where=str(going.run_dir.path),
        )


def draws_from_all(parts: PolicyMaterials) -> bool:
    """Whether tokens are drawn from the whole distribution, so that engine and trainer mean the same numbers."""
    return parts.section.top_k == 0 and parts.section.top_p == 1


def logps_now(going: PolicyRun, collected: Collected) -> torch.Tensor:
    """Log-probabilities of an iteration's answers under the policy as it is now."""
    parts = going.parts
    device, policy = parts.materials.device, parts.roles.policy
    return on_grid(
        collected.rows,
        collected.mask_BT,
        parts.plan,
        lambda batch: log_probabilities(policy, batch.to(device), parts.head, parts.section.temperature)[0],
    )
