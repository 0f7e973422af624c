"""Machines as plain values, real or described (`v100-32g:4`). Knows what cards can do, not what runs on them.

What the name of a card leaves open is assumed, and a YAML file can say it better (`zhibei/plan/described.py`): 8 cores
per card, host memory of twice the cards' memory but at least 32 GiB, nine tenths of it free, half of it as shared
memory (Linux's default for /dev/shm), NVLink between modules, and between nodes 25 GB/s (200 Gbit/s) for modules and
1.25 GB/s (10 Gbit/s) for everything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from zhibei.config.errors import UserError
from zhibei.plan.cards import Card, card_of

CORES_PER_CARD, SMALLEST_HOST_GIB, FREE_SHARE, SHARED_SHARE = 8, 32, 0.9, 0.5
CPU_CORES, CPU_HOST_GIB = 8, 32
MODULE_NODE_LINK, OTHER_NODE_LINK = 25.0, 1.25
MOST_CARDS, MOST_NODES = 16, 1024
# All x86 servers since 2013; what zhibei asks of a processor is at most this.
ASSUMED_FLAGS = frozenset({"avx", "avx2", "fma", "f16c"})

BEFORE = re.compile(r"(\d+)\s*[x*×]\s*(?=[a-z])", re.IGNORECASE)
AFTER = re.compile(r"(?:\s*:\s*|\s+[x*×]\s*)(\d+)(?:\s*[x*×]\s*(\d+))?\s*$", re.IGNORECASE)
CPU = re.compile(r"cpu(?:[-_ ]*(\d+)\s*(?:g|gb|gib))?(?:\s*:\s*(\d+))?", re.IGNORECASE)
FORM = "CARD, CARD:GPUS or CARD:GPUSxNODES, such as t4, rtx4090, v100-32g:4 or h100-80g:8x2; or cpu"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `memory_gib` is what programs can use; rates are dense peaks of the data sheet."""

    name: str
    memory_gib: float
    capability: tuple[int, int]
    vendor: Literal["nvidia", "amd", "other"] = "nvidia"
    bandwidth_gb_per_s: float = 0.0
    half_tflops: float = 0.0
    free_gib: float | None = None

    @property
    def has_bf16(self) -> bool:
        """Matrix units that compute in bf16 (Ampere and newer; CDNA on AMD)."""
        return self.vendor == "amd" or self.capability >= (8, 0)

    @property
    def has_tf32(self) -> bool:
        return self.vendor == "nvidia" and self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        return self.vendor == "nvidia" and self.capability >= (8, 9)

    @property
    def architecture(self) -> str:
        """`sm_70`, as torch's list of built architectures writes it."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes of one kind. `gpus` are those of one node; host figures are of one node too."""

    name: str
    gpus: tuple[Gpu, ...] = ()
    num_nodes: int = 1
    cpu_cores: int = 1
    cpu_flags: frozenset[str] = frozenset()
    host_gib: float = 0.0
    host_free_gib: float = 0.0
    """Memory a new process can have: available memory, or what the container's limit leaves, whichever is less."""
    shared_memory_gib: float | None = None
    disk_free_gib: float | None = None
    """Only of a described machine; on a real one the disk depends on the folder (OutputFacts)."""
    gpu_link: Literal["nvlink", "pcie", "none"] = "none"
    node_link_gb_per_s: float = 0.0
    is_described: bool = False
    """True when it stands in for a machine that is not this one."""

    @property
    def num_gpus(self) -> int:
        return len(self.gpus) * self.num_nodes

    @property
    def smallest_gpu(self) -> Gpu | None:
        """The card that limits the others: the one with the least memory."""
        return min(self.gpus, key=lambda gpu: gpu.memory_gib, default=None)


def parse_machine(text: str, *, where: str = "--machine") -> Machine:
    """`v100-32g:4`, `A100-80GB:2`, `4090`, `2xv100-32g`, `h100-80g:8x2` (8 cards in each of 2 nodes), `cpu`,
    `cpu-64g:16` (64 GiB, 16 cores). Raises UserError with what was expected and the nearest names."""
    stripped = text.strip()
    if not stripped:
        raise UserError("the name of the machine is empty", expected=FORM, fix="name a card", where=where)
    if found := CPU.fullmatch(stripped):
        host_gib, cores = int(found[1] or CPU_HOST_GIB), int(found[2] or CPU_CORES)
        if host_gib < 1 or cores < 1:
            raise _bad_count(text, where)
        return plain_computer(host_gib, cores)
    before, after = BEFORE.match(stripped), AFTER.search(stripped)
    name = stripped[before.end() if before else 0 : after.start() if after else None]
    if ":" in name:
        raise _bad_count(text, where)
    if before and after:
        raise UserError(
            f"{text!r} counts the cards twice", expected=FORM, fix=f"write {name.strip()}:{after[1]}", where=where
        )
    num_gpus = int(before[1]) if before else int(after[1]) if after else 1
    num_nodes = int(after[2]) if after and after[2] else 1
    if not (1 <= num_gpus <= MOST_CARDS and 1 <= num_nodes <= MOST_NODES):
        raise _bad_count(text, where)
    return machine_of(card_of(name, where=where), num_gpus=num_gpus, num_nodes=num_nodes)


def machine_of(card: Card, *, name: str = "", num_gpus: int = 1, num_nodes: int = 1) -> Machine:
    """Nodes with equal cards, and the assumptions above around them."""
    counts = "" if num_gpus == num_nodes == 1 else f":{num_gpus}" + (f"x{num_nodes}" if num_nodes > 1 else "")
    host_gib = float(max(SMALLEST_HOST_GIB, 2 * card.size_gb * num_gpus))
    return Machine(
        name=(name or card.key) + counts,
        gpus=(gpu_of(card),) * num_gpus,
        num_nodes=num_nodes,
        cpu_cores=CORES_PER_CARD * num_gpus,
        cpu_flags=ASSUMED_FLAGS,
        host_gib=host_gib,
        host_free_gib=FREE_SHARE * host_gib,
        shared_memory_gib=SHARED_SHARE * host_gib,
        gpu_link="none" if num_gpus == 1 else "nvlink" if card.has_nvlink else "pcie",
        node_link_gb_per_s=0.0 if num_nodes == 1 else MODULE_NODE_LINK if card.has_nvlink else OTHER_NODE_LINK,
        is_described=True,
    )


def gpu_of(card: Card) -> Gpu:
    """A card of the table as part of a machine."""
    return Gpu(
        name=card.name,
        memory_gib=card.memory_gib,
        capability=card.capability,
        vendor=card.vendor,
        bandwidth_gb_per_s=card.bandwidth_gb_per_s,
        half_tflops=card.half_tflops,
    )


def plain_computer(host_gib: float = CPU_HOST_GIB, cores: int = CPU_CORES) -> Machine:
    """A machine without cards."""
    return Machine(
        name="cpu",
        cpu_cores=cores,
        cpu_flags=ASSUMED_FLAGS,
        host_gib=float(host_gib),
        host_free_gib=FREE_SHARE * host_gib,
        shared_memory_gib=SHARED_SHARE * host_gib,
        is_described=True,
    )


def _bad_count(text: str, where: str) -> UserError:
    return UserError(
        f"{text!r}: the numbers of cards and nodes cannot be read",
        expected=f"{FORM}, with 1 to {MOST_CARDS} cards in each of 1 to {MOST_NODES} nodes",
        fix="for more cards write the nodes too: v100-32g:8x4 is 32 cards",
        where=where,
    )
