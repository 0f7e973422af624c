"""The installed torch, looked at without importing it here: version, CUDA or ROCm, architectures. Knows no machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zhibei.doctor.facts.outside import ask, read_quietly, remembered_probe

# get_arch_list() is empty where no card is visible; the function below it always answers.
PROBE = """
import json, torch
flags = getattr(torch._C, "_cuda_getArchFlags", None)
devices = []
for number in range(torch.cuda.device_count()):
    one = torch.cuda.get_device_properties(number)
    devices.append({"name": one.name, "memory": one.total_memory, "capability": f"{one.major}.{one.minor}"})
print(json.dumps({"architectures": (flags() or "").split() if flags else [], "devices": devices,
                  "available": torch.cuda.is_available()}))
"""
PROBE_SECONDS = 60.0
VISIBILITY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class TorchBuild:
    """What torch/version.py says; empty when torch is not installed."""

    version: str = ""
    cuda: str | None = None
    hip: str | None = None

    @property
    def is_for_gpus(self) -> bool:
        return self.cuda is not None or self.hip is not None

    @cached_property
    def probed(self) -> Mapping[str, Any]:
        """`architectures`, `devices`, `available` of a GPU build, asked of torch itself; `fault` when it crashed."""
        if not self.is_for_gpus:
            return {}
        answer = remembered_probe(PROBE, known_by=known_by(self), seconds=PROBE_SECONDS)
        return {"fault": answer.fault} if answer.fault else json.loads(answer.output.strip().splitlines()[-1])


def read_torch_build(folder: Path | None = None) -> TorchBuild:
    """The torch that `import torch` would give, or the one in `folder`."""
    if folder is None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return TorchBuild()
        folder = Path(spec.origin).parent
    text = read_quietly(folder / "version.py")

    def value(name: str) -> str | None:
        found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return found[1] if found else None

    return TorchBuild(version=value("__version__") or "", cuda=value("cuda"), hip=value("hip"))


def known_by(build: TorchBuild) -> dict[str, str]:
    """What an answer of torch depends on besides its code: version, driver, boot, and which cards are visible."""
    return {
        "torch": f"{build.version} {build.cuda} {build.hip}",
        "driver": driver_version(),
        "boot": read_quietly(Path("/proc/sys/kernel/random/boot_id")).strip(),
        **{name: os.environ.get(name, "") for name in VISIBILITY},
    }


def driver_version() -> str:
    """NVIDIA's kernel driver, "" where there is none."""
    found = re.search(
        r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", read_quietly(Path("/proc/driver/nvidia/version"))
    )
    if found:
        return found[1]
    answer = ask(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return "" if answer.fault or not answer.output.strip() else answer.output.split()[0]
