"""Kills a training run with SIGKILL again and again, resuming each time; prints what it saw as JSON.

A process of its own: it imports torch once and forks a child per trial, which keeps fifty trials short.
Usage: python -m tests.train.kill_driver FOLDER NUM_KILLS
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# Imported here so that forked children find them: each would spend seconds on it.
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from tests.train.small_run import small_run
from zhibei.store.checkpoint import check_checkpoint, list_steps, newest_sound
from zhibei.store.run_dir import RunDir
from zhibei.train.offline import train

SETTINGS = ["name=killed", "sft.max_steps=400", "sft.save_every=3", "sft.evaluate_every=100", "lora.rank=4"]
SETTINGS += ["model.method=lora", "lora.dropout=0.1", "sft.sample_tokens=0"]


def child(folder: Path, run_dir: RunDir, start: int) -> int:
    """A forked process that trains or resumes; its exit code is 0 when the run got finished."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(folder / "child.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                begun = run_dir.manifest.is_file()
                train(small_run(folder, *SETTINGS), resume=run_dir if begun else None)
                code = 0
            except BaseException as error:
                print(f"trial {start}: {type(error).__name__}: {error}", file=log, flush=True)
    finally:
        os._exit(code)


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    small_run(folder, *SETTINGS)
    run_dir = RunDir(folder / "runs/killed")
    draw = random.Random(0)
    seen = {"kills": 0, "in_a_save": 0, "unsound_after_kill": 0, "steps": [], "failed": 0}
    deadline = time.monotonic() + 420
    is_done = False
    while not is_done and time.monotonic() < deadline:
        pid = child(folder, run_dir, seen["kills"])
        if seen["kills"] < num_kills:
            first = len(list_steps(run_dir.checkpoints)) and list_steps(run_dir.checkpoints)[-1][0]
            # Wait until this trial has saved something of its own, then kill at a random moment of the next steps.
            while _newest(run_dir) <= first and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            time.sleep(draw.random() * 0.12)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            seen["kills"] += 1
            seen["in_a_save"] += bool(list(run_dir.checkpoints.glob(".writing-*")))
            seen["unsound_after_kill"] += sum(
                bool(check_checkpoint(path, step=step)) for step, path in list_steps(run_dir.checkpoints)
            )
            found = newest_sound(run_dir.checkpoints)
            seen["steps"].append(found.step if found else None)
        else:
            _, status = os.waitpid(pid, 0)
            is_done = os.waitstatus_to_exitcode(status) == 0
            seen["failed"] += not is_done
            if seen["failed"] > 2:
                break
    print(json.dumps({**seen, "finished": is_done}))


def _newest(run_dir: RunDir) -> int:
    steps = list_steps(run_dir.checkpoints)
    return steps[-1][0] if steps else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
