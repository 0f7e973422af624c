"""A reward model's adapter and head, put onto a base that others use too. Knows PEFT's names, no rewards or loops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.model.language_model import LanguageModel
from zhibei.model.lora import import_peft
from zhibei.store.shards import read_tensors

HEAD_TENSOR = "base_model.model.score.weight"
"""PEFT's name of the head in a reward model's adapter folder."""


@dataclass(frozen=True)
class ScoreAdapter:
    """`tensors` have PEFT's names, without the head; `head_1D` is the head in fp32."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    head_1D: torch.Tensor


def read_score_adapter(folder: Path) -> ScoreAdapter:
    """Adapter and head of a reward model's PEFT folder. Raises UserError when it holds no head."""
    tensors = dict(read_tensors(folder, stem="adapter_model"))
    head = tensors.pop(HEAD_TENSOR, None)
    if head is None:
        raise UserError(
            f"{folder} holds no {HEAD_TENSOR}",
            expected="the adapter of a reward model, with its head",
            fix="copy the folder again from where it was written",
            where=str(folder),
        )
    return ScoreAdapter(folder, tensors, head.float())


def put_on(model: LanguageModel, adapter: ScoreAdapter, *, name: str, device: torch.device) -> torch.nn.Linear:
    """Put the adapter onto a model that has adapters already, under `name`; gives its head, which is not part of the
    model. Nothing of it drops out. Raises UserError unless every tensor finds its place."""
    peft: Any = import_peft()
    config = peft.LoraConfig.from_pretrained(str(adapter.folder))
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    config.inference_mode, config.lora_dropout = False, 0.0
    model.hf.add_adapter(name, config, autocast_adapter_dtype=False)
    result = peft.set_peft_model_state_dict(model.hf, adapter.tensors, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if missing or result.unexpected_keys:
        astray = [*missing, *result.unexpected_keys]
        raise UserError(
            f"{len(astray)} tensors of {adapter.folder} do not fit this model, e.g. {astray[0]}",
            expected="the adapter of a reward model that was trained on this base",
            fix="set ppo.models: separate, or train the reward model on this base",
            where=str(adapter.folder),
        )
    head = torch.nn.Linear(adapter.head_1D.shape[1], 1, bias=False, device=device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(adapter.head_1D)
    return head.requires_grad_(False)
