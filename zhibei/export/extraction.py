"""An adapter out of two whole models: the best low-rank share of each layer's difference. Knows tensors, not runs.

W_tuned - W_base = U S V' (singular values); the first R of them are the closest matrix of rank R (Eckart-Young), and
their share of the squared sum is the energy that is kept. A = S^1/2 V', B = U S^1/2, scale 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.export.adapters import PREFIX
from zhibei.export.merge import require_plain
from zhibei.store.files import read_json, write_json_atomic
from zhibei.store.shards import TensorFolder, read_tensors, save_tensors
from zhibei.store.tensor_names import EMBEDDING, HEAD

EXACT_UP_TO = 1024  # beyond, a randomised decomposition takes seconds where the exact one takes minutes
OVERSAMPLED, ITERATIONS = 16, 4


@dataclass(frozen=True)
class Extracted:
    """`energy`: of each adapted layer, the share of its squared difference that the rank keeps. `left_out`: tensors
    that differ and are no linear layers (embeddings, head, norms, biases), which no such adapter holds."""

    rank: int
    energy: dict[str, float]
    left_out: tuple[str, ...]
    num_bytes: int

    @property
    def kept(self) -> float:
        """The mean share over layers; 1 when nothing differs."""
        return sum(self.energy.values()) / len(self.energy) if self.energy else 1.0


def extract_adapter(
    tuned: Path,
    base: Path,
    folder: Path,
    *,
    rank: int,
    device: torch.device,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Extracted:
    """Write a PEFT folder whose adapter brings the base closest to the tuned model, layer by layer.

    Raises UserError for a rank below 1, models of different shapes, and two models whose layers are the same.
    """
    if rank < 1:
        raise UserError(f"--rank {rank}", expected="1 or more", fix="try --rank 16", where="--rank")
    for place in (tuned, base):
        require_plain(read_json(place / "config.json"), place)
    mine, theirs = read_tensors(tuned, stem="model"), read_tensors(base, stem="model")
    layers = [name for name in mine if _is_layer(mine, theirs, name)]
    energy: dict[str, float] = {}
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for number, name in enumerate(layers, start=1):
        difference = mine.read_unmapped(name).float() - theirs.read_unmapped(name).float()
        progress(number, len(layers))
        if not bool(torch.count_nonzero(difference)):
            continue
        module = name.removesuffix(".weight")
        used = min(rank, *difference.shape)
        b, a, kept = low_rank(difference.to(device), used)
        energy[module] = kept
        ranks[module] = used
        dtype = mine.read_unmapped(name).dtype
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to("cpu", dtype).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.to("cpu", dtype).contiguous()
    if not energy:
        raise UserError(
            "no linear layer differs between the two models",
            expected="a model that was tuned in full, and its base",
            fix="check the two paths",
            where=str(tuned),
        )
    written = save_tensors(folder, tensors, stem="adapter_model")
    write_json_atomic(folder / "adapter_config.json", _config(base, energy, rank=rank, ranks=ranks))
    others = tuple(name for name in mine if name not in layers and _differs(mine, theirs, name))
    return Extracted(rank, energy, others, sum(file.num_bytes for file in written))


def low_rank(difference_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(B [O, R], A [R, I], share of the squared sum that is kept)."""
    if min(difference_OI.shape) <= EXACT_UP_TO:
        u, s, vt = torch.linalg.svd(difference_OI, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wanted = min(rank + OVERSAMPLED, *difference_OI.shape)
            u, s, v = torch.svd_lowrank(difference_OI, q=wanted, niter=ITERATIONS)
            vt = v.T
    root = s[:rank].sqrt()
    kept = float(s[:rank].double().square().sum() / difference_OI.double().square().sum())
    return u[:, :rank] * root, root[:, None] * vt[:rank], min(kept, 1.0)


def _is_layer(mine: TensorFolder, theirs: TensorFolder, name: str) -> bool:
    """A matrix of both models that is no embedding and no head. Raises UserError for one of another shape."""
    if name not in theirs:
        raise UserError(
            f"tensor {name} is not in the base",
            expected="the base that the model was tuned from",
            fix="name it with --base",
            where="--base",
        )
    shape = mine.spec(name).shape
    if len(shape) != 2 or not name.endswith(".weight") or EMBEDDING.search(name) or HEAD.search(name):
        return False
    if shape != theirs.spec(name).shape:
        raise UserError(
            f"tensor {name} has shape {list(shape)}, in the base {list(theirs.spec(name).shape)}",
            expected="the base that the model was tuned from",
            fix="name it with --base",
            where="--base",
        )
    return True


def _differs(mine: TensorFolder, theirs: TensorFolder, name: str) -> bool:
    a, b = mine.read_unmapped(name), theirs.read_unmapped(name)
    return a.shape != b.shape or not torch.equal(a, b)


def _config(base: Path, energy: dict[str, float], *, rank: int, ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it: alpha = rank, so that the scale is 1."""
    smaller = {module: used for module, used in ranks.items() if used != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": dict(smaller),
        "target_modules": sorted(energy),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
