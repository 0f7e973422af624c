"""This machine as plain values: cards, memory, cores, shared memory, links. Knows no run file and imports no torch.

Cards are read from nvidia-smi, or where it is not there and torch is a GPU build, from torch in a process of its own.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from zhibei.config.yaml_tree import parse, read_text
from zhibei.doctor.facts.outside import ask, read_quietly
from zhibei.doctor.facts.torch_build import TorchBuild, read_torch_build
from zhibei.plan.cards import known_card
from zhibei.plan.described import machine_from
from zhibei.plan.machines import Gpu, Machine, gpu_of, parse_machine
from zhibei.store.host_memory import read_memory

GIB = 2**30
GPU_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap", "memory.reserved")
FEW_FIELDS = GPU_FIELDS[:5]  # old drivers know neither compute_cap nor memory.reserved


def machine_for(text: str | None) -> Machine:
    """The machine `--machine` means: a name (`v100-32g:4`), the path of a YAML file, or None for this one.

    Raises UserError with the nearest names, or with file, line and field.
    """
    if text is None:
        return read_machine()
    is_file = text.endswith((".yaml", ".yml")) or Path(text).is_file()
    return read_described(Path(text)) if is_file else parse_machine(text)


def read_described(path: Path) -> Machine:
    """The machine that a YAML file describes. Raises UserError with file, line and field."""
    tree = parse(read_text(path), source=str(path))
    lines = {".".join(str(part) for part in key): place.line for key, place in tree.values.items()}
    return machine_from(tree.value, where=str(path), lines=lines)


def read_machine(*, root: Path = Path("/"), variables: Mapping[str, str] | None = None) -> Machine:
    """This machine, as far as it can be read. `root` stands in for the file system in tests."""
    variables = os.environ if variables is None else variables
    gpus = read_gpus(variables)
    total_gib, free_gib = read_memory(root)
    return Machine(
        name="this machine",
        gpus=gpus,
        cpu_cores=read_cores(root),
        cpu_flags=read_cpu_flags(root),
        host_gib=total_gib,
        host_free_gib=free_gib,
        shared_memory_gib=read_shared_memory(root),
        gpu_link=read_link() if len(gpus) > 1 else "none",
    )


def read_gpus(variables: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The cards a program started here would see, in the order of nvidia-smi. CUDA puts the fastest first unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID, so unequal cards may be numbered otherwise by torch."""
    build = read_torch_build()
    for fields in (GPU_FIELDS, GPU_FIELDS[:6], FEW_FIELDS):
        answer = ask(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
        if not answer.fault:
            asked = variables.get("CUDA_VISIBLE_DEVICES")
            if asked is not None and asked.strip().startswith("MIG"):
                break  # a slice of a card: only torch can say how large it is
            gpus = gpus_of(answer.output, asked)
            is_known = all(gpu.capability > (0, 0) for gpu in gpus)
            return gpus if is_known else gpus_of_probe(build) or gpus
    return gpus_of_probe(build) if build.is_for_gpus and has_gpu_device() else ()


def has_gpu_device(root: Path = Path("/")) -> bool:
    """Whether the kernel offers any card: NVIDIA, AMD, or through WSL."""
    return any((root / "dev" / name).exists() for name in ("nvidia0", "nvidiactl", "kfd", "dxg"))


def gpus_of(listing: str, asked: str | None = None) -> tuple[Gpu, ...]:
    """Cards from nvidia-smi's CSV, chosen and ordered as CUDA_VISIBLE_DEVICES (`asked`) says."""
    found: dict[str, tuple[str, Gpu]] = {}
    for line in listing.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) >= len(FEW_FIELDS):
            found[parts[0]] = (parts[1], _gpu_of_line(parts))
    if asked is None:
        return tuple(gpu for _, gpu in found.values())
    chosen: list[Gpu] = []
    for name in (name.strip() for name in asked.split(",")):
        match = [gpu for index, (uuid, gpu) in found.items() if name == index or (name and uuid.startswith(name))]
        if len(match) != 1:
            break  # CUDA sees the devices before the first one that does not exist
        chosen += match
    return tuple(chosen)


def _gpu_of_line(parts: list[str]) -> Gpu:
    name, total_mib, free_mib = parts[2], _number(parts[3]) or 0.0, _number(parts[4])
    capability = re.fullmatch(r"(\d+)\.(\d+)", parts[5]) if len(parts) > 5 else None
    reserved_mib = _number(parts[6]) if len(parts) > 6 else None
    card = known_card(name, total_mib / 1024)
    if reserved_mib is not None:
        usable_gib = (total_mib - reserved_mib) / 1024
    else:
        usable_gib = min(total_mib / 1024, card.memory_gib if card else math.inf)
    return Gpu(
        name=name,
        memory_gib=round(usable_gib, 2),
        capability=(int(capability[1]), int(capability[2])) if capability else card.capability if card else (0, 0),
        bandwidth_gb_per_s=card.bandwidth_gb_per_s if card else 0.0,
        half_tflops=card.half_tflops if card else 0.0,
        free_gib=None if free_mib is None else round(free_mib / 1024, 2),
    )


def _number(text: str) -> float | None:
    """`[N/A]` and its kin are None."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def gpus_of_probe(build: TorchBuild) -> tuple[Gpu, ...]:
    """Cards as torch sees them: AMD's, slices of a card, and machines without nvidia-smi."""
    devices = build.probed.get("devices", [])
    return tuple(_gpu_of_torch(one, is_amd=build.hip is not None) for one in devices)


def _gpu_of_torch(one: Mapping[str, Any], *, is_amd: bool) -> Gpu:
    name, memory_gib = str(one["name"]), one["memory"] / GIB
    card = known_card(name, memory_gib)
    major, minor = one["capability"].split(".")
    gpu = Gpu(name, round(memory_gib, 2), (int(major), int(minor)), vendor="amd" if is_amd else "nvidia")
    if card is None:
        return gpu
    known = gpu_of(card)
    return replace(gpu, bandwidth_gb_per_s=known.bandwidth_gb_per_s, half_tflops=known.half_tflops)


def read_link() -> Literal["nvlink", "pcie"]:
    """How the cards of this machine reach one another: nvlink when nvidia-smi shows a link between any two."""
    return link_of(ask(["nvidia-smi", "topo", "-m"]).output)


def link_of(matrix: str) -> Literal["nvlink", "pcie"]:
    """From the table of `nvidia-smi topo -m`: NV12 between two cards is NVLink."""
    rows = [line.split() for line in matrix.splitlines() if line.startswith("GPU")]
    return "nvlink" if any(re.fullmatch(r"NV\d+", cell) for row in rows for cell in row) else "pcie"


def read_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: those it is bound to, within the container's share."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    base = root / "sys" / "fs" / "cgroup"
    share = read_quietly(base / "cpu.max").split()
    if not share:
        share = [read_quietly(base / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(share) == 2 and all(part.isdigit() for part in share) and int(share[1]):
        bound = min(bound, math.ceil(int(share[0]) / int(share[1])))
    return max(1, bound)


def read_cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction sets: avx2, avx512f, amx_bf16, asimd, ..."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", read_quietly(root / "proc" / "cpuinfo"), re.MULTILINE)
    return frozenset(found[1].split() if found else [platform.machine()])


def read_shared_memory(root: Path = Path("/")) -> float | None:
    """Room in /dev/shm in GiB; None where there is no such place."""
    try:
        room = os.statvfs(root / "dev" / "shm")
    except OSError:
        return None
    return round(room.f_bavail * room.f_frsize / GIB, 3)
