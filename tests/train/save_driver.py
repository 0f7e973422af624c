"""Saves as one of two ranks until it is killed, or what it is told to do; started by tests, never imported by them.

python -m tests.train.save_driver FOLDER KILLS     (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)

The ranks meet once and fork for every trial; the children connect anew, so that a trial costs no imports.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train.test_ranks import free_port
from zhibei.model.ranks import Ranks
from zhibei.store.checkpoint import check_checkpoint, list_steps, load_checkpoint, newest_sound, prune
from zhibei.store.parts import Part
from zhibei.train.saving import Saver

ROWS = 20_000
WIDTH = 40


def whole(step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint of this step must hold."""
    weight = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH) + step
    return {"weight": weight, "half": (weight / 7).to(torch.bfloat16), "score": torch.full((9,), float(step))}


def share(step: int, ranks: Ranks) -> dict:
    """This rank's half; the score is written once."""
    tensors = whole(step)
    start = ranks.rank * ROWS // 2
    found: dict = {name: Part(tensors[name][start : start + ROWS // 2], start, ROWS) for name in ("weight", "half")}
    if ranks.is_first:
        found["score"] = tensors["score"]
    return {"model": found, "random": {f"cpu.{ranks.rank}": torch.tensor([ranks.rank], dtype=torch.uint8)}}


def save_for_ever(checkpoints: Path, ranks: Ranks, *, first: int) -> None:
    """Steps of a few milliseconds; every second one is saved, every third of these while training goes on."""
    with Saver(checkpoints, ranks, background=True) as saver:
        for step in range(first, 10**6):
            groups = share(step, ranks)
            saver.begin(step, groups, {"run_id": "r", "cursor": step * 10}, may_go_on=step % 3 > 0)
            groups["model"]["weight"].tensor.fill_(-1.0)  # training goes on: what is written must be a copy
            while ranks.sum_on_host(float(saver.is_writing))[0] > 0:
                time.sleep(0.001)
            saved = saver.settle()
            if ranks.is_first and saved is not None:
                prune(checkpoints, keep=2, verified=saved.path)


def trial(checkpoints: Path, port: int, ranks: Ranks) -> int:
    """A forked child that saves from the newest step on; its process number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        found = newest_sound(checkpoints) if ranks.is_first else None
        store = dist.TCPStore("127.0.0.1", port, ranks.world, ranks.is_first)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world)
        first = ranks.from_first(found.step + 1 if found else 1)
        save_for_ever(checkpoints, ranks, first=first)
    finally:
        os._exit(70)


def examine(checkpoints: Path) -> dict[str, object]:
    """What the next run would find."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    inside = any(name.startswith(".writing") and not name.endswith(".lock") for name in names)
    unsound = sum(bool(check_checkpoint(path, step=step)) for step, path in list_steps(checkpoints))
    sound = newest_sound(checkpoints)
    found: dict[str, object] = {"inside_a_save": inside, "unsound": unsound, "step": sound.step if sound else 0}
    if sound is not None:
        groups, state = load_checkpoint(sound.path)
        expected = whole(sound.step)
        found["equal"] = state["cursor"] == sound.step * 10 and all(
            torch.equal(groups["model"][name], tensor) for name, tensor in expected.items()
        )
    return found


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks = Ranks(rank, world, rank, world)
    chance = random.Random(0)
    checkpoints = folder / "checkpoints"
    control = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), world, rank == 0)  # pyright: ignore[reportPrivateImportUsage]
    seen = []
    for number in range(num_kills):
        victim, delay = number % world, chance.random() * 0.12
        before = newest(checkpoints)
        control.add(f"ready{number}", 1)
        while control.add(f"ready{number}", 0) < world:
            time.sleep(0.002)
        if rank == 0:
            control.set(f"port{number}", str(free_port()))
        pid = trial(checkpoints, int(control.get(f"port{number}")), ranks)
        if rank == victim:
            deadline = time.monotonic() + 60
            while newest(checkpoints) <= before and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            control.set(f"dead{number}", "1")
        else:
            control.wait([f"dead{number}"])
            time.sleep(0.03)  # the survivor may do what it likes for a moment: commit, or wait for the dead one
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        control.add(f"over{number}", 1)
        while control.add(f"over{number}", 0) < world:
            time.sleep(0.002)
        if rank == 0:
            seen.append({"victim": victim, **examine(checkpoints)})
        control.add(f"seen{number}", 1)
        while control.add(f"seen{number}", 0) < world:
            time.sleep(0.002)
    # The store lives in rank 0, which therefore leaves last.
    if rank:
        control.add("left", 1)
        return
    while control.add("left", 0) < world - 1:
        time.sleep(0.002)
    print(json.dumps(seen))


def newest(checkpoints: Path) -> int:
    steps = list_steps(checkpoints)
    return steps[-1][0] if steps else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
