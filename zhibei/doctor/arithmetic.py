"""On which cards and in which arithmetic a run will compute, from its run file and the machine. Knows no check.

The same choices as `zhibei/model/device.py` makes, without torch.
"""

from __future__ import annotations

import re

from zhibei.doctor.facts.facts import Facts
from zhibei.plan.machines import Gpu

BF16_CAPABILITY = (8, 0)


def cards_of(facts: Facts) -> list[tuple[int, Gpu]]:
    """(number, card) of each card the run may use: none for `device: cpu`, one for `cuda:1`, else all."""
    gpus = list(enumerate(facts.machine.gpus))
    if facts.resolved is None:
        return gpus
    device = facts.run.device.strip().lower()
    if device == "cpu":
        return []
    named = re.fullmatch(r"cuda:(\d+)", device)
    return [one for one in gpus if named is None or one[0] == int(named[1])]


def precision_of(facts: Facts) -> str:
    """fp32, bf16 or fp16 as forward and backward will compute; `auto` becomes what the first card can do."""
    asked, cards = facts.run.model.precision, cards_of(facts)
    if asked != "auto":
        return asked
    return "fp32" if not cards else "fp16" if is_older(cards[0][1], BF16_CAPABILITY) else "bf16"


def is_older(gpu: Gpu, capability: tuple[int, int]) -> bool:
    """Whether a card is below a compute capability; one whose capability nobody told is not."""
    return gpu.vendor == "nvidia" and (0, 0) < gpu.capability < capability


def described(number: int, gpu: Gpu) -> str:
    """`GPU 0 (V100-32G, compute capability 7.0)`."""
    return f"GPU {number} ({gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]})"
