"""DPO, IPO, SimPO, ORPO and KTO as tasks of the offline loop: losses and held-out figures. Knows no files and no loop.

Dimensions: P pairs, R = 2 P rows (chosen, rejected, chosen, ...); A judged answers, one row each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zhibei.config.preference import REFERENCE_FREE
from zhibei.config.run import DpoSection, RunFile
from zhibei.data.batches import Batch, Batches
from zhibei.losses.intervals import wilson
from zhibei.losses.preference import (
    dpo_loss_sum,
    ipo_loss_sum,
    kto_baseline,
    kto_loss_sum,
    orpo_odds_loss_sum,
    simpo_loss_sum,
)  # fmt: skip
from zhibei.losses.tokens import TokenLoss
from zhibei.model.language_model import LanguageModel
from zhibei.train.answer_logps import RowLogps, all_row_logps, row_logps
from zhibei.train.finish import prove, write_model
from zhibei.train.reference import make_prepare, probe_reference, reference_rows, uses_adapters_off
from zhibei.train.step import LossSum, StepLoss
from zhibei.train.task import HeldoutFigures, Task, nothing_to_probe, unchanged

if TYPE_CHECKING:
    from zhibei.train.materials import Materials


@dataclass(frozen=True)
class Compared:
    """Rows of pairs under the policy, and what the reference gave them (zeros where the loss needs none)."""

    policy: RowLogps
    reference_R: torch.Tensor

    @property
    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi - log pi_ref of chosen and of rejected answers, summed over their tokens."""
        gain_R = self.policy.sums_R - self.reference_R
        return gain_R[0::2], gain_R[1::2]

    @property
    def mean_gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        gain_R = (self.policy.sums_R - self.reference_R) / self.policy.counts_R.clamp(min=1)
        return gain_R[0::2], gain_R[1::2]

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.policy.means_R[0::2], self.policy.means_R[1::2]


def preference_task(run: RunFile, plain: TokenLoss) -> Task:
    """The task of `dpo.loss`. `plain`: the shape of the model's head."""
    section = run.dpo
    has_reference = section.loss not in REFERENCE_FREE
    adapters_off = has_reference and uses_adapters_off(run)
    is_kto = section.loss == "kto"
    loss = judged_step(section, plain) if is_kto else paired_step(section, plain, has_reference=has_reference)
    return Task(
        unit="answer" if is_kto else "pair",
        step_loss=loss,
        plain_loss=without_figures(loss),
        evaluate=evaluate_judged if is_kto else evaluate_pairs,
        write=write_model,
        prove=prove,
        prepare=make_prepare(plain, adapters_off=adapters_off) if has_reference else unchanged,
        probe=probe_reference(plain, adapters_off=adapters_off) if has_reference else nothing_to_probe,
    )


def _dpo(rows: Compared, section: DpoSection) -> torch.Tensor:
    return dpo_loss_sum(*rows.gains, beta=beta_of(section), label_smoothing=section.label_smoothing)


def _ipo(rows: Compared, section: DpoSection) -> torch.Tensor:
    return ipo_loss_sum(*rows.mean_gains, beta=beta_of(section))


def _simpo(rows: Compared, section: DpoSection) -> torch.Tensor:
    return simpo_loss_sum(*rows.means, beta=beta_of(section), gamma=section.gamma)


def _orpo(rows: Compared, section: DpoSection) -> torch.Tensor:
    """Cross-entropy of the chosen answer (mean over its tokens) and the odds ratio: arXiv:2403.07691, eq. 6."""
    chosen_P, rejected_P = rows.means
    return -chosen_P.sum() + section.odds_weight * orpo_odds_loss_sum(chosen_P, rejected_P)


PAIR_LOSSES: dict[str, Callable[[Compared, DpoSection], torch.Tensor]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
}
REWARDS: dict[str, Callable[[Compared], tuple[torch.Tensor, torch.Tensor]]] = {
    "dpo": lambda rows: rows.gains,
    "ipo": lambda rows: rows.mean_gains,
    "simpo": lambda rows: rows.means,
    "orpo": lambda rows: rows.means,
}
"""What, times beta, each loss takes as the reward of an answer."""


def beta_of(section: DpoSection) -> float:
    """beta as planned; 1 for orpo, which has none."""
    return 1.0 if section.beta is None else section.beta


