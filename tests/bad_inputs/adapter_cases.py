"""Adapters that do not fit their base, and settings of adapters that cannot work. Knows only what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bad_inputs.config_cases import settings
from tests.bad_inputs.model_cases import change_json
from tests.bad_inputs.place import Place
from tests.bad_inputs.scenario import Build, Scenario

LORA = {"model.method": "lora"}


def lora(**changes: Any) -> Build:
    """A LoRA run with these fields of section lora."""
    return settings({**LORA, **{f"lora.{name}": value for name, value in changes.items()}})


def make_adapter(folder: Path, base: Path, *, targets: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 4) -> Path:
    """A PEFT folder for the base, with weights that are not zero."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    made: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        parts = name.split(".")
        if parts[-2] in targets and parts[-1] == "weight":
            stem = "base_model.model." + name.removesuffix(".weight")
            made[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=draw) * 0.02
            made[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=draw) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": list(targets), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def _adapter_of_other_size(place: Place) -> None:
    """Made on a base of other width, then named for this one."""
    other = place.models("phi")
    make_adapter(place.folder / "adapter", other, targets=("q_proj", "v_proj", "dense", "fc1"))
    change_json(place.folder / "adapter" / "adapter_config.json", base_model_name_or_path="model")
    settings({**LORA, "lora.adapter": "adapter"})(place)


def _adapter_of_other_vocabulary(place: Place) -> None:
    """The adapter brings an embedding of 320 rows; the base has 300."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_adapter(place.folder / "adapter", place.model)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(320, 32)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(320, 32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    change_json(folder / "adapter_config.json", modules_to_save=["embed_tokens", "lm_head"])
    place.set("model.path", "adapter")


LORA_CASES = [
    Scenario(
        "l1_target_missing",
        "A target that the model does not have.",
        lora(targets=["query_key_value"]),
        value="query_key_value",
        where=r"run\.yaml:\d+|lora\.targets",
        remedy="q_proj|all-linear",
    ),
    Scenario(
        "l2_half_bad_target",
        "One target that exists and one that does not.",
        lora(targets=["q_proj", "v_porj"]),
        value="v_porj",
        where=r"run\.yaml:\d+|lora\.targets",
        remedy="v_proj",
    ),
    Scenario(
        "l3_adapter_other_base",
        "An adapter of another model.",
        _adapter_of_other_size,
        value=r"fc1|dense|\d+",
        where=("adapter", r"lora\.adapter|adapter_model\.safetensors|adapter_config\.json"),
        remedy="to do:.*base",
    ),
    Scenario(
        "l4_merge_other_vocab",
        "An adapter with the embeddings of another vocabulary.",
        _adapter_of_other_vocabulary,
        value=(r"\b320\b", r"\b300\b"),
        where=("adapter",),
        remedy="to do:.*base",
    ),
    Scenario(
        "l5_rank_zero",
        "Adapters of rank zero.",
        lora(rank=0),
        value=r"lora\.rank.{0,40}\b0\b",
        where=r"run\.yaml:\d+",
        remedy="to do:.*rank",
    ),
]
