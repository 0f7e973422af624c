"""Adapters out of differences: exact where the difference has that rank, the best share where it has not."""

from __future__ import annotations

import json

import pytest
import torch

from tests.export.making import adapter_folder, load, logits_of, tiny_model_folder, with_adapter
from zhibei.config.errors import UserError
from zhibei.export.extraction import EXACT_UP_TO, extract_adapter, low_rank
from zhibei.export.merge import merge_weights
from zhibei.export.sources import find_merge

CPU = torch.device("cpu")


def test_a_merged_adapter_comes_out_again(tmp_path):
    base = tiny_model_folder(tmp_path)
    merge_weights(find_merge([str(adapter_folder(base, tmp_path / "first", r=3))]), tmp_path / "merged")
    (tmp_path / "again").mkdir()
    found = extract_adapter(tmp_path / "merged", base, tmp_path / "again", rank=3, device=CPU)
    assert found.kept == pytest.approx(1.0, abs=1e-6)
    assert found.left_out == ()
    assert len(found.energy) == 14
    expected = logits_of(load(tmp_path / "merged"))
    torch.testing.assert_close(logits_of(with_adapter(base, tmp_path / "again")), expected, atol=1e-4, rtol=1e-4)


def test_a_lower_rank_keeps_what_its_singular_values_say(tmp_path):
    base = tiny_model_folder(tmp_path)
    merge_weights(find_merge([str(adapter_folder(base, tmp_path / "first", r=8))]), tmp_path / "merged")
    kept = []
    for rank in (1, 4, 64):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        kept.append(extract_adapter(tmp_path / "merged", base, folder, rank=rank, device=CPU).kept)
    assert kept[0] < kept[1] < kept[2]
    assert kept[2] == pytest.approx(1.0, abs=1e-6)
    config = json.loads((tmp_path / "rank64" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {16, 32}, "no layer has more singular values than its smaller side"
    with_adapter(base, tmp_path / "rank64")


@pytest.mark.parametrize("size", [(40, 60), (EXACT_UP_TO + 8, EXACT_UP_TO + 16)])
def test_exact_and_randomised_are_the_best_of_their_rank(size):
    torch.manual_seed(0)
    outputs, inputs = size
    difference = torch.randn(outputs, 6) @ torch.diag(torch.tensor([8.0, 6, 4, 3, 2, 1])) @ torch.randn(6, inputs)
    b, a, kept = low_rank(difference, 4)
    left = (difference - b @ a).square().sum() / difference.square().sum()
    assert kept == pytest.approx(1 - float(left), abs=1e-4)
    singular = torch.linalg.svdvals(difference.double())
    assert kept == pytest.approx(float(singular[:4].square().sum() / singular.square().sum()), rel=1e-3)


def test_what_cannot_be_extracted_says_so(tmp_path):
    base = tiny_model_folder(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="no linear layer differs"):
        extract_adapter(base, base, tmp_path / "out", rank=4, device=CPU)
    with pytest.raises(UserError, match="rank 0"):
        extract_adapter(base, base, tmp_path / "out", rank=0, device=CPU)
    with pytest.raises(UserError, match="not in the base"):
        extract_adapter(tiny_model_folder(tmp_path, "phi3"), base, tmp_path / "out", rank=4, device=CPU)
