"""`zhibei doctor` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zhibei.cli.app import run_command
from zhibei.doctor import trials
from zhibei.doctor.trials import Outcome, Trial

Captured = pytest.CaptureFixture[str]


def test_a_described_machine_is_told_by_its_make(capsys: Captured) -> None:
    assert run_command(["doctor", "--machine", "v100-32g:4"]) == 0
    said = capsys.readouterr().out
    assert "4 x V100-32G" in said
    assert "has no bf16 units" in said
    assert "sm_70" in said


def test_a_described_machine_as_json(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "box.yaml"
    path.write_text("card: a100-40g\ngpus: 4\nshared_memory: 64 MiB\n")
    assert run_command(["doctor", "--machine", str(path), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in said["findings"]] == ["shm-too-small-exit-7"]
    assert said["machine"]["gpus"][0]["capability"] == [8, 0]
    assert {one["name"]: one["can"] for one in said["abilities"]}["bf16"] is True


def test_an_unknown_machine_is_refused(capsys: Captured) -> None:
    assert run_command(["doctor", "--machine", "v101-32g", "--json"]) == 2
    assert "v100" in json.loads(capsys.readouterr().out)["error"]["fix"]


def outcomes(*, status: trials.Status, needed: bool) -> list[Outcome]:
    fine = Outcome(Trial("arithmetic", "multiply in fp32 on cpu", {"device": "cpu"}), "works", "1 TFLOPS")
    other = Trial("compile", "torch.compile on cpu", {"device": "cpu"}, is_needed=needed, to_do="install gcc")
    return [fine, Outcome(other, status, "no compiler")]


@pytest.mark.parametrize(
    ("status", "needed", "code", "words"),
    [
        ("works", True, 0, "Training works on this machine ("),
        ("broken", False, 0, "some of what else was tried does not"),
        ("broken", True, 2, "Training would stop on this machine"),
        ("absent", True, 0, "Training works on this machine ("),
    ],
)
def test_the_exit_code_says_whether_training_works(
    status: trials.Status,
    needed: bool,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.setattr(trials, "run_trials", lambda *_, **__: outcomes(status=status, needed=needed))
    assert run_command(["doctor"]) == code
    said = capsys.readouterr().out
    assert words in said
    assert ("install gcc" in said) is (status == "broken")


def test_a_crash_in_a_trial_is_a_finding_with_a_page(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    crashed = Trial("arithmetic", "multiply in bf16 on cuda:0", {"device": "cuda:0"})
    words = "crashed inside native code (SIGSEGV): the builds of torch, CUDA and driver do not fit each other"
    monkeypatch.setattr(trials, "run_trials", lambda *_, **__: [Outcome(crashed, "broken", words)])
    assert run_command(["doctor", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert "segv-exit-11-at-init" in [one["id"] for one in said["findings"]]
    assert said["is_broken"] is True
