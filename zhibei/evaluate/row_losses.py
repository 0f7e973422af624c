"""The loss of each row by itself, so that a mean over rows gets an interval. Knows prepared rows and models, no files.

Dimensions: B rows, T tokens, N = B * T, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from zhibei.data.batches import NOT_LEARNED, BatchPlan, collate_padded, split_padded
from zhibei.data.prepared import PreparedRows
from zhibei.model.language_model import LanguageModel

TOKENS_AT_ONCE = 2048


def row_losses(
    model: LanguageModel, rows: PreparedRows, *, pad_token: int, most_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each of the first `most_rows` rows: summed loss in nats (float64) and number of learned tokens (int64).

    The model is used as it is for answering: evaluation mode, fp32 logits; nothing is padded into the sums.
    """
    numbers = np.arange(min(most_rows, len(rows)))
    sums_R, counts_R = np.zeros(len(numbers)), np.zeros(len(numbers), dtype=np.int64)
    lengths = rows.lengths[numbers]
    budget = max(TOKENS_AT_ONCE, int(lengths.max(initial=0)))
    plan = BatchPlan(
        global_batch=len(numbers), micro_batch_tokens=budget, packing=False, shuffle=False, pad_token=pad_token
    )
    model.hf.eval()
    for group in split_padded(lengths, budget):
        batch = collate_padded(rows, numbers[group], plan).to(model.device)
        with torch.no_grad():
            logits_NV = model.logits(model.hidden(batch))
            losses_N = torch.nn.functional.cross_entropy(
                logits_NV, batch.targets_BT.flatten(), ignore_index=NOT_LEARNED, reduction="none"
            )
        losses_BT = losses_N.view(batch.targets_BT.shape).double()
        sums_R[group] = losses_BT.sum(dim=1).cpu().numpy()
        counts_R[group] = (batch.targets_BT != NOT_LEARNED).sum(dim=1).cpu().numpy()
    return sums_R, counts_R
