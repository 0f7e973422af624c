"""Chunked log-probabilities and entropies equal the full softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch

from zhibei.losses.logps import token_logps
from zhibei.losses.tokens import NOT_LEARNED, TokenLoss


def plain(hidden, head, targets, bias, shape, temperature):
    logits = torch.nn.functional.linear(hidden, head, bias) * shape.logit_scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    learned = targets != NOT_LEARNED
    picked = log_p[torch.arange(len(targets)), targets.clamp(min=0)]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return picked * learned, entropy * learned


@pytest.mark.parametrize(
    ("shape", "temperature", "has_bias"),
    [
        (TokenLoss(chunk_tokens=3), 1.0, False),
        (TokenLoss(chunk_tokens=100), 0.7, True),
        (TokenLoss(chunk_tokens=4, softcap=5.0, logit_scale=0.5), 1.3, True),
    ],
)
def test_values_and_gradients_equal_the_full_softmax(shape: TokenLoss, temperature: float, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(17, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(17, generator=generator, dtype=torch.float64) if has_bias else None
    targets = torch.randint(0, 17, (11,), generator=generator)
    targets[[2, 7]] = NOT_LEARNED
    weights = torch.randn(2, 11, generator=generator)

    def gradients(function):
        inputs = [t.clone().requires_grad_() for t in (hidden, head)] + [
            bias.clone().requires_grad_() if bias is not None else None
        ]
        values = function(*inputs)
        (values[0] * weights[0] + values[1] * weights[1]).sum().backward()
        return values, [one.grad for one in inputs if one is not None]

    ours, our_gradients = gradients(
        lambda h, w, b: token_logps(h, w, targets, bias_V=b, shape=shape, temperature=temperature)
    )
    theirs, their_gradients = gradients(lambda h, w, b: plain(h, w, targets, b, shape, temperature))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_is_not_learned_has_no_probability_and_no_gradient() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([1, NOT_LEARNED, 2, NOT_LEARNED])
    logps, entropies = token_logps(hidden, torch.randn(5, 3), targets)
    (logps.sum() + entropies.sum()).backward()
    assert hidden.grad is not None
    assert logps[[1, 3]].tolist() == entropies[[1, 3]].tolist() == [0, 0]
    assert hidden.grad[[1, 3]].abs().sum() == 0
    assert (hidden.grad[[0, 2]].abs().sum(dim=1) > 0).all()
