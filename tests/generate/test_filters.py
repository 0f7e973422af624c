"""Filters beside a few lines of numpy and beside the processors of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zhibei.generate.filters import draw, keep_min_p, keep_top_k, keep_top_p, penalize_repetition, shape_scores
from zhibei.generate.options import SamplingOptions


@pytest.fixture
def logits_BV() -> torch.Tensor:
    return torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 3


IDS_BT = torch.tensor(
    [[1, 2, 2, 9], [4, 4, 4, 4], [0, 49, 7, 3], [5, 6, 7, 8], [9, 9, 1, 1], [30, 31, 32, 33], [2, 4, 6, 8]]
)


def seen_mask(ids_BT: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return torch.zeros(ids_BT.shape[0], vocabulary, dtype=torch.bool).scatter(1, ids_BT, True)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


@pytest.mark.parametrize("top_k", [1, 3, 50, 80])
def test_top_k_is_that_of_transformers_and_numpy(logits_BV, top_k):
    ours_BV = keep_top_k(logits_BV, top_k)
    assert torch.equal(ours_BV, TopKLogitsWarper(top_k)(IDS_BT, logits_BV))  # type: ignore[arg-type]
    for ours, row in zip(ours_BV.numpy(), logits_BV.numpy(), strict=True):
        assert set(np.flatnonzero(np.isfinite(ours))) == set(np.argsort(row)[-min(top_k, 50) :])


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.75, 0.999])
def test_top_p_is_that_of_transformers_and_numpy(logits_BV, top_p):
    ours_BV = keep_top_p(logits_BV, top_p)
    assert torch.equal(ours_BV, TopPLogitsWarper(top_p)(IDS_BT, logits_BV))  # type: ignore[arg-type]
    for ours, row in zip(ours_BV.numpy(), logits_BV.numpy(), strict=True):
        order = np.argsort(row)[::-1]
        num_kept = int(np.searchsorted(np.cumsum(softmax(row)[order]), top_p)) + 1
        assert set(np.flatnonzero(np.isfinite(ours))) == set(order[:num_kept])


@pytest.mark.parametrize("min_p", [0.001, 0.1, 1.0])
def test_min_p_is_that_of_transformers_and_numpy(logits_BV, min_p):
    ours_BV = keep_min_p(logits_BV, min_p)
    assert torch.equal(ours_BV, MinPLogitsWarper(min_p)(IDS_BT, logits_BV))  # type: ignore[arg-type]
    for ours, row in zip(ours_BV.numpy(), logits_BV.numpy(), strict=True):
        probs = softmax(row)
        assert set(np.flatnonzero(np.isfinite(ours))) == set(np.flatnonzero(probs >= min_p * probs.max()))


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_is_that_of_transformers_and_numpy(logits_BV, penalty):
    ours_BV = penalize_repetition(logits_BV, seen_mask(IDS_BT, 50), penalty)
    assert torch.equal(ours_BV, RepetitionPenaltyLogitsProcessor(penalty)(IDS_BT, logits_BV))  # type: ignore[arg-type]
    for ours, row, ids in zip(ours_BV.numpy(), logits_BV.numpy(), IDS_BT.numpy(), strict=True):
        expected = row.copy()
        for token in set(ids):
            expected[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
        assert np.allclose(ours, expected, rtol=1e-6)


def test_all_filters_together_in_the_order_of_transformers(logits_BV):
    options = SamplingOptions(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ]
    )
    ours_BV = shape_scores(logits_BV, options, seen_mask(IDS_BT, 50))
    assert torch.equal(ours_BV, theirs(IDS_BT, logits_BV))  # type: ignore[arg-type]
    # The order matters: temperature after the filters would keep other tokens.
    late_BV = keep_min_p(keep_top_p(keep_top_k(logits_BV, 20), 0.9), 0.05) / 0.6
    assert not torch.equal(ours_BV.isfinite(), late_BV.isfinite())


def test_transformers_itself_builds_the_processors_in_this_order():
    """If a later transformers changes the order, ours must be looked at again."""
    from tests.tiny import tiny_model

    model = tiny_model()
    config = model.generation_config
    config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    names = [type(processor).__name__ for processor in processors]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


def test_greedy_leaves_the_filters_out(logits_BV):
    assert torch.equal(shape_scores(logits_BV, SamplingOptions(temperature=0, top_k=1), None), logits_BV)


def test_draw_inverts_the_cumulative_distribution():
    scores_BV = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.0, 0.25, 0.0]])).expand(6, -1)
    uniform_B = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(scores_BV, uniform_B).tolist() == [0, 0, 2, 2, 4, 4]


def test_draw_frequencies_follow_the_probabilities():
    probs_V = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    uniform_B = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    tokens_B = draw(probs_V.log().expand(2000, -1), uniform_B)
    assert tokens_B.bincount(minlength=5).tolist() == [1000, 600, 300, 100, 0]
