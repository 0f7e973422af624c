"""Canaries of area distributed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy
from zhibei.doctor.facts.environment import Launch
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfalls.distributed import chosen_interfaces
from zhibei.plan.machines import parse_machine

TWO_NODES: dict[str, Any] = {
    "launcher": "torchrun", "world_size": 8, "rank": 5, "local_rank": 1, "local_world_size": 4, "num_nodes": 2,
    "node_rank": 1, "master_address": "10.0.0.1", "master_port": 29500,
}  # fmt: skip
ONE_NODE = TWO_NODES | {"world_size": 4, "rank": 1, "num_nodes": 1, "node_rank": 0, "master_address": "localhost"}


def launched(**figures: Any) -> Facts:
    return broken(healthy(), "environment.launch", Launch(**figures))


def visible(asked: str, *, physical: int | None = 8, **figures: Any) -> Facts:
    facts = launched(**figures) if figures else healthy()
    facts = broken(facts, "environment.variables", {"CUDA_VISIBLE_DEVICES": asked})
    return broken(facts, "environment.physical_gpus", physical)


def interfaces(*names: str, nodes: int = 2, **variables: str) -> Facts:
    facts = launched(**(TWO_NODES if nodes > 1 else ONE_NODE))
    return broken(broken(facts, "environment.interfaces", names), "environment.variables", variables)


CANARIES: Canaries = {
    "deepspeed-launcher-cuda-visible-devices": (
        [
            visible("0,9"),
            visible("8"),
            visible("0,0"),
            visible("cuda:0"),
            visible("2", launcher="deepspeed", world_size=2, local_world_size=2, local_rank=1, master_address="x"),
            visible("1", physical=1),
        ],
        [
            visible("0"),
            visible("7,3,1"),
            visible(""),
            visible("-1"),
            visible("GPU-0a1b2c3d-aaaa"),
            visible("5", physical=None),
            healthy(),
        ],
    ),
    "master-port-in-use": (
        [
            launched(**ONE_NODE | {"port_owner": "python (pid 4711)"}),
            launched(master_port=29500, port_owner="another process"),
            launched(master_port=80, port_owner="the system: ports below 1024 need privileges"),
        ],
        [launched(**ONE_NODE), launched(master_port=29500), healthy()],
    ),
    "multinode-no-rank-or-master": (
        [
            launched(**TWO_NODES | {"master_address": ""}),
            launched(**TWO_NODES | {"master_address": "localhost"}),
            launched(**TWO_NODES | {"master_address": "127.0.0.1", "launcher": ""}),
            launched(**TWO_NODES | {"node_rank": None}),
            launched(**TWO_NODES | {"node_rank": 2}),
            launched(**TWO_NODES | {"rank": 8}),
            launched(**TWO_NODES | {"rank": -1}),
            launched(**TWO_NODES | {"local_rank": 4}),
            launched(**TWO_NODES | {"world_size": 4, "rank": 1}),
            launched(**TWO_NODES | {"master_resolves": False}),
            launched(num_nodes=2, master_address="10.0.0.1"),
            launched(world_size=4, local_world_size=4),
            launched(world_size=2, local_world_size=4, master_address="x"),
            launched(unreadable=("WORLD_SIZE=four",)),
        ],
        [
            launched(**TWO_NODES),
            launched(**ONE_NODE),
            launched(**TWO_NODES | {"launcher": "", "node_rank": None}),  # ranks set by a script of one's own
            launched(launcher="srun", world_size=2, rank=1, local_world_size=2, local_rank=1),
            healthy(),
            broken(healthy(machine=parse_machine("h100:8x2")), "environment.launch", Launch(world_size=4)),
        ],
    ),
    "multinode-wrong-interface": (
        [
            interfaces("lo", "docker0", "eno4"),
            interfaces("lo", "eth0", "br-12ab", "veth9"),
            interfaces("lo", "eno4", NCCL_SOCKET_IFNAME="ib0"),
            interfaces("lo", "eno4", NCCL_SOCKET_IFNAME="lo"),
            interfaces("lo", "eno4", NCCL_SOCKET_IFNAME="eno4", GLOO_SOCKET_IFNAME="eth1"),
            interfaces("lo", "eno4", NCCL_SOCKET_IFNAME="^eno"),
        ],
        [
            interfaces("lo", "docker0", "eno4", nodes=1),
            interfaces("lo", "docker0", "eno4", NCCL_SOCKET_IFNAME="eno4"),
            interfaces("lo", "docker0", "eno4", NCCL_SOCKET_IFNAME="^docker,lo"),
            interfaces("lo", "eth0"),
            interfaces(),
            healthy(machine=parse_machine("h100:8x2")),
        ],
    ),
    "several-ranks-each-train-alone": (
        [launched(launcher="srun", world_size=2), launched(launcher="mpirun", world_size=8, num_nodes=2)],
        [
            healthy(),
            launched(**ONE_NODE),
            launched(**TWO_NODES),
            launched(world_size=2),
            launched(launcher="srun", world_size=1),
            broken(launched(launcher="srun", world_size=2), "environment.variables", {"WORLD_SIZE": "2"}),
            healthy(machine=parse_machine("h100:8x2")),
        ],
    ),
}


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth", []),
        ("=eth1", ["eth1"]),
        ("^eth", ["lo", "docker0"]),
        ("^=eth0", ["lo", "eth1", "docker0"]),
        ("ib,eth1", ["eth1"]),
    ],
)
def test_interfaces_are_chosen_as_nccl_does(asked, chosen):
    assert chosen_interfaces(asked, ["lo", "eth0", "eth1", "docker0"]) == chosen
