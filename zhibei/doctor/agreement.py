"""Whether all ranks are about to train the same thing: what each says of itself, compared before anything is added up.

Knows figures of processes and how they may differ; no operation among ranks but the exchange of texts.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei.config.errors import SeveralErrors, UserError, from_told
from zhibei.config.resolve import ResolvedRun

if TYPE_CHECKING:
    from zhibei.model.meeting import Meeting

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "numpy")
MOST_SKEW_SECONDS = 10.0
"""torchrun's rendezvous takes a node for dead when its last sign, by its own clock, is 15 seconds old."""
MOST_NAMED = 4


def agree(here: Meeting, resolved: ResolvedRun | None, fault: UserError | None, *, seconds: float) -> list[str]:
    """Every rank says what it is about to train, rank 0 compares, all raise the same UserError where they differ.

    Returns the launches that the ranks belong to, one for each node. `fault`: why the run file could not be read on
    this rank. `seconds`: how long rank 0 waits for the others.
    """
    from zhibei.model.meeting import all_told, first_does

    told = all_told(here, "facts", own_facts(resolved, fault), seconds=seconds)

    def compared() -> list[str]:
        problem = disagreement(told, seconds=seconds)
        if problem is not None:
            raise problem
        return sorted({one[0]["launch"] for one in told if one is not None} - {""})

    return first_does(here, "all ranks came and agree", compared)


