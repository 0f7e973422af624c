"""Every step equals the transformers Trainer's: loss, gradient norm, rate and held-out loss, full and LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.side_by_side import Curve, difference, run_ours, run_theirs
from tests.shared_data import shared_path
from tests.train.small_run import small_run
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun

pytestmark = pytest.mark.parity

LORA = ("model.method=lora", "lora.rank=4", "lora.alpha=8")
NUM_STEPS = 20


def assert_same_curves(ours: Curve, theirs: Curve, *, tolerance: float = 2e-5) -> None:
    """Rates exactly; losses and gradient norms within fp32 rounding, also on average (a drift would show there)."""
    assert ours.learning_rates == pytest.approx(theirs.learning_rates, rel=1e-9, abs=1e-12)
    for name in ("losses", "grad_norms", "heldout"):
        found = difference(getattr(ours, name), getattr(theirs, name))
        assert found.largest_relative < tolerance, f"{name}: {found}"
        assert found.mean < tolerance, f"{name}: {found}"


def tiny(tmp_path: Path, *overrides: str) -> ResolvedRun:
    return small_run(
        tmp_path,
        f"sft.max_steps={NUM_STEPS}",
        "sft.learning_rate=1e-3",
        "sft.evaluate_every=1",
        "sft.save_every=0",
        "sft.sample_tokens=0",
        "model.precision=fp32",
        *overrides,
    )


@pytest.mark.parametrize("method", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_tiny_model_step_by_step(tmp_path: Path, method: tuple[str, ...], packing: str) -> None:
    ours, rows, run = run_ours(tiny(tmp_path, f"data.packing={packing}", *method))
    assert len(ours.losses) == NUM_STEPS
    assert_same_curves(ours, run_theirs(run, rows, batch=4))


@pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup"])
def test_schedules_weight_decay_and_clipping(tmp_path: Path, schedule: str) -> None:
    ours_name = {"constant_with_warmup": "constant"}.get(schedule, schedule)
    resolved = tiny(
        tmp_path, f"sft.schedule={ours_name}", "sft.weight_decay=0.1", "sft.max_grad_norm=0.25", "sft.beta2=0.95"
    )
    ours, rows, run = run_ours(resolved)
    theirs = run_theirs(
        run.model_copy(update={"sft": run.sft.model_copy(update={"schedule": schedule})}), rows, batch=2
    )
    assert min(ours.grad_norms) > run.sft.max_grad_norm  # or clipping would not be tested
    assert_same_curves(ours, theirs)


def test_the_comparison_bites(tmp_path: Path) -> None:
    """A weight decay of 0.01, which changes a weight by 1e-5 of itself per step, must be seen."""
    ours, rows, run = run_ours(tiny(tmp_path, "sft.weight_decay=0.0"))
    other = run.model_copy(update={"sft": run.sft.model_copy(update={"weight_decay": 0.01})})
    with pytest.raises(AssertionError):
        assert_same_curves(ours, run_theirs(other, rows, batch=4))


@pytest.mark.slow
@pytest.mark.parametrize("method", [(), LORA], ids=["full", "lora"])
def test_real_model_on_real_rows(tmp_path: Path, method: tuple[str, ...]) -> None:
    """stories260K on Alpaca rows: 20 steps of 8 rows, held-out loss after every step."""
    model = shared_path("data", "models", "stories260K")
    source = shared_path("data", "derived", "alpaca_union.json")
    rows = json.loads(source.read_text(encoding="utf-8"))[:600]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"""name: real
runs: {tmp_path / "runs"}
model: {{path: {model}, precision: fp32}}
data: {{sources: [{data}], template: alpaca, max_tokens: 256, validation: 8, workers: 0}}
sft: {{global_batch: 8, micro_batch_tokens: 768, max_steps: {NUM_STEPS}, learning_rate: 1e-3, warmup_steps: 3,
  evaluate_every: 1, save_every: 0, sample_tokens: 0}}
log: {{tensorboard: false}}
""",
        encoding="utf-8",
    )
    ours, prepared, run = run_ours(read_run(str(run_file), method))
    assert_same_curves(ours, run_theirs(run, prepared, batch=4), tolerance=5e-5)
