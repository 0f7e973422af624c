"""Machines as plain values, real or described (`v100-32g:4`). Knows what cards can do, not what runs on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
