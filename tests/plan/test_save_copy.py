"""The copy of what is saved in host memory: as large as a checkpoint, and never what a run fails to fit by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.doctor.healthy import run_of
from tests.plan.test_search import ROWS, SHAPE
from zhibei.plan.holdings import holdings_of
from zhibei.plan.job import Ways, job_of
from zhibei.plan.machines import parse_machine
from zhibei.plan.memory import COPY, plan_memory

GIB = 2**30


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_copy_is_one_checkpoint(method: str) -> None:
    machine = replace(parse_machine("h100-80g"), host_free_gib=2000.0)
    job = job_of(run_of(f"model.method={method}").run, SHAPE, machine, ROWS, Ways(4096))
    held = holdings_of(SHAPE, job)
    learned = held.adapters if method == "lora" else held.weights
    assert plan_memory(SHAPE, job, machine).host[COPY] == learned + held.masters + held.states
    assert COPY not in plan_memory(SHAPE, replace(job, saves_beside=False), machine).host


def test_nodes_that_divide_a_model_copy_their_part() -> None:
    machine = parse_machine("h100-80g:8x4")
    job = job_of(run_of("model.method=full").run, SHAPE, machine, ROWS, Ways(4096, sharding="full_shard"))
    whole = plan_memory(SHAPE, replace(job, sharding="hybrid"), machine).host[COPY]
    assert plan_memory(SHAPE, job, machine).host[COPY] == whole / 4


def test_a_copy_that_nobody_asked_for_is_left_out_where_there_is_no_room() -> None:
    machine = replace(parse_machine("h100-80g"), host_free_gib=2000.0)
    job = job_of(run_of("model.method=full").run, SHAPE, machine, ROWS, Ways(4096))
    plan = plan_memory(SHAPE, job, machine)
    copy = plan.host[COPY] / GIB
    assert plan.needed_host_gib == pytest.approx(plan.host_gib - copy)
    small = replace(machine, host_free_gib=plan.needed_host_gib + 0.4 * copy)
    assert COPY not in plan_memory(SHAPE, job, small).host
    asked = plan_memory(SHAPE, replace(job, saves_beside=True), small)
    assert asked.host_capacity_gib is not None
    assert plan.needed_host_gib < asked.host_capacity_gib < asked.needed_host_gib == asked.host_gib
