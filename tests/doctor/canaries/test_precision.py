"""Canaries of area precision."""

from __future__ import annotations

from dataclasses import replace

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, CPU, ONE_A100, V100, broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfalls.precision import bf16_on_pre_ampere, fp16_on_bf16_pretrained_nan
from zhibei.plan.machines import Gpu, Machine, parse_machine

MIXED = replace(ONE_A100, name="mixed", gpus=(*ONE_A100.gpus, *V100.gpus))


def first_llama(*overrides: str, machine: Machine = V100, **config: object) -> Facts:
    """A llama of 2,048 positions, stored in fp16, with changes to its config.json."""
    return broken(
        healthy(*overrides, machine=machine), "model.config", {**CONFIG, "max_position_embeddings": 2048, **config}
    )


CANARIES: Canaries = {
    "bf16-on-pre-ampere": (
        [
            healthy("model.precision=bf16", machine=V100),
            healthy("model.precision=bf16", machine=MIXED),
            healthy("model.precision=bf16", "device=cuda:1", machine=MIXED),
            *(
                healthy("model.precision=bf16", machine=parse_machine(name))
                for name in ("t4", "v100-16g:4", "p100", "rtx2080ti", "1080ti", "v100-32g:8x2")
            ),
            healthy("model.precision=bf16", "model.method=qlora", machine=parse_machine("t4")),
        ],
        [
            healthy("model.precision=fp16", machine=V100),
            healthy("model.precision=fp32", machine=V100),
            healthy("model.precision=bf16"),
            healthy("model.precision=bf16", machine=CPU),
            healthy("model.precision=bf16", "device=cpu", machine=V100),
            healthy("model.precision=bf16", "device=cuda:0", machine=MIXED),
            healthy("model.precision=bf16", machine=parse_machine("mi210")),
            healthy("model.precision=bf16", machine=parse_machine("rtx3060")),
            healthy(machine=V100),
            healthy("model.precision=bf16", machine=replace(ONE_A100, gpus=(Gpu("unknown card", 24.0, (0, 0)),))),
        ],
    ),
    "fp16-on-cpu": (
        [
            healthy("model.precision=fp16", machine=CPU),
            healthy("model.precision=fp16", "device=cpu"),
            healthy("model.precision=fp16", machine=parse_machine("cpu")),
        ],
        [
            healthy("model.precision=bf16", machine=CPU),
            healthy("model.precision=fp16"),
            healthy(machine=CPU),
            healthy("model.precision=fp16", machine=Machine("unknown")),
        ],
    ),
    "fp16-on-bf16-pretrained-nan": (
        [
            first_llama("model.precision=fp16", torch_dtype="bfloat16"),
            first_llama(dtype="bfloat16"),  # auto is fp16 on a V100
            first_llama("model.precision=fp16", torch_dtype="torch.bfloat16", machine=ONE_A100),
            first_llama("model.precision=fp16", max_position_embeddings=4096),  # Llama 2, stored in fp16
            first_llama(model_type="qwen2", machine=parse_machine("t4")),
            first_llama(model_type="gemma2"),
            first_llama("model.precision=fp16", model_type="mistral"),
            first_llama(torch_dtype=None, text_config={"dtype": "bfloat16"}, model_type="other"),
            broken(first_llama(model_type="other"), "model.dtype", "bfloat16"),
        ],
        [
            first_llama("model.precision=fp16"),
            first_llama(),
            first_llama("model.precision=fp16", machine=ONE_A100),
            first_llama("model.precision=fp32", torch_dtype="bfloat16"),
            first_llama(torch_dtype="bfloat16", machine=ONE_A100),
            first_llama(torch_dtype="bfloat16", machine=CPU),
            first_llama(model_type="opt"),
            # Vicuna 16k: the first LLaMA, stretched.
            first_llama(max_position_embeddings=16384, rope_scaling={"type": "linear", "factor": 8.0}),
        ],
    ),
    "flash-attn-needs-half": (
        [
            healthy("model.attention=varlen", "model.precision=fp32"),
            healthy("model.attention=varlen", "model.precision=fp32", machine=parse_machine("h100:8")),
        ],
        [
            healthy("model.attention=varlen"),
            healthy("model.attention=varlen", "model.precision=bf16"),
            healthy("model.attention=documents", "model.precision=fp32"),
            healthy("model.precision=fp32"),
        ],
    ),
}


def test_the_change_that_is_proposed_mends_it() -> None:
    (found,) = bf16_on_pre_ampere(healthy("model.precision=bf16", machine=V100))
    assert found.changes == {"model.precision": "fp16"}
    assert not found.is_safe
    assert "V100" in found.what
    assert "7.0" in found.what
    (found,) = fp16_on_bf16_pretrained_nan(
        first_llama("model.precision=fp16", torch_dtype="bfloat16", machine=ONE_A100)
    )
    assert found.changes == {"model.precision": "bf16"}
    (found,) = fp16_on_bf16_pretrained_nan(first_llama(torch_dtype="bfloat16"))
    assert found.changes == {}
    assert "auto" in found.what
