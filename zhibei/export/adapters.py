"""What a PEFT adapter does to each tensor of its base, in plain arithmetic. Knows adapter folders, not models or runs.

Dimensions: O outputs, I inputs, R rank. LoRA (arXiv:2106.09685): W' = W + s B A with s = alpha / R, or alpha / sqrt(R)
for rsLoRA (arXiv:2312.03732). DoRA (arXiv:2402.09353): W' = m (W + s B A) / |W + s B A|, the norm over the inputs of
each output. Embeddings and layers that store (inputs, outputs) take the transposed difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.store.files import read_json
from zhibei.store.shards import TensorFolder

PREFIX = "base_model.model."
ROWS_AT_ONCE = 4096
# Settings under which an adapter is more, or something else, than a product of two matrices beside the base's own.
NOT_A_SUM: dict[str, str] = {
    "layer_replication": "repeats layers of the base",
    "target_parameters": "adapts parameters that are no layers of their own",
    "trainable_token_indices": "trains single rows of the embedding",
    "use_qalora": "pools its inputs",
    "use_bdlora": "is block-diagonal",
    "alora_invocation_tokens": "acts only behind certain tokens",
    "arrow_config": "chooses between adapters for each token",
    "kasa_config": "changes the base's own singular values",
    "monteclora_config": "draws at random",
    "megatron_config": "belongs to layers that are split over devices",
}
# Ways to begin that take something out of the base; the matrices alone do not say what.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Product:
    """W + scale B A, from two tensors of the adapter's file; with `magnitude`, DoRA."""

    a: str
    b: str
    scale: float
    is_transposed: bool = False
    magnitude: str | None = None


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained in full (modules_to_save, biases) and takes the place of the base's."""

    tensor: str


Change = Product | Replacement


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder, read as far as its config and the heads of its files. `weight` is its share in a mixture."""

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFolder
    weight: float = 1.0

    @property
    def is_dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    def changes(self) -> dict[str, Change]:
        """By the name of the base's tensor. Raises UserError for tensors that no known kind of adapter has."""
        found: dict[str, Change] = {}
        for name in self.tensors:
            inner = _inner_name(name)
            if ".original_module." in inner:  # the base's own tensor, which PEFT may save beside the trained copy
                continue
            module, separator, part = inner.partition(".lora_")
            if not separator:
                found[inner.replace(".base_layer.", ".")] = Replacement(name)
            elif part in ("A.weight", "embedding_A"):
                found[f"{module}.weight"] = self._product(name, module, is_embedding=part == "embedding_A")
            elif part == "B.bias":
                raise self._refusal(f"{name}: it adds a bias to a layer (lora_bias)")
            elif part not in ("B.weight", "embedding_B", "magnitude_vector", "magnitude_vector.weight"):
                raise self._refusal(f"tensor {name} is of no known kind")
        if not found:
            raise self._refusal("it holds no tensor")
        return found

    def _product(self, name: str, module: str, *, is_embedding: bool) -> Product:
        b = name.replace("lora_embedding_A", "lora_embedding_B").replace(".lora_A.", ".lora_B.")
        if b not in self.tensors:
            raise self._refusal(f"tensor {name} has no B beside it")
        rank = self.tensors.spec(name).shape[0]
        if self.tensors.spec(b).shape[-1] != rank:
            raise self._refusal(f"{module}: A has rank {rank}, B {self.tensors.spec(b).shape[-1]}")
        stem = name[: name.index(".lora_")]
        magnitude = next(
            (m for m in (f"{stem}.lora_magnitude_vector{end}" for end in (".weight", "")) if m in self.tensors), None
        )
        if self.is_dora and (magnitude is None or is_embedding):
            raise self._refusal(f"{module}: DoRA without a magnitude that belongs to a linear layer")
        transposed = is_embedding or bool(self.config.get("fan_in_fan_out"))
        return Product(name, b, self._scale(module, rank), is_transposed=transposed, magnitude=magnitude)

    def _scale(self, module: str, rank: int) -> float:
        patterns: Mapping[str, Any] = self.config.get("alpha_pattern") or {}
        own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = float(self.config.get("lora_alpha", 8) if own is None else own)
        return self.weight * alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"the adapter cannot be merged: {what}",
            expected="LoRA, rsLoRA or DoRA matrices, and whole tensors under modules_to_save",
            fix="copy the folder again from where it was written, or merge it with the program that made it",
            where=str(self.folder),
        )


