"""The loss of each row, against the model's own loss on that row alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from tests.tiny import tiny_model_folder
from zhibei.data.prepared import PreparedRows
from zhibei.evaluate.row_losses import row_losses
from zhibei.model.load import load_for_inference


def test_each_row_has_the_loss_it_has_alone(tmp_path: Path):
    model = load_for_inference(str(tiny_model_folder(tmp_path)), device="cpu")
    random = np.random.default_rng(0)
    lengths = [7, 3, 12, 5]
    tokens = random.integers(4, 300, size=sum(lengths)).astype(np.int32)
    supervised = random.random(len(tokens)) < 0.6
    borders = np.concatenate([[0], np.cumsum(lengths)])
    supervised[borders[1] : borders[2]] = False  # a row without anything to learn
    rows = PreparedRows(tokens, supervised, borders, [f"row {number}" for number in range(4)])
    sums, counts = row_losses(model, rows, pad_token=3, most_rows=100)
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        row = torch.from_numpy(tokens[start:end].astype(np.int64))[None]
        with torch.no_grad():
            logps = model.hf(row).logits[0].log_softmax(-1)
        learned = [i for i in range(1, end - start) if supervised[start + i]]
        expected = -sum(float(logps[i - 1, row[0, i]]) for i in learned)
        assert counts[number] == len(learned)
        assert np.isclose(sums[number], expected, atol=1e-4)
    first_two, _ = row_losses(model, rows, pad_token=3, most_rows=2)
    assert np.allclose(first_two, sums[:2], atol=1e-5)
