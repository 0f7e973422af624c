"""Pits of several processes: ranks that cannot meet, ports, interfaces, cards that ranks share. Knows no model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from zhibei.doctor.facts.environment import EnvironmentFacts, Launch
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.launch import OWN_ADDRESSES
from zhibei.doctor.pitfall import Finding, pitfall

# Interfaces of containers and virtual machines; ranks on other nodes cannot be reached through them.
VIRTUAL = (
    "docker*",
    "br-*",
    "veth*",
    "virbr*",
    "cni*",
    "flannel*",
    "cali*",
    "tun*",
    "tap*",
    "vmnet*",
    "podman*",
    "lxc*",
)
NO_OPTION = "tests/doctor/test_no_such_option.py::test_options_of_other_programs_are_refused"


@pitfall(
    "distributed",
    cost="hours",
    errors=[
        r"No slot '?\d+'? specified on host",
        r"Detected CUDA_VISIBLE_DEVICES=.{1,80}(?:but ignoring it|ignored)",
        r"CUDA_VISIBLE_DEVICES.{0,60}(?:invalid|detected but ignored)",
    ],
    sources=[
        "https://github.com/deepspeedai/DeepSpeed/issues/662",
        "https://github.com/deepspeedai/DeepSpeed/issues/5818",
        "https://github.com/deepspeedai/DeepSpeed/issues/4248",
        "https://github.com/deepspeedai/DeepSpeed/issues/2976",
        "https://github.com/huggingface/accelerate/issues/663",
    ],
)
def deepspeed_launcher_cuda_visible_devices(facts: Facts) -> Iterable[Finding]:
    """CUDA_VISIBLE_DEVICES and the cards or ranks of this machine do not fit each other.

    Why: CUDA reads the list up to the first card that does not exist and says nothing, so a run gets fewer cards, none
    or somebody else's. The deepspeed launcher overwrites the variable; indices are counted anew in every process.

    Fix: List cards that exist, each once (nvidia-smi -L shows them), as many as ranks on this node. With deepspeed
    unset the variable and use --include localhost:2,3.

    CUDA_VISIBLE_DEVICES 与本机的显卡或进程数对不上。

    为何：CUDA 读到第一张不存在的卡就停下且不作提示，于是运行得到的卡变少、没有，或是别人的卡。
    deepspeed 启动器会改写该变量；每个进程里的编号都重新计数。

    办法：列出确实存在的卡，每张只列一次（nvidia-smi -L 可查看），数量与本节点的进程数一致。
    使用 deepspeed 时取消该变量，改用 --include localhost:2,3。
    """
    environment = facts.environment
    asked = environment.variables.get("CUDA_VISIBLE_DEVICES")
    if facts.machine.is_described or asked is None:
        return
    for fault in visibility_faults(asked, environment, len(facts.machine.gpus)):
        yield Finding(
            what=f"CUDA_VISIBLE_DEVICES={asked}: {fault}",
            where="environment variable CUDA_VISIBLE_DEVICES",
            to_do="list cards that nvidia-smi -L shows, each once, one for each rank; or unset it",
        )


def visibility_faults(asked: str, environment: EnvironmentFacts, num_visible: int) -> list[str]:
    """What is wrong with a list of visible cards; -1 and an empty list hide all cards on purpose."""
    names = [name.strip() for name in asked.split(",")]
    if asked.strip() in ("", "-1", "NoDevFiles"):
        return []
    faults = []
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        faults.append(f"{', '.join(doubled)} is listed twice, which CUDA takes for an error and shows no card at all")
    strange = [name for name in names if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name)]
    if strange:
        faults.append(f"{strange[0]!r} is neither a number nor the identifier of a card")
    physical = environment.physical_gpus
    missing = [name for name in names if name.isdigit() and physical is not None and int(name) >= physical]
    if missing:
        faults.append(f"card {missing[0]} does not exist: this machine has {physical}, counted from 0")
    launch = environment.launch
    if physical and num_visible and launch.world_size > 1 and launch.local_rank >= num_visible:
        faults.append(f"local rank {launch.local_rank} finds only {num_visible} cards")
    return faults


@pitfall(
    "distributed",
    cost="minutes",
    errors=[
        r"failed to bind to .{0,60}(?:Address already in use|errno: 98)",
        r"EADDRINUSE|Address already in use",
        r"server socket has failed to listen on any local network address",
    ],
    sources=[
        "https://github.com/pytorch/pytorch/issues/126510",
        "https://github.com/meta-llama/llama-cookbook/issues/186",
        "https://github.com/pytorch/pytorch/issues/85604",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/401",
    ],
)
def master_port_in_use(facts: Facts) -> Iterable[Finding]:
    """The port at which the ranks are to meet is taken.

    Why: A second job on the node, or a process left over from the last run, holds it. Rank 0 fails, and the others
    wait for it.

    Fix: End the process that holds the port if it is a leftover of yours, or take another port: MASTER_PORT, torchrun
    --master-port; on one node torchrun --standalone finds a free one.

    各进程会合所用的端口已被占用。

    为何：同一节点上的另一个作业，或上一次运行残留的进程占着它。0 号进程失败，其余进程则一直等待。

    办法：若是自己残留的进程就结束它，或换一个端口：MASTER_PORT、torchrun --master-port；
    单节点时 torchrun --standalone 会自行找到空闲端口。
    """
    launch = facts.environment.launch
    if launch.port_owner and not facts.machine.is_described:
        yield Finding(
            what=f"MASTER_PORT={launch.master_port} is held by {launch.port_owner}",
            where="environment variable MASTER_PORT",
            to_do=f"end that process if it is a leftover of yours, or set another port, e.g. {_other(launch)}",
            level="stop" if launch.world_size > 1 else "warning",
        )


def _other(launch: Launch) -> int:
    port = launch.master_port or 29500
    return port + 1 if 1024 <= port < 65535 else 29500


@pitfall(
    "distributed",
    cost="hours",
    errors=[
        r"environment variable (?:MASTER_ADDR|MASTER_PORT|RANK|WORLD_SIZE) expected, but not set",
        r"(?:getaddrinfo|Name or service not known|Temporary failure in name resolution|hostname .{1,60} cannot be)"
        r".{0,120}(?:master|rdzv|rendezvous|c10d|\d{4,5})",
        r"RendezvousTimeoutError|RendezvousConnectionError|rendezvous.{0,60}(?:timed? ?out|failed)",
    ],
    sources=[
        "https://github.com/hpcaitech/ColossalAI/issues/4343",
        "https://github.com/pytorch/pytorch/issues/25767",
        "https://github.com/longyuewangdcu/Chinese-Llama-2/issues/7",
    ],
)
def multinode_no_rank_or_master(facts: Facts) -> Iterable[Finding]:
    """The ranks of a launch cannot find one another: their variables are missing or contradict each other.

    Why: torchrun --nnodes=2 without --node-rank and --master-addr starts two separate runs that write into one
    directory, or waits for ever. The same happens when both nodes have one node rank, or the address is localhost.

    Fix: On every node: torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500,
    or --node-rank and --master-addr; with srun one task per card.

    一次启动的各进程找不到彼此：所需变量缺失或互相矛盾。

    为何：torchrun --nnodes=2 若不给 --node-rank 与 --master-addr，就会启动两个互不相干的运行写进同一目录，
    或一直等待。两个节点的 node rank 相同，或地址是 localhost 时也一样。

    办法：在每个节点上：torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d
    --rdzv-endpoint=FIRST_NODE:29500，或给出 --node-rank 与 --master-addr；用 srun 时每张卡一个任务。
    """
    if facts.machine.is_described:
        return
    launch = facts.environment.launch
    # Left-over variables of an earlier launch do not stop a run in one process.
    level = "stop" if launch.world_size > 1 or launch.num_nodes > 1 else "warning"
    where = "variables of the launch (RANK, WORLD_SIZE, MASTER_ADDR, ...)"
    for what, to_do in launch_faults(launch):
        yield Finding(what=what, where=where, to_do=to_do, level=level)


def launch_faults(launch: Launch) -> Iterable[tuple[str, str]]:
    """(what, what to do) for each contradiction in how this process was started."""
    again = "start all ranks with torchrun, which sets these variables"
    for text in launch.unreadable:
        yield f"{text} is not a whole number", again
    for name, value, bound in (
        ("rank", launch.rank, launch.world_size),
        ("local rank", launch.local_rank, launch.local_world_size),
        *([("node rank", launch.node_rank, launch.num_nodes)] if launch.node_rank is not None else []),
    ):
        if not 0 <= value < max(1, bound):
            yield f"{name} {value} of {bound}: ranks go from 0 to {max(1, bound) - 1}", again
    if launch.world_size < 1:
        yield f"WORLD_SIZE={launch.world_size}", again
    if launch.world_size < launch.local_world_size:
        yield f"{launch.local_world_size} ranks on this node, but {launch.world_size} in all", again
    needs_address = launch.world_size > 1 and launch.launcher not in ("mpirun", "srun")
    if needs_address and not launch.master_address:
        yield f"{launch.world_size} ranks, and no MASTER_ADDR where they meet", again
    if launch.num_nodes > 1:
        yield from _node_faults(launch)
    if launch.master_address and not launch.master_resolves:
        yield (
            f"MASTER_ADDR={launch.master_address} has no address (asked for 2 seconds)",
            "give the first node's IP address, or a name that every node resolves (getent hosts NAME)",
        )


def _node_faults(launch: Launch) -> Iterable[tuple[str, str]]:
    nodes = f"{launch.num_nodes} nodes"
    rendezvous = "give torchrun --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 on every node"
    if launch.world_size < launch.num_nodes:
        yield f"{nodes} and {launch.world_size} ranks in all: each node would train alone", rendezvous
    elif launch.world_size == launch.local_world_size:
        yield f"{nodes}, and all {launch.world_size} ranks are on this one: each node would train alone", rendezvous
    ranks_are_given = launch.world_size > 1 and launch.launcher != "torchrun"
    if launch.node_rank is None and not ranks_are_given:
        yield f"{nodes}, and no NODE_RANK says which one this is", "give --node-rank on every node"
    if launch.master_address.lower() in OWN_ADDRESSES:
        yield f"{nodes}, and MASTER_ADDR={launch.master_address} means a different machine on each", rendezvous


@pitfall(
    "distributed",
    cost="hours",
    errors=[
        r"NCCL WARN.{0,60}Connect to .{1,60} failed",
        r"No route to host",
        r"(?:NCCL|Gloo).{0,80}(?:no socket interface found|unable to find (?:address|interface)|Bootstrap : no socket)",
        r"connectFullMesh failed|Gloo connectFullMesh",
    ],
    sources=[
        "https://github.com/pytorch/pytorch/issues/58431",
        "https://github.com/pytorch/pytorch/issues/50575",
        "https://github.com/NVIDIA/nccl/issues/1105",
        "https://github.com/NVIDIA/nccl/issues/1016",
        "https://github.com/hpcaitech/ColossalAI/issues/4343",
        "https://github.com/meta-llama/llama-cookbook/issues/688",
    ],
)
def multinode_wrong_interface(facts: Facts) -> Iterable[Finding]:
    """Ranks on other nodes will be called through a network interface that does not lead there.

    Why: NCCL and Gloo take the first interface they find, which may be docker0 or a bridge, and wait half an hour
    for an answer. A name in NCCL_SOCKET_IFNAME that this node does not have ends the run at once or, worse, only on
    one node.

    Fix: export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME with the interface of the route between the nodes
    (ip route get ADDRESS), and open the ports between them.

    将通过到不了其他节点的网络接口去呼叫它们。

    为何：NCCL 与 Gloo 取找到的第一个接口，它可能是 docker0 或网桥，然后等上半小时。
    若 NCCL_SOCKET_IFNAME 写的是本节点没有的接口，运行会立刻终止，更糟的是只在某一个节点上终止。

    办法：用 export NCCL_SOCKET_IFNAME 与 GLOO_SOCKET_IFNAME 指定节点之间路由所用的接口
    （ip route get 地址），并放通它们之间的端口。
    """
    environment = facts.environment
    if facts.machine.is_described or environment.launch.num_nodes < 2 or not environment.interfaces:
        return
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        asked = environment.variables.get(variable, "")
        chosen = chosen_interfaces(asked, environment.interfaces)
        if asked and (not chosen or chosen == ["lo"]):
            yield Finding(
                what=f"{variable}={asked} chooses {chosen or 'nothing'} of {', '.join(environment.interfaces)}",
                where=f"environment variable {variable}",
                to_do="name the interface of the route to the other nodes: ip route get MASTER_ADDR",
            )
    virtual = [name for name in environment.interfaces if is_virtual(name)]
    if virtual and not environment.variables.get("NCCL_SOCKET_IFNAME"):
        real = [name for name in environment.interfaces if name not in virtual and name != "lo"]
        yield Finding(
            what=f"{environment.launch.num_nodes} nodes, NCCL_SOCKET_IFNAME is not set, and this node has "
            f"{', '.join(virtual)} beside {', '.join(real) or 'no other interface'}",
            where="environment variable NCCL_SOCKET_IFNAME",
            to_do=f"export NCCL_SOCKET_IFNAME={real[0] if real else 'INTERFACE'} on every node, GLOO_SOCKET_IFNAME too",
            level="warning",
        )


def is_virtual(interface: str) -> bool:
    return any(fnmatch.fnmatch(interface, pattern) for pattern in VIRTUAL)


def chosen_interfaces(asked: str, interfaces: Iterable[str]) -> list[str]:
    """As NCCL reads its variable: a list of prefixes, `=` before it for exact names, `^` to leave them out."""
    mark = re.match(r"\^?=?", asked)
    signs = mark[0] if mark else ""
    names = [name for name in asked[len(signs) :].split(",") if name]

    def fits(interface: str) -> bool:
        return any(interface == name if "=" in signs else interface.startswith(name) for name in names)

    return [interface for interface in interfaces if fits(interface) != ("^" in signs)]


@pitfall(
    "distributed",
    cost="hours",
    sources=["https://github.com/hpcaitech/ColossalAI/issues/4343"],
)
def several_ranks_each_train_alone(facts: Facts) -> Iterable[Finding]:
    """Several processes were started, and each of them takes itself for the only one.

    Why: srun and mpirun number their processes in variables of their own. Without RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT every process trains the whole run by itself and writes into the same directory.

    Fix: Start with zhibei launch, one task on each node: srun --ntasks-per-node=1 zhibei launch --nodes N RUN.
    zhibei launch --write slurm writes the whole file.

    启动了多个进程，而每个进程都以为只有自己。

    为何：srun 与 mpirun 用各自的变量给进程编号。没有 RANK、WORLD_SIZE、LOCAL_RANK、MASTER_ADDR 与 MASTER_PORT 时，
    每个进程都会独自训练整个运行，并写进同一目录。

    办法：用 zhibei launch 启动，每个节点一个任务：srun --ntasks-per-node=1 zhibei launch --nodes N RUN。
    zhibei launch --write slurm 可写出完整的脚本。
    """
    environment, launch = facts.environment, facts.environment.launch
    if facts.resolved is None or facts.machine.is_described or launch.world_size < 2:
        return
    if launch.launcher in ("mpirun", "srun") and "WORLD_SIZE" not in environment.variables:
        yield Finding(
            what=f"{launch.world_size} processes were started by {launch.launcher}, and WORLD_SIZE is not set",
            where="environment variable WORLD_SIZE",
            to_do="start one task on each node, and in it: zhibei launch (zhibei launch --write slurm writes the file)",
        )
