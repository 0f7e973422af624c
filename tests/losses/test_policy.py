"""Policy arithmetic against a few lines of numpy; padding, wherever it is, changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zhibei.losses.policy import (
    GROUP_ADVANTAGES,
    KL_ESTIMATORS,
    Clip,
    KlController,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    token_rewards,
    truncated_importance,
    whiten,
)

RANDOM = np.random.default_rng(1)
LENGTHS = (5, 1, 3)
WIDTH = 6


def padded(rows: list[np.ndarray], *, left: bool, fill: float) -> torch.Tensor:
    whole = np.full((len(rows), WIDTH), fill)
    for number, row in enumerate(rows):
        part = slice(WIDTH - len(row), None) if left else slice(0, len(row))
        whole[number, part] = row
    return torch.tensor(whole, dtype=torch.float32)


def mask(*, left: bool) -> torch.Tensor:
    return padded([np.ones(length) for length in LENGTHS], left=left, fill=0).bool()


def numpy_gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """The sum of arXiv:1506.02438, eq. 16, term by term instead of backwards."""
    following = np.append(values[1:], 0)
    deltas = rewards + gamma * following - values
    return np.array(
        [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
    )


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_gae_on_every_padding_side(left: bool, gamma: float, lam: float) -> None:
    rewards = [RANDOM.normal(size=length) for length in LENGTHS]
    values = [RANDOM.normal(size=length) for length in LENGTHS]
    advantages_BT, returns_BT = gae(
        padded(rewards, left=left, fill=99.0),
        padded(values, left=left, fill=-77.0),
        mask(left=left),
        gamma=gamma,
        lam=lam,
    )
    for row, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        expected = numpy_gae(reward, value, gamma, lam)
        is_token = mask(left=left)[row]
        np.testing.assert_allclose(advantages_BT[row][is_token], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(returns_BT[row][is_token], expected + value, rtol=1e-6, atol=1e-6)
        assert advantages_BT[row][~is_token].abs().sum() == returns_BT[row][~is_token].abs().sum() == 0


@pytest.mark.parametrize("left", [False, True])
def test_gae_goes_on_from_the_value_after_an_answer_that_was_cut_off(left: bool) -> None:
    rewards = [RANDOM.normal(size=length) for length in LENGTHS]
    values = [RANDOM.normal(size=length) for length in LENGTHS]
    after = np.array([0.0, 2.5, -1.5])
    rewards_BT, values_BT = padded(rewards, left=left, fill=99.0), padded(values, left=left, fill=-77.0)
    mask_BT, after_B = mask(left=left), torch.tensor(after, dtype=torch.float32)
    found_BT, _ = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8, after_B=after_B)
    for row, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        # A value after the end is what one more step without reward would be worth.
        expected = numpy_gae(reward + 0.9 * np.eye(len(reward))[-1] * after[row], value, 0.9, 0.8)
        np.testing.assert_allclose(found_BT[row][mask_BT[row]], expected, rtol=1e-6, atol=1e-6)
    plain_BT, _ = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8)
    assert torch.equal(plain_BT[0], found_BT[0])
    assert not torch.equal(plain_BT[2], found_BT[2])


@pytest.mark.parametrize("left", [False, True])
def test_the_score_lands_on_the_true_last_token(left: bool) -> None:
    kl = [RANDOM.normal(size=length) for length in LENGTHS]
    scores = np.array([1.0, -2.0, 3.0])
    rewards_BT = token_rewards(
        torch.tensor(scores), padded(kl, left=left, fill=9.0), mask(left=left), kl_coefficient=0.1
    )
    for row, one in enumerate(kl):
        expected = -0.1 * one
        expected[-1] += scores[row]
        np.testing.assert_allclose(rewards_BT[row][mask(left=left)[row]], expected, rtol=1e-6, atol=1e-6)
        assert rewards_BT[row][~mask(left=left)[row]].abs().sum() == 0


def test_an_answer_without_tokens_gets_no_reward() -> None:
    nothing = torch.zeros(1, 4)
    assert token_rewards(torch.ones(1), nothing, nothing.bool(), kl_coefficient=0.1).abs().sum() == 0


def test_kl_estimators_against_their_formulas_and_the_true_kl() -> None:
    p, q = RANDOM.dirichlet(np.ones(8)), RANDOM.dirichlet(np.ones(8))
    d = np.log(p) - np.log(q)
    logps, reference = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    formulas = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
    for name, expected in formulas.items():
        np.testing.assert_allclose(KL_ESTIMATORS[name](logps, reference), expected, rtol=1e-6, atol=1e-9)
    true_kl = (p * d).sum()
    for name in ("k1", "k3"):
        estimate = (torch.tensor(p) * KL_ESTIMATORS[name](logps, reference)).sum().item()
        assert estimate == pytest.approx(true_kl, rel=1e-9)


def test_whitening_sees_only_the_mask() -> None:
    rows = [RANDOM.normal(size=length) for length in LENGTHS]
    flat = np.concatenate(rows)
    whitened_BT = whiten(padded(rows, left=False, fill=1e6), mask(left=False))
    np.testing.assert_allclose(
        whitened_BT[mask(left=False)], (flat - flat.mean()) / (flat.std() + 1e-8), rtol=1e-5, atol=1e-6
    )
    kept_BT = whiten(padded(rows, left=False, fill=1e6), mask(left=False), keep_mean=True)
    assert kept_BT[mask(left=False)].mean().item() == pytest.approx(flat.mean(), abs=1e-5)
    assert whitened_BT[~mask(left=False)].abs().sum() == 0


@pytest.mark.parametrize("clip", [Clip(), Clip(0.2, 0.28), Clip(0.2, 0.2, dual=3.0)])
def test_clipped_policy_loss(clip: Clip) -> None:
    new, old, advantages = (RANDOM.normal(size=(3, 40)) for _ in range(3))
    ratio = np.exp(new - old)
    bounded = np.clip(ratio, 1 - clip.low, 1 + clip.high) * advantages
    expected = -np.minimum(ratio * advantages, bounded)
    if clip.dual:
        expected = np.where(advantages < 0, np.minimum(expected, -clip.dual * advantages), expected)
    loss_BT, was_clipped_BT = clipped_policy_loss(*(torch.tensor(x) for x in (new, old, advantages)), clip)
    np.testing.assert_allclose(loss_BT, expected, rtol=1e-6)
    np.testing.assert_array_equal(was_clipped_BT, bounded < ratio * advantages)


def test_the_first_update_has_ratio_one_and_the_plain_policy_gradient() -> None:
    logps = torch.randn(2, 3, requires_grad=True)
    advantages = torch.randn(2, 3)
    loss_BT, was_clipped_BT = clipped_policy_loss(logps, logps.detach(), advantages, Clip())
    loss_BT.sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)
    assert not was_clipped_BT.any()


def test_clipped_value_loss() -> None:
    values, old, returns = (RANDOM.normal(size=(3, 40)) for _ in range(3))
    near = old + np.clip(values - old, -0.2, 0.2)
    expected = np.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    tensors = [torch.tensor(x) for x in (values, old, returns)]
    np.testing.assert_allclose(clipped_value_loss(*tensors, clip=0.2), expected, rtol=1e-6)
    np.testing.assert_allclose(clipped_value_loss(*tensors, clip=0.0), (values - returns) ** 2 / 2, rtol=1e-6)


def test_group_advantages() -> None:
    scores = RANDOM.normal(size=(4, 5))
    mean = scores.mean(axis=1, keepdims=True)
    others = np.stack([np.delete(scores, g, axis=1).mean(axis=1) for g in range(5)], axis=1)
    expected = {
        "grpo": (scores - mean) / (scores.std(axis=1, ddof=1, keepdims=True) + 1e-4),
        "dr_grpo": scores - mean,
        "rloo": scores - others,
        "reinforce++": (scores - scores.mean()) / (scores.std() + 1e-8),
    }
    assert set(expected) == set(GROUP_ADVANTAGES)
    for name, value in expected.items():
        np.testing.assert_allclose(GROUP_ADVANTAGES[name](torch.tensor(scores)), value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(GROUP_ADVANTAGES) - {"reinforce++"}))
def test_a_group_without_variance_teaches_nothing(name: str) -> None:
    assert GROUP_ADVANTAGES[name](torch.full((2, 4), 3.0)).abs().max().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(GROUP_ADVANTAGES))
def test_a_group_of_one_is_finite(name: str) -> None:
    assert bool(torch.isfinite(GROUP_ADVANTAGES[name](torch.tensor([[1.0], [2.0]]))).all())


def test_the_kl_controller_moves_towards_its_target_and_a_fixed_one_stays() -> None:
    controller = KlController(0.2, target=6.0, horizon=10_000)
    controller.update(12.0, num_answers=256)
    assert controller.coefficient == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))
    controller.update(5.7, num_answers=256)
    assert controller.coefficient == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000) * (1 - 0.05 * 256 / 10_000))
    fixed = KlController(0.1)
    fixed.update(1e9, num_answers=256)
    assert fixed.coefficient == 0.1


def test_truncated_importance_is_a_few_lines_of_numpy():
    random = np.random.default_rng(5)
    logps, engine = random.normal(size=(2, 4, 6)) * 0.8
    mask = random.random((4, 6)) < 0.7
    expected = np.where(mask, np.minimum(np.exp(logps - engine), 2.0), 1.0)
    found = truncated_importance(torch.tensor(logps), torch.tensor(engine), torch.tensor(mask), most=2.0)
    assert np.abs(found.numpy() - expected).max() < 1e-6
    assert (expected[mask] == 2.0).any()
    assert truncated_importance(torch.tensor(logps), torch.tensor(engine), torch.tensor(mask), most=0).eq(1).all()
    same = truncated_importance(torch.tensor(logps), torch.tensor(logps), torch.tensor(mask), most=2.0)
    assert same.eq(1).all()
