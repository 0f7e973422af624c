"""What a machine can do by its make, without trying: for machines that are not this one. Knows data sheets, no run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zhibei.doctor.trials import DTYPES, lacking
from zhibei.plan.machines import Gpu, Machine

# Triton needs 7.0; the integer matrix units that make LLM.int8 fast came with 7.5; bitsandbytes' 4-bit kernels run
# from 6.0 on (the support tables of Triton and bitsandbytes).
COMPILE_FROM, INT8_FROM, NF4_FROM, VARLEN_FROM = (7, 0), (7, 5), (6, 0), (8, 0)


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing a device can or cannot do, and why not or by what means."""

    device: str
    name: str
    can: bool
    words: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"device": self.device, "name": self.name, "can": self.can, "words": self.words}


def abilities_of(machine: Machine) -> list[Ability]:
    """For each kind of card of the machine (or the processor where there is none), what it can compute."""
    kinds = list(dict.fromkeys(machine.gpus))
    found = [ability for gpu in kinds for ability in _of_card(gpu)]
    return found or [
        *(Ability("cpu", dtype, not lacking(dtype, None), lacking(dtype, None)) for dtype in DTYPES),
        Ability("cpu", "packed rows", True, "documents"),
        Ability("cpu", "torch.compile", True, "with a C++ compiler"),
    ]


def _of_card(gpu: Gpu) -> list[Ability]:
    has_varlen = gpu.capability >= VARLEN_FROM
    is_amd = gpu.vendor == "amd"
    return [
        *(Ability(gpu.name, dtype, not lacking(dtype, gpu), lacking(dtype, gpu)) for dtype in DTYPES),
        Ability(gpu.name, "packed rows", True, "varlen, one kernel" if has_varlen else "documents, row by row"),
        _since(gpu, "torch.compile", COMPILE_FROM),
        _since(gpu, "nf4 base", NF4_FROM),
        Ability(gpu.name, "int8 base", True, "" if gpu.capability >= INT8_FROM else "slow: no integer matrix units"),
        Ability(gpu.name, "torch", True, "a ROCm build" if is_amd else torch_for(gpu)),
    ]


def _since(gpu: Gpu, name: str, first: tuple[int, int]) -> Ability:
    can = gpu.vendor == "amd" or gpu.capability >= first
    return Ability(gpu.name, name, can, "" if can else f"needs compute capability {first[0]}.{first[1]}")


def torch_for(gpu: Gpu) -> str:
    """Which builds of torch hold machine code for a card: CUDA 13 dropped everything before 7.5, Blackwell came with
    CUDA 12.8 (CUDA's release notes)."""
    if gpu.capability < (7, 5):
        return f"a build for CUDA 12 that lists {gpu.architecture}; builds for CUDA 13 do not"
    return "a build for CUDA 12.8 or newer" if gpu.capability >= (10, 0) else "any build for CUDA 12 or 13"
