"""The loss of supervised fine-tuning over one batch. Knows the model's border and the loss, not loops or files."""

from __future__ import annotations

import torch

from zhibei.data.batches import Batch
from zhibei.losses.tokens import TokenLoss, cross_entropy_sum
from zhibei.model.language_model import LanguageModel
from zhibei.train.step import LossSum


def token_loss(shape: TokenLoss) -> LossSum:
    """A function giving the summed cross-entropy of the next token where it is learned."""

    def loss_sum(model: LanguageModel, batch: Batch) -> torch.Tensor:
        return cross_entropy_sum(
            model.hidden(batch), model.head_weight_VD, batch.targets_BT.flatten(), bias_V=model.head_bias_V, loss=shape
        )

    return loss_sum
