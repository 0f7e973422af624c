"""`zhibei doctor` on a machine with cards: every trial that the card can do works, and what is read is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zhibei.cli.app import run_command
from zhibei.doctor.checkup import check
from zhibei.doctor.facts.environment import read_environment
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.machine import gpus_of_probe, read_machine
from zhibei.doctor.facts.torch_build import read_torch_build
from zhibei.doctor.pitfalls.environment import runs_on

pytestmark = pytest.mark.gpu


def test_cards_are_read_as_torch_sees_them() -> None:
    machine = read_machine()
    assert len(machine.gpus) == torch.cuda.device_count()
    for number, gpu in enumerate(machine.gpus):
        seen = torch.cuda.get_device_properties(number)
        assert gpu.capability == (seen.major, seen.minor)
        assert gpu.memory_gib == pytest.approx(seen.total_memory / 2**30, rel=0.01)
        assert gpu.half_tflops > 0, f"{gpu.name} is not in zhibei/plan/cards.py"


def test_the_probe_of_torch_says_the_same_as_the_driver() -> None:
    probed = gpus_of_probe(read_torch_build())
    assert [gpu.capability for gpu in probed] == [gpu.capability for gpu in read_machine().gpus]


def test_the_environment_is_sound_and_trips_no_check() -> None:
    machine, environment = read_machine(), read_environment()
    assert environment.torch_cuda
    assert environment.driver
    assert runs_on(environment.torch_architectures, machine.gpus[0].capability)
    assert set(torch.cuda.get_arch_list()) == set(environment.torch_architectures)
    facts = Facts(machine=machine, environment=environment)
    found = [one for area in ("environment", "hardware", "distributed") for one in check(facts, area=area).findings]
    assert [(one.id, one.finding.what) for one in found] == []


def test_the_doctor_finds_this_machine_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run_command(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    broken = [(one["name"], one["words"]) for one in said["trials"] if one["status"] == "broken"]
    # 4 and 8 bits and single sdpa backends may be missing without harm; what is needed must work.
    assert [one["name"] for one in said["trials"] if one["status"] == "broken" and one["needed"]] == [], broken
    assert code == 0
    works = {one["name"] for one in said["trials"] if one["status"] == "works"}
    assert {"multiply in fp32 on cuda:0", "multiply in fp16 on cuda:0", "packed rows by documents on cuda:0"} <= works
    if torch.cuda.get_device_capability(0) >= (8, 0):
        assert {"multiply in bf16 on cuda:0", "multiply in tf32 on cuda:0", "packed rows by varlen on cuda:0"} <= works
    if torch.cuda.get_device_capability(0) >= (8, 9):
        assert "multiply in fp8 on cuda:0" in works
    if torch.cuda.device_count() > 1:
        assert "all-reduce by nccl" in works
