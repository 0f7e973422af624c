"""What the card gives at best: a large bf16 product and a device copy. Knows no model."""

from __future__ import annotations

import torch

from benchmarks.records import Record, median_and_spread


def _seconds(run: object, repeats: int) -> list[float]:
    """Seconds of each repeat by device events, after a warm-up."""
    assert callable(run)
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def ceilings(size: int = 8192, copy_gib: float = 4.0, repeats: int = 30) -> list[Record]:
    """Two records: a bf16 `size`^3 product on random data (TFLOP/s), and a device copy (TB/s, read + written)."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    median, spread = median_and_spread(_seconds(lambda: torch.mm(left, right, out=product), repeats))
    operations = 2 * size**3
    source = torch.randint(0, 255, (int(copy_gib * 2**30),), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_median, copy_spread = median_and_spread(_seconds(lambda: target.copy_(source), repeats))
    moved = 2 * source.numel()
    return [
        {
            "benchmark": "ceiling",
            "who": "torch",
            "version": torch.__version__,
            "method": "bf16 product",
            "settings": {"size": size},
            "model_tflops": round(operations / median / 1e12, 1),
            "seconds": median,
            "spread": {"model_tflops": [round(operations / s / 1e12, 1) for s in spread[::-1]], "seconds": spread},
            "repeats": repeats,
        },
        {
            "benchmark": "ceiling",
            "who": "torch",
            "version": torch.__version__,
            "method": "device copy",
            "settings": {"gib": copy_gib},
            "terabytes_per_s": round(moved / copy_median / 1e12, 3),
            "seconds": copy_median,
            "spread": {
                "terabytes_per_s": [round(moved / s / 1e12, 3) for s in copy_spread[::-1]],
                "seconds": copy_spread,
            },
            "repeats": repeats,
        },
    ]
