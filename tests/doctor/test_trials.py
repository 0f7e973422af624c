"""The trials of the doctor: what is tried where, and that a crash, a hang and a wrong result are outcomes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from zhibei.doctor import trials as module
from zhibei.doctor.abilities import abilities_of
from zhibei.doctor.trials import Outcome, Trial, lacking, nearest_folder, run_trials, slow_cards, trials_for
from zhibei.plan.machines import parse_machine

SPEAKER = """
import json, os, signal, sys, time
for spec in json.load(sys.stdin):
    print(json.dumps({"started": spec["name"]}), flush=True)
    print("noise of a library", file=sys.stderr)
    if spec["name"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if spec["name"] == "hang":
        time.sleep(60)
    end = {"broken": {"fault": "ArithmeticError: wrong"}, "absent": {"absent": "no card"}}
    print(json.dumps({"name": spec["name"], **end.get(spec["name"], {"words": "fine", "figures": {}})}), flush=True)
"""


def trial(name: str, **about: object) -> Trial:
    return Trial("group", name, {"kind": name}, **about)  # type: ignore[arg-type]


def test_a_crash_or_a_hang_does_not_end_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", SPEAKER))
    begun: list[str] = []
    names = ["one", "crash", "two", "hang", "broken", "absent", "three"]
    found = run_trials(
        [trial(name, seconds=1.0 if name == "hang" else 20.0) for name in names],
        on_start=lambda trial: begun.append(trial.name),
    )
    assert begun == names
    assert [one.status for one in found] == ["works", "broken", "works", "broken", "broken", "absent", "works"]
    assert "SIGSEGV" in found[1].words
    assert found[3].words == "did not end within 1 seconds"
    assert [one.blocks for one in found] == [False, True, False, True, True, False, False]


def test_a_trial_that_is_not_needed_blocks_nothing() -> None:
    assert not Outcome(trial("x", is_needed=False), "broken").blocks


def test_a_python_that_does_not_start_is_an_outcome_of_every_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit('no torch')"))
    found = run_trials([trial("one"), trial("two")])
    assert [(one.status, one.words) for one in found] == [("broken", "no torch")] * 2


def test_what_is_quick_here_works_here(tmp_path: Path) -> None:
    machine = replace(parse_machine("cpu"), host_free_gib=0.5)
    wanted, absent = trials_for(machine, tmp_path / "runs" / "deep")
    names = {one.name for one in wanted}
    assert {"multiply in fp32 on cpu", "sdpa math on cpu", "packed rows by documents on cpu"} <= names
    assert {one.trial.name for one in absent} >= {"multiply in tf32 on cpu", "all-reduce by nccl"}
    quick = [one for one in wanted if one.group not in ("compile", "several processes", "4 and 8 bits")]
    found = run_trials([one for one in quick if not one.name.startswith("write")])
    assert [(one.trial.name, one.words) for one in found if one.status == "broken"] == []


def test_each_card_is_tried_in_what_it_can(tmp_path: Path) -> None:
    for name, has in (("v100-32g:2", {"fp32", "fp16"}), ("a100-40g", {"fp32", "tf32", "bf16", "fp16"})):
        wanted, _ = trials_for(parse_machine(name), tmp_path)
        on_card = {
            one.spec["dtype"] for one in wanted if one.spec["kind"] == "multiply" and one.spec["device"] == "cuda:0"
        }
        assert on_card == has
    wanted, _ = trials_for(parse_machine("v100-32g:2"), tmp_path)
    assert "all-reduce by nccl" in {one.name for one in wanted}
    assert "multiply in fp16 on cuda:1" in {one.name for one in wanted}


@pytest.mark.parametrize(
    ("name", "dtype", "can"),
    [("v100-32g", "bf16", False), ("t4", "tf32", False), ("rtx4090", "fp8", True), ("a100-40g", "fp8", False)],
)
def test_what_cards_lack_by_their_make(name: str, dtype: str, can: bool) -> None:
    machine = parse_machine(name)
    assert (lacking(dtype, machine.gpus[0]) == "") is can
    assert {one.name: one.can for one in abilities_of(machine)}[dtype] is can


def test_the_torch_that_a_card_needs_is_named() -> None:
    words = {
        name: {one.name: one.words for one in abilities_of(parse_machine(name))} for name in ("v100-32g", "rtx5090")
    }
    assert "sm_70" in words["v100-32g"]["torch"]
    assert "12.8" in words["rtx5090"]["torch"]


def rate(device: str, tflops: float, card: str = "A100") -> Outcome:
    spec = {"kind": "multiply", "dtype": "bf16", "device": device, "card": card}
    return Outcome(Trial("arithmetic", device, spec), "works", figures={"tflops": tflops})


def test_a_card_slower_than_its_kind_is_named() -> None:
    assert slow_cards([rate("cuda:0", 200), rate("cuda:1", 198), rate("cuda:2", 100), rate("cuda:3", 201)]) == [
        "cuda:2 reaches 50% of the usual speed of its kind in bf16"
    ]
    assert slow_cards([rate("cuda:0", 200), rate("cuda:1", 60, card="T4"), rate("cpu", 0.1)]) == []


def test_the_folder_that_is_tried_exists(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path


@pytest.mark.slow
def test_processes_add_up_and_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    wanted, _ = trials_for(parse_machine("cpu"), tmp_path)
    chosen = [one for one in wanted if one.group == "several processes" or one.name.startswith("write")]
    assert [one.status for one in run_trials(chosen)] == ["works", "works"]
    assert list(tmp_path.iterdir()) == []
