"""Broken and healthy cases of the checks of area memory: every kind of machine, method and phase."""

from __future__ import annotations

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, healthy
from tests.doctor.healthy import planned as with_its_plan
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfalls.memory import gpu_memory_too_small, host_oom_exit_9_deepspeed
from zhibei.plan.machines import parse_machine

SMALL = {**CONFIG, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
         "num_key_value_heads": 16, "intermediate_size": 5504}  # fmt: skip


def planned(machine: str, *overrides: str, config: dict = CONFIG) -> Facts:
    """Facts of a run on a described machine, with the plan that `zhibei check` makes."""
    return with_its_plan(healthy(*overrides, machine=parse_machine(machine)), config)


BROKEN = {
    "7B in full on 40 GB": planned("a100-40g"),
    "7B in full on 80 GB": planned("a100-80g"),
    "7B in full on one of four V100": planned("v100-32g:4"),
    "7B LoRA on 8 GB": planned("rtx3070", "model.method=lora"),
    "a pass that is too long": planned("a100-40g", "model.method=lora", "sft.micro_batch_tokens=65536",
                                       "model.activation_checkpointing=none"),
    "1B in fp32 on 12 GB": planned("rtx3060", "model.precision=fp32", config=SMALL),
    "8-bit states do not save 7B on 24 GB": planned("rtx4090", "sft.optimizer=adamw_8bit"),
}  # fmt: skip
HEALTHY = {
    "7B in full on an H200": planned("h200"),
    "7B LoRA on 24 GB": planned("rtx4090", "model.method=lora", "data.max_tokens=512"),
    "7B LoRA on a V100": planned("v100-32g", "model.method=lora"),
    "1B in full on 80 GB": planned("a100-80g", config=SMALL),
    "no GPU": planned("cpu-64g", "model.method=lora", config=SMALL),
    "sizes are not known": healthy(),
}


CANARIES: Canaries = {
    "gpu-memory-too-small": (list(BROKEN.values()), list(HEALTHY.values())),
    "host-oom-exit-9-deepspeed": (
        [planned("cpu-16g"), planned("cpu-64g"), planned("cpu-24g", "model.method=lora")],
        [HEALTHY[case] for case in ("7B in full on an H200", "no GPU", "sizes are not known", "7B LoRA on a V100")],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_card_that_is_too_small_is_named_with_phase_causes_and_remedy(case):
    (finding,) = gpu_memory_too_small(BROKEN[case])
    assert finding.level == "stop"
    assert "GiB" in finding.what
    assert finding.to_do
    assert finding.evidence


def test_what_would_fit_is_proposed():
    facts = BROKEN["7B in full on 40 GB"]
    (finding,) = gpu_memory_too_small(facts)
    assert "model.method: lora" in finding.to_do


def test_a_host_that_is_too_small_is_named_with_its_causes():
    (finding,) = host_oom_exit_9_deepspeed(planned("cpu-16g"))
    assert "weights" in finding.what or "tensors" in finding.what
    assert finding.level == "stop"


def test_auto_settings_become_what_fits():
    facts = planned("rtx4090", "model.method=lora")
    assert isinstance(facts.run.sft.micro_batch_tokens, int)
    assert facts.run.model.activation_checkpointing in ("none", "selective", "full")
    assert facts.origin("sft.micro_batch_tokens") == "planned"
    assert facts.plan is not None
    assert facts.plan.fits
