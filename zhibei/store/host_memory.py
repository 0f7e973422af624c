"""How much memory this host has, and how much a new process can have of it. Knows no cards and no plans."""

from __future__ import annotations

import os
import re
from pathlib import Path

GIB = 2**30
# cgroup v1 says "no limit" with a number near 2^63.
NO_LIMIT_BYTES = 2**60


def read_memory(root: Path = Path("/")) -> tuple[float, float]:
    """(all, free for a new process) of the host in GiB, within the container's limit."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc" / "meminfo"), re.MULTILINE))
    if not info:
        return _memory_without_proc()
    total, free = int(info["MemTotal"]) * 1024, int(info.get("MemAvailable", info["MemFree"])) * 1024
    for limit, used in cgroup_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return round(total / GIB, 2), round(free / GIB, 2)


def _memory_without_proc() -> tuple[float, float]:
    """macOS says how much there is; that half of it is free is a guess on the careful side."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError):
        return 0.0, 0.0
    return round(total, 2), round(total / 2, 2)


def cgroup_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of every memory group around this process, v1 and v2."""
    found: list[tuple[int, int]] = []
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            base, names = root / "sys" / "fs" / "cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys" / "fs" / "cgroup" / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path is the host's and the group itself is mounted at the base.
        inner = base / path.strip("/")
        for folder in (inner, *inner.parents):
            if folder != base and base not in folder.parents:
                break
            limit = _read(folder / names[0]).strip()
            if limit.isdigit() and int(limit) < NO_LIMIT_BYTES:
                used = int(_read(folder / names[1]).strip() or 0)
                droppable = re.search(rf"^{names[2]} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                found.append((int(limit), max(0, used - (int(droppable[1]) if droppable else 0))))
    return found


def _read(path: Path) -> str:
    """A small text file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
