"""Canaries of area checkpoint: disks too small for what a run writes, configs that cannot be saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CPU, V100, broken, healthy, planned
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.plan.disk import DiskPlan, Saves

load_catalogue()
GIB = 2**30
STEPS = "sft.max_steps=1170"


def with_disk(gib: float, *overrides: str, **options: Any) -> Facts:
    """LLaMA-7B as it is planned, on a disk with so much room."""
    return broken(planned(healthy(STEPS, *overrides, **options)), "output.free_bytes", int(gib * GIB))


def disk_of(*overrides: str, **options: Any) -> DiskPlan:
    plan = planned(healthy(*overrides, **options)).plan
    assert plan is not None
    assert plan.disk is not None
    return plan.disk


LORA = ("model.method=lora",)
SAMPLING = "temperature is 0.9, which only sampling uses, and do_sample is not true"
DESCRIBED = replace(V100, is_described=True, disk_free_gib=100.0)

CANARIES: Canaries = {
    "disk-full-at-checkpoint": (
        [
            with_disk(200),
            with_disk(90),
            with_disk(290, "sft.keep_checkpoints=3"),
            with_disk(0.5, *LORA),
            broken(with_disk(5000), "output.quota_free_bytes", 50 * GIB),
            broken(with_disk(5000), "output.free_inodes", 12),
            planned(healthy(machine=DESCRIBED)),
            with_disk(200, machine=CPU),
            with_disk(240, "model.precision=fp16", machine=V100),
        ],
        [
            with_disk(400),
            with_disk(20, *LORA),
            with_disk(160, "sft.save_every=0", "sft.keep_best=false"),
            broken(with_disk(5000), "output.free_inodes", 0),
            broken(with_disk(1), "output.free_bytes", None),
            healthy("sft.keep_checkpoints=50"),
            planned(healthy(machine=replace(DESCRIBED, disk_free_gib=None))),
            broken(with_disk(5000), "output.quota_free_bytes", 900 * GIB),
        ],
    ),
    "final-consolidation-no-disk": (
        [
            with_disk(80, "sft.save_every=0", "sft.keep_best=false"),
            with_disk(155, "sft.save_every=1000", "sft.keep_best=false"),
        ],
        [
            with_disk(305),
            with_disk(20, *LORA),
            with_disk(70, "sft.save_every=0", "sft.keep_best=false"),
            with_disk(90, "sft.save_every=0", "sft.keep_best=false"),
            healthy(),
        ],
    ),
    "generation-config-invalid-at-save": (
        [
            broken(healthy(), "model.generation_config_fault", SAMPLING),
            broken(healthy(*LORA), "model.generation_config_fault", SAMPLING),
        ],
        [healthy(), broken(healthy(), "model.generation_config", {"do_sample": True, "temperature": 0.9})],
    ),
}


@pytest.mark.parametrize(
    ("overrides", "bytes_per_weight"),
    [
        (["model.precision=bf16"], 12),
        (["model.precision=fp32"], 12),
        (["model.precision=fp16"], 14),
        (["sft.optimizer=adamw_8bit", "model.precision=bf16"], 8.1),
        (["sft.optimizer=adafactor", "model.precision=fp32"], 4.0),
    ],
)
def test_a_checkpoint_has_the_bytes_of_its_tensors(overrides: list[str], bytes_per_weight: float) -> None:
    assert disk_of(*overrides).checkpoint_bytes == pytest.approx(6_738_415_616 * bytes_per_weight, rel=1e-2)


def test_a_run_on_the_cpu_keeps_fp32_whatever_card_is_there() -> None:
    assert disk_of("device=cpu").model_bytes == pytest.approx(4 * 6_738_415_616, rel=1e-3)


def test_adapters_count_their_own_matrices_and_the_layers_beside_them() -> None:
    adapters = disk_of("model.method=lora", "lora.rank=8", "lora.targets=[q_proj,v_proj]")
    assert adapters.checkpoint_bytes == 32 * 2 * 8 * 2 * 4096 * 12
    more = disk_of("model.method=lora", "lora.targets=[q_proj]", "lora.modules_to_save=[lm_head]")
    assert more.checkpoint_bytes == (32 * 16 * 2 * 4096 + 32000 * 4096) * 12


@pytest.mark.parametrize(
    ("overrides", "most", "last"),
    [
        (["sft.keep_checkpoints=3"], 5, 4),
        (["sft.keep_checkpoints=3", "data.validation=0"], 4, 3),
        (["sft.save_every=0", "sft.keep_best=false"], 1, 1),
        (["sft.save_every=1000", "sft.keep_best=false"], 2, 2),
        (["sft.save_every=1000", "sft.evaluate_every=1170"], 3, 3),
    ],
)
def test_as_many_checkpoints_must_fit_as_the_run_ever_has_at_once(overrides: list[str], most: int, last: int) -> None:
    assert disk_of(STEPS, *overrides).saves == Saves(most, last)


def test_only_what_the_run_writes_is_fatal() -> None:
    find = CATALOGUE["generation-config-invalid-at-save"].find
    assert find is not None
    broken_full, broken_lora = CANARIES["generation-config-invalid-at-save"][0]
    assert [one.level for one in find(broken_full)] == ["stop"]
    assert [one.level for one in find(broken_lora)] == ["warning"]
