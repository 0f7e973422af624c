"""Canaries of area resume: a checkpoint taken for an adapter."""

from __future__ import annotations

from pathlib import Path

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import AdapterFacts


def continued(*state: str, path: str = "/runs/other/model", key: str = "lora.adapter") -> Facts:
    adapter = AdapterFacts(Path(path), training_state=state)
    overrides = ["model.method=lora", f"lora.adapter={path}"] if key == "lora.adapter" else []
    return healthy(*overrides, adapter=adapter)


CANARIES: Canaries = {
    "resume-adapter-path-is-not-resume": (
        [
            continued("optimizer.pt", "trainer_state.json", path="/out/checkpoint-904"),
            continued("scheduler.pt", path="/out/last"),
            continued("files.json", path="/runs/other/checkpoints/step-000200"),
            continued("trainer_state.json", path="/out/checkpoint-1", key="model.path"),
        ],
        [
            continued(),
            continued(path="/out/checkpoint-904"),
            broken(continued("optimizer.pt"), "is_resumed", True),
            healthy("model.method=lora"),
        ],
    ),
}
