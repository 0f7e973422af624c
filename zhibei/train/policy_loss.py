"""The losses of policy and critic over one batch. Knows the model's border and the arithmetic, not loops or rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zhibei.config.policy import RatioSection
from zhibei.data.batches import Batch
from zhibei.losses.logps import token_logps
from zhibei.losses.policy import Clip, clipped_policy_loss, clipped_value_loss, kl_k3
from zhibei.losses.tokens import TokenLoss, cross_entropy_sum
from zhibei.model.language_model import LanguageModel
from zhibei.model.roles import Critic
from zhibei.train.step import LossSum, StepLoss

PTX = "ptx_weight"
"""Figure of batches of supervised rows: what their summed loss is multiplied by."""


@dataclass(frozen=True)
class PolicyShape:
    """What decides the policy's loss besides the figures of a batch. `kl_in_loss`: weight of the k3 estimate of the KL
    to the reference inside of the loss (GRPO); 0 where it is part of the reward."""

    head: TokenLoss
    temperature: float
    clip: Clip
    entropy_coefficient: float = 0.0
    kl_in_loss: float = 0.0


def head_of(model: LanguageModel) -> TokenLoss:
    return TokenLoss(softcap=model.head_shape.softcap, logit_scale=model.head_shape.scale)


def shape_of(section: RatioSection, model: LanguageModel, *, kl_in_loss: float = 0.0) -> PolicyShape:
    """The shape that a section of the run file asks for."""
    return PolicyShape(
        head=head_of(model),
        temperature=section.temperature,
        clip=Clip(section.clip_low, section.clip_high, section.dual_clip),
        entropy_coefficient=section.entropy_coefficient,
        kl_in_loss=kl_in_loss,
    )


def log_probabilities(
    model: LanguageModel, batch: Batch, shape: TokenLoss, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of the next token where it is learned, entropy there), both [N], 0 elsewhere."""
    return token_logps(
        model.hidden(batch),
        model.head_weight_VD,
        batch.targets_BT.flatten(),
        bias_V=model.head_bias_V,
        shape=shape,
        temperature=temperature,
    )


def policy_loss(shape: PolicyShape) -> StepLoss:
    """The clipped loss summed over the tokens of a batch, each by its weight; with the figures a board shows.

    Batches carry `old_logps`, `advantages`, `weights` and `share`, and `reference` where the KL is part of the loss.
    Batches of supervised rows carry PTX instead, and their cross-entropy is added.
    """

    def loss_sum(model: LanguageModel, batch: Batch) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        columns = batch.columns_I
        if PTX in columns:
            summed = cross_entropy_sum(
                model.hidden(batch),
                model.head_weight_VD,
                batch.targets_BT.flatten(),
                bias_V=model.head_bias_V,
                loss=shape.head,
            )
            return summed * columns[PTX][0]
        logps_N, entropies_N = log_probabilities(model, batch, shape.head, shape.temperature)
        old_N, share_N = columns["old_logps"], columns["share"]
        loss_N, is_clipped_N = clipped_policy_loss(logps_N, old_N, columns["advantages"], shape.clip)
        total_N = loss_N - shape.entropy_coefficient * entropies_N
        if shape.kl_in_loss:
            total_N = total_N + shape.kl_in_loss * kl_k3(logps_N, columns["reference"])
        figures = {
            "clip_share": (is_clipped_N * share_N).sum(),
            "entropy": (entropies_N * share_N).sum(),
            "kl_to_writer": (kl_k3(logps_N, old_N) * share_N).sum(),
        }
        return (total_N * columns["weights"]).sum(), {name: value.detach() for name, value in figures.items()}

    return loss_sum


def value_loss(critic: Critic, *, clip: float) -> LossSum:
    """The clipped squared error of the critic summed over the tokens of a batch, each by its weight."""

    def loss_sum(_model: LanguageModel, batch: Batch) -> torch.Tensor:
        columns = batch.columns_I
        values_N = critic.values(batch)
        loss_N = clipped_value_loss(values_N, columns["values"], columns["returns"], clip=clip)
        return (loss_N * columns["weights"]).sum()

    return loss_sum
