"""Trains whole runs as one of several ranks, one after the other; started by tests, never imported by them.

python -m tests.train.rank_run ORDERS.json DEVICE     (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
"""

import atexit
import json
import os
import signal
import sys
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.model.device import choose_device
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import met
from zhibei.store.run_dir import RunDir
from zhibei.train.loops import train


def require_no_threads_of_gloo() -> None:
    """One that outlives the interpreter ends the process by a signal now and then."""
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    left = [name for name in names if "gloo" in name]
    if left:
        sys.stderr.write(f"threads are left: {left}\n")
        sys.stderr.flush()
        os._exit(7)


def main() -> None:
    atexit.register(require_no_threads_of_gloo)  # called after what is registered later
    orders = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with met(choose_device(sys.argv[2]), patience_seconds=120) as ranks:
        for order in orders:

            def watch(record: dict, stop: int | None = order.get("signal_after_step")) -> None:
                if stop is not None and record["kind"] in ("train", "iteration") and record["step"] == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

            if order.get("has_no_room"):
                LanguageModel.has_room_to_gather = lambda _self: False
            resume = RunDir(Path(order["resume"])) if order.get("resume") else None
            try:
                train(read_run(order["file"], order["overrides"]), watch=watch, resume=resume)
            except UserError as error:
                if not order.get("fails"):
                    raise
                told = ranks.gathered([type(error).__name__, error.what])
                if ranks.is_first:
                    Path(order["fails"]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
