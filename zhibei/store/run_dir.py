"""The names of everything a run writes. Knows where things lie, not what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """`runs/<name>/`: the interface between stages; every later stage takes it as its input."""

    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / "run.yaml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def check(self) -> Path:
        return self.path / "check.json"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def proofs(self) -> Path:
        return self.path / "proofs.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def rehearsal(self) -> Path:
        return self.path / "rehearsal.json"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def handed_over(self) -> Path:
        return self.path / "handed_over.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"
