"""Proximal policy optimisation with a critic: the whole loop on one page. Knows one method, and no doctor.

Collect answers, turn rewards into advantages, learn in small steps, watch, save. Formulas: zhibei/losses/policy.py.
"""

from __future__ import annotations

from typing import Any

import torch

from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import PpoSection
from zhibei.losses.policy import KL_ESTIMATORS, gae, token_rewards, whiten
from zhibei.store.run_dir import RunDir
from zhibei.train.collect import Collected, seed_of
from zhibei.train.experience import Experience, minibatches
from zhibei.train.health import deviation, explained_variance
from zhibei.train.interrupts import stop_requests
from zhibei.train.iteration import learning, record_iteration, write_and_score
from zhibei.train.learned import Learned
from zhibei.train.policy_run import PolicyRun, attend, train_policy


def train(resolved: ResolvedRun, **options: Any) -> RunDir:
    """Learn from a reward as section ppo says; returns the run directory with the finished policy.

    Options and errors are those of `zhibei.train.policy_run.train_policy`.
    """
    return train_policy(resolved, loop, **options)


def loop(going: PolicyRun) -> None:
    """Answers, advantages, updates; until the last iteration, an early stop or a signal."""
    section, state = going.parts.run.ppo, going.state
    with stop_requests() as stop:
        while not going.is_done:
            collected = write_and_score(going)
            coefficient = state.kl.coefficient
            experience = experience_of(collected, section, kl_coefficient=coefficient)
            state.constant_groups += deviation(collected.scores) == 0
            rate, critic_rate = going.rate(section.learning_rate), going.rate(section.critic_learning_rate)
            with learning(going, collected) as learned:
                learn(going, experience, rate=rate, critic_rate=critic_rate, into=learned)
            values_BT, returns_BT = experience.figures_BT["values"], experience.figures_BT["returns"]
            board = record_iteration(
                going,
                collected,
                learned,
                learned_tokens=sum(collected.rollout.lengths),
                learning_rate=rate,
                kl_coefficient=coefficient,
                explained_variance=explained_variance(values_BT, returns_BT, collected.mask_BT),
                return_mean=float(returns_BT[collected.mask_BT].mean()),
                constant_rewards=state.constant_groups,
            )
            state.kl.update(board["kl_per_answer"], num_answers=len(collected.rollout))
            if attend(going, stop):
                break


def experience_of(collected: Collected, section: PpoSection, *, kl_coefficient: float) -> Experience:
    """Rewards per token with the KL to the reference taken off (arXiv:2009.01325), advantages and returns by GAE
    (arXiv:1506.02438). Every token counts alike, so a step is a mean over its tokens.

    With `truncated: bootstrap` an answer that was cut off has no score; in its place stands the value after it."""
    assert collected.reference_BT is not None
    assert collected.values_BT is not None
    mask_BT = collected.mask_BT
    kl_BT = KL_ESTIMATORS[section.kl_estimator](collected.old_logps_BT, collected.reference_BT)
    scores_B, after_B = collected.rewards_B, None
    if section.truncated == "bootstrap":
        assert collected.end_values_B is not None
        scores_B = torch.where(collected.was_cut_B, 0, scores_B)
        after_B = torch.where(collected.was_cut_B, collected.end_values_B, 0)
    rewards_BT = token_rewards(scores_B, kl_BT, mask_BT, kl_coefficient=kl_coefficient)
    if section.whiten_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, keep_mean=True)
    values_BT = collected.values_BT * mask_BT
    advantages_BT, returns_BT = gae(
        rewards_BT, values_BT, mask_BT, gamma=section.gamma, lam=section.gae_lambda, after_B=after_B
    )
    if section.whiten_advantages:
        advantages_BT = whiten(advantages_BT, mask_BT)
    return Experience(
        rows=collected.rows,
        mask_BT=mask_BT,
        figures_BT={
            "old_logps": collected.old_logps_BT,
            "advantages": advantages_BT * collected.importance_BT(section.importance_clip),
            "values": values_BT,
            "returns": returns_BT,
        },
        weights_BT=mask_BT.float(),
        units_B=collected.rollout.lengths,
    )


def learn(going: PolicyRun, experience: Experience, *, rate: float, critic_rate: float, into: Learned) -> None:
    """Small steps of critic and policy over the answers, a few times; ends early when the policy has gone far."""
    parts, section = going.parts, going.parts.run.ppo
    iteration = going.progress.step
    assert parts.critic is not None
    for inner in range(section.inner_epochs):
        seed = seed_of(parts.run.seed + 1, iteration * section.inner_epochs + inner)
        for place, numbers in enumerate(minibatches(range(len(experience)), section.minibatches, seed=seed)):
            passes = experience.passes(numbers, parts.plan)
            with parts.roles.as_critic():
                into.critic.append(parts.critic.step(passes, learning_rate=critic_rate))
            if iteration < section.critic_warmup_steps:
                continue
            step = (iteration * section.inner_epochs + inner) * section.minibatches + place
            supervised = parts.ptx_passes(step, passes, coefficient=section.ptx_coefficient)
            record = parts.materials.stepper.step([*passes, *supervised], learning_rate=rate)
            into.policy.append(record)
            if section.stop_at_kl and record.figures["kl_to_writer"] > section.stop_at_kl:
                into.stopped_early = True
                return
