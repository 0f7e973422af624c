"""Packed, padded and one row at a time are one and the same step: same loss, same gradients, for every family."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks.reference_trainer import collate
from benchmarks.side_by_side import rows_of
from tests.tiny import FAMILIES, tiny_model
from zhibei.data.batches import Batch, BatchPlan, collate_packed, collate_padded
from zhibei.data.prepared import PreparedRows
from zhibei.losses.tokens import TokenLoss
from zhibei.model import attention
from zhibei.model.language_model import LanguageModel
from zhibei.train.token_loss import token_loss

pytestmark = pytest.mark.parity

LENGTHS = (5, 23, 1, 17, 9, 30)


def rows() -> PreparedRows:
    random = np.random.default_rng(0)
    borders = np.cumsum([0, *LENGTHS]).astype(np.int64)
    supervised = random.random(int(borders[-1])) < 0.6
    supervised[borders[1] :: 7] = True
    tokens = random.integers(4, 300, int(borders[-1]), dtype=np.int32)
    return PreparedRows(tokens, supervised, borders, [f"row#{n}" for n in range(len(LENGTHS))])


def sums_of(family: str, batches: Sequence[Batch], *, packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and gradients of a fresh copy of the family's model over some batches."""
    attention.register()
    hf = tiny_model(family)
    hf.config._attn_implementation = attention.DOCUMENTS if packed else "eager"
    model = LanguageModel(hf.train(), attention_name=attention.DOCUMENTS if packed else "eager", longest_row=64)
    loss = token_loss(TokenLoss(softcap=model.head_shape.softcap, logit_scale=model.head_shape.scale, chunk_tokens=16))
    total = 0.0
    for batch in batches:
        batch_sum = loss(model, batch)
        batch_sum.backward()
        total += batch_sum.item()
    return total, {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}


def of_transformers(family: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same rows through the model's own forward and loss, padded, by plain transformers."""
    hf = tiny_model(family).train()
    hf.set_attn_implementation("eager")
    inputs = collate(rows_of(rows()))
    num_targets = int((inputs["labels"][:, 1:] != -100).sum())
    loss = hf(**inputs, num_items_in_batch=1).loss
    loss.backward()
    assert num_targets > 10
    return loss.item(), {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_padded_single_and_transformers_agree(family: str) -> None:
    prepared, everyone = rows(), range(len(LENGTHS))
    plan = BatchPlan(global_batch=len(LENGTHS), micro_batch_tokens=256, pad_token=3)
    padded_plan = BatchPlan(global_batch=len(LENGTHS), micro_batch_tokens=256, pad_token=3, pad_multiple=16)
    ways = {
        "packed": sums_of(family, [collate_packed(prepared, list(everyone), plan)], packed=True),
        "packed in another order": sums_of(family, [collate_packed(prepared, [4, 0, 5, 2, 3, 1], plan)], packed=True),
        "packed in two": sums_of(
            family, [collate_packed(prepared, part, padded_plan) for part in ([0, 1], [2, 3, 4, 5])], packed=True
        ),
        "padded": sums_of(family, [collate_padded(prepared, list(everyone), padded_plan)], packed=False),
        "one at a time": sums_of(family, [collate_padded(prepared, [n], plan) for n in everyone], packed=False),
    }
    expected_loss, expected = of_transformers(family)
    for way, (loss, gradients) in ways.items():
        assert loss == pytest.approx(expected_loss, rel=1e-5), way
        assert gradients.keys() == expected.keys(), way
        for name, gradient in gradients.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                gradient,
                expected[name],
                rtol=1e-4,
                atol=2e-5 * max(scale, 1.0),
                msg=lambda m, w=way, n=name: f"{w}, {n}: {m}",
            )


def test_a_row_that_sees_its_neighbour_is_noticed() -> None:
    """The equality above bites: without borders between rows the loss differs."""
    prepared, plan = rows(), BatchPlan(global_batch=len(LENGTHS), micro_batch_tokens=256)
    batch = collate_packed(prepared, list(range(len(LENGTHS))), plan)
    joined = Batch(**{**vars(batch), "row_lengths": (sum(LENGTHS),)})
    correct, _ = sums_of("llama", [batch], packed=True)
    wrong, _ = sums_of("llama", [joined], packed=True)
    assert abs(wrong - correct) > 1e-3 * correct
