"""Watchdogs and rehearsals as only a CUDA device can show them: memory figures, a second process on the same card."""

import json

import pytest
import torch

from tests.train.small_run import small_run
from zhibei.cli.app import run_command
from zhibei.doctor.rehearsal import STEPS, rehearse
from zhibei.doctor.watchdogs import watch_over
from zhibei.store.metrics import read_metrics
from zhibei.train.offline import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RUNS = {
    "bf16, packed": ["model.precision=bf16"],
    "fp16": ["model.precision=fp16"],
    "fp32": ["model.precision=fp32", "model.compile=false"],
    "lora": ["model.method=lora", "lora.dropout=0.1"],
    "padded": ["data.packing=false", "model.compile=false"],
    "recomputed": ["model.activation_checkpointing=full"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_sound_run_passes_its_rehearsal(tmp_path, name):
    done = rehearse(small_run(tmp_path, *RUNS[name]))
    assert [(one.finding.what, one.finding.where) for one in done.checkup.findings] == []
    assert [step.name for step in done.steps] == list(STEPS)
    memory = next(step for step in done.steps if step.name == "memory")
    assert memory.figures is not None
    assert memory.figures["measured_gib"] > 0
    assert memory.figures["planned_gib"] > 0


def test_the_second_process_has_the_card_to_itself(tmp_path, monkeypatch):
    """Nothing of the first half still holds memory when the model is read back."""
    from zhibei.doctor import readback

    run_fresh, held = readback.run_fresh, []

    def measured(folder):
        held.append(torch.cuda.memory_allocated())
        return run_fresh(folder)

    before = torch.cuda.memory_allocated()
    monkeypatch.setattr(readback, "run_fresh", measured)
    rehearse(small_run(tmp_path, "model.compile=false"))
    assert held[0] - before < 2**16


def test_training_on_a_gpu_begins_with_a_rehearsal_of_its_own(tmp_path):
    small_run(tmp_path)
    assert run_command(["train", str(tmp_path / "run.yaml"), "--quiet"]) in (0, None)
    assert json.loads((tmp_path / "runs/small/rehearsal.json").read_text())["passed"]


@pytest.mark.parametrize("name", RUNS)
def test_a_healthy_run_hears_nothing(tmp_path, name):
    resolved = small_run(tmp_path, *RUNS[name])
    run_dir = train(resolved, watch=watch_over(resolved.run))
    records = read_metrics(run_dir.metrics)
    assert [r for r in records if r.get("event") in ("warning", "stopped")] == []
    assert all(r["gpu_held_gib"] is not None for r in records if r["kind"] == "train")
    looks = [r for r in records if r["kind"] == "look"]
    assert looks
    assert all(r["without_gradient"] == 0 for r in looks if r["effective_steps"] >= 3)


def test_looking_at_gradients_does_not_wait_for_the_device(tmp_path):
    """Between looks the step waits once, for its loss; what the watchdogs need is added up on the device."""
    from zhibei.train.materials import gather

    materials = gather(small_run(tmp_path, "model.compile=false"))
    passes = materials.batches.micro_batches(0)
    for _ in range(3):
        materials.stepper.step(passes, learning_rate=1e-4)
    noted = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms_N = torch.ones(3, device="cuda")
        materials.stepper._note_reached(("a", "b", "c"), norms_N)
        materials.stepper._note_reached(("a", "b", "c"), norms_N)
        noted.append(True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert noted == [True]
