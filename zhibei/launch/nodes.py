"""The ranks of one node, kept by torchrun's own agent: started together, started again after a failure, ended together.

Knows torch.distributed.elastic and exit codes; not what the ranks do.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zhibei.config.errors import DONE, INTERRUPTED_AND_SAVED, STOPPED_BY_WATCHDOG, UserError
from zhibei.launch.network import (
    address_of,
    interface_of,
    is_own,
    own_address_towards,
    parse_master,
    require_free,
    require_reachable,
)

GRACE_SECONDS = 60
"""How long a rank that is asked to stop may take to save, before it is ended."""


@dataclass(frozen=True)
class Nodes:
    """What is to be started. `node_rank`: None where the nodes settle it among themselves."""

    num_nodes: int = 1
    node_rank: int | None = None
    ranks_per_node: int = 1
    master: str = ""
    max_restarts: int = 2
    wait_seconds: float = 600.0


@dataclass(frozen=True)
class MeetingPoint:
    """Where the nodes meet, and how this one is reached by the others."""

    host: str
    port: int
    is_here: bool
    own_address: str
    interface: str = ""


def ranks_here(asked: int | None) -> int:
    """How many ranks this node gets: one for each GPU, one where there is none. Raises UserError for more than GPUs."""
    import torch

    found = torch.cuda.device_count()
    if asked is None:
        return max(1, found)
    if asked < 1 or (found and asked > found):
        raise UserError(
            f"{asked} ranks on this node, which has {found} GPUs",
            expected="one rank for each GPU, or fewer",
            fix="leave --gpus-per-node out, or look with nvidia-smi and at CUDA_VISIBLE_DEVICES why some are not seen",
            where="--gpus-per-node",
        )
    return asked


def meeting_point(nodes: Nodes, *, say: Callable[[str], None]) -> MeetingPoint:
    """Find out where the nodes meet and whether they can. Raises UserError, naming host and port."""
    if nodes.num_nodes < 1 or (nodes.node_rank is not None and not 0 <= nodes.node_rank < nodes.num_nodes):
        raise UserError(
            f"--nodes {nodes.num_nodes} --node-rank {nodes.node_rank}",
            expected="node ranks from 0 to the number of nodes minus 1, each once",
            fix="number the nodes from 0, or give --node-rank auto on all of them",
            where="--node-rank",
        )
    if nodes.num_nodes == 1 and not nodes.master:
        return MeetingPoint("127.0.0.1", 0, is_here=True, own_address="127.0.0.1")
    if not nodes.master:
        raise UserError(
            f"{nodes.num_nodes} nodes, and nothing says where they meet",
            expected="--master HOST:PORT, the same on every node",
            fix="give the first node's address and a free port there, e.g. --master 10.0.0.1:29500",
            where="--master",
        )
    host, port = parse_master(nodes.master)
    address = address_of(host)
    if nodes.num_nodes > 1 and address.startswith("127."):
        raise UserError(
            f"--master {nodes.master} means a different machine on each node ({address})",
            expected="an address of the first node that the others can reach",
            fix="give its IP address in the network of the nodes (hostname -I)",
            where="--master",
        )
    is_here = is_own(address)
    if nodes.node_rank is not None and is_here != (nodes.node_rank == 0):
        raise UserError(
            f"this is node {nodes.node_rank}, and --master {nodes.master} is {'' if is_here else 'not '}this node",
            expected="the first node (node rank 0) at the address of --master",
            fix="give --node-rank 0 on that node and other numbers on the others, or --node-rank auto on all",
            where="--master",
        )
    if is_here:
        require_free(host, port)
        own = address
    else:
        own = own_address_towards(address)
        require_reachable(host, port, seconds=nodes.wait_seconds, say=say)
    return MeetingPoint(address, port, is_here, own, interface_of(own))


def launch(nodes: Nodes, command: Sequence[str], *, name: str, say: Callable[[str], None]) -> int:
    """Start `command` (arguments of zhibei) once for each rank of this node and keep it going; its exit code.

    A rank that dies or hangs ends the others, and all start again, at most `max_restarts` times. Exit codes that would
    come again (2, 3, 130) end the launch. Raises UserError when the nodes cannot meet.
    """
    point = meeting_point(nodes, say=say)
    with tempfile.TemporaryDirectory(prefix="zhibei-launch-") as folder:
        _set_environment(nodes, point, folder)
        seconds = GRACE_SECONDS / 2 if nodes.max_restarts == 0 else nodes.wait_seconds
        threading.Thread(target=_end_after_loss, args=(Path(folder), seconds, say), daemon=True).start()
        failed = _run_agent(nodes, point, [sys.executable, "-u", "-m", "zhibei", *command], name, say)
        verdicts = {
            int(path.name): int(path.read_text(encoding="ascii"))
            for path in Path(folder).iterdir()
            if path.name.isdigit()
        }
    if verdicts:
        return verdicts[min(verdicts)]
    return failed


def _set_environment(nodes: Nodes, point: MeetingPoint, folder: str) -> None:
    """What the ranks inherit; what the user has set wins."""
    os.environ["ZHIBEI_VERDICTS"] = folder
    # Every start gets a store of its own, kept by rank 0: what an earlier one left there would be heard again.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    wished = {
        "ZHIBEI_LAUNCH_ID": uuid.uuid4().hex,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nodes.ranks_per_node)),
    }
    if nodes.num_nodes > 1 and point.interface:
        wished |= {"GLOO_SOCKET_IFNAME": point.interface, "NCCL_SOCKET_IFNAME": point.interface}
    for variable, value in wished.items():
        os.environ.setdefault(variable, value)


def _run_agent(nodes: Nodes, point: MeetingPoint, command: list[str], name: str, say: Callable[[str], None]) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # each of them has a level of its own
    config = LaunchConfig(
        min_nodes=nodes.num_nodes,
        max_nodes=nodes.num_nodes,
        nproc_per_node=nodes.ranks_per_node,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{point.host}:{point.port}",
        rdzv_configs={
            "is_host": str(int(point.is_here)),
            "timeout": int(nodes.wait_seconds),
            "join_timeout": int(nodes.wait_seconds),
        },
        # One rank alone is a plain run, which finds its own directory in the way when it is started again.
        max_restarts=nodes.max_restarts if nodes.num_nodes * nodes.ranks_per_node > 1 else 0,
        local_addr=point.own_address,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)),
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        # Once one has failed, torch's agent ends the others: with SIGTERM, and those that do not obey with SIGKILL.
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            say(f"rank {rank} on {socket.gethostname()} (pid {first.pid}) {_end_of(first.exitcode)}")
        return first.exitcode if first.exitcode > 0 else STOPPED_BY_WATCHDOG
    except SignalException as error:
        say(f"stopped by {error.sigval.name}")
        return INTERRUPTED_AND_SAVED
    except (RendezvousError, RuntimeError) as error:
        raise UserError(
            f"the nodes did not meet, or lost one another: {type(error).__name__}: {str(error).splitlines()[0]}",
            expected=f"{nodes.num_nodes} nodes at {point.host}:{point.port} within {nodes.wait_seconds:.0f} s",
            fix="start zhibei launch with the same --nodes, --master and run file on every node; look at their output "
            "and at the link between them; go on with: zhibei launch --resume RUN_DIR",
            where=f"{point.host}:{point.port}",
        ) from error
    return DONE


def _end_after_loss(folder: Path, seconds: float, say: Callable[[str], None]) -> None:
    """End this process where a rank was lost and torch's agent neither ends nor starts the ranks again: behind a cut
    link it waits for its store until TCP gives up, which takes a quarter of an hour."""
    while folder.is_dir():
        time.sleep(1.0)
        lost = [path.stat().st_mtime for path in folder.glob("lost-*")]
        begun = list(folder.glob("begun-*"))
        newest = max((path.stat().st_mtime for path in begun), default=0.0)
        if not lost or max(lost) < newest or time.time() < max(lost) + seconds:
            continue
        say(f"the ranks of this node have ended, and the other nodes do not answer ({seconds:.0f} s waited)")
        for path in begun:
            with suppress(OSError, ValueError):
                os.kill(int(path.read_text(encoding="ascii")), signal.SIGKILL)
        os._exit(STOPPED_BY_WATCHDOG)


def _end_of(code: int) -> str:
    name = signal.Signals(-code).name
    hints = {
        "SIGKILL": " (the system does so when memory runs out: dmesg | grep -i oom)",
        "SIGSEGV": " (a crash inside a library; the same again points to a driver or a card)",
        "SIGBUS": " (often a full /dev/shm)",
    }
    return f"was ended by {name}{hints.get(name, '')}"
