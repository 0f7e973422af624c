"""Dropout off for good, in a model that is otherwise in training mode. Knows modules, not stages."""

from __future__ import annotations

import torch

from zhibei.model.language_model import LanguageModel


def without_dropout(model: LanguageModel) -> None:
    """No noise between two answers that are compared, nor between a policy and its reference.

    Evaluation mode would do that too, but transformers recomputes activations in training mode only.
    """
    for module in model.hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Attention hands its rate to a function instead of having a module for it.
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
