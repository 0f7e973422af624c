"""Each preference loss against its equation in numpy, at ordinary and at extreme inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zhibei.losses.preference import (
    dpo_loss_sum,
    ipo_loss_sum,
    kto_baseline,
    kto_loss_sum,
    orpo_odds_loss_sum,
    simpo_loss_sum,
)
from zhibei.losses.reward import centring_sum, pair_loss_sum, tie_loss_sum

RANDOM = np.random.default_rng(0)
CHOSEN, REJECTED = RANDOM.normal(size=12), RANDOM.normal(size=12)
MEAN_CHOSEN, MEAN_REJECTED = -np.abs(RANDOM.normal(size=12)), -np.abs(RANDOM.normal(size=12))


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_dpo() -> None:
    ours = dpo_loss_sum(tensor(CHOSEN), tensor(REJECTED), beta=0.3)
    assert ours.item() == pytest.approx(softplus(-0.3 * (CHOSEN - REJECTED)).sum(), rel=1e-6)


def test_conservative_dpo_is_a_mixture_of_both_orders() -> None:
    kept = dpo_loss_sum(tensor(CHOSEN), tensor(REJECTED), beta=0.3).item()
    exchanged = dpo_loss_sum(tensor(REJECTED), tensor(CHOSEN), beta=0.3).item()
    mixed = dpo_loss_sum(tensor(CHOSEN), tensor(REJECTED), beta=0.3, label_smoothing=0.1).item()
    assert mixed == pytest.approx(0.9 * kept + 0.1 * exchanged, rel=1e-6)


def test_equal_models_give_ln_two_per_pair() -> None:
    nothing = torch.zeros(5)
    assert dpo_loss_sum(nothing, nothing, beta=0.1).item() == pytest.approx(5 * np.log(2), rel=1e-6)


def test_ipo() -> None:
    expected = ((MEAN_CHOSEN - MEAN_REJECTED - 1 / (2 * 0.2)) ** 2).sum()
    ours = ipo_loss_sum(tensor(MEAN_CHOSEN), tensor(MEAN_REJECTED), beta=0.2)
    assert ours.item() == pytest.approx(expected, rel=1e-6)


def test_simpo() -> None:
    expected = softplus(-(2.0 * (MEAN_CHOSEN - MEAN_REJECTED) - 0.5)).sum()
    ours = simpo_loss_sum(tensor(MEAN_CHOSEN), tensor(MEAN_REJECTED), beta=2.0, gamma=0.5)
    assert ours.item() == pytest.approx(expected, rel=1e-6)


def test_orpo() -> None:
    def odds(logp: np.ndarray) -> np.ndarray:
        return np.exp(logp) / (1 - np.exp(logp))

    expected = -np.log(sigmoid(np.log(odds(MEAN_CHOSEN) / odds(MEAN_REJECTED)))).sum()
    ours = orpo_odds_loss_sum(tensor(MEAN_CHOSEN), tensor(MEAN_REJECTED))
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_kto() -> None:
    good = RANDOM.random(12) < 0.5
    distance = 0.4 * (CHOSEN - 0.25)
    expected = np.where(good, 1.5 * (1 - sigmoid(distance)), 0.5 * (1 - sigmoid(-distance))).sum()
    ours = kto_loss_sum(
        tensor(CHOSEN),
        torch.tensor(good),
        baseline=torch.tensor(0.25),
        beta=0.4,
        good_weight=1.5,
        bad_weight=0.5,
    )
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_the_kto_baseline_is_never_negative_and_has_no_gradient() -> None:
    gains = torch.tensor([-3.0, 1.0], requires_grad=True)
    assert kto_baseline(gains).item() == 0
    assert kto_baseline(-gains).item() == pytest.approx(1)
    assert not kto_baseline(gains).requires_grad


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_large_gaps_stay_finite_with_gradients(gap: float) -> None:
    chosen, rejected = torch.tensor([gap], requires_grad=True), torch.zeros(1)
    losses = [
        dpo_loss_sum(chosen, rejected, beta=1.0),
        pair_loss_sum(chosen, rejected),
        simpo_loss_sum(chosen, rejected, beta=1.0, gamma=0.0),
    ]
    sum(losses, torch.zeros(())).backward()
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    assert chosen.grad is not None
    assert bool(torch.isfinite(chosen.grad).all())


def test_orpo_is_finite_where_a_probability_is_one_or_nearly_zero() -> None:
    sure = torch.tensor([0.0, -1e-8, -80.0], requires_grad=True)
    loss = orpo_odds_loss_sum(sure, torch.tensor([-1.0, -80.0, 0.0]))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert sure.grad is not None
    assert bool(torch.isfinite(sure.grad).all())


def test_both_names_of_coatis_reward_loss_are_one_function() -> None:
    log_sig = -np.log(sigmoid(CHOSEN - REJECTED)).sum()
    log_exp = np.log(1 + np.exp(REJECTED - CHOSEN)).sum()
    ours = pair_loss_sum(tensor(CHOSEN), tensor(REJECTED)).item()
    assert ours == pytest.approx(log_sig, rel=1e-6)
    assert ours == pytest.approx(log_exp, rel=1e-6)


def test_a_margin_asks_for_a_larger_gap() -> None:
    margin = np.abs(RANDOM.normal(size=12))
    expected = softplus(REJECTED - CHOSEN + margin).sum()
    ours = pair_loss_sum(tensor(CHOSEN), tensor(REJECTED), margin_P=tensor(margin))
    assert ours.item() == pytest.approx(expected, rel=1e-6)


def test_a_tie_is_least_where_scores_are_equal() -> None:
    expected = (softplus(CHOSEN - REJECTED) + softplus(REJECTED - CHOSEN)).sum() / 2
    assert tie_loss_sum(tensor(CHOSEN), tensor(REJECTED)).item() == pytest.approx(expected, rel=1e-6)
    assert tie_loss_sum(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(np.log(2), rel=1e-6)


def test_centring_is_the_square_of_the_sum() -> None:
    chosen_P, rejected_P = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    assert float(centring_sum(chosen_P, rejected_P)) == pytest.approx(1.5**2 + 0.0)
