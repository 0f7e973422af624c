"""Canaries of area hardware."""

from __future__ import annotations

from dataclasses import replace

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, CPU, ONE_A100, V100, broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.plan.machines import Machine, parse_machine

REMOTE = {**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}}
MI300 = parse_machine("mi300x")


def remote(machine: Machine, *overrides: str, **config: object) -> Facts:
    return broken(healthy(*overrides, machine=machine), "model.config", {**REMOTE, **config})


def with_bitsandbytes(version: str, machine: Machine, *overrides: str) -> Facts:
    facts = healthy(*overrides, machine=machine)
    return broken(facts, "environment.packages", {**facts.environment.packages, "bitsandbytes": version})


TRUSTED = "model.trust_remote_code=true"
CANARIES: Canaries = {
    "flash-attn-pre-ampere": (
        [
            healthy("model.attention=varlen", machine=V100),
            healthy("model.attention=varlen", machine=parse_machine("t4:4")),
            healthy("model.attention=varlen", machine=replace(ONE_A100, gpus=(*ONE_A100.gpus, *V100.gpus))),
            healthy("model.attention=varlen", machine=CPU),
            remote(V100, TRUSTED, use_flash_attn=True),
            remote(V100, TRUSTED, use_flash_attn="auto"),
            remote(parse_machine("t4"), TRUSTED, _attn_implementation="flash_attention_2"),
            remote(V100, TRUSTED, _use_flash_attention_2=True),
        ],
        [
            healthy("model.attention=varlen"),
            healthy("model.attention=documents", machine=V100),
            healthy(machine=V100),
            healthy("model.attention=varlen", machine=parse_machine("rtx3090")),
            remote(V100, TRUSTED, use_flash_attn=False),
            remote(V100, TRUSTED),
            remote(ONE_A100, TRUSTED, use_flash_attn=True),
            remote(V100, TRUSTED, _attn_implementation="sdpa"),
        ],
    ),
    "rocm-4bit-blocksize": (
        [
            with_bitsandbytes("0.48.1", MI300, "model.method=qlora"),
            with_bitsandbytes("0.49.1", parse_machine("mi210:4"), "model.method=lora", "model.quantize=nf4"),
            broken(with_bitsandbytes("0.45.0", MI300, "model.method=lora"), "model.quant_method", "bitsandbytes"),
        ],
        [
            with_bitsandbytes("0.50.2", MI300, "model.method=qlora"),
            with_bitsandbytes("0.49.2", MI300, "model.method=qlora"),
            with_bitsandbytes("0.48.1", ONE_A100, "model.method=qlora"),
            with_bitsandbytes("0.48.1", MI300, "model.method=lora"),
            with_bitsandbytes("0.48.1", MI300, "model.method=lora", "model.quantize=int8"),
            healthy("model.method=qlora", machine=MI300),
        ],
    ),
    "unhealthy-gpu-stalls-collectives": (
        [
            broken(healthy(), "environment.gpu_faults", ("GPU 3: 12 uncorrectable ECC errors since the last reset",)),
            broken(healthy(), "environment.gpu_faults", ("GPU at PCI 0000:3b:00: Xid 79 in the kernel's log",)),
        ],
        [healthy(), healthy(machine=parse_machine("h100:8x4"))],
    ),
    "device-that-is-not-there": (
        [
            healthy("device=cuda:1"),
            healthy("device=cuda", machine=CPU),
            healthy("device=cuda:8", machine=parse_machine("v100-32g:8")),
            healthy("device=gpu"),
            healthy("device=cuda:-1"),
            broken(healthy("device=cuda:2"), "environment.variables", {"CUDA_VISIBLE_DEVICES": "2"}),
        ],
        [
            healthy("device=cuda"),
            healthy("device=cuda:0"),
            healthy("device=cuda:7", machine=parse_machine("v100-32g:8")),
            healthy("device=cpu", machine=CPU),
            healthy("device=cuda", machine=Machine("unknown")),
        ],
    ),
}
