"""A run that is killed fifty times and resumed each time ends with the weights of a run that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.kill_driver import SETTINGS
from tests.train.small_run import small_run
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.offline import train

NUM_KILLS = 50


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path):
    straight = train(small_run(tmp_path, *SETTINGS, "name=straight"))
    command = [sys.executable, "-m", "tests.train.kill_driver", str(tmp_path), str(NUM_KILLS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = (tmp_path / "child.log").read_text()[-2000:]
    assert done.returncode == 0, done.stderr[-2000:] + log
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["kills"] == NUM_KILLS, log
    assert seen["finished"], log
    assert seen["unsound_after_kill"] == 0
    assert None not in seen["steps"]
    assert seen["steps"] == sorted(seen["steps"])
    assert len(set(seen["steps"])) > NUM_KILLS // 2, "the kills must hit a run that moves on"
    killed = RunDir(tmp_path / "runs/killed")
    name = "adapter_model.safetensors"
    assert (killed.model / name).read_bytes() == (straight.model / name).read_bytes()
    assert curve(killed) == curve(straight)


def curve(run_dir: RunDir) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run_dir.metrics) if r["kind"] == "train"]
