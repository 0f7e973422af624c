"""Supervised steps on the model's own best answers: the whole loop on one page. Knows one method, and no doctor.

RAFT (arXiv:2304.06767), and rejection sampling where `least_reward` says what a right answer is. Dimensions: Q prompts,
G answers of each, B = Q * G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import RaftSection
from zhibei.store.run_dir import RunDir
from zhibei.train.collect import Collected, seed_of
from zhibei.train.experience import minibatches, passes_of
from zhibei.train.interrupts import stop_requests
from zhibei.train.iteration import learning, record_iteration, write_and_score
from zhibei.train.learned import Learned
from zhibei.train.policy_run import PolicyRun, attend, train_policy
from zhibei.train.reward_shaping import differs, less_kl


@dataclass(frozen=True)
class Kept:
    """Numbers of the answers that are learned from; how many groups said nothing, how many answers were not good
    enough to be kept although they were their group's best."""

    numbers: list[int]
    excluded_groups: int = 0
    not_good_enough: int = 0


def train(resolved: ResolvedRun, **options: Any) -> RunDir:
    """Learn from a reward as section raft says; returns the run directory with the finished policy.

    Options and errors are those of `zhibei.train.policy_run.train_policy`.
    """
    return train_policy(resolved, loop, **options)


def loop(going: PolicyRun) -> None:
    """Answers, the best of them, supervised steps; until the last iteration, an early stop or a signal."""
    section, state = going.parts.run.raft, going.state
    with stop_requests() as stop:
        while not going.is_done:
            collected = write_and_score(going, group=section.answers_per_prompt)
            kept = best_of(collected, section)
            state.constant_groups += kept.excluded_groups
            rate = going.rate(section.learning_rate)
            with learning(going, collected) as learned:
                learn(going, collected, kept.numbers, rate=rate, into=learned)
            record_iteration(
                going,
                collected,
                learned,
                learned_tokens=int(collected.mask_BT[kept.numbers].sum()),
                learning_rate=rate,
                kl_coefficient=section.kl_coefficient,
                kept=len(kept.numbers),
                kept_reward_mean=float(collected.rewards_B[kept.numbers].mean()) if kept.numbers else None,
                not_good_enough=kept.not_good_enough,
                excluded_groups=kept.excluded_groups,
                excluded_groups_so_far=state.constant_groups,
            )
            if attend(going, stop):
                break


def best_of(collected: Collected, section: RaftSection) -> Kept:
    """The answers with the highest rewards (less the KL to the reference): of each prompt, or of the whole iteration.

    Answers that all have one reward are no better than one another; such groups are left out, unless `least_reward`
    tells which are good. Of equal answers the first is taken.
    """
    rewards_B = collected.rewards_B
    if collected.reference_BT is not None:
        logps_BT, reference_BT = collected.old_logps_BT, collected.reference_BT
        rewards_B = less_kl(rewards_B, logps_BT - reference_BT, collected.mask_BT, section.kl_coefficient)
    rewards_QG = rewards_B.view(-1, section.answers_per_prompt if section.compare == "prompt" else len(rewards_B))
    group = rewards_QG.shape[1]
    order_QG = torch.argsort(rewards_QG, dim=1, descending=True, stable=True)
    best_QK = order_QG[:, : max(1, round(group * section.keep_share))] + group * torch.arange(len(order_QG))[:, None]
    if section.least_reward is not None:
        best = best_QK.flatten().tolist()
        good = [number for number in best if collected.scores[number] >= section.least_reward]
        return Kept(good, not_good_enough=len(best) - len(good))
    varies_Q = differs(rewards_QG)
    return Kept(best_QK[varies_Q].flatten().tolist(), excluded_groups=int((~varies_Q).sum()))


def learn(going: PolicyRun, collected: Collected, numbers: list[int], *, rate: float, into: Learned) -> None:
    """Supervised steps over the kept answers, a few times; a step is a mean over its tokens."""
    parts, section = going.parts, going.parts.run.raft
    for inner in range(section.inner_epochs):
        seed = seed_of(parts.run.seed + 1, going.progress.step * section.inner_epochs + inner)
        for part in minibatches(numbers, section.minibatches, seed=seed):
            passes = passes_of(collected.rows, part, parts.plan)
            into.policy.append(parts.materials.stepper.step(passes, learning_rate=rate))
