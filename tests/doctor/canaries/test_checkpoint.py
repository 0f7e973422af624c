"""Canaries of area checkpoint: disks too small for what a run writes, configs that cannot be saved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CPU, LINEARS, V100, broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.doctor.pitfalls.checkpoint import written_by

load_catalogue()
GIB = 2**30
WIDTHS = {"q_proj": 4096, "k_proj": 4096, "v_proj": 4096, "o_proj": 4096, "gate_proj": 11008, "up_proj": 11008}


def seven_billion(facts: Facts) -> Facts:
    """All tensors of LLaMA-7B, so that sizes are known."""
    assert facts.model is not None
    tensors = dict(facts.model.tensors)
    for layer in range(32):
        for name in LINEARS:
            part = "self_attn" if name in LINEARS[:4] else "mlp"
            shape = (4096, 11008) if name == "down_proj" else (WIDTHS[name], 4096)
            tensors[f"model.layers.{layer}.{part}.{name}.weight"] = ("F16", shape)
    return broken(facts, "model.tensors", tensors)


def with_disk(gib: float, *overrides: str, **options) -> Facts:
    return broken(seven_billion(healthy(*overrides, **options)), "output.free_bytes", int(gib * GIB))


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
            seven_billion(healthy(machine=DESCRIBED)),
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
            seven_billion(healthy(machine=replace(DESCRIBED, disk_free_gib=None))),
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
        (["sft.optimizer=adafactor", "model.precision=fp32"], 4.1),
    ],
)
def test_a_checkpoint_has_the_bytes_of_its_tensors(overrides: list[str], bytes_per_weight: float) -> None:
    written = written_by(seven_billion(healthy(*overrides)))
    assert written is not None
    assert written.checkpoint == pytest.approx(6_738_149_376 * bytes_per_weight, rel=1e-6)


def test_adapters_count_their_own_matrices_and_the_layers_beside_them() -> None:
    facts = seven_billion(healthy("model.method=lora", "lora.rank=8", "lora.targets=[q_proj,v_proj]"))
    written = written_by(facts)
    assert written is not None
    assert written.checkpoint == 32 * 2 * 8 * 2 * 4096 * 12
    more = written_by(
        seven_billion(healthy("model.method=lora", "lora.targets=[q_proj]", "lora.modules_to_save=[lm_head]"))
    )
    assert more is not None
    assert more.checkpoint == (32 * 16 * 2 * 4096 + 32000 * 4096) * 12


def test_one_checkpoint_more_than_is_kept_must_fit_and_the_best_besides() -> None:
    written = written_by(seven_billion(healthy("sft.keep_checkpoints=3")))
    assert written is not None
    assert written.most_checkpoints == 5
    written = written_by(seven_billion(healthy("sft.keep_checkpoints=3", "data.validation=0")))
    assert written is not None
    assert written.most_checkpoints == 4


def test_only_what_the_run_writes_is_fatal() -> None:
    find = CATALOGUE["generation-config-invalid-at-save"].find
    assert find is not None
    broken_full, broken_lora = CANARIES["generation-config-invalid-at-save"][0]
    assert [one.level for one in find(broken_full)] == ["stop"]
    assert [one.level for one in find(broken_lora)] == ["warning"]
