"""How a plan looks in a terminal. Knows plans, not run files or machines."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from zhibei.plan.machines import Machine
from zhibei.plan.memory import CONTEXT_GIB, RESERVE_SHARE, MemoryPlan
from zhibei.plan.search import MARGIN, Search
from zhibei.plan.stages import WRITING

BAR = 32
COLOURS = {
    "weights": "blue", "adapters": "cyan", "master weights": "bright_blue", "optimiser states": "magenta",
    "gradients": "yellow", "activations": "green", "loss": "red", "working buffers": "bright_black",
    "KV cache": "cyan", "checks": "bright_black", "model read back": "blue", "gathered layers": "bright_cyan",
}  # fmt: skip
GIB = 2**30
SMALLEST_SHOWN_GIB = 0.005


def lines(found: Search, machine: Machine, *, alternatives: list[str], price: float | None) -> Iterator[Text]:
    """What a person reads."""
    plan = found.chosen.memory
    yield _verdict(found, machine)
    yield Text(f"  {found.chosen.words}", style="bold")
    yield Text("")
    yield from _phases(plan)
    yield Text("")
    yield from _around(found, price)
    if found.chosen.job.num_gpus > 1:
        speed = found.chosen.speed
        if speed is not None:
            moved = speed.traffic.total / 2**30
            text = f"each GPU receives {moved:,.1f} GiB a step; {100 * speed.efficiency:.0f} % of GPUs that never wait"
            yield Text(f"  links       {text}")
        note = "start it with zhibei launch; figures are of one GPU (docs/scale.md says what is assumed)"
        yield Text(f"  note        {note}", style="yellow")
    if found.others:
        yield Text("\nother ways:" if found.chosen.fits else "\nthe smallest other ways:", style="bold")
        for other in found.others:
            tokens = found.total_tokens
            hours = f", {_hours(other.speed.hours(tokens))}" if other.speed and tokens else ""
            fits = "" if other.fits else " (does not fit)"
            yield Text(f"  {other.memory.device_gib:7.1f} GiB{hours}  {other.words}{fits}")
    if alternatives:
        yield Text("\nwhat would fit:", style="bold")
        for line in alternatives:
            yield Text(f"  {line}", style="green")
    yield Text("")
    yield from _explained(plan, machine)


def _verdict(found: Search, machine: Machine) -> Text:
    plan = found.chosen.memory
    if plan.capacity_gib is None:
        text = f"{machine.name}: no GPU; {plan.host_gib:.1f} of {plan.host_capacity_gib or 0:.1f} GiB of host memory"
        return Text(text, style="bold green" if found.chosen.fits else "bold red")
    if found.chosen.fits:
        left = plan.capacity_gib - plan.device_gib
        return Text(
            f"fits on {machine.name}: {plan.device_gib:.1f} of {plan.capacity_gib:.1f} GiB per GPU, {left:.1f} GiB to "
            "spare",
            style="bold green",
        )
    missing = plan.device_gib - plan.capacity_gib * (1 - MARGIN)
    if missing > 0:
        what = f"{plan.device_gib:.1f} GiB per GPU at least, {plan.capacity_gib:.1f} there: {missing:.1f} GiB too much"
    else:
        what = f"{plan.host_gib:.1f} GiB of host memory, {plan.host_capacity_gib or 0:.1f} there"
    return Text(f"does not fit on {machine.name}: {what} (with {MARGIN:.0%} left free)", style="bold red")


def _phases(plan: MemoryPlan) -> Iterator[Text]:
    most = max(phase.gib for phase in plan.phases)
    scale = max(most, plan.capacity_gib or 0.0) or 1.0
    for phase in plan.phases:
        line = Text(f"  {phase.name:11s}{_size(phase.gib)} ")
        for name, size in sorted(phase.causes.items(), key=lambda item: -item[1]):
            line.append("█" * round(BAR * size / GIB / scale), style=COLOURS.get(name, "white"))
        yield line
        shown = [
            f"{name} {size / GIB:.2f}" for name, size in sorted(phase.causes.items(), key=lambda item: -item[1])
            if size / GIB >= SMALLEST_SHOWN_GIB
        ]  # fmt: skip
        yield Text(f"             {', '.join([*shown, f'at: {phase.moment}'])}", style="dim")
    if plan.capacity_gib is not None:
        yield Text(
            f"  on the card {plan.device_gib:7.2f} GiB: the peak, {RESERVE_SHARE:.0%} that torch's allocator keeps, "
            f"and {CONTEXT_GIB} GiB of CUDA",
            style="dim",
        )


def _around(found: Search, price: float | None) -> Iterator[Text]:
    plan, speed = found.chosen.memory, found.chosen.speed
    host = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.host.items())
    known = f" of {plan.host_capacity_gib:.0f}" if plan.host_capacity_gib else ""
    yield Text(f"  host memory {plan.host_gib:.1f}{known} GiB ({host})")
    if plan.disk is not None:
        files = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.disk.files.items() if size > GIB / 200)
        yield Text(f"  disk        {plan.disk.peak_gib:.1f} GiB at most ({files})")
    if speed is None:
        yield Text("  time        not known: the card's rate is not in the table, or there is no GPU", style="dim")
        return
    if found.chosen.job.stage in WRITING:
        steps = "" if found.total_steps is None else f" for {found.total_steps:,} iterations"
        text = f"not estimated{steps}: most of it goes to writing answers, whose lengths no one knows beforehand"
        yield Text(f"  time        {text}", style="dim")
        return
    if found.hours is None:
        text = f"{speed.tokens_per_s:,.0f} tokens/s; how many tokens is not known before rows are prepared"
        yield Text(f"  time        {text}", style="dim")
        return
    money = (
        "" if price is None else f", {price * found.hours * found.chosen.job.num_gpus:,.2f} at {price:g} per GPU hour"
    )
    how = "measured" if speed.is_measured else "by a model of throughput, not measured"
    yield Text(
        f"  time        {_hours(found.hours)} for {found.total_steps:,} steps, {speed.tokens_per_s:,.0f} tokens/s "
        f"({how}){money}"
    )


def _size(gib: float) -> str:
    return f"{gib:8.2f} GiB" if gib >= 0.1 else f"{gib * 1024:8.1f} MiB"


def _hours(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _explained(plan: MemoryPlan, machine: Machine) -> Iterator[Text]:
    """The rule of thumb that the numbers follow."""
    shape, job = plan.shape, plan.job
    if shape is None:
        return
    billions = shape.num_parameters / 1e9
    if billions < 0.01:
        return
    rule = {"fp32": 4, "bf16": 2, "fp16": 2}[job.precision]
    yield Text(
        f"  {billions:.2f} billion parameters: {rule} GB per billion in {job.precision} make {billions * rule:.1f} GB "
        "of weights (4 in fp32, 2 in 16 bit, 1 in 8 bit);",
        style="dim",
    )
    if job.trains_adapters:
        yield Text("  only the adapters have gradients and optimiser states.", style="dim")
    else:
        yield Text(
            f"  AdamW adds 8 bytes per parameter ({billions * 8:.1f} GB), gradients 2 or 4, masters 2 (split) or 4.",
            style="dim",
        )
