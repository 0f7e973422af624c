"""Every step equals TRL's SFTTrainer, where TRL is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.16", reason="needs TRL 1.16 or newer, the first that computes on a CPU")

from benchmarks.reference_trainer import trl_trainer
from benchmarks.side_by_side import run_ours, run_theirs
from tests.parity.test_trainer import LORA, assert_same_curves, tiny

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("method", [(), LORA], ids=["full", "lora"])
def test_tiny_model_step_by_step(tmp_path: Path, method: tuple[str, ...]) -> None:
    ours, rows, run = run_ours(tiny(tmp_path, *method))
    assert_same_curves(ours, run_theirs(run, rows, batch=4, make=trl_trainer))
