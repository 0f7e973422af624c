"""The software around a run: packages, torch build, drivers, compilers, variables, launch. Knows no way to read them.

`zhibei/doctor/facts/environment_reader.py` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zhibei.config.run import RunFile
    from zhibei.plan.machines import Machine


@dataclass(frozen=True, slots=True)
class Launch:
    """How this process was started, from the variables of torchrun and its kin."""

    launcher: str = ""
    """"" (plain python), torchrun, deepspeed, accelerate, mpirun or srun."""
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    num_nodes: int = 1
    node_rank: int | None = None
    master_address: str = ""
    master_port: int | None = None
    master_resolves: bool = True
    port_owner: str = ""
    """Who holds the master port on this machine; "" when it is free or not asked for."""
    unreadable: tuple[str, ...] = ()
    """Variables whose value is no number: `WORLD_SIZE=four`."""


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """`trials` maps things that were tried (import flash_attn, dlopen libcuda.so.1, quantise on GPU 0) to what went
    wrong; "" means it worked, and what is absent from it was not tried."""

    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed packages with versions, by normalised name (`flash-attn`)."""
    torch_cuda: str | None = None
    torch_hip: str | None = None
    torch_architectures: tuple[str, ...] = ()
    """As torch.cuda.get_arch_list(): sm_80, sm_90, compute_90 (PTX)."""
    driver: str | None = None
    driver_cuda: str | None = None
    """Newest CUDA that the driver serves."""
    nvcc: str | None = None
    gcc: str | None = None
    has_c_compiler: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that change a run (CUDA_*, NCCL_*, HF_*, WANDB_*, OMP_*, TOKENIZERS_PARALLELISM, ...)."""
    stdin_is_terminal: bool = True
    open_files: int | None = None
    is_wsl: bool = False
    is_container: bool = False
    interfaces: tuple[str, ...] = ()
    gpu_faults: tuple[str, ...] = ()
    """Cards that report errors: `GPU 3: 12 uncorrectable ECC errors`."""
    physical_gpus: int | None = None
    """Cards in this machine, before CUDA_VISIBLE_DEVICES hides some; None when no driver told."""
    model_types: frozenset[str] = frozenset()
    """Values of `model_type` in config.json that the installed transformers knows; empty when that is not known."""
    unmet: tuple[str, ...] = ()
    """Packages that are missing or outside the range zhibei asks for: `transformers 4.27.0, needed >=5.17,<6`."""
    trials: Mapping[str, str] = field(default_factory=dict)
    launch: Launch = Launch()


def read_environment(run: RunFile | None = None, *, machine: Machine | None = None) -> EnvironmentFacts:
    """What is installed and set here (`zhibei/doctor/facts/environment_reader.py`)."""
    from zhibei.doctor.facts.environment_reader import read_environment as read

    return read(run, machine=machine)