def _inner_name(name: str) -> str:
    inner = name.removeprefix(PREFIX)
    return inner.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def read_adapter_folder(folder: Path, *, weight: float = 1.0) -> Adapter:
    """Config and file heads of a PEFT folder.

    Raises UserError when something is missing, and for kinds of adapters that are not a sum with the base.
    """
    if not math.isfinite(weight) or weight == 0:
        raise UserError(
            f"weight {weight} of {folder}",
            expected="a finite number other than 0",
            fix="write --adapters PATH:0.5",
            where="--adapters",
        )
    config = read_json(folder / "adapter_config.json")
    files = sorted(folder.glob("adapter_model*.safetensors"))
    if not isinstance(config, dict) or not files:
        raise UserError(
            "no adapter_model.safetensors here" if not files else "adapter_config.json holds no settings",
            expected="a PEFT folder (adapter_config.json and adapter_model.safetensors)",
            fix="name the folder that an adapter run wrote, e.g. runs/NAME (pickled .bin files are never opened)",
            where=str(folder),
        )
    reason = next((what for name, what in NOT_A_SUM.items() if config.get(name)), "")
    begun = str(config.get("init_lora_weights", "")).lower()
    if config.get("peft_type") != "LORA":
        reason = f"is of type {config.get('peft_type')}"
    elif begun.startswith(CHANGES_THE_BASE):
        reason = f"began with init_lora_weights: {begun}, which takes its share out of the base"
    if reason:
        raise UserError(
            f"this adapter {reason}: it is not base plus product",
            expected="a LoRA, rsLoRA or DoRA adapter",
            fix="merge it with PEFT itself (merge_and_unload), where that is possible",
            where=f"{folder}/adapter_config.json",
        )
    adapter = Adapter(folder, config, TensorFolder(files), weight)
    if weight != 1 and adapter.is_dora:
        raise UserError(
            f"weight {weight} of a DoRA adapter",
            expected="weight 1: its magnitudes replace those of the base, so a share of it is not defined",
            fix=f"leave the weight of {folder} out",
            where="--adapters",
        )
    return adapter


def mixed_changes(adapters: list[Adapter]) -> dict[str, list[tuple[Adapter, Change]]]:
    """What all adapters together do to each tensor. Raises UserError for what cannot be added up."""
    together: dict[str, list[tuple[Adapter, Change]]] = {}
    for adapter in adapters:
        for name, change in adapter.changes().items():
            together.setdefault(name, []).append((adapter, change))
    for name, found in together.items():
        is_alone = len(found) == 1
        for adapter, change in found:
            what = "is trained in full" if isinstance(change, Replacement) else "has DoRA magnitudes"
            is_sum = isinstance(change, Product) and change.magnitude is None
            if not is_sum and (not is_alone or adapter.weight != 1):
                raise UserError(
                    f"{name} {what} in {adapter.folder}, and its weight is {adapter.weight:g}"
                    + ("" if is_alone else "; another adapter changes it too"),
                    expected="adapters whose differences can be added: LoRA on linear layers",
                    fix="merge that adapter alone first, and the others into the result",
                    where="--adapters",
                )
    return together


def changed(
    base: torch.Tensor, changes: list[tuple[Adapter, Change]], *, dtype: torch.dtype, name: str
) -> torch.Tensor:
    """The merged tensor: computed in fp32 some rows at a time, and rounded once to `dtype`.

    Raises UserError when shapes do not fit, or when a value is not finite in `dtype`.
    """
    adapter, change = changes[0]
    if isinstance(change, Replacement):
        return finite(adapter.tensors.read_unmapped(change.tensor).to(dtype), name)
    parts = [_loaded(adapter, change, base, name) for adapter, change in changes if isinstance(change, Product)]
    merged = torch.empty(base.shape, dtype=dtype)
    for start in range(0, base.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        values = base[rows].to(torch.float32, copy=True)
        for left, right, magnitude in parts:
            values += left[rows] @ right
            if magnitude is not None:
                values *= (magnitude[rows] / torch.linalg.vector_norm(values, dim=1))[:, None]
        merged[rows] = values.to(dtype)
    return finite(merged, name)


def _loaded(
    adapter: Adapter, change: Product, base: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(left, right) with left @ right the difference in the base's own layout, scale included, and the magnitude."""
    a_RI = adapter.tensors.read_unmapped(change.a).float()
    b_OR = adapter.tensors.read_unmapped(change.b).float() * change.scale
    left, right = (a_RI.T, b_OR.T) if change.is_transposed else (b_OR, a_RI)
    if (left.shape[0], right.shape[1]) != tuple(base.shape):
        raise UserError(
            f"{name} of the base has shape {list(base.shape)}, the adapter's difference "
            f"{[left.shape[0], right.shape[1]]}",
            expected="the base that the adapter was trained on",
            fix="name that base with --base",
            where=str(adapter.folder),
            pitfall="adapter-on-wrong-base",
        )
    if change.magnitude is None:
        return left, right, None
    if change.is_transposed:
        raise UserError(
            f"{name}: DoRA on a layer that stores (inputs, outputs)",
            expected="linear layers that store (outputs, inputs)",
            fix="merge it with PEFT itself (merge_and_unload)",
            where=str(adapter.folder),
        )
    return left, right, adapter.tensors.read_unmapped(change.magnitude).float().flatten()


def finite(values: torch.Tensor, name: str) -> torch.Tensor:
    """The same values. Raises UserError when one is NaN or infinite, e.g. beyond what fp16 can hold."""
    bad = sum(int((~torch.isfinite(block)).sum()) for block in values.split(ROWS_AT_ONCE)) if values.numel() else 0
    if bad:
        raise UserError(
            f"{name} would hold {bad:,} values that are NaN or infinite as {values.dtype}",
            expected="finite weights",
            fix="take --dtype bf16 or fp32 if this was fp16 (which ends at 65504); else zhibei verify the inputs",
            where=name,
        )
    return values
