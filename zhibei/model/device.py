"""Which device and which arithmetic a run uses. Looks at the machine once; knows no model."""

from __future__ import annotations

import torch

from zhibei.config.errors import UserError
from zhibei.model.ranks import ranks_asked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` is the CUDA device of this rank (the first one for a process alone), else the CPU. Raises UserError for a
    device that is not there."""
    if name == "auto" or (name == "cuda" and ranks_asked().are_several):
        own = ranks_asked().local
        if not torch.cuda.is_available() and name == "auto":
            return torch.device("cpu")
        name = f"cuda:{own}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"device: {name}", expected="auto, cpu, cuda or cuda:N", fix="set device: auto", where="device"
        ) from None
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise UserError(
                f"device: {name}, but torch {torch.__version__} sees {found} CUDA devices",
                expected="a device that is there",
                fix="set device: auto or cpu; if a GPU is installed, check the driver and that torch is a CUDA build",
                where="device",
            )
        return torch.device("cuda", device.index or 0)
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for a device. auto: the widest fast type. Raises UserError where the device has it not."""
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return "fp32" if device.type == "cpu" else ("bf16" if has_bf16 else "fp16")
    if name == "bf16" and not has_bf16:
        raise UserError(
            f"precision: bf16, but {torch.cuda.get_device_name(device)} has no bf16 arithmetic",
            expected="a GPU of compute capability 8.0 (Ampere) or newer",
            fix="set model.precision: fp16 (a loss scaler is then used) or fp32",
            where="model.precision",
        )
    if name == "fp16" and device.type == "cpu":
        raise UserError(
            "precision: fp16 on a CPU",
            expected="fp32 or bf16 on a CPU",
            fix="set model.precision: auto (fp32 here), or bf16",
            where="model.precision",
        )
    return name
