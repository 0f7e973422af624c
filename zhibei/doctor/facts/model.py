"""A model as its files describe it: config, tensor names and shapes, a scan for NaN. No weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zhibei.plan.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`tensors` maps names to (dtype as safetensors writes it, shape); empty for a hub id that is not here yet."""

    path: str
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    generation_config_fault: str = ""
    """What transformers objects to when it validates generation_config.json; "" when it does not."""
    shape: ModelShape | None = None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    module_names: tuple[str, ...] = ()
    """Dotted names of all modules, from the tensor names or the meta model."""
    linear_names: tuple[str, ...] = ()
    """Dotted names of those that can carry an adapter."""
    missing_files: tuple[str, ...] = ()
    pickled_files: tuple[str, ...] = ()
    non_finite: tuple[str, ...] = ()
    """Tensors in which NaN or infinity was seen."""
    scanned_share: float = 0.0
    """Share of the weight bytes that the scan read."""
    embedding_rows: int | None = None
    head_rows: int | None = None
    is_tied: bool = False
    dtype: str = ""
    """Dtype of most weights: float32, bfloat16, float16."""
    quant_method: str = ""
    """gptq, awq, bitsandbytes, ... when the weights are stored quantised."""
    row_norms: Mapping[int, float] = field(default_factory=dict)
    """Norms of the embedding rows of the special tokens that the template uses."""
    median_row_norm: float | None = None
    fingerprint: str | None = None
    parent_manifest: Mapping[str, Any] | None = None
    """The manifest of the run that the model came from."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """A PEFT folder that the run continues from, or that model.path is."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    fault: str = ""
    """Why its weights cannot be read; "" when they can."""
    base_fingerprint: str | None = None
    zero_tensors: tuple[str, ...] = ()
    """lora_B tensors that are all zero, i.e. never trained."""
    num_bytes: int = 0
