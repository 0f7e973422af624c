"""How this process was started, and whether its ranks can meet: from the variables of the launchers. Knows no GPU."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from zhibei.doctor.facts.environment import Launch
from zhibei.doctor.facts.outside import read_quietly

RESOLVE_SECONDS = 2.0
OWN_ADDRESSES = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::")
# For each figure the variables that tell it, the plain ones (torchrun, deepspeed, a script of one's own) first.
SOURCES: dict[str, tuple[str, ...]] = {
    "world_size": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"),
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "local_rank": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "local_world_size": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    "num_nodes": ("GROUP_WORLD_SIZE", "NNODES", "CROSS_SIZE", "SLURM_STEP_NUM_NODES"),
    "node_rank": ("GROUP_RANK", "NODE_RANK", "CROSS_RANK", "SLURM_NODEID"),
    "master_port": ("MASTER_PORT",),
}
# sbatch sets these in the script itself too, where nothing has been started in ranks yet.
ONLY_IN_A_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


def read_launch(variables: Mapping[str, str], *, root: Path = Path("/")) -> Launch:
    """Ranks, nodes and the meeting place. Never raises: what cannot be read is in `unreadable`."""
    unreadable: list[str] = []
    figures = {name: _figure(name, variables, unreadable) for name in SOURCES}
    launcher = launcher_of(variables)
    world_size = _or(figures["world_size"], 1)
    num_nodes = _or(figures["num_nodes"], 1)
    local_world_size = figures["local_world_size"]
    if local_world_size is None:
        local_world_size = max(1, world_size // num_nodes) if num_nodes >= 1 else world_size
    if figures["num_nodes"] is None and local_world_size >= 1 and world_size > local_world_size:
        num_nodes = -(-world_size // local_world_size)
    address, port, rank = variables.get("MASTER_ADDR", "").strip(), figures["master_port"], _or(figures["rank"], 0)
    # Under torchrun the launcher itself holds the port and serves the ranks; ranks that have met hold it themselves.
    have_met = "ZHIBEI_LAUNCHES" in variables
    is_ours = launcher != "torchrun" and not have_met and rank == 0 and (world_size > 1 or port is not None)
    return Launch(
        launcher=launcher,
        world_size=world_size,
        rank=rank,
        local_rank=_or(figures["local_rank"], 0),
        local_world_size=local_world_size,
        num_nodes=num_nodes,
        node_rank=figures["node_rank"],
        master_address=address,
        master_port=port,
        master_resolves=not address or resolves(address),
        port_owner=port_owner(port, root=root) if is_ours and port is not None else "",
        unreadable=tuple(unreadable),
    )


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _figure(name: str, variables: Mapping[str, str], unreadable: list[str]) -> int | None:
    in_step = "SLURM_STEP_ID" in variables or "SLURM_STEPID" in variables
    for variable in SOURCES[name]:
        text = variables.get(variable, "").strip()
        if not text or (variable in ONLY_IN_A_STEP and not in_step):
            continue
        if re.fullmatch(r"-?\d+", text):
            return int(text)
        # torchrun takes NNODES=1:4 (elastic); the figure is then not known before the ranks have met.
        if not (variable == "NNODES" and re.fullmatch(r"\d+:\d+", text)):
            unreadable.append(f"{variable}={text}")
        return None
    return None


def launcher_of(variables: Mapping[str, str]) -> str:
    """torchrun, accelerate, deepspeed, mpirun, srun, or "" for a plain start."""
    has_accelerate = any(name.startswith("ACCELERATE_") for name in variables)
    if "TORCHELASTIC_RUN_ID" in variables:
        return "accelerate" if has_accelerate else "torchrun"
    if has_accelerate:
        return "accelerate"
    if "CROSS_RANK" in variables and "LOCAL_SIZE" in variables:  # deepspeed/launcher/launch.py sets both
        return "deepspeed"
    if "OMPI_COMM_WORLD_RANK" in variables or "PMI_RANK" in variables:
        return "mpirun"
    return "srun" if "SLURM_STEP_ID" in variables or "SLURM_STEPID" in variables else ""


def resolves(host: str, *, seconds: float = RESOLVE_SECONDS) -> bool:
    """Whether a host name has an address. A name server that does not answer in time counts as no."""
    found: list[bool] = []

    def ask_the_resolver() -> None:
        with suppress(OSError, UnicodeError):
            socket.getaddrinfo(host, None)
            found.append(True)

    thread = threading.Thread(target=ask_the_resolver, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found)


def port_owner(port: int, *, root: Path = Path("/")) -> str:
    """Who listens on a TCP port of this machine; "" when it is free. A port out of range is nobody's and not free."""
    if not 0 < port < 65536:
        return "nobody can: ports go from 1 to 65535"
    try:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("", port))
            tried.listen(1)  # with SO_REUSEADDR only listening shows another listener on Linux
        return ""
    except PermissionError:
        return "the system: ports below 1024 need privileges"
    except OSError:
        return _holder(port, root) or "another process"


def _holder(port: int, root: Path) -> str:
    """`python (pid 4711)`, as far as /proc shows it to this user."""
    sockets = set()
    for name in ("tcp", "tcp6"):
        for line in read_quietly(root / "proc" / "net" / name).splitlines()[1:]:
            parts = line.split()
            if len(parts) > 9 and parts[3] == "0A" and int(parts[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{parts[9]}]")
    for process in (root / "proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):
            if any(os.readlink(link) in sockets for link in (process / "fd").iterdir()):
                return f"{read_quietly(process / 'comm').strip()} (pid {process.name})"
    return ""
