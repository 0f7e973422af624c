"""Canaries of area quantization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, CPU, ONE_A100, broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.plan.machines import Gpu

QLORA = "model.method=qlora"
INT8 = ("model.method=lora", "model.quantize=int8")
OLD = replace(ONE_A100, gpus=(Gpu("GTX 980", 4, (5, 2)),))
HEAD = "lora.modules_to_save=[lm_head, embed_tokens]"
MLP = "lora.modules_to_save=[down_proj, embed_tokens]"


def stored(facts: Facts, **settings: Any) -> Facts:
    """The same run on weights that bitsandbytes packed."""
    config = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes", **settings}}
    return broken(broken(facts, "model.quant_method", "bitsandbytes"), "model.config", config)


def as_int8(*settings: str, **parts: Any) -> Facts:
    return stored(healthy(*settings, **parts), load_in_8bit=True)


def as_nf4(*settings: str, **parts: Any) -> Facts:
    return stored(healthy(*settings, **parts), load_in_4bit=True, bnb_4bit_quant_type="nf4")


CANARIES: Canaries = {
    "full-training-of-a-quantised-base": (
        [as_int8(), as_nf4()],
        [as_int8("model.method=lora"), as_nf4(QLORA), healthy(), healthy(QLORA)],
    ),
    "base-stored-in-other-bits": (
        [
            as_int8(QLORA),
            as_nf4(*INT8),
            stored(healthy(QLORA), load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        ],
        [as_nf4(QLORA), as_int8(*INT8), as_nf4("model.method=lora"), healthy(QLORA), healthy(*INT8)],
    ),
    "modules-to-save-in-few-bits": (
        [healthy(QLORA, MLP), healthy(*INT8, MLP), as_int8("model.method=lora", MLP)],
        [healthy(QLORA, HEAD), healthy("model.method=lora", MLP), healthy(QLORA), as_int8("model.method=lora", HEAD)],
    ),
    "few-bits-on-an-old-card": (
        [healthy(QLORA, machine=OLD), healthy(*INT8, machine=OLD), as_nf4("model.method=lora", machine=OLD)],
        [
            healthy("model.method=lora", machine=OLD),
            healthy(QLORA, "device=cpu", machine=OLD),
            healthy(QLORA, machine=CPU),
            healthy(QLORA),
        ],
    ),
}
