"""A transformers model set up to answer, and put back afterwards. Knows modules and attention, not tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zhibei.model.attention import plain_attention

# Attention that understands a padding mask and a cache. Anything else was registered for packed training rows.
_CACHED_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def plain_model(model: Any) -> Any:
    """The transformers model itself, without the wrapper of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cache_argument(module: Any) -> str:
    """What the forward pass of a transformers model calls the keys and values it goes on from: `cache` since 5.24, in
    the families that follow."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def going_on(model: Any) -> Callable[[Any], dict[str, Any]]:
    """What a causal model is called with, besides tokens, to go on from a cache: logits of the last position only where
    it can leave out the others."""
    inner = plain_model(model)
    accepted = inspect.signature(inner.forward).parameters
    settings = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})}
    name = cache_argument(inner)
    return lambda cache: {name: cache, **settings}


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """The model as it must be while it answers (no dropout, attention with a cache); afterwards as it was before."""
    in_training = [module for module in model.modules() if module.training]
    inner = plain_model(model)
    attention = inner.config._attn_implementation
    must_switch = attention not in _CACHED_ATTENTION
    model.eval()
    if must_switch:
        inner.set_attn_implementation(plain_attention(inner.config, has_sdpa=inner._supports_sdpa))
    try:
        # Compiled layers would be compiled anew for each length of the cache.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in in_training:
            module.training = True
        if must_switch:
            inner.set_attn_implementation(attention)
