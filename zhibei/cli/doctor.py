"""`zhibei doctor`: what a machine can do, by trying it, and what is broken. Knows how outcomes look, not how to try."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import DONE, USER_MUST_ACT

if TYPE_CHECKING:
    from zhibei.doctor.abilities import Ability
    from zhibei.doctor.checkup import Found
    from zhibei.doctor.facts.environment import EnvironmentFacts
    from zhibei.doctor.trials import Outcome, Trial
    from zhibei.plan.machines import Machine

AREAS = ("environment", "hardware", "precision", "distributed")
MARKS = {"works": Text("works", style="green"), "broken": Text("BROKEN", style="bold red")}
SHOWN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn", "wandb")


def doctor(*, machine: str = "", runs: Path = Path("runs"), json: bool = False) -> int:
    """Try what this machine can do, and say what is broken and how to mend it.

    Multiplies in every precision on every device and compares with fp64, runs the attention kernels, compiles, packs
    values into 4 and 8 bits, lets two processes add numbers up, fills memory and writes to the disk. Each trial runs
    apart, so that a crash is a line of the report. With --machine it says what another machine could do.

    Leaves with exit code 2 when something is broken that would stop training here.

    Examples:

      zhibei doctor

      zhibei doctor --machine v100-32g:4

      zhibei doctor --json

    Parameters
    ----------
    machine
        Another machine: v100-32g:4, a100-40g:4, rtx4090, t4, h100-80g:8x2, cpu, or a YAML file.
    runs
        The folder of the runs, whose disk is tried.
    json
        One JSON document.
    """
    return describe(machine, as_json=json) if machine else examine(runs, as_json=json)


def examine(runs: Path, *, as_json: bool) -> int:
    """Look at this machine and try it."""
    from zhibei.doctor.facts.environment import read_environment
    from zhibei.doctor.facts.machine import read_machine
    from zhibei.doctor.trials import run_trials, slow_cards, trials_for

    started = time.monotonic()
    machine = read_machine()
    environment = read_environment(machine=machine)
    trials, absent = trials_for(machine, runs)
    with Trying(quiet=as_json) as trying:
        outcomes = run_trials(trials, on_start=trying.show) + absent
    tried = {one.trial.name: "" if one.status == "works" else one.words for one in outcomes if one.status != "absent"}
    environment = replace(environment, trials={**environment.trials, **tried})
    findings, slow = found_in(machine, environment), slow_cards(outcomes)
    is_broken = any(one.blocks for one in outcomes) or any(one.blocks for one in findings)
    if as_json:
        document = {
            "machine": machine_dict(machine),
            "environment": environment_dict(environment),
            "trials": [one.as_dict() for one in outcomes],
            "slow": slow,
            "findings": [one.as_dict() for one in findings],
            "is_broken": is_broken,
            "seconds": round(time.monotonic() - started, 2),
        }
        console.emit(document, as_json=True)
    else:
        show_machine(machine, environment)
        show_outcomes(outcomes)
        show_findings(findings)
        for line in slow:
            console.stdout.print(Text(f"SLOW     {line}: is another program using it, or is it hot? (nvidia-smi)"))
        console.stdout.print(verdict(outcomes, findings, seconds=time.monotonic() - started))
    return USER_MUST_ACT if is_broken else DONE


def describe(name: str, *, as_json: bool) -> int:
    """What a described machine can do by its make; nothing is tried."""
    from zhibei.doctor.abilities import abilities_of
    from zhibei.doctor.facts.environment import read_environment
    from zhibei.doctor.facts.machine import machine_for

    machine = machine_for(name)
    abilities = abilities_of(machine)
    findings = found_in(machine, read_environment(machine=machine))
    if as_json:
        document = {
            "machine": machine_dict(machine),
            "abilities": [one.as_dict() for one in abilities],
            "findings": [one.as_dict() for one in findings],
            "is_broken": any(one.blocks for one in findings),
        }
        console.emit(document, as_json=True)
    else:
        show_machine(machine, None)
        show_abilities(abilities)
        show_findings(findings)
        console.stdout.print(Text("By its make; nothing was tried. What a run needs: zhibei plan RUN --machine", "dim"))
    return USER_MUST_ACT if any(one.blocks for one in findings) else DONE


class Trying:
    """Says on stderr what is being tried: one changing line on a terminal, a line each elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.is_quiet = quiet
        self.status = console.stderr.status("") if not quiet and console.stderr.is_terminal else None

    def __enter__(self) -> Trying:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def show(self, trial: Trial) -> None:
        """One trial begins."""
        if self.status is not None:
            self.status.update(f"trying: {trial.name}")
        elif not self.is_quiet:
            console.stderr.print(f"trying: {trial.name}", style="dim")


