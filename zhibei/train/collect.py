"""One iteration's answers: written, scored, and looked at by reference and critic. Knows no loss and no loop.

Dimensions: B answers, T tokens of the longest answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from zhibei.data.batches import Batch
from zhibei.data.prepared import PreparedRows
from zhibei.generate.options import SamplingOptions
from zhibei.generate.rewards import Answered
from zhibei.generate.rollouts import Rollout
from zhibei.losses.policy import truncated_importance
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import current
from zhibei.train.dealing import all_answers, all_scores, own_of
from zhibei.train.experience import on_grid, on_grid_with_ends, rows_of
from zhibei.train.policy_loss import log_probabilities
from zhibei.train.policy_materials import PolicyMaterials
from zhibei.train.reward_shaping import RunningScale, shaped

GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Collected:
    """B answers and what is known of them before anything is learned. Log-probabilities are those of the forward pass
    that learns, at the temperature of sampling; `engine_logps_BT` are those the sampler saw."""

    rollout: Rollout
    rows: PreparedRows
    prompt_numbers: Sequence[int]
    scores: list[float]
    """As the source gave them."""
    rewards_B: torch.Tensor
    """As they are learned from."""
    old_logps_BT: torch.Tensor
    engine_logps_BT: torch.Tensor
    reference_BT: torch.Tensor | None
    values_BT: torch.Tensor | None
    seconds: dict[str, float]
    end_values_B: torch.Tensor | None = None
    """What the critic expects after the last token of each answer."""

    def importance_BT(self, most: float) -> torch.Tensor:
        """How much each token's loss counts, given what the engine drew it with (losses/policy.py)."""
        return truncated_importance(self.old_logps_BT, self.engine_logps_BT, self.mask_BT, most=most)

    @property
    def mask_BT(self) -> torch.Tensor:
        return self.rollout.mask_BT

    @property
    def was_cut_B(self) -> torch.Tensor:
        """Whether an answer was cut off at max_new_tokens."""
        return torch.tensor([reason == "length" for reason in self.rollout.finish])


def seed_of(seed: int, iteration: int) -> int:
    """Another seed for each iteration, the same whenever that iteration is done again."""
    return (seed + (iteration + 1) * GOLDEN) % 2**63


def collect(parts: PolicyMaterials, iteration: int, scale: RunningScale, *, group: int = 1) -> Collected:
    """Answers to the prompts of an iteration (`group` of each), their rewards, and what reference and critic say.

    Everything is a pure function of the weights, the run's seed and the iteration; several ranks share the work and
    all get the same. Raises UserError when the reward source fails.
    """
    numbers = np.repeat(parts.cursor.numbers(iteration), group)
    started = time.monotonic()
    rollout = answers_to(parts, parts.materials.rows.train, numbers, seed=seed_of(parts.materials.run.seed, iteration))
    written = time.monotonic()
    scores = scored(parts, rollout, parts.materials.rows.train, numbers)
    rewarded = time.monotonic()
    rows, mask_BT = rows_of(rollout), rollout.mask_BT
    roles, device = parts.roles, parts.materials.device

    def logps_of(model: LanguageModel) -> torch.Tensor:
        def compute(batch: Batch) -> torch.Tensor:
            return log_probabilities(model, batch.to(device), parts.head, parts.section.temperature)[0]

        return on_grid(rows, mask_BT, parts.plan, compute)

    old_BT = logps_of(roles.policy)
    reference_BT = values_BT = end_values_B = None
    if roles.has_reference:
        with roles.as_reference() as reference:
            reference_BT = logps_of(reference)
    if roles.critic is not None:
        with roles.as_critic() as critic:
            values_BT, end_values_B = on_grid_with_ends(
                rows, mask_BT, parts.plan, lambda batch: critic.values(batch.to(device))
            )
    return Collected(
        rollout=rollout,
        rows=rows,
        prompt_numbers=[int(number) for number in numbers],
        scores=scores,
        rewards_B=shaped(scores, [reason == "length" for reason in rollout.finish], parts.section, scale),
        old_logps_BT=old_BT,
        engine_logps_BT=rollout.grid(rollout.logps),
        reference_BT=reference_BT,
        values_BT=values_BT,
        end_values_B=end_values_B,
        seconds={
            "writing_seconds": written - started,
            "reward_seconds": rewarded - written,
            "scoring_seconds": time.monotonic() - rewarded,
        },
    )


def answers_to(
    parts: PolicyMaterials, rows: PreparedRows, numbers: Sequence[int] | np.ndarray, *, seed: int
) -> Rollout:
    """The policy's answers to these prompts, of which every rank writes a part."""
    section, materials = parts.section, parts.materials
    prompts = [rows.tokens[rows.borders[n] : rows.borders[n + 1]].tolist() for n in numbers]
    options = SamplingOptions(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        seed=seed,
        stop_strings=materials.template.stop_strings,
        batch_rows=section.rollout_batch,
    )
    tokenizer = materials.tokenizer
    own = own_of(len(prompts), current())
    with parts.roles.policy.gathered():
        rollout = parts.write(
            parts.roles.policy.hf,
            [prompts[number] for number in own],
            options=options,
            stop_ids=tokenizer.stop_ids(materials.template.terminator),
            pad_id=tokenizer.pad_id,
            decode=tokenizer.decode,
            numbers=own,
        )
    rollout = all_answers(rollout, prompts, current())
    return replace(rollout, texts=[text.strip() for text in rollout.texts])


def scored(
    parts: PolicyMaterials, rollout: Rollout, rows: PreparedRows, numbers: Sequence[int] | np.ndarray
) -> list[float]:
    """What the reward source gives for these answers; every rank asks for those that it wrote."""
    questions = [parts.questions[rows.row_ids[number]] for number in numbers]
    tokens = rollout.rows

    def score(own: range) -> list[float]:
        return parts.reward(
            Answered(
                prompts=[questions[number].text for number in own],
                answers=[rollout.texts[number] for number in own],
                references=[questions[number].reference for number in own],
                tokens=[tokens[number] for number in own],
            )
        )

    return all_scores(score, len(rollout), current())
