"""Adapters of every kind on tiny models, as PEFT writes them, with random values. Knows no test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_model_folder


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def adapter_folder(base: Path, folder: Path, *, seed: int = 0, size: float = 0.1, **settings: Any) -> Path:
    """A PEFT folder beside `base` whose matrices, magnitudes and whole tensors all differ from their beginning."""
    import peft

    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 if "magnitude" in name else 1.0
            parameter.data += scale * size * torch.randn_like(parameter)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def with_adapter(base: Path, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(load(base), str(folder), autocast_adapter_dtype=False).eval()


def tokens(vocabulary: int = 300) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(5))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(model.config.vocab_size)).logits


__all__ = ["adapter_folder", "load", "logits_of", "tiny_model_folder", "tokens", "with_adapter"]
