"""Canaries of adapter folders that a run continues from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import LINEARS, broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import AdapterFacts

LAYERS = range(32)
WIDTH, INNER, RANK = 4096, 11008, 8
SHAPES = {name: (WIDTH, WIDTH) for name in LINEARS} | {
    "gate_proj": (INNER, WIDTH),
    "up_proj": (INNER, WIDTH),
    "down_proj": (WIDTH, INNER),
}
TARGETS = ("q_proj", "v_proj", "down_proj")


def module(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}"


def tensors(targets: tuple[str, ...] = TARGETS, *, rank: int = RANK, layers: range = LAYERS) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for layer in layers:
        for name in targets:
            outputs, inputs = SHAPES[name]
            stem = f"base_model.model.{module(layer, name)}"
            made[f"{stem}.lora_A.weight"] = ("F32", (rank, inputs))
            made[f"{stem}.lora_B.weight"] = ("F32", (outputs, rank))
    return made


def with_adapter(held: dict[str, Any], *, fault: str = "", **config: Any) -> Facts:
    """Facts of a sound base whose shapes are known, and this adapter."""
    facts = healthy("model.method=lora", "lora.adapter=adapter")
    assert facts.model is not None
    base = dict(facts.model.tensors)
    base |= {f"{module(n, name)}.weight": ("F16", SHAPES[name]) for n in LAYERS for name in LINEARS}
    told = {"peft_type": "LORA", "r": RANK, "target_modules": list(TARGETS), "base_model_name_or_path": "b"} | config
    adapter = AdapterFacts(path=Path("adapter"), config=told, tensors=held, fault=fault, num_bytes=1000)
    return broken(replace(facts, adapter=adapter), "model.tensors", base)


SOUND = with_adapter(tensors())
WITHOUT = healthy("model.method=lora")
SAVED = {"base_model.model.lm_head.weight": ("F16", (32000, WIDTH))}
TALLER = {"base_model.model.lm_head.weight": ("F16", (32016, WIDTH))}
OTHER_FAMILY = {
    f"base_model.model.transformer.h.{n}.self_attention.query_key_value.lora_{side}.weight": ("F32", shape)
    for n in LAYERS
    for side, shape in (("A", (RANK, WIDTH)), ("B", (3 * WIDTH, RANK)))
}
NARROW = {name: ("F32", tuple(2048 if size == WIDTH else size for size in it[1])) for name, it in tensors().items()}
ONE_SIDED = {name: entry for name, entry in tensors().items() if "lora_A" in name}

CANARIES: Canaries = {
    "adapter-folder-damaged": (
        [
            with_adapter({}, fault="no adapter_model.safetensors"),
            with_adapter(tensors(), fault="tensor model.layers.0.self_attn.q_proj.lora_A.weight is not finite"),
        ],
        [SOUND, WITHOUT],
    ),
    "adapter-of-another-kind": (
        [with_adapter({}, peft_type="IA3"), with_adapter({}, peft_type=None)],
        [SOUND, WITHOUT],
    ),
    "adapter-does-not-fit-base": (
        [
            with_adapter(OTHER_FAMILY, target_modules=["query_key_value"]),
            with_adapter(NARROW),
            with_adapter(tensors() | TALLER, modules_to_save=["lm_head"]),
            with_adapter(tensors(("q_proj",)) | {name: ("F32", (RANK, 1)) for name in tensors(("v_proj",))}),
        ],
        [SOUND, WITHOUT, with_adapter(tensors() | SAVED, modules_to_save=["lm_head"])],
    ),
    "adapter-incomplete": (
        [
            with_adapter({}),
            with_adapter(tensors(layers=range(16))),
            with_adapter(tensors(("q_proj", "v_proj"))),
            with_adapter(tensors(rank=4)),
            with_adapter(ONE_SIDED),
        ],
        [
            SOUND,
            WITHOUT,
            with_adapter(tensors(layers=range(16)), layers_to_transform=list(range(16))),
            with_adapter(tensors(rank=4), rank_pattern={"q_proj": 4}),
        ],
    ),
}


def test_the_place_and_both_shapes_are_named() -> None:
    from zhibei.doctor.pitfalls.lora_folder import adapter_does_not_fit_base

    (finding,) = adapter_does_not_fit_base(with_adapter(tensors() | TALLER))
    assert "[32000, 4096] in the base and [32016, 4096] in the adapter" in finding.what
    assert "lora.adapter" in finding.where
