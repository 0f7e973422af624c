"""The plan that is proposed fits, is the fastest of those that do, and says what would have to give when none does."""

from __future__ import annotations

import pytest

from tests.doctor.healthy import CONFIG, run_of
from zhibei.plan.division import why_whole
from zhibei.plan.job import Rows, rows_of_lengths
from zhibei.plan.machines import parse_machine
from zhibei.plan.search import MARGIN, ONE_CARD, search, what_would_fit
from zhibei.plan.settle import settle
from zhibei.plan.shapes import read_shape
from zhibei.plan.speed import corrected

SHAPE = read_shape(CONFIG)
ROWS = Rows(512, 512.0, 50_000)
LORA = ("model.method=lora", "data.max_tokens=512")


def found(machine: str, *overrides: str):
    return search(run_of(*overrides).run, SHAPE, parse_machine(machine), ROWS)


@pytest.mark.parametrize("machine", ["rtx4090", "v100-32g", "a100-40g", "a100-80g", "h200"])
def test_what_is_chosen_fits_with_a_margin_and_nothing_that_fits_is_faster(machine):
    search = found(machine, *LORA)
    chosen = search.chosen
    assert chosen.fits
    assert chosen.memory.capacity_gib is not None
    assert chosen.memory.device_gib <= chosen.memory.capacity_gib * (1 - MARGIN)
    assert chosen.speed is not None
    for other in search.others:
        assert other.speed is not None
        assert other.speed.tokens_per_s <= chosen.speed.tokens_per_s + 1


def test_a_larger_card_is_never_given_a_slower_way():
    speeds = [found(machine, *LORA).chosen.job.pass_tokens for machine in ("rtx4090", "a100-40g", "a100-80g")]
    assert speeds == sorted(speeds)


def test_what_the_run_file_fixes_is_kept():
    search = found("a100-80g", *LORA, "sft.micro_batch_tokens=2048", "model.activation_checkpointing=full")
    assert search.chosen.micro_batch_tokens == 2048
    assert search.chosen.job.checkpointing == "full"


def test_several_cards_hold_what_one_does_not():
    one, four = found("a100-40g"), found("a100-40g:4")
    assert four.chosen.fits
    assert four.chosen.job.sharding != "no_shard" or four.chosen.job.offload != "none"
    assert four.chosen.memory.peak_gib < one.chosen.memory.peak_gib or one.chosen.fits


def test_what_would_have_to_give_is_named_and_works():
    run, machine = run_of().run, parse_machine("rtx4090")
    assert not search(run, SHAPE, machine, ROWS).chosen.fits
    ways = what_would_fit(run, SHAPE, machine, ROWS)
    assert any("model.method: lora" in way for way in ways)
    assert search(run_of("model.method=lora").run, SHAPE, machine, ROWS).chosen.fits


def test_auto_becomes_values_and_a_cpu_keeps_its_own():
    run = run_of(*LORA).run
    on_card = settle(run, SHAPE, parse_machine("rtx4090"), ROWS)
    assert set(on_card.values) == {"sft.micro_batch_tokens", "model.activation_checkpointing", "distributed.sharding"}
    assert on_card.search is not None
    assert on_card.search.chosen.job.num_gpus == 1
    on_cpu = settle(run, SHAPE, parse_machine("cpu-64g"), ROWS)
    assert on_cpu.values == {
        "sft.micro_batch_tokens": 4096,
        "model.activation_checkpointing": "none",
        "distributed.sharding": "no_shard",
    }
    unknown = settle(run, None, parse_machine("rtx4090"), ROWS)
    assert unknown.values == on_cpu.values
    fixed = run_of(
        *LORA, "sft.micro_batch_tokens=1024", "model.activation_checkpointing=none", "distributed.sharding=no_shard"
    ).run
    assert settle(fixed, SHAPE, parse_machine("rtx4090"), ROWS).values == {}


