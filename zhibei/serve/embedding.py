"""Texts as vectors: the mean of the last hidden states of a language model. Knows no HTTP.

A language model was trained to continue text, not to compare it; these vectors are a fair start and no more.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from zhibei.model.language_model import LanguageModel


@torch.no_grad()
def embed(model: LanguageModel, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """One vector of length 1 for each row of token ids: the mean over its tokens after the model's last norm."""
    vectors = []
    for row in rows:
        tokens_BT = torch.tensor([list(row)], device=model.device)
        hidden_TD = model.body(input_ids=tokens_BT, use_cache=False).last_hidden_state[0].float()
        vectors.append(torch.nn.functional.normalize(hidden_TD.mean(dim=0), dim=0).tolist())
    return vectors


def as_written(vector: Sequence[float], encoding: str) -> Any:
    """A list of numbers, or little-endian float32 in base64, as OpenAI's clients ask for."""
    if encoding == "float":
        return list(vector)
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
