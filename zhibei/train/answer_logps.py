"""Log-probabilities of the learned tokens of each row, with gradient. Knows the model's border, not losses or files.

Dimensions: R rows of a batch, N tokens, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zhibei.data.batches import Batch, Batches
from zhibei.losses.logps import token_logps
from zhibei.losses.tokens import NOT_LEARNED, TokenLoss
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import current


@dataclass(frozen=True)
class RowLogps:
    """Per row of a batch: log-probability of its answer (sum over its learned tokens, nats), and their number."""

    sums_R: torch.Tensor
    counts_R: torch.Tensor

    @property
    def means_R(self) -> torch.Tensor:
        return self.sums_R / self.counts_R.clamp(min=1)


def row_logps(model: LanguageModel, batch: Batch, shape: TokenLoss) -> RowLogps:
    """log pi(answer | prompt) of each row. `shape` is that of the model's head."""
    targets_N = batch.targets_BT.flatten()
    logps_N, _ = token_logps(
        model.hidden(batch), model.head_weight_VD, targets_N, bias_V=model.head_bias_V, shape=shape
    )
    learned_N = (targets_N != NOT_LEARNED).float()
    return RowLogps(_by_row(logps_N, batch), _by_row(learned_N, batch))


def _by_row(values_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums over each real row. Row by row, because adding by index has no fixed order on a GPU."""
    if batch.borders is None:
        return values_N.view(batch.tokens_BT.shape).sum(dim=1)
    parts = values_N.split(batch.row_lengths)[: len(batch.row_numbers)]
    return torch.stack([part.sum() for part in parts])


def all_row_logps(model: LanguageModel, batches: Batches, shape: TokenLoss, *, most_items: int) -> RowLogps:
    """The same for the first `most_items` items of a set, in the order of its rows, on the CPU and without gradient."""
    num_rows = min(most_items, batches.num_items) * batches.plan.rows_per_item
    sums_R, counts_R, is_known_R = torch.zeros(num_rows), torch.zeros(num_rows), torch.zeros(num_rows)
    was_training = model.hf.training
    model.hf.eval()
    with torch.no_grad():
        for batch in batches.all_rows(most_items):
            found = row_logps(model, batch.to(model.device), shape)
            numbers = list(batch.row_numbers)
            sums_R[numbers], counts_R[numbers] = found.sums_R.cpu(), found.counts_R.cpu()
            is_known_R[numbers] = 1
    model.hf.train(was_training)
    ranks = current()
    return RowLogps(ranks.put_together(sums_R, is_known_R), ranks.put_together(counts_R, is_known_R))
