"""Saves are killed with SIGKILL at random moments; after each kill the newest checkpoint is read back and compared.

Run as a program: `python tests/store/kill_trials.py FOLDER TRIALS SEED` prints one JSON document.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from zhibei.store.checkpoint import check_checkpoint, load_checkpoint, newest_sound, prune, save_checkpoint
from zhibei.store.metrics import Metrics, read_metrics

NUM_FLOATS = 200_000


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint of this step must hold."""
    moving = torch.arange(NUM_FLOATS, dtype=torch.float32) + step
    return {
        "model": {"weight": moving, "half": (moving / 7).to(torch.bfloat16), "step": torch.tensor(step)},
        "optimizer": {"exp_avg": moving * 3, "exp_avg_sq": moving.square()},
    }


def save_for_ever(run_dir: Path, *, first_step: int, report: int) -> None:
    """The child: log, save, prune; every third step is saved twice, so that replacing is killed too."""
    with Metrics(run_dir, tensorboard=False, resume_at_step=first_step - 1) as metrics:
        step = first_step
        while True:
            metrics.write({"kind": "train", "step": step, "loss": 1 / step})
            for _ in range(2 if step % 3 == 0 else 1):
                path = save_checkpoint(
                    run_dir / "checkpoints", step, groups=tensors_of(step), state={"run_id": "r", "cursor": step * 10}
                )
                os.write(report, step.to_bytes(8, "little"))
            prune(run_dir / "checkpoints", keep=2, verified=path)
            step += 1


def seconds_per_save(run_dir: Path) -> float:
    start = time.perf_counter()
    for step in range(3):
        save_checkpoint(run_dir, step, groups=tensors_of(step), state={})
    return (time.perf_counter() - start) / 3


def trials(run_dir: Path, *, num_trials: int, seed: int) -> Iterator[dict[str, object]]:
    chance = random.Random(seed)
    checkpoints = run_dir / "checkpoints"
    longest_delay = 6 * seconds_per_save(run_dir / "timing")
    finished = 0
    for _ in range(num_trials):
        sound = newest_sound(checkpoints)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                save_for_ever(run_dir, first_step=sound.step + 1 if sound else 1, report=writer)
            finally:
                os._exit(70)  # only an exception leads here; the parent takes it as a failure
        os.close(writer)
        time.sleep(chance.uniform(0, longest_delay))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            reported = pipe.read()
        finished = int.from_bytes(reported[-8:], "little") if reported else finished
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        yield {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "reported_step": finished,
            "inside_a_save": any(name.startswith(".writing") and not name.endswith(".lock") for name in names),
            "inside_a_replacement": any(name.startswith(".replaced") for name in names),
            **examine(run_dir),
        }


def examine(run_dir: Path) -> dict[str, object]:
    """What the next run would find."""
    sound = newest_sound(run_dir / "checkpoints")
    records = read_metrics(run_dir / "metrics.jsonl", notes=[])
    steps = [record["step"] for record in records]
    found: dict[str, object] = {"curve_is_whole": steps == list(range(1, len(steps) + 1))}
    if sound is None:
        return {**found, "sound_step": 0, "tensors_equal": True, "left_overs": []}
    groups, state = load_checkpoint(sound.path)
    expected = tensors_of(sound.step)
    equal = groups.keys() == expected.keys() and all(
        set(groups[group]) == set(tensors)
        and all(torch.equal(groups[group][name], tensor) for name, tensor in tensors.items())
        for group, tensors in expected.items()
    )
    return {
        **found,
        "sound_step": sound.step,
        "tensors_equal": equal and state["cursor"] == sound.step * 10,
        "problems": [str(problem) for problem in check_checkpoint(sound.path, step=sound.step)],
        "left_overs": [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, count, seed_text = sys.argv[1:]
    print(json.dumps(list(trials(Path(folder), num_trials=int(count), seed=int(seed_text)))))
