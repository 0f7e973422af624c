"""Launches of the small run for tests, and two network namespaces that stand for two hosts. Knows no test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zhibei.store.run_dir import RunDir

PATIENCE_SECONDS = 8
LONG = [
    "sft.max_steps=4000",
    "sft.save_every=10",
    "sft.evaluate_every=1000",
    "sft.sample_tokens=0",
    "log.every=1",
    "distributed.sharding=no_shard",
    f"distributed.patience_seconds={PATIENCE_SECONDS}",
]
NAMESPACES = ("zhibei-a", "zhibei-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def start(arguments: list[str], log: Path, *, namespace: str = "") -> subprocess.Popen:
    """`zhibei launch` in a process group of its own; everything it says goes into `log`."""
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZHIBEI_LAUNCH")}
    return subprocess.Popen(
        [*inside, sys.executable, "-m", "zhibei", "launch", *arguments],
        env={**environment, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def step_of(run_dir: RunDir) -> int:
    """The newest step in the metrics of a run that is under way."""
    if not run_dir.metrics.is_file():
        return 0
    lines = [line for line in run_dir.metrics.read_text().splitlines() if line.endswith("}")]
    return max([json.loads(line)["step"] for line in lines], default=0)


def wait_for_step(run_dir: RunDir, step: int, processes: list[subprocess.Popen], *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while step_of(run_dir) < step:
        assert time.monotonic() < deadline, f"step {step_of(run_dir)} only"
        assert all(process.poll() is None for process in processes), "it ended before"
        time.sleep(0.1)


def ranks_of(name: str) -> dict[int, int]:
    """Process numbers of the ranks that train the run of this name, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ranks = [int(word.removeprefix("RANK=")) for word in words if word.startswith("RANK=")]
        if ranks and f"name={name}" in command:
            found[ranks[0]] = int(process.name)
    return found


def end(processes: list[subprocess.Popen]) -> None:
    """Ask all of them to save and end, as a cluster manager does, and wait for it."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a virtual link between them. Raises OSError or CalledProcessError where the system
    does not allow them."""
    for name in NAMESPACES:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    try:
        for name in NAMESPACES:
            ip("netns", "add", name)
        ip("link", "add", "veth-a", "netns", NAMESPACES[0], "type", "veth", "peer", "veth-b", "netns", NAMESPACES[1])
        for name, link, address in zip(NAMESPACES, ("veth-a", "veth-b"), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield NAMESPACES
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
