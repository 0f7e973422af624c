"""One tiny model and a few rows, as this package and as TRL takes them. Knows no loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model_folder
from zhibei.config.run import LoraSection, ModelSection
from zhibei.data.batches import Batch, BatchPlan, collate_packed
from zhibei.data.prepared import PreparedRows
from zhibei.model.language_model import LanguageModel
from zhibei.model.load import Need, load_for_training

PROMPTS = (5, 3, 7)
ANSWERS = ((4, 6), (2, 9), (5, 5))
"""Tokens of each prompt, and of its chosen and its rejected answer."""
PLAN = BatchPlan(global_batch=1, micro_batch_tokens=512)


def rows_of_pairs() -> tuple[list[list[int]], list[int]]:
    """Token ids of chosen, rejected, chosen, ... and the prompt tokens of each."""
    draw = np.random.default_rng(3)
    rows, prompts = [], []
    for prompt, lengths in zip(PROMPTS, ANSWERS, strict=True):
        asked = draw.integers(4, 290, prompt).tolist()
        rows += [[*asked, *draw.integers(4, 290, length).tolist()] for length in lengths]
        prompts += [prompt, prompt]
    return rows, prompts


def as_rows(rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> PreparedRows:
    """The rows with their answers supervised."""
    return PreparedRows(
        tokens=np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
        supervised=np.concatenate([np.arange(len(row)) >= prompt for row, prompt in zip(rows, prompts, strict=True)]),
        borders=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        row_ids=[str(number) for number in range(len(rows))],
    )


def packed(rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> Batch:
    return collate_packed(as_rows(rows, prompts), range(len(rows)), PLAN)


def padded(rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> dict[str, torch.Tensor]:
    """The rows side by side, padded on the right: input_ids, attention_mask, completion_mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    lengths, starts = torch.tensor([len(row) for row in rows])[:, None], torch.tensor(prompts)[:, None]
    places = torch.arange(width)
    return {
        "input_ids": ids,
        "attention_mask": (places < lengths).long(),
        "completion_mask": ((places >= starts) & (places < lengths)).long(),
    }


def chosen_first(rows: Sequence[Any]) -> list[Any]:
    """The order of TRL: all chosen rows, then all rejected ones."""
    return [*rows[0::2], *rows[1::2]]


def two_folders(folder: Path) -> tuple[Path, Path]:
    """A policy, and a reference with other weights."""
    policy = tiny_model_folder(folder / "policy")
    model = AutoModelForCausalLM.from_pretrained(policy)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    reference = tiny_model_folder(folder / "reference")
    model.save_pretrained(reference)
    return policy, reference


def ours(folder: Path) -> LanguageModel:
    need = Need(device=torch.device("cpu"), precision="fp32", longest_row=64)
    return load_for_training(ModelSection(path=str(folder)), LoraSection(), need)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By parameter; forgotten afterwards."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def assert_same(mine: torch.Tensor, model: LanguageModel, theirs: torch.Tensor, module: torch.nn.Module) -> None:
    """Equal losses, and equal gradients of every parameter."""
    torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)
    mine.backward()
    theirs.backward()
    assert_same_gradients(gradients(model.hf), gradients(module))


def assert_same_gradients(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Apart by rounding only: fp32 sums in another order."""
    assert set(mine) == set(theirs)
    assert any(gradient.abs().max() > 1e-6 for gradient in theirs.values())
    for name, gradient in theirs.items():
        difference, size = (mine[name] - gradient).abs().max(), gradient.abs().max()
        assert difference <= 1e-4 * size + 1e-7, f"{name}: {difference:.3g} of {size:.3g}"
