"""Canaries of area quantization."""

from __future__ import annotations

from dataclasses import replace

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CPU, healthy

QLORA = "model.method=qlora"
BF16_CPU = replace(CPU, cpu_flags=frozenset({"avx2", "avx512f", "avx512_bf16"}))

CANARIES: Canaries = {
    "bnb-nf4-cpu-repacks-weights-in-place": (
        [
            healthy(QLORA, machine=BF16_CPU),
            healthy("model.method=lora", "model.quantize=nf4", machine=BF16_CPU),
            healthy(QLORA, "device=cpu", machine=replace(healthy().machine, cpu_flags=BF16_CPU.cpu_flags)),
        ],
        [
            healthy(QLORA, machine=CPU),
            healthy(QLORA, machine=replace(healthy().machine, cpu_flags=BF16_CPU.cpu_flags)),
            healthy(QLORA, "model.quantize=int8", machine=BF16_CPU),
            healthy("model.method=lora", machine=BF16_CPU),
        ],
    ),
    "quantised-base-not-trained-here": (
        [healthy(QLORA), healthy("model.method=lora", "model.quantize=int8")],
        [healthy("model.method=lora"), healthy()],
    ),
}
