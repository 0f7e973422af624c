"""Whole runs on several ranks: the files of one run, its losses, its model; and resumed by another number of ranks."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.train.pair_run import pair_run
from tests.train.small_run import small_run
from tests.train.test_ranks import free_port
from zhibei.store.checkpoint import load_checkpoint
from zhibei.store.run_dir import RunDir
from zhibei.store.shards import read_tensors
from zhibei.train.loops import train

STEPS = 8


def run_orders(world: int, orders: list[dict], folder: Path, *, device: str = "cpu") -> None:
    (folder / "orders.json").write_text(json.dumps(orders))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.rank_run", str(folder / "orders.json"), device],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for error in errors)


def losses(run_dir: RunDir) -> list[float]:
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] in ("train", "heldout")]


def newest(run_dir: RunDir) -> Path:
    return max(run_dir.checkpoints.iterdir())


def proofs_hold(run_dir: RunDir) -> bool:
    return all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))


@pytest.mark.slow
def test_runs_of_two_ranks_are_those_of_one_and_any_number_goes_on_with_them(tmp_path):
    settings = [f"sft.max_steps={STEPS}", "sft.sample_tokens=4", "distributed.sharding=full_shard"]
    small_run(tmp_path)
    file, runs = str(tmp_path / "run.yaml"), tmp_path / "runs"
    alone = RunDir(runs / "alone")
    assert train(small_run(tmp_path, *settings, "name=alone")).path == alone.path

    def order(name: str, *more: str, **others) -> dict:
        return {"file": file, "overrides": [*settings, f"name={name}", *more], **others}

    can_pack = find_spec("bitsandbytes") is not None
    adapters = ("model.method=lora", "distributed.sharding=no_shard")
    pair_run(tmp_path, "reward")
    short = [*settings[2:], "reward.max_steps=4"]
    reward = {"file": str(tmp_path / "reward.yaml"), "overrides": [*short, "name=reward", "model.method=lora"]}
    interrupted = tmp_path / "interrupted.json"
    run_orders(
        2,
        [
            order("two"),
            order("adapters", *adapters),
            *([order("packed", "model.method=qlora")] if can_pack else []),
            order("cut", signal_after_step=5, fails=str(interrupted)),
            order("two", fails=str(tmp_path / "exists.json")),
            reward,
            order("narrow", has_no_room=True),
            order("gradients", "distributed.sharding=shard_grad_op"),
        ],
        tmp_path,
    )
    samples = [sorted(path.read_text() for path in RunDir(runs / name).samples.iterdir()) for name in ("two", "narrow")]
    assert samples[0]
    assert samples[0] == samples[1], "where whole layers do not fit, answers come layer by layer, and are the same"
    assert losses(RunDir(runs / "two")) == pytest.approx(losses(alone), rel=1e-4)
    one, two = read_tensors(alone.model, stem="model"), read_tensors(runs / "two" / "model", stem="model")
    assert set(one) == set(two)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3
    saved = [load_checkpoint(newest(RunDir(runs / name)))[0] for name in ("two", "gradients")]
    for group in ("model", "optimizer"):
        first, second = (dict(groups[group]) for groups in saved)
        assert {name: tensor.dtype for name, tensor in first.items()} == {n: t.dtype for n, t in second.items()}
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{group} {name}")
    assert losses(RunDir(runs / "gradients")) == pytest.approx(losses(alone), rel=1e-4)
    assert proofs_hold(RunDir(runs / "gradients"))
    assert proofs_hold(RunDir(runs / "two"))
    assert proofs_hold(RunDir(runs / "reward"))
    by_adapters = train(small_run(tmp_path, *settings[:2], "name=adapters-alone", "model.method=lora"))
    assert losses(RunDir(runs / "adapters")) == pytest.approx(losses(by_adapters), rel=1e-4)
    if can_pack:
        by_packed = train(small_run(tmp_path, *settings[:2], "name=packed-alone", "model.method=qlora"))
        assert losses(RunDir(runs / "packed")) == pytest.approx(losses(by_packed), rel=1e-4)
        assert proofs_hold(RunDir(runs / "packed"))
    by_one = train(pair_run(tmp_path, "reward", "name=reward-alone", "model.method=lora", *short))
    assert losses(RunDir(runs / "reward")) == pytest.approx(losses(by_one), rel=1e-4)

    told = json.loads(interrupted.read_text())
    assert [kind for kind, _ in told] == ["RunInterrupted"] * 2, "a signal to one rank stops all of them"
    refused = json.loads((tmp_path / "exists.json").read_text())
    assert all("exists already" in what for _, what in refused), "what rank 0 refuses, all refuse"

    # The cut run goes on with four ranks; another copy of it with one.
    copy = runs / "cut-once-more"
    subprocess.run(["cp", "-r", str(runs / "cut"), str(copy)], check=True)
    run_orders(4, [order("cut", resume=str(runs / "cut"))], tmp_path)
    resumed = train(small_run(tmp_path, *settings, "name=cut-once-more"), resume=RunDir(copy))
    assert losses(RunDir(runs / "cut")) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(resumed) == pytest.approx(losses(alone), rel=1e-4)
