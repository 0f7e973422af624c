"""Learning from groups of answers to one prompt, without a critic: the whole loop on one page. Knows no doctor.

GRPO, Dr. GRPO, RLOO and REINFORCE++ differ in how a group's rewards become advantages and in what a step is the mean
over. Formulas: zhibei/losses/policy.py. Dimensions: Q prompts, G answers of each, B = Q * G, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import GrpoSection
from zhibei.losses.policy import GROUP_ADVANTAGES, KL_ESTIMATORS
from zhibei.store.run_dir import RunDir
from zhibei.train.collect import Collected, seed_of
from zhibei.train.experience import Experience, minibatches
from zhibei.train.interrupts import stop_requests
from zhibei.train.iteration import learning, record_iteration, write_and_score
from zhibei.train.learned import Learned
from zhibei.train.policy_models import KL_IN_LOSS
from zhibei.train.policy_run import PolicyRun, attend, train_policy
from zhibei.train.reward_shaping import differs, less_kl


def train(resolved: ResolvedRun, **options: Any) -> RunDir:
    """Learn from a reward as section grpo says; returns the run directory with the finished policy.

    Options and errors are those of `zhibei.train.policy_run.train_policy`.
    """
    return train_policy(resolved, loop, **options)


def loop(going: PolicyRun) -> None:
    """Groups of answers, advantages, updates; until the last iteration, an early stop or a signal."""
    section, state = going.parts.run.grpo, going.state
    with stop_requests() as stop:
        while not going.is_done:
            collected = write_and_score(going, group=section.answers_per_prompt)
            experience, numbers = experience_of(collected, section)
            excluded = (len(experience) - len(numbers)) // section.answers_per_prompt
            state.constant_groups += excluded
            rate = going.rate(section.learning_rate)
            with learning(going, collected) as learned:
                learn(going, experience, numbers, rate=rate, into=learned)
            record_iteration(
                going,
                collected,
                learned,
                learned_tokens=int(collected.mask_BT[numbers].sum()),
                learning_rate=rate,
                kl_coefficient=section.kl_coefficient,
                excluded_groups=excluded,
                excluded_groups_so_far=state.constant_groups,
            )
            if attend(going, stop):
                break


def experience_of(collected: Collected, section: GrpoSection) -> tuple[Experience, list[int]]:
    """What is learned from each answer, and the numbers of the answers that say anything.

    Answers of a group with equal rewards are left out: their advantage is 0, and they would only thin out the mean.
    """
    mask_BT = collected.mask_BT
    rewards_QG = rewards_of(collected, section).view(-1, section.answers_per_prompt)
    advantages_B = GROUP_ADVANTAGES[section.method](rewards_QG).view(-1)
    varies_Q = differs(rewards_QG)
    if section.method == "reinforce++":  # compares with the whole batch, not with the group
        varies_Q = differs(rewards_QG.view(1, -1)).expand(len(varies_Q))
    varies_B = varies_Q.repeat_interleave(section.answers_per_prompt)
    weights_BT, units_B = weights_of(mask_BT, section)
    advantages_BT = advantages_B[:, None] * mask_BT * collected.importance_BT(section.importance_clip)
    figures = {"old_logps": collected.old_logps_BT, "advantages": advantages_BT}
    if collected.reference_BT is not None:
        figures["reference"] = collected.reference_BT
    experience = Experience(collected.rows, mask_BT, figures, weights_BT, units_B)
    return experience, torch.nonzero(varies_B)[:, 0].tolist()


def rewards_of(collected: Collected, section: GrpoSection) -> torch.Tensor:
    """The rewards, [B]; with rloo and reinforce++ less the KL of the whole answer (arXiv:2402.14740, eq. 3)."""
    if section.method in KL_IN_LOSS or collected.reference_BT is None:
        return collected.rewards_B
    kl_BT = KL_ESTIMATORS[section.kl_estimator](collected.old_logps_BT, collected.reference_BT)
    return less_kl(collected.rewards_B, kl_BT, collected.mask_BT, section.kl_coefficient)


def weights_of(mask_BT: torch.Tensor, section: GrpoSection) -> tuple[torch.Tensor, list[int]]:
    """How much each token counts, and what an answer adds to what a step is the mean over.

    grpo: a mean over answers of means over tokens (arXiv:2402.03300, eq. 3). dr_grpo and rloo: a mean over answers of
    sums over tokens, divided by the longest possible answer, which is no other direction (arXiv:2503.20783, section
    3.2). reinforce++: a mean over tokens.
    """
    lengths_B = mask_BT.sum(dim=1)
    if section.method == "reinforce++":
        return mask_BT.float(), [int(length) for length in lengths_B]
    if section.method == "grpo":
        return mask_BT / lengths_B[:, None], [1] * len(mask_BT)
    return mask_BT / section.max_new_tokens, [1] * len(mask_BT)


def learn(going: PolicyRun, experience: Experience, numbers: list[int], *, rate: float, into: Learned) -> None:
    """Small steps over the answers that say anything, a few times; ends early when the policy has gone far."""
    parts, section = going.parts, going.parts.run.grpo
    for inner in range(section.inner_epochs):
        seed = seed_of(parts.run.seed + 1, going.progress.step * section.inner_epochs + inner)
        for part in minibatches(numbers, section.minibatches, seed=seed):
            record = parts.materials.stepper.step(experience.passes(part, parts.plan), learning_rate=rate)
            into.policy.append(record)
            if section.stop_at_kl and record.figures["kl_to_writer"] > section.stop_at_kl:
                into.stopped_early = True
                return
