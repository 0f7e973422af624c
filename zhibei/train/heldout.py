"""Held-out loss of a model. Knows batches, not optimisers or files."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from zhibei.data.batches import Batches
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import current
from zhibei.train.step import LossSum


@dataclass(frozen=True)
class HeldoutLoss:
    """`loss` in nats per learned token over all evaluated rows; `seconds` is wall time."""

    loss: float
    num_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def heldout_loss(model: LanguageModel, batches: Batches, loss_sum: LossSum, *, num_rows: int) -> HeldoutLoss:
    """One mean over the learned tokens of up to `num_rows` rows, in evaluation mode; the random state is untouched."""
    started = time.monotonic()
    was_training = model.hf.training
    model.hf.eval()
    total = torch.zeros((), device=model.device, dtype=torch.float64)
    num_tokens = 0
    with torch.no_grad():
        for batch in batches.all_rows(num_rows):
            total += loss_sum(model, batch.to(model.device))
            num_tokens += batch.num_units
    model.hf.train(was_training)
    summed, counted = current().sum_on_host(float(total), num_tokens)
    return HeldoutLoss(summed / max(1, counted), int(counted), time.monotonic() - started)
