"""Log-probabilities of given tokens, and entropies, without ever holding all logits. Knows hidden states, not models.

Dimensions: N tokens, C tokens of one chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from zhibei.losses.tokens import NOT_LEARNED, TokenLoss

PLAIN_HEAD = TokenLoss()


def token_logps(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    shape: TokenLoss = PLAIN_HEAD,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(target), entropy) of every token in fp32, [N] each; both are 0 where the target is NOT_LEARNED.

    p is the softmax of logits / temperature: the distribution that sampling at that temperature draws from. Both carry
    gradients. Forward and backward hold one chunk of logits; the backward pass computes them again.
    Of `shape` only the head's scale, soft cap and chunk size are used.
    """
    return _ChunkedLogps.apply(hidden_ND, head_VD, bias_V, targets_N, (shape, temperature))


def _shaped(raw_CV: torch.Tensor, shape: TokenLoss, temperature: float) -> torch.Tensor:
    logits_CV = raw_CV.float() * shape.logit_scale
    if shape.softcap is not None:
        logits_CV = shape.softcap * torch.tanh(logits_CV / shape.softcap)
    return logits_CV / temperature


def _back_to_raw(gradient_CV: torch.Tensor, logits_CV: torch.Tensor, shape: TokenLoss, temperature: float) -> None:
    """d/d logits -> d/d raw, in place."""
    gradient_CV /= temperature
    if shape.softcap is not None:
        gradient_CV *= 1 - (logits_CV * temperature / shape.softcap) ** 2
    gradient_CV *= shape.logit_scale


class _ChunkedLogps(torch.autograd.Function):
    """With z the shaped logits, L = log Z, p = softmax(z): log p_y = z_y - L, H = L - sum p z.

    d log p_y / dz = onehot(y) - p, and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        shaping: tuple[TokenLoss, float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape, temperature = shaping
        learned_N = targets_N != NOT_LEARNED
        logps_N = hidden_ND.new_zeros(hidden_ND.shape[0], dtype=torch.float32)
        entropies_N = torch.zeros_like(logps_N)
        for part in _chunks(hidden_ND.shape[0], shape.chunk_tokens):
            raw_CV = torch.nn.functional.linear(hidden_ND[part], head_VD, bias_V)
            log_p_CV = torch.log_softmax(_shaped(raw_CV, shape, temperature), dim=-1)
            index_C = torch.where(learned_N[part], targets_N[part], 0)
            logps_N[part] = log_p_CV.gather(1, index_C[:, None])[:, 0] * learned_N[part]
            entropies_N[part] = -(log_p_CV.exp() * log_p_CV).sum(dim=-1) * learned_N[part]
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, entropies_N)
        ctx.shaping = shaping
        return logps_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_logps_N, grad_entropies_N = grads
        shape, temperature = ctx.shaping
        hidden_ND, head_VD, bias_V, targets_N, entropies_N = ctx.saved_tensors
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        learned_N = targets_N != NOT_LEARNED
        grad_hidden_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        for part in _chunks(hidden_ND.shape[0], shape.chunk_tokens):
            raw_CV = torch.nn.functional.linear(hidden_ND[part], head_VD, bias_V)
            logits_CV = _shaped(raw_CV, shape, temperature)
            log_p_CV = torch.log_softmax(logits_CV, dim=-1)
            p_CV = log_p_CV.exp()
            weight_C = grad_logps_N[part] * learned_N[part]
            index_C = torch.where(learned_N[part], targets_N[part], 0)
            gradient_CV = -p_CV * weight_C[:, None]
            gradient_CV.scatter_add_(1, index_C[:, None], weight_C[:, None])
            of_entropy_C = (grad_entropies_N[part] * learned_N[part])[:, None]
            gradient_CV -= p_CV * (log_p_CV + entropies_N[part][:, None]) * of_entropy_C
            _back_to_raw(gradient_CV, logits_CV, shape, temperature)
            gradient_CV = gradient_CV.to(raw_CV.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = gradient_CV @ head_VD
            if grad_head_VD is not None:
                grad_head_VD += gradient_CV.T @ hidden_ND[part]
            if grad_bias_V is not None:
                grad_bias_V += gradient_CV.float().sum(dim=0)
        head = None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype)
        bias = None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_ND, head, bias, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens)]
