"""Writes requirements.lock and requirements-dev.lock: exact versions for every supported Python, merged with markers.

    python scripts/lock.py [python3.10 python3.11 ...]

For each interpreter pip resolves pyproject.toml without installing anything. Where two Pythons need different versions
of a package (some no longer support 3.10), the line carries a marker.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
INTERPRETERS = ("python3.10", "python3.11", "python3.13")
TORCH = "torch==2.13.0"
GROUPS = {"requirements.lock": ".[gguf,serve]", "requirements-dev.lock": ".[test]"}
HEADER = "# Made by scripts/lock.py from pyproject.toml; do not edit.\n"
# Follow from torch's own exact pins, and differ between its CPU and CUDA builds.
LEFT_TO_TORCH = re.compile(r"^(nvidia-|triton|cuda-)")


def resolved(interpreter: str) -> tuple[str, dict[str, dict[str, str]]]:
    """("3.11", {lock file: {package: exact version}}): what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        # The pip of an old Python does not write reports.
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        tag = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = subprocess.run([python, "-c", tag], check=True, capture_output=True, text=True).stdout.strip()
        answers = {file: _packages(python, extras, Path(folder) / "report.json") for file, extras in GROUPS.items()}
    return version, answers


def _packages(python: str, extras: str, report: Path) -> dict[str, str]:
    """Names and public versions (a local build such as +cpu counts as its public version)."""
    resolve = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
    subprocess.run([*resolve, TORCH, "setuptools>=77", extras], check=True, cwd=REPOSITORY)
    found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    names = {entry["name"].lower().replace("_", "-"): entry["version"].split("+")[0] for entry in found}
    return {name: version for name, version in names.items() if name != "zhibei" and not LEFT_TO_TORCH.match(name)}


def merged(answers: dict[str, dict[str, str]]) -> list[str]:
    """One line per package and version; a marker where it is not the same on every Python.

    The answer of the newest Python resolved also holds for the ones after it.
    """
    pythons = sorted(answers, key=lambda version: [int(part) for part in version.split(".")])
    lines: list[str] = []
    for name in sorted({name for packages in answers.values() for name in packages}):
        versions = {python: answers[python].get(name) for python in pythons}
        for version in dict.fromkeys(versions.values()):
            if version is None:
                continue
            holds = [python for python in pythons if versions[python] == version]
            lines.append(f"{name}=={version}{_marker(holds, pythons)}")
    return lines


def _marker(holds: list[str], pythons: list[str]) -> str:
    if holds == pythons:
        return ""
    first, last = pythons.index(holds[0]), pythons.index(holds[-1])
    bounds: list[str] = []
    if first > 0:
        bounds.append(f'python_version >= "{holds[0]}"')
    if last < len(pythons) - 1:
        bounds.append(f'python_version < "{pythons[last + 1]}"')
    return f" ; {' and '.join(bounds)}"


def main(interpreters: Iterable[str]) -> None:
    """Resolve for every interpreter, merge, and write both files."""
    answers = dict(resolved(interpreter) for interpreter in interpreters)
    for file in GROUPS:
        lines = merged({version: listed[file] for version, listed in answers.items()})
        (REPOSITORY / file).write_text(HEADER + "\n".join(lines) + "\n")
        print(f"{file}: {len(lines)} lines for Python {', '.join(answers)}")


if __name__ == "__main__":
    main(sys.argv[1:] or INTERPRETERS)
