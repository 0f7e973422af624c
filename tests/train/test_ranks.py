"""One rank, two ranks and four ranks train the same model: gradients of the first step, losses of twenty."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model_folder
from zhibei.config.run import LoraSection
from zhibei.data.batches import shares_of
from zhibei.plan import holdings
from zhibei.plan.communication import traffic_of
from zhibei.plan.division import divided
from zhibei.plan.job import Job, adapted_names
from zhibei.plan.shapes import ModelShape, read_shape

BASE = {"method": "full", "sharding": "no_shard", "packing": True, "tokens": 128, "steps": 20}
JOBS = {
    "full": {},
    "full, padded": {"packing": False, "steps": 3},
    "lora": {"method": "lora", "steps": 3},
    "lora, padded": {"method": "lora", "packing": False},
    "nf4": {"method": "qlora", "steps": 3},
    "nf4, recomputed": {"method": "qlora", "checkpointing": "full", "steps": 3},
    "int8": {"method": "lora", "quantize": "int8", "steps": 3},
    "recomputed": {"checkpointing": "full", "steps": 3},
    "unequal": {"unequal": True, "steps": 3},
}
WAYS = ("no_shard", "shard_grad_op", "full_shard")
FEW_BYTES = 1024
"""Norms, losses and counts of a step."""
TRIED_ON_FOUR = ("full", "lora, padded")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(world: int, jobs: list[dict], folder: Path, *, per_node: int | None = None) -> list[dict]:
    """What rank 0 found for each job, with `world` processes on this machine, which may pass for several."""
    per_node = per_node or world
    (folder / "jobs.json").write_text(json.dumps(jobs))
    out = folder / f"out-{world}.pt"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.rank_driver", str(folder / "jobs.json"), str(out)],
            env={
                **os.environ,
                **meeting,
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank % per_node),
                "LOCAL_WORLD_SIZE": str(per_node),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-2000:] for error in errors)
    return torch.load(out, weights_only=True)


def planned_job(job: dict, world: int, num_passes: int) -> tuple[ModelShape, Job]:
    shape = read_shape(json.loads((Path(job["folder"]) / "config.json").read_text()))
    names = adapted_names(shape, "all-linear") if job["method"] != "full" else ()
    planned = Job(
        128,
        num_passes=num_passes,
        method=job["method"],
        precision="fp32",
        quantize="nf4" if job["method"] == "qlora" else job.get("quantize", "none"),
        rank=LoraSection().rank,
        targets=names,
        sharding=job["sharding"],
        num_gpus=world,
        gpus_per_node=world,
        on_gpu=False,
    )
    return shape, planned


def require_planned(found: dict, job: dict, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank holds what the plan says to the byte, and a step moves what it says within a hundredth."""
    monkeypatch.setattr(holdings, "ALLOCATION", 1)  # torch's allocator on a GPU rounds each tensor up
    shape, planned = planned_job(job, world, found["num_passes"])
    held = divided(shape, planned, holdings.holdings_of(shape, planned)).held
    bytes_held = {"parameters": held.weights + held.adapters, "gradients": held.gradients, "optimizer": held.states}
    assert found["held"][0] == bytes_held, job
    traffic = traffic_of(shape, planned)
    for name in ("gathered", "scattered", "added_up"):
        assert found["moved"][name] == pytest.approx(getattr(traffic, name), rel=0.01, abs=FEW_BYTES), (name, job)


def jobs_for(model: Path, ways: tuple[str, ...]) -> dict[tuple[str, str], dict]:
    can_pack = find_spec("bitsandbytes") is not None
    chosen = [
        job for job, more in JOBS.items() if can_pack or not (more.get("quantize") or more.get("method") == "qlora")
    ]
    names = [(job, way) for job in chosen for way in ways if way == "no_shard" or not JOBS[job].get("unequal")]
    return {(job, way): {**BASE, **JOBS[job], "sharding": way, "folder": str(model)} for job, way in names}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("ranks"), family="llama")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> dict[str, dict]:
    jobs = jobs_for(model, ("no_shard",))
    found = run_ranks(1, list(jobs.values()), tmp_path_factory.mktemp("alone"))
    return {job: result for (job, _), result in zip(jobs, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_train_what_one_rank_trains(model, alone, tmp_path, world, monkeypatch):
    jobs = {
        (job, way): settings
        for (job, way), settings in jobs_for(model, WAYS).items()
        if world == 2 or (job in TRIED_ON_FOUR and way != "shard_grad_op")
    }
    for (job, way), found in zip(jobs, run_ranks(world, list(jobs.values()), tmp_path), strict=True):
        expected = alone[job]
        where = f"{job}, {way}, {world} ranks"
        assert found["units"] == expected["units"], where
        assert set(found["gradients"]) == set(expected["gradients"]), where
        for name, gradient in expected["gradients"].items():
            difference = (found["gradients"][name] - gradient).abs().max().item()
            assert difference <= 1e-6 * max(1.0, gradient.abs().max().item()), f"{where}: {name}: {difference}"
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-4), where
        if job in ("full", "full, padded", "lora", "nf4", "int8"):
            require_planned(found, jobs[job, way], world, monkeypatch)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_share_within_and_copy_across(model, alone, tmp_path):
    job = {**BASE, "steps": 3, "sharding": "hybrid", "folder": str(model)}
    found, expected = run_ranks(4, [job], tmp_path, per_node=2)[0], alone["full"]
    for name, gradient in expected["gradients"].items():
        assert (found["gradients"][name] - gradient).abs().max().item() <= 1e-6 * max(1.0, gradient.abs().max().item())
    assert found["losses"] == pytest.approx(expected["losses"][:3], rel=2e-4)


def test_groups_are_dealt_out_evenly_and_none_is_lost():
    groups = [[0, 1, 2], [3, 4], [5]]
    for world in (1, 2, 3, 4):
        parts = [shares_of(groups, rank=rank, world=world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert sorted(item for part in parts for group in part for item in group) == list(range(6))


def test_with_fewer_items_than_ranks_everyone_takes_all():
    assert shares_of([[0]], rank=1, world=2) == [[0]]