def test_ranks_are_planned_as_many_as_there_are_and_divided_where_one_card_is_too_small():
    run, node = run_of().run, parse_machine("a100-80g:4")
    four = settle(run, SHAPE, node, ROWS, ranks=4, per_node=4)
    assert four.search is not None
    assert four.search.chosen.fits
    assert four.search.chosen.job.num_gpus == 4
    assert four.values["distributed.sharding"] in ("shard_grad_op", "full_shard")
    adapters = settle(run_of(*LORA).run, SHAPE, node, ROWS, ranks=4, per_node=4)
    assert adapters.values["distributed.sharding"] == "no_shard"
    kept = settle(run_of("distributed.sharding=full_shard").run, SHAPE, node, ROWS, ranks=4, per_node=4)
    assert "distributed.sharding" not in kept.values
    assert kept.search is not None
    assert kept.search.chosen.job.sharding == "full_shard"
    by_rule = settle(run, None, parse_machine("cpu"), ROWS, ranks=2, per_node=2)
    assert by_rule.values["distributed.sharding"] == "full_shard"


@pytest.mark.parametrize("setting", ["sft.optimizer=adamw_8bit", "lora.modules_to_save=[lm_head]"])
def test_what_cannot_be_divided_is_planned_whole(setting):
    more = () if "optimizer" in setting else ("model.method=lora",)
    run = run_of(*more, setting).run
    assert why_whole(run) is not None
    machine = parse_machine("a100-80g:4")
    assert search(run, SHAPE, machine, ROWS).chosen.job.sharding == "no_shard"
    assert why_whole(run_of().run) is None


def test_training_is_planned_on_one_card_and_without_offloading():
    settled = settle(run_of().run, SHAPE, parse_machine("a100-40g:4"), ROWS)
    assert settled.search is not None
    job = settled.search.chosen.job
    assert (job.num_gpus, job.sharding, job.offload) == (1, "no_shard", "none")


def test_time_grows_with_rows_and_a_probe_replaces_the_model():
    search_a = found("a100-80g", *LORA)
    search_b = search(
        run_of(*LORA).run, SHAPE, parse_machine("a100-80g"), rows_of_lengths([512] * 5000, global_batch=128)
    )
    assert search_a.hours is not None
    assert search_b.hours is not None
    assert search_a.hours > 5 * search_b.hours
    assert search_a.chosen.speed is not None
    probed = corrected(search_a.chosen.speed, 100.0)
    assert probed.is_measured
    assert probed.hours(3.6e5) == pytest.approx(1.0)


def test_disk_holds_checkpoints_the_best_and_the_one_being_written():
    plan = found("h200").chosen.memory
    assert plan.disk is not None
    assert plan.disk.saves.most == 2 + 1 + 1
    # bf16 weights and the other half of the masters, and two fp32 moments
    assert plan.disk.checkpoint_bytes == pytest.approx(12 * SHAPE.num_parameters, rel=1e-3)
    adapters = found("h200", *LORA).chosen.memory.disk
    assert adapters is not None
    assert adapters.peak_bytes < 0.1 * plan.disk.peak_bytes


def test_what_can_be_trained_now_names_neither_more_cards_nor_offload() -> None:
    run, machine = run_of().run, parse_machine("rtx4090")
    planned = what_would_fit(run, SHAPE, machine, ROWS)
    today = what_would_fit(run, SHAPE, machine, ROWS, wishes=ONE_CARD)
    assert any("such GPUs" in way for way in planned)
    assert today
    assert not any("such GPUs" in way or "host" in way or "shard" in way for way in today)


@pytest.mark.parametrize(
    ("stage", "settings", "iterations"),
    [
        ("ppo", {}, -(-1000 // 32)),
        ("grpo", {"answers_per_prompt": 8}, -(-1000 // 4)),
        ("raft", {"answers_per_prompt": 8, "keep_share": 0.125}, -(-1000 // 32)),
    ],
)
def test_steps_of_a_policy_are_iterations_and_no_time_is_told(stage: str, settings: dict[str, float], iterations: int):
    values = {"reward": "number", "global_batch": 16, "minibatches": 2, **settings}
    overrides = [f"stage={stage}", *(f"{stage}.{name}={value}" for name, value in values.items())]
    planned = search(run_of(*overrides).run, SHAPE, parse_machine("h200"), Rows(128, 64.0, 1000))
    assert planned.total_steps == iterations
    assert (planned.total_tokens, planned.hours) == (None, None)
