"""Losses of answers: the numpy arithmetic to 1e-6, whatever the micro cut, the padding side or the packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from zhibei.data.batches import BatchPlan
from zhibei.generate.rollouts import Rollout
from zhibei.losses.policy import Clip
from zhibei.losses.tokens import TokenLoss
from zhibei.model.attention import DOCUMENTS, register
from zhibei.model.language_model import LanguageModel
from zhibei.model.roles import Critic
from zhibei.train.experience import Experience, minibatches, on_grid, passes_of, rows_of
from zhibei.train.policy_loss import PolicyShape, log_probabilities, policy_loss, value_loss

PROMPTS = [[1, 40, 41], [1, 90], [1, *range(50, 60)], [1, 7]]
ANSWERS = [[5, 6, 7, 8, 2], [9], [10, 11, 12], [20, 21, 22, 2]]
SHAPE = PolicyShape(TokenLoss(), 0.7, Clip(0.2, 0.3, 2.0), entropy_coefficient=0.01, kl_in_loss=0.1)
CUTS = [(True, 200), (True, 20), (False, 200), (False, 20)]


def rollout() -> Rollout:
    return Rollout(PROMPTS, ANSWERS, [[0.0] * len(a) for a in ANSWERS], ["stop"] * 4, [""] * 4)


def model(packing: bool) -> LanguageModel:
    register()
    hf = tiny_model()
    if packing:
        hf.set_attn_implementation(DOCUMENTS)
    return LanguageModel(hf, attention_name=DOCUMENTS if packing else "sdpa", longest_row=64)


def plan(packing: bool, budget: int) -> BatchPlan:
    return BatchPlan(global_batch=4, micro_batch_tokens=budget, packing=packing, pad_multiple=4 if packing else 1)


def experience() -> Experience:
    made = rollout()
    generator = torch.Generator().manual_seed(0)
    names = ("old_logps", "advantages", "reference", "values", "returns")
    figures = {name: torch.randn(made.mask_BT.shape, generator=generator) * made.mask_BT for name in names}
    figures["old_logps"] -= 8 * made.mask_BT
    figures["reference"] -= 8 * made.mask_BT
    return Experience(rows_of(made), made.mask_BT, figures, made.mask_BT.float(), made.lengths)


def logps_of(one: LanguageModel) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies on the grid, from whole logits of each row alone, in float64."""
    logps, entropies = np.zeros((4, 5)), np.zeros((4, 5))
    for number, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        with torch.no_grad():
            plain = tiny_model()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().numpy()
        scaled = plain / 0.7
        log_p = (
            scaled
            - np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1, keepdims=True))
            - scaled.max(1, keepdims=True)
        )
        logps[number, : len(answer)] = log_p[np.arange(len(answer)), answer]
        entropies[number, : len(answer)] = -(np.exp(log_p) * log_p).sum(1)
    return logps, entropies


@pytest.mark.parametrize(("packing", "budget"), CUTS)
def test_log_probabilities_come_back_to_their_tokens(packing: bool, budget: int) -> None:
    made, one = rollout(), model(packing)
    found_BT = on_grid(
        rows_of(made),
        made.mask_BT,
        plan(packing, budget),
        lambda batch: log_probabilities(one, batch, TokenLoss(), 0.7)[0],
    )
    np.testing.assert_allclose(found_BT.numpy(), logps_of(one)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("packing", "budget"), CUTS)
def test_the_loss_is_the_papers_arithmetic_whatever_the_cut(packing: bool, budget: int) -> None:
    data, one = experience(), model(packing)
    passes = data.passes([0, 1, 2, 3], plan(packing, budget))
    assert sum(batch.num_units for batch in passes) == 13
    found, clipped = 0.0, 0.0
    for batch in passes:
        outcome: Any = policy_loss(SHAPE)(one, batch)
        found, clipped = found + float(outcome[0].detach()), clipped + float(outcome[1]["clip_share"])
    mask = data.mask_BT.numpy()
    old, advantage, reference = (data.figures_BT[n].double().numpy() for n in ("old_logps", "advantages", "reference"))
    logps, entropies = logps_of(one)
    ratio = np.exp(logps - old)
    free, bound = -ratio * advantage, -np.clip(ratio, 0.8, 1.3) * advantage
    loss = np.maximum(free, bound)
    loss = np.where(advantage < 0, np.minimum(loss, -2.0 * advantage), loss)
    d = logps - reference
    total = loss - 0.01 * entropies + 0.1 * (np.exp(-d) - 1 + d)
    assert found == pytest.approx(float(total[mask].sum()), rel=2e-5)
    assert clipped / 13 == pytest.approx(float((bound > free)[mask].mean()))


@pytest.mark.parametrize(("packing", "budget"), CUTS)
def test_the_critics_loss_is_the_papers_arithmetic_whatever_the_cut(packing: bool, budget: int) -> None:
    data, one = experience(), model(packing)
    head = torch.nn.Linear(32, 1)
    torch.nn.init.constant_(head.weight, 0.1)
    torch.nn.init.constant_(head.bias, 0.5)
    critic = Critic(one, head, {})
    grid_BT = on_grid(data.rows, data.mask_BT, plan(packing, budget), critic.values)
    found = sum(
        float(value_loss(critic, clip=0.2)(one, batch).detach())
        for batch in data.passes([0, 1, 2, 3], plan(packing, budget))
    )
    values, mask = grid_BT.double().numpy(), data.mask_BT.numpy()
    old, returns = (data.figures_BT[name].double().numpy() for name in ("values", "returns"))
    near = old + np.clip(values - old, -0.2, 0.2)
    wanted = np.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    assert found == pytest.approx(float(wanted[mask].sum()), rel=1e-5)
    first = np.array([0.1 * tiny_hidden(PROMPTS[0] + ANSWERS[0])[2].sum() + 0.5])
    np.testing.assert_allclose(values[0, :1], first, rtol=0, atol=1e-4)


def tiny_hidden(row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return tiny_model().model(torch.tensor([row])).last_hidden_state[0].numpy()


def test_a_row_longer_than_a_pass_is_an_error_and_not_an_endless_loop() -> None:
    from zhibei.config.errors import UserError

    with pytest.raises(UserError, match="14 tokens, one forward pass has room for 10"):
        passes_of(rows_of(rollout()), range(4), plan(True, 10))


def test_minibatches_hold_every_answer_once() -> None:
    parts = minibatches(range(10), 3, seed=4)
    assert sorted(number for part in parts for number in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == minibatches(range(10), 3, seed=4)
    assert parts != minibatches(range(10), 3, seed=5)
    assert minibatches([], 3, seed=1) == []