def launch_id() -> str:
    """What is the same for all ranks of a node however often they are started again: set by `zhibei launch`, else who
    started this process. A run directory that such a launch made is its own to go on in."""
    given = os.environ.get("ZHIBEI_LAUNCH_ID", "")
    if given or "TORCHELASTIC_RUN_ID" not in os.environ:
        return given
    parent = os.getppid()
    try:
        started = (
            Path(f"/proc/{parent}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return ""
    return f"{socket.gethostname()}-{parent}-{started}"


def own_facts(resolved: ResolvedRun | None, fault: UserError | None) -> dict[str, Any]:
    """What this rank says of itself. Rows and weights are looked at once on each node."""
    from zhibei.model.ranks import ranks_asked

    asked = ranks_asked()
    facts: dict[str, Any] = {
        "rank": asked.rank,
        "host": socket.gethostname(),
        "local_rank": asked.local,
        "launch": launch_id(),
        "versions": versions(),
        "fault": None if fault is None else fault.as_dict(),
        "run": {},
        "data": None,
        "model": None,
        "device": "",
    }
    if resolved is None:
        return facts
    try:
        facts["run"] = _flat(resolved.run.model_dump(mode="json"))
        facts["device"] = _device(resolved.run.device)
        if asked.local == 0:
            facts["data"], facts["model"] = _data(resolved), _weights(resolved)
    except UserError as error:
        facts["fault"] = error.as_dict()
    return facts


def versions() -> dict[str, str]:
    """Python and the packages that decide what is computed and what is written."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, "zhibei"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def disagreement(told: Sequence[tuple[Mapping[str, Any], float] | None], *, seconds: float) -> UserError | None:
    """The first thing in which ranks differ, the plainest first; None where all is well.

    `told`: by rank, what it said and how many seconds its clock is ahead of rank 0's; None for one that did not come.
    """
    absent = [rank for rank, one in enumerate(told) if one is None]
    if absent:
        return _absent(absent, [one[0] for one in told if one is not None], seconds=seconds)
    facts = [one[0] for one in told if one is not None]
    for look in (_faults, _different_versions, _different_runs, _different_files, _devices):
        found = look(facts)
        if found is not None:
            return found
    return _clocks([one for one in told if one is not None])


def _name(facts: Mapping[str, Any]) -> str:
    return f"rank {facts['rank']} on {facts['host']}"


def _absent(absent: list[int], here: list[Mapping[str, Any]], *, seconds: float) -> UserError:
    hosts: dict[str, list[int]] = {}
    for facts in here:
        hosts.setdefault(facts["host"], []).append(facts["rank"])
    present = "; ".join(f"{host}: {', '.join(map(str, ranks))}" for host, ranks in hosts.items())
    ranks = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
    return UserError(
        f"{ranks} did not come within {seconds:.0f} s; these are here: {present}",
        expected=f"{len(absent) + len(here)} ranks",
        fix="look at the output of that rank or node; it may have failed while it started",
        where="launch",
    )


def _faults(facts: list[Mapping[str, Any]]) -> UserError | None:
    faulty = [one for one in facts if one["fault"]]
    if not faulty:
        return None
    fault = faulty[0]["fault"]
    # Files are looked at by the first rank of each node.
    looked = (
        [one for one in facts if one["local_rank"] == 0] if all(one["local_rank"] == 0 for one in faulty) else facts
    )
    is_everywhere = len(faulty) == len(looked) and all(one["fault"]["what"] == fault["what"] for one in faulty)
    prefix = "" if is_everywhere else f"{_name(faulty[0])}: "
    if fault.get("errors"):
        return SeveralErrors(list(map(from_told, fault["errors"])), what=f"{prefix}{fault['what']}")
    found = from_told(fault)
    found.what = f"{prefix}{found.what}"
    return found


def _different_versions(facts: list[Mapping[str, Any]]) -> UserError | None:
    first = facts[0]
    for other in facts[1:]:
        for package, version in first["versions"].items():
            if other["versions"].get(package) != version:
                theirs = other["versions"].get(package)
                return UserError(
                    f"{package} is {theirs} for {_name(other)}, and {version} for {_name(first)}",
                    expected="the same versions on every node",
                    fix=f"install the same one there: pip install '{package}=={version}'",
                    where="environment",
                )
    return None


def _different_runs(facts: list[Mapping[str, Any]]) -> UserError | None:
    first = facts[0]
    for other in facts[1:]:
        names = sorted(set(first["run"]) | set(other["run"]))
        fields = [name for name in names if first["run"].get(name) != other["run"].get(name)]
        if fields:
            shown = "; ".join(
                f"{field} is {other['run'].get(field)!r} for {_name(other)}, "
                f"{first['run'].get(field)!r} for {_name(first)}"
                for field in fields[:MOST_NAMED]
            )
            return UserError(
                f"the ranks were given different runs: {shown}",
                expected="the same run file and the same settings on every node",
                fix="copy the run file to every node, or keep it in a folder that all of them see",
                where="run file",
            )
    return None


def _different_files(facts: list[Mapping[str, Any]]) -> UserError | None:
    first, *others = [one for one in facts if one["data"] is not None]
    for other in others:
        for mine, theirs in zip(first["data"], other["data"], strict=False):
            if mine[1:] != theirs[1:]:
                return UserError(
                    f"{theirs[0]} has {theirs[1]:,} bytes (sha256 {theirs[2][:12]}) for {_name(other)}, and "
                    f"{mine[0]} has {mine[1]:,} (sha256 {mine[2][:12]}) for {_name(first)}",
                    expected="the same rows on every node",
                    fix="copy the file to every node again",
                    where="data.sources",
                )
        if len(first["data"]) != len(other["data"]):
            return UserError(
                f"{_name(other)} finds {len(other['data'])} data files, {_name(first)} finds {len(first['data'])}",
                expected="the same rows on every node",
                fix="copy the data to every node again",
                where="data.sources",
            )
        if first["model"] != other["model"]:
            return UserError(
                f"the weights have the fingerprint {str(other['model'])[:12]} for {_name(other)}, and "
                f"{str(first['model'])[:12]} for {_name(first)}",
                expected="the same model folder on every node",
                fix="copy the model to every node again (zhibei verify FOLDER names a damaged file)",
                where="model.path",
            )
    return None


def _devices(facts: list[Mapping[str, Any]]) -> UserError | None:
    seen: dict[tuple[str, str], Mapping[str, Any]] = {}
    for one in facts:
        kind, _, card = one["device"].partition(" ")
        if kind != facts[0]["device"].partition(" ")[0]:
            return UserError(
                f"{_name(one)} would compute on {kind}, {_name(facts[0])} on {facts[0]['device'].partition(' ')[0]}",
                expected="ranks of one kind",
                fix="look with zhibei doctor why no GPU is seen there, or set device: cpu",
                where="device",
            )
        twin = seen.setdefault((one["host"], card), one) if card else one
        if twin is not one:
            return UserError(
                f"{_name(one)} and {_name(twin)} have the same card ({card})",
                expected="a card for each rank",
                fix="start one rank for each card (--gpus-per-node), and look at CUDA_VISIBLE_DEVICES",
                where="device",
            )
    return None


def _clocks(told: list[tuple[Mapping[str, Any], float]]) -> UserError | None:
    facts, ahead = max(told, key=lambda one: abs(one[1]))
    if abs(ahead) <= MOST_SKEW_SECONDS:
        return None
    return UserError(
        f"the clock of {_name(facts)} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's",
        expected=f"clocks that agree within {MOST_SKEW_SECONDS:.0f} s: nodes are taken for dead by their clocks",
        fix="set the clock there: chronyc makestep, or timedatectl set-ntp true",
        where="clock",
    )


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{path}.{name}" if path else name)
    return found


def _device(name: str) -> str:
    """`cpu`, or `cuda` with the card's own identifier."""
    from zhibei.model.device import choose_device

    device = choose_device(name)
    if device.type != "cuda":
        return device.type
    import torch

    return f"cuda {torch.cuda.get_device_properties(device).uuid}"


def _data(resolved: ResolvedRun) -> list[list[Any]]:
    from zhibei.data.prepare import source_files

    return [[one["path"], one["bytes"], one["sha256"]] for one in source_files(resolved.run.data)]


def _weights(resolved: ResolvedRun) -> str | None:
    from zhibei.model.locate import locate
    from zhibei.store.manifest import model_fingerprint

    folder = Path(locate(resolved.run.model.path).weights)
    return model_fingerprint(folder) if folder.is_dir() else None
