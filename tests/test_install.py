"""The pinned environment: every dependency of the project is locked exactly, and the two commands lead to it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.shared_data import REPOSITORY


def locked(name: str) -> list[Requirement]:
    lines = (REPOSITORY / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    """`dependencies` of pyproject.toml (tomllib only exists from Python 3.11 on)."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    block = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    return [Requirement(line) for line in re.findall(r'"([^"]+)"', block)]


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_every_line_is_one_exact_version(name: str) -> None:
    for requirement in locked(name):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="]
    pins = [(normal(r.name), str(r.marker or "")) for r in locked(name)]
    assert len(set(pins)) == len(pins)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_each_dependency_is_locked_once_to_a_version_it_allows(python: str) -> None:
    pins = [
        (normal(pin.name), next(iter(pin.specifier)).version)
        for pin in locked("requirements.lock")
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert len(dict(pins)) == len(pins)
    for requirement in declared():
        assert requirement.specifier.contains(dict(pins)[normal(requirement.name)]), requirement


def test_torch_is_the_tested_one() -> None:
    assert "torch==2.13.0" in (REPOSITORY / "requirements.lock").read_text().splitlines()


def test_the_test_tools_come_on_top_of_the_same_versions() -> None:
    run, test = {str(pin) for pin in locked("requirements.lock")}, {str(pin) for pin in locked("requirements-dev.lock")}
    assert run <= test


@pytest.mark.parametrize(
    ("target", "command"), [("demo", "zhibei quickstart"), ("test", "pytest"), ("lint", "pyright")]
)
def test_targets_create_the_environment_and_lead_to_the_command(target: str, command: str) -> None:
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert shown.index("-m venv .venv") < shown.index("requirements.lock") < shown.rindex(command)


def test_ci_runs_make_test() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert script.read_text().rstrip().endswith("make test")
    assert script.stat().st_mode & 0o111


def test_recipes_and_the_report_page_are_package_data() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert '"recipes/*.yaml"' in text
    suffixes = {path.suffix for path in Path(REPOSITORY / "zhibei").rglob("*") if path.is_file()} - {".pyc", ".py"}
    assert all(f"*{suffix}" in text for suffix in suffixes)
