"""Where the time of a zhibei step goes on the GPU, kernel by kernel. Knows kernel names, not trainers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.ours import OurSettings, assemble, steps
from benchmarks.records import Record
from benchmarks.workload import Workload

# First match wins. Attention comes before products: flash kernels carry "cutlass" or "gemm" in their names too.
KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|attention|attn"),
    (
        "optimiser",
        r"^triton_\w*(lshift|left_shift|(?<!r)sqrt)|multi_tensor|fused_adam|FusedAdam|FusedOptimizer|foreach|lpnorm|NormTwoOps",
    ),
    ("products", r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitK|cudnn"),
    ("loss", r"softmax|logsumexp|nll"),
    ("copies and fills", r"Memcpy|Memset|memcpy|memset|copy_kernel|FillFunctor|CatArray"),
    ("fused pointwise", r"^triton_"),
    ("pointwise", r"elementwise|vectorized|reduce_kernel|unrolled"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel name over the profiled steps."""

    name: str
    milliseconds: float
    calls: int

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS if re.search(pattern, self.name)), "other")


def shares(kernels: Iterable[Kernel], wall_milliseconds: float) -> dict[str, float]:
    """Milliseconds of each kind, and of the time in which no kernel ran (one stream is assumed)."""
    totals: dict[str, float] = {}
    for kernel in kernels:
        totals[kernel.kind] = totals.get(kernel.kind, 0.0) + kernel.milliseconds
    totals["no kernel"] = max(0.0, wall_milliseconds - sum(totals.values()))
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def profile(settings: OurSettings, workload: Workload, *, profiled: int = 2, warmup: int = 3, top: int = 30) -> Record:
    """Run `warmup` steps, then `profiled` steps under torch.profiler; returns the shares and the largest kernels."""
    import time

    on_gpu = torch.cuda.is_available()
    run, stepper, batches = assemble(settings, workload, warmup + profiled)
    running = steps(stepper, batches, run.sft.learning_rate)
    for _ in range(warmup):
        next(running)
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(profiled):
            next(running)
        if on_gpu:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - began) * 1e3
    kernels = _kernels(profiler, on_gpu)
    largest = sorted(kernels, key=lambda kernel: -kernel.milliseconds)[:top]
    return {
        "benchmark": "sft-profile",
        "who": "zhibei",
        "version": "",
        "method": settings.method,
        "settings": settings.describe(workload),
        "steps": profiled,
        "wall_milliseconds": round(wall, 2),
        "shares_milliseconds": {kind: round(value, 2) for kind, value in shares(kernels, wall).items()},
        "kernels": [
            {"kind": k.kind, "milliseconds": round(k.milliseconds, 2), "calls": k.calls, "name": k.name[:120]}
            for k in largest
        ],
    }


def _kernels(profiler: Any, on_gpu: bool) -> list[Kernel]:
    found = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0 and not event.key.startswith("ProfilerStep"):
            found.append(Kernel(event.key, microseconds / 1e3, event.count))
    return found


def as_table(record: Record) -> str:
    """The profile for reading."""
    wall = record["wall_milliseconds"]
    lines = [f"{record['steps']} steps, {wall:.1f} ms of wall clock"]
    lines += [
        f"{100 * value / wall:5.1f} %  {value:9.1f} ms  {kind}" for kind, value in record["shares_milliseconds"].items()
    ]
    lines += ["", "  share         ms    calls  kind              kernel"]
    for kernel in record["kernels"]:
        milliseconds, calls = kernel["milliseconds"], kernel["calls"]
        lines.append(
            f"{100 * milliseconds / wall:5.1f} %  {milliseconds:9.1f}  {calls:7d}  {kernel['kind']:16s}  "
            f"{kernel['name'][:90]}"
        )
    return "\n".join(lines)