def found_in(machine: Machine, environment: EnvironmentFacts) -> list[Found]:
    """What the catalogue says of a machine and its software without any run."""
    from zhibei.doctor.checkup import check
    from zhibei.doctor.facts.facts import Facts

    facts = Facts(machine=machine, environment=environment)
    return [found for area in AREAS for found in check(facts, area=area).findings]


def show_machine(machine: Machine, environment: EnvironmentFacts | None) -> None:
    """Cards, memory and software in a few lines."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, words in machine_lines(machine):
        table.add_row(label, words)
    if environment is not None:
        for label, words in software_lines(environment):
            table.add_row(label, words)
    console.stdout.print(Text(machine.name, style="bold"))
    console.stdout.print(table)


def machine_lines(machine: Machine) -> Iterable[tuple[str, str]]:
    """(label, words) of the hardware."""
    for gpu in dict.fromkeys(replace(gpu, free_gib=None) for gpu in machine.gpus):
        count = sum(replace(one, free_gib=None) == gpu for one in machine.gpus)
        rates = f", {gpu.half_tflops:g} TFLOPS in halves, {gpu.bandwidth_gb_per_s:g} GB/s" if gpu.half_tflops else ""
        capability = ".".join(str(part) for part in gpu.capability)
        yield "cards", f"{count} x {gpu.name}, {gpu.memory_gib:.1f} GiB, compute capability {capability}{rates}"
    if not machine.gpus:
        yield "cards", "none"
    if len(machine.gpus) > 1:
        yield "links", {"nvlink": "NVLink", "pcie": "PCIe", "none": "unknown"}[machine.gpu_link]
    if machine.num_nodes > 1:
        yield "nodes", f"{machine.num_nodes}, {machine.node_link_gb_per_s:g} GB/s between them"
    shared = "" if machine.shared_memory_gib is None else f", {machine.shared_memory_gib:.2f} GiB shared memory"
    assumed = " (assumed; a YAML file can say it)" if machine.is_described else ""
    host = f"{machine.cpu_cores} cores, {machine.host_gib:.1f} GiB ({machine.host_free_gib:.1f} free){shared}"
    yield "host", host + assumed


def software_lines(environment: EnvironmentFacts) -> Iterable[tuple[str, str]]:
    """(label, words) of the software."""
    there = [f"{name} {environment.packages[name]}" for name in SHOWN_PACKAGES if name in environment.packages]
    yield "python", f"{environment.python}: {', '.join(there)}"
    cuda = f"CUDA {environment.torch_cuda}" if environment.torch_cuda else None
    build = cuda or (f"ROCm {environment.torch_hip}" if environment.torch_hip else "for processors")
    architectures = f": {' '.join(environment.torch_architectures)}" if environment.torch_architectures else ""
    yield "torch build", build + architectures
    if environment.driver:
        yield "driver", f"{environment.driver} (CUDA up to {environment.driver_cuda or 'unknown'})"
    yield "compilers", f"gcc {environment.gcc or 'none'}, nvcc {environment.nvcc or 'none'}"
    where = [word for word, is_so in (("WSL", environment.is_wsl), ("container", environment.is_container)) if is_so]
    if where:
        yield "inside", ", ".join(where)


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """What was tried, group by group: what works in green, what does not with its remedy, what is not here with why."""
    for group in dict.fromkeys(one.trial.group for one in outcomes):
        console.stdout.print(Text(f"\n{group}", style="bold"))
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        for one in (one for one in outcomes if one.trial.group == group):
            mark = MARKS.get(one.status, Text("not here", style="dim"))
            style = {"works": "", "broken": "red"}.get(one.status, "dim")
            table.add_row(mark, Text(one.trial.name, style=style), Text(one.words, style=style))
            if one.status == "broken":
                table.add_row("", Text("to do:", style="dim"), Text(one.trial.to_do, style="green"))
        console.stdout.print(table)


def show_abilities(abilities: Sequence[Ability]) -> None:
    """One table for each kind of card."""
    for device in dict.fromkeys(one.device for one in abilities):
        console.stdout.print(Text(f"\n{device}", style="bold"))
        table = Table(box=None, pad_edge=False, show_header=False)
        for one in (one for one in abilities if one.device == device):
            mark = Text("yes", style="green") if one.can else Text("no", style="yellow")
            table.add_row(mark, one.name, Text(one.words, style="dim"))
        console.stdout.print(table)


def show_findings(findings: Sequence[Found]) -> None:
    """As `zhibei check` shows them."""
    from zhibei.cli.check import lines_of
    from zhibei.doctor.checkup import Checkup

    console.stdout.print()
    for line in lines_of(Checkup(tuple(findings))):
        console.stdout.print(line)


def verdict(outcomes: Sequence[Outcome], findings: Sequence[Found], *, seconds: float) -> Text:
    """The last line: whether training works here."""
    count = {status: sum(one.status == status for one in outcomes) for status in ("works", "broken", "absent")}
    numbers = f"{count['works']} work, {count['broken']} broken, {count['absent']} not here; {seconds:.0f} s"
    if any(one.blocks for one in outcomes) or any(one.blocks for one in findings):
        text = Text("Training would stop on this machine: mend what is broken above", style="bold red")
    elif count["broken"] or findings:
        text = Text("Training works on this machine; some of what else was tried does not", style="bold yellow")
    else:
        text = Text("Training works on this machine", style="bold green")
    return text.append(f" ({numbers}).", style="not bold dim")


def machine_dict(machine: Machine) -> dict[str, Any]:
    """Plain JSON values of a machine."""
    return {
        "name": machine.name,
        "gpus": [
            {
                "name": gpu.name,
                "memory_gib": gpu.memory_gib,
                "free_gib": gpu.free_gib,
                "capability": list(gpu.capability),
                "vendor": gpu.vendor,
                "bandwidth_gb_per_s": gpu.bandwidth_gb_per_s,
                "half_tflops": gpu.half_tflops,
            }
            for gpu in machine.gpus
        ],
        "nodes": machine.num_nodes,
        "cpu_cores": machine.cpu_cores,
        "host_gib": machine.host_gib,
        "host_free_gib": machine.host_free_gib,
        "shared_memory_gib": machine.shared_memory_gib,
        "disk_free_gib": machine.disk_free_gib,
        "gpu_link": machine.gpu_link,
        "node_link_gb_per_s": machine.node_link_gb_per_s,
        "is_described": machine.is_described,
    }


def environment_dict(environment: EnvironmentFacts) -> dict[str, Any]:
    """Plain JSON values of the software."""
    return {
        "python": environment.python,
        "packages": dict(environment.packages),
        "torch_cuda": environment.torch_cuda,
        "torch_hip": environment.torch_hip,
        "torch_architectures": list(environment.torch_architectures),
        "driver": environment.driver,
        "driver_cuda": environment.driver_cuda,
        "nvcc": environment.nvcc,
        "gcc": environment.gcc,
        "variables": dict(environment.variables),
        "is_wsl": environment.is_wsl,
        "is_container": environment.is_container,
        "interfaces": list(environment.interfaces),
        "gpu_faults": list(environment.gpu_faults),
    }
