"""What cannot happen to memory here: the properties behind area memory's entries of kind construction and gate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.run import ModelSection
from zhibei.data.batches import Batches, BatchPlan
from zhibei.data.prepared import PreparedRows
from zhibei.losses.tokens import TokenLoss, cross_entropy_sum
from zhibei.model.load import Need, load_weights
from zhibei.model.locate import locate
from zhibei.train.materials import heldout_batches


def rows_of(lengths: list[int]) -> PreparedRows:
    total = sum(lengths)
    return PreparedRows(
        tokens=np.arange(total, dtype=np.int32) % 50,
        supervised=np.ones(total, dtype=bool),
        borders=np.cumsum([0, *lengths]).astype(np.int64),
        row_ids=[f"row {number}" for number in range(len(lengths))],
    )


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_passes_keep_the_budget_of_training(packing):
    plan = BatchPlan(global_batch=4, micro_batch_tokens=96, packing=packing)
    heldout = heldout_batches(rows_of([90, 3, 40, 41, 96, 7, 60, 2]), plan)
    assert heldout is not None
    assert max(batch.tokens_BT.numel() for batch in heldout.all_rows()) <= 96
    training = Batches(rows_of([90, 3, 40, 41, 96, 7, 60, 2]), plan).micro_batches(0)
    assert max(batch.tokens_BT.numel() for batch in training) <= 96


def test_an_evaluation_keeps_nothing_per_row(monkeypatch):
    """The largest tensor of logits has the rows of one chunk, and the loss is a single number."""
    largest = []
    original = torch.nn.functional.linear

    def watched(*inputs, **options):
        result = original(*inputs, **options)
        largest.append(result.shape[0])
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    with torch.no_grad():
        loss = cross_entropy_sum(
            torch.randn(1000, 8), torch.randn(50, 8), torch.randint(50, (1000,)), loss=TokenLoss(chunk_tokens=64)
        )
    assert loss.shape == ()
    assert max(largest) == 64


def test_a_model_with_a_tensor_missing_is_refused_when_it_loads(tmp_path):
    folder = tiny_model_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    need = Need(device=torch.device("cpu"), precision="fp32", longest_row=16)
    with pytest.raises(UserError) as caught:
        load_weights(locate(str(folder)), ModelSection(path=str(folder)), need, attention_name="sdpa")
    assert "q_proj" in str(caught.value)