def rewards_of(rows: Compared, section: DpoSection) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards of chosen and rejected answers (arXiv:2305.18290, section 4)."""
    chosen_P, rejected_P = REWARDS[section.loss](rows)
    return beta_of(section) * chosen_P, beta_of(section) * rejected_P


def paired_step(section: DpoSection, shape: TokenLoss, *, has_reference: bool) -> StepLoss:
    """The loss of pairs, with reward accuracy, margin and log-probabilities of both sides."""

    def loss_sum(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        reference_R = reference_rows(model, batch, shape) if has_reference else None
        policy = row_logps(model, batch, shape)
        rows = Compared(policy, torch.zeros_like(policy.sums_R) if reference_R is None else reference_R)
        chosen_P, rejected_P = (side_P.detach() for side_P in rewards_of(rows, section))
        sums_R = rows.policy.sums_R.detach()
        return PAIR_LOSSES[section.loss](rows, section), {
            "accuracy": rightness(chosen_P - rejected_P).sum(),
            "margin": (chosen_P - rejected_P).sum(),
            "chosen_logp": sums_R[0::2].sum(),
            "rejected_logp": sums_R[1::2].sum(),
        }

    return loss_sum


def judged_step(section: DpoSection, shape: TokenLoss) -> StepLoss:
    """KTO. The baseline comes with the batch: it is a mean over the whole step (`reference.step_baseline`)."""

    def loss_sum(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        reference_A = reference_rows(model, batch, shape)
        gain_A = row_logps(model, batch, shape).sums_R - reference_A
        is_good_A, baseline = batch.columns_I["is_good"], batch.columns_I["baseline"][0]
        signed_A = _signed(gain_A.detach(), is_good_A, baseline, section)
        return _kto(gain_A, is_good_A, baseline, section), {
            "accuracy": rightness(signed_A).sum(),
            "margin": signed_A.sum(),
            "baseline": baseline * len(gain_A),
        }

    return loss_sum


def _kto(gain_A: torch.Tensor, is_good_A: torch.Tensor, baseline: torch.Tensor, section: DpoSection) -> torch.Tensor:
    return kto_loss_sum(
        gain_A,
        is_good_A,
        baseline=baseline,
        beta=beta_of(section),
        good_weight=section.good_weight,
        bad_weight=section.bad_weight,
    )


def _signed(gain_A: torch.Tensor, is_good_A: torch.Tensor, baseline: torch.Tensor, section: DpoSection) -> torch.Tensor:
    """How far each answer is on the side of the baseline where its label wants it."""
    distance_A = beta_of(section) * (gain_A - baseline)
    return torch.where(is_good_A, distance_A, -distance_A)


def without_figures(loss: StepLoss) -> LossSum:
    """The loss alone."""

    def loss_sum(model: LanguageModel, batch: Batch) -> torch.Tensor:
        outcome = loss(model, batch)
        return outcome[0] if isinstance(outcome, tuple) else outcome

    return loss_sum


def evaluate_pairs(materials: Materials, heldout: Batches) -> HeldoutFigures:
    """Held-out loss, reward accuracy with its interval, rewards and log-probabilities of both sides."""
    started = time.monotonic()
    section = materials.run.dpo
    policy = all_row_logps(materials.model, heldout, head_of(materials), most_items=section.evaluate_rows)
    reference_R = torch.zeros_like(policy.sums_R)
    if "reference_chosen" in heldout.columns_I:
        for place, name in enumerate(("reference_chosen", "reference_rejected")):
            column_P = torch.as_tensor(heldout.columns_I[name])
            reference_R[place::2] = column_P[: len(reference_R) // 2]
    rows = Compared(policy, reference_R)
    chosen_P, rejected_P = rewards_of(rows, section)
    num_pairs = len(chosen_P)
    figures = {
        "pairs": num_pairs,
        **_accuracy(chosen_P - rejected_P),
        "margin": float((chosen_P - rejected_P).mean()),
        "chosen_reward": float(chosen_P.mean()),
        "rejected_reward": float(rejected_P.mean()),
        "chosen_logp": float(policy.sums_R[0::2].mean()),
        "rejected_logp": float(policy.sums_R[1::2].mean()),
    }
    loss = float(PAIR_LOSSES[section.loss](rows, section)) / num_pairs
    return HeldoutFigures(loss, time.monotonic() - started, figures)


def evaluate_judged(materials: Materials, heldout: Batches) -> HeldoutFigures:
    """Held-out loss of KTO with one baseline for all answers, and the rewards of good and of bad ones."""
    started = time.monotonic()
    section = materials.run.dpo
    most, head = section.evaluate_rows, head_of(materials)
    gain_A = _gains(materials.model, heldout, head, most)
    other = materials.mismatched_heldout
    assert other is not None
    baseline = kto_baseline(_gains(materials.model, other, head, most))
    is_good_A = torch.as_tensor(heldout.columns_I["is_good"])[: len(gain_A)]
    signed_A = _signed(gain_A, is_good_A, baseline, section)
    reward_A = beta_of(section) * gain_A
    figures = {
        "answers": len(gain_A),
        **_accuracy(signed_A),
        "margin": float(signed_A.mean()),
        "baseline": float(baseline),
        "good_reward": float(reward_A[is_good_A].mean()) if is_good_A.any() else None,
        "bad_reward": float(reward_A[~is_good_A].mean()) if not is_good_A.all() else None,
    }
    loss = float(_kto(gain_A, is_good_A, baseline, section)) / len(gain_A)
    return HeldoutFigures(loss, time.monotonic() - started, figures)


def _gains(model: LanguageModel, batches: Batches, head: TokenLoss, most_items: int) -> torch.Tensor:
    sums_A = all_row_logps(model, batches, head, most_items=most_items).sums_R
    return sums_A - torch.as_tensor(batches.columns_I["reference"])[: len(sums_A)]


def rightness(gap: torch.Tensor) -> torch.Tensor:
    """1 where the gap is on the right side, 0 on the wrong one, 1/2 at 0: before the first step a policy is its
    reference, which prefers neither answer and is no worse than guessing."""
    return (gap > 0).float() + (gap == 0).float() / 2


def _accuracy(gap: torch.Tensor) -> dict[str, float]:
    share = wilson(float(rightness(gap).sum()), len(gap))
    return {"accuracy": share.score, "accuracy_low": share.low, "accuracy_high": share.high}


def head_of(materials: Materials) -> TokenLoss:
    """The shape of the model's head."""
    shape = materials.model.head_shape
    return TokenLoss(softcap=shape.softcap, logit_scale=shape.scale)
