"""Chunked cross-entropy equals the formula written out in numpy, and autograd over whole logits."""

import numpy as np
import pytest
import torch

from tests.shape_names import shape_names_checked
from zhibei.losses.tokens import NOT_LEARNED, TokenLoss, cross_entropy_sum

N, D, V = 37, 16, 53
SHAPES = {
    "plain": TokenLoss(chunk_tokens=10),
    "smoothed": TokenLoss(label_smoothing=0.1, chunk_tokens=10),
    "z": TokenLoss(z_loss=1e-2, chunk_tokens=7),
    "capped and scaled": TokenLoss(softcap=5.0, logit_scale=0.5, chunk_tokens=10),
    "everything": TokenLoss(label_smoothing=0.2, z_loss=1e-2, softcap=5.0, logit_scale=0.5, chunk_tokens=64),
}


def inputs(seed: int = 0, with_bias: bool = True):
    torch.manual_seed(seed)
    hidden_ND = torch.randn(N, D, requires_grad=True)
    head_VD = torch.randn(V, D, requires_grad=True)
    bias_V = torch.randn(V, requires_grad=True) if with_bias else None
    targets_N = torch.randint(V, (N,))
    targets_N[::5] = NOT_LEARNED
    return hidden_ND, head_VD, bias_V, targets_N


def by_numpy(hidden_ND, head_VD, bias_V, targets_N, shape: TokenLoss) -> float:
    total = 0.0
    for h_D, y in zip(hidden_ND.detach().double().numpy(), targets_N.numpy(), strict=True):
        if y == NOT_LEARNED:
            continue
        z_V = (head_VD.detach().double().numpy() @ h_D + bias_V.detach().double().numpy()) * shape.logit_scale
        if shape.softcap:
            z_V = shape.softcap * np.tanh(z_V / shape.softcap)
        log_z = np.log(np.exp(z_V).sum())
        nll_V = log_z - z_V
        total += (1 - shape.label_smoothing) * nll_V[y] + shape.label_smoothing * nll_V.mean() + shape.z_loss * log_z**2
    return total


@pytest.mark.parametrize("name", SHAPES)
def test_the_sum_is_the_formula(name):
    given = inputs()
    with shape_names_checked("zhibei/losses"):
        ours = cross_entropy_sum(given[0], given[1], given[3], bias_V=given[2], loss=SHAPES[name])
    assert ours.item() == pytest.approx(by_numpy(*given, SHAPES[name]), rel=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_autograd_over_whole_logits(name):
    shape = SHAPES[name]
    hidden_ND, head_VD, bias_V, targets_N = inputs(1)
    (cross_entropy_sum(hidden_ND, head_VD, targets_N, bias_V=bias_V, loss=shape) / 3).backward()
    ours = [tensor.grad.clone() for tensor in (hidden_ND, head_VD, bias_V)]
    for tensor in (hidden_ND, head_VD, bias_V):
        tensor.grad = None
    z_NV = torch.nn.functional.linear(hidden_ND, head_VD, bias_V) * shape.logit_scale
    if shape.softcap:
        z_NV = shape.softcap * torch.tanh(z_NV / shape.softcap)
    nll = torch.nn.functional.cross_entropy(z_NV, targets_N, reduction="sum", label_smoothing=shape.label_smoothing)
    z_term = shape.z_loss * (torch.logsumexp(z_NV, -1)[targets_N != NOT_LEARNED] ** 2).sum()
    ((nll + z_term) / 3).backward()
    for mine, tensor in zip(ours, (hidden_ND, head_VD, bias_V), strict=True):
        torch.testing.assert_close(mine, tensor.grad, atol=2e-6, rtol=1e-5)


def test_chunking_changes_nothing():
    whole, chunked = TokenLoss(chunk_tokens=1000), TokenLoss(chunk_tokens=3)
    results = []
    for shape in (whole, chunked):
        hidden_ND, head_VD, _, targets_N = inputs(2, with_bias=False)
        loss = cross_entropy_sum(hidden_ND, head_VD, targets_N, loss=shape)
        loss.backward()
        results.append((loss.item(), hidden_ND.grad, head_VD.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1:], results[1][1:], atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_unlearned_tokens_none_either():
    hidden_ND, head_VD, _, targets_N = inputs(3, with_bias=False)
    head_VD.requires_grad_(False)
    cross_entropy_sum(hidden_ND, head_VD, targets_N).backward()
    assert head_VD.grad is None
    unlearned_N = targets_N == NOT_LEARNED
    assert hidden_ND.grad[unlearned_N].abs().max() == 0
    assert (hidden_ND.grad[~unlearned_N].abs().sum(dim=1) > 0).all()


def test_nothing_learned_gives_exactly_zero():
    hidden_ND, head_VD, _, _ = inputs(4, with_bias=False)
    loss = cross_entropy_sum(hidden_ND, head_VD, torch.full((N,), NOT_LEARNED))
    loss.backward()
    assert loss.item() == 0
    assert head_VD.grad.abs().max() == 0


def test_held_out_losses_are_the_same_number_without_any_gradient_being_made(monkeypatch):
    from zhibei.losses import tokens

    asked = []
    original = tokens._chunk_loss_and_gradient

    def watched(raw_NV, targets_N, loss, with_gradient):
        asked.append(with_gradient)
        return original(raw_NV, targets_N, loss, with_gradient)

    monkeypatch.setattr(tokens, "_chunk_loss_and_gradient", watched)
    hidden_ND, head_VD, bias_V, targets_N = inputs()
    trained = cross_entropy_sum(hidden_ND, head_VD, targets_N, bias_V=bias_V, loss=SHAPES["everything"])
    with torch.no_grad():
        heldout = cross_entropy_sum(hidden_ND, head_VD, targets_N, bias_V=bias_V, loss=SHAPES["everything"])
    assert torch.equal(trained, heldout)
    assert asked == [True, False]
