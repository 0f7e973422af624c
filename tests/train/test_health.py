"""The figures of the health board on answers whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zhibei.config.policy import PpoSection
from zhibei.train.health import board, correlation, deviation, explained_variance, repeated_share
from zhibei.train.prompt_cursor import PromptCursor
from zhibei.train.reward_shaping import RunningScale, shaped


def test_repetition_correlation_and_spread() -> None:
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0
    assert repeated_share([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repeated_share([1, 2]) == 0
    a, b = np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 3.0, 9.0, 1.0])
    assert correlation(a.tolist(), b.tolist()) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert deviation([1.0, 3.0]) == 1


def test_explained_variance_of_a_perfect_and_of_a_constant_critic() -> None:
    returns = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert explained_variance(returns, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.full((2, 3), 5.0), returns, mask) == pytest.approx(0)
    assert explained_variance(returns, torch.ones(2, 3), mask) is None


def test_the_board_of_two_answers() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    logps = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    reference = torch.tensor([[-1.5, -2.0], [-2.0, 0.0]])
    found = board(
        answers=[[5, 2], [6]],
        ended=[True, False],
        scores=[1.0, 0.0],
        mask_BT=mask,
        logps_BT=logps,
        reference_BT=reference,
    )
    assert found["kl"] == pytest.approx((0.5 + 0 - 1) / 3)
    assert found["kl_k3"] == pytest.approx((np.exp(-0.5) - 1 + 0.5 + np.exp(1.0) - 1 - 1) / 3, abs=1e-6)
    assert found["kl_per_answer"] == pytest.approx((0.5 - 1) / 2)
    assert (found["reward_mean"], found["length_mean"], found["ended_share"]) == (0.5, 1.5, 0.5)
    assert found["length_correlation"] == pytest.approx(1)


def test_rewards_are_penalised_then_scaled_then_bounded() -> None:
    section = PpoSection(missing_terminator_penalty=1, normalize_rewards=True, reward_clip=1.2)
    scale, seen = RunningScale(), []
    for batch in ([1.0, 2.0, 6.0], [0.0, 3.0]):
        cut = [False] * (len(batch) - 1) + [True]
        seen += [score - one for score, one in zip(batch, cut, strict=True)]
        found = shaped(batch, cut, section, scale)
        assert (scale.mean, scale.deviation) == pytest.approx((np.mean(seen), np.std(seen)))
        wanted = np.clip((np.array(seen[-len(batch) :]) - np.mean(seen)) / np.std(seen), -1.2, 1.2)
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    assert shaped([3.0, 4.0], [False, True], PpoSection(), RunningScale()).tolist() == [3.0, 4.0]


def test_every_prompt_comes_once_per_pass_and_the_stream_is_a_function_of_seed_and_iteration() -> None:
    cursor = PromptCursor(num_prompts=7, per_iteration=3, epochs=3, max_steps=None, seed=5)
    assert cursor.num_iterations == 7
    stream = np.concatenate([cursor.numbers(iteration) for iteration in range(7)])
    for epoch in range(3):
        assert sorted(stream[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert stream[:7].tolist() != stream[7:14].tolist()
    assert cursor.numbers(4).tolist() == cursor.numbers(4).tolist()
    assert cursor.epoch_at(7) == 3
    wide = PromptCursor(num_prompts=2, per_iteration=5, epochs=1, max_steps=4, seed=0)
    assert wide.num_iterations == 4
    assert len(wide.numbers(3)) == 5
