"""Cross-entropy over a large vocabulary without ever holding all logits. Knows hidden states, not models or rows.

Dimensions: N tokens, C tokens of one chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

NOT_LEARNED = -100


@dataclass(frozen=True)
class TokenLoss:
    """What is added up per token, with the shape of the model's output head.

    `label_smoothing` e: (1 - e) nll + e * mean over the vocabulary of -log p (arXiv:1512.00567, eq. 3).
    `z_loss` w: w * (log Z)^2 (arXiv:2204.02311, section 5). `softcap` c: logits are c * tanh(x / c) (Gemma 2).
    `logit_scale` s: logits are s * x (Cohere, Granite). `chunk_tokens`: rows of logits held at a time.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_tokens: int = 2048
    compiled: bool = False


def cross_entropy_sum(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    loss: TokenLoss = TokenLoss(),
) -> torch.Tensor:
    """Sum of the token losses, in fp32, over all targets that are not NOT_LEARNED. Never divides.

    The gradients are worked out chunk by chunk in the forward pass (they are linear in the incoming scalar), so
    memory is one chunk of logits instead of N x V, and no logits are computed twice.
    """
    # A Function is told which inputs require gradients even where none are recorded; held-out losses need none.
    asked = _Asked(loss, with_gradient=torch.is_grad_enabled())
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, bias_V, targets_N, asked)


@dataclass(frozen=True)
class _Asked:
    loss: TokenLoss
    with_gradient: bool


def _chunk_loss_and_gradient(
    raw_NV: torch.Tensor, targets_N: torch.Tensor, loss: TokenLoss, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss sum of one chunk and, if asked for, d loss / d raw logits.

    With z the shaped logits, L = log Z and p = softmax(z):
    loss = (1 - e)(L - z_y) + e (L - mean z) + w L^2, so d/dz = p (1 + 2 w L) - (1 - e) onehot(y) - e / V.
    """
    logits_NV = raw_NV.float()
    if loss.logit_scale != 1.0:
        logits_NV = logits_NV * loss.logit_scale
    if loss.softcap is not None:
        logits_NV = loss.softcap * torch.tanh(logits_NV / loss.softcap)
    learned_N = targets_N != NOT_LEARNED
    index_N = torch.where(learned_N, targets_N, 0)
    log_z_N = torch.logsumexp(logits_NV, dim=-1)
    picked_N = logits_NV.gather(1, index_N[:, None])[:, 0]
    token_loss_N = log_z_N - (1 - loss.label_smoothing) * picked_N
    if loss.label_smoothing:
        token_loss_N = token_loss_N - loss.label_smoothing * logits_NV.mean(dim=-1)
    if loss.z_loss:
        token_loss_N = token_loss_N + loss.z_loss * log_z_N**2
    weight_N = learned_N.float()
    loss_sum = (token_loss_N * weight_N).sum()
    if not with_gradient:
        return loss_sum, None

    gradient_NV = torch.exp(logits_NV - log_z_N[:, None])
    if loss.z_loss:
        gradient_NV = gradient_NV * (1 + 2 * loss.z_loss * log_z_N[:, None])
    columns_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    gradient_NV = gradient_NV - (1 - loss.label_smoothing) * (columns_V[None, :] == index_N[:, None]).float()
    if loss.label_smoothing:
        gradient_NV = gradient_NV - loss.label_smoothing / logits_NV.shape[1]
    if loss.softcap is not None:
        gradient_NV = gradient_NV * (1 - (logits_NV / loss.softcap) ** 2)
    if loss.logit_scale != 1.0:
        gradient_NV = gradient_NV * loss.logit_scale
    gradient_NV = (gradient_NV * weight_N[:, None]).to(raw_NV.dtype)
    return loss_sum, gradient_NV


@functools.cache
def _compiled_chunk() -> Any:
    """Made on first use: merely naming torch.compile imports the whole compiler."""
    return torch.compile(_chunk_loss_and_gradient, dynamic=True)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes loss and gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        asked: _Asked,
    ) -> torch.Tensor:
        loss, with_gradient = asked.loss, asked.with_gradient
        wants_hidden, wants_head, wants_bias = (needed and with_gradient for needed in ctx.needs_input_grad[:3])
        chunk_step = _compiled_chunk() if loss.compiled else _chunk_loss_and_gradient
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        # fp32: a bf16 sum over many chunks would lose the small contributions.
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        for start in range(0, hidden_ND.shape[0], loss.chunk_tokens):
            part = slice(start, start + loss.chunk_tokens)
            raw_CV = torch.nn.functional.linear(hidden_ND[part], head_VD, bias_V)
            chunk_sum, gradient_CV = chunk_step(raw_CV, targets_N[part], loss, with_gradient)
            total += chunk_sum
            if gradient_CV is None:
                continue
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = gradient_CV @ head_VD
            if grad_head_VD is not None:
                grad_head_VD += gradient_CV.T @ hidden_ND[part]
            if grad_bias_V is not None:
                grad_bias_V += gradient_CV.float().sum(dim=0)
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD, grad_bias_V)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (scale,) = grads
        grad_hidden_ND, grad_head_VD, grad_bias_V = ctx.saved_tensors

        def scaled(gradient: torch.Tensor | None) -> torch.Tensor | None:
            # In place: a scaled copy of the head's fp32 gradient would be the peak of many a step.
            return None if gradient is None else gradient.mul_(scale).to(ctx.head_dtype)

        return scaled(grad_hidden_ND), scaled(grad_head_VD), scaled(grad_bias_V), None, None
