"""The Python functions do what the commands do, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import zhibei
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"The number is {n}."} for n in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = tiny_model_folder(tmp_path)
    text = f"""
runs: {tmp_path}/runs
device: cpu
model: {{path: {model}, compile: false}}
data: {{sources: [{tmp_path}/rows.json], template: alpaca_short, validation: 4, max_tokens: 200}}
sft: {{max_steps: 2, global_batch: 8, evaluate_every: 1, sample_tokens: 0}}
log: {{tensorboard: false}}
"""
    (tmp_path / "first.yaml").write_text(text)
    return tmp_path / "first.yaml"


def test_from_a_run_file_to_a_model_that_speaks(run_file: Path) -> None:
    resolved = zhibei.read_run(run_file, ["seed=3"])
    rows = zhibei.prepare(resolved)
    assert (len(rows.train), len(rows.heldout)) == (20, 4)
    records = []
    run_dir = zhibei.train(resolved, watch=records.append)
    assert run_dir.path == run_file.parent / "runs" / "first"
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2]
    assert zhibei.verify(run_dir.path) == []
    again = zhibei.read_run(run_dir.path).run
    # What the run file left to the plan is written down as what it became, so that a resumed run does the same.
    settled = {"micro_batch_tokens": again.training.micro_batch_tokens}
    assert isinstance(settled["micro_batch_tokens"], int)
    assert again.model.activation_checkpointing == "none"
    assert again.sft == resolved.run.sft.model_copy(update=settled)
    assert again.model == resolved.run.model.model_copy(update={"activation_checkpointing": "none"})
    sharding = {"sharding": again.distributed.sharding}
    assert sharding == {"sharding": "no_shard"}
    assert again.distributed == resolved.run.distributed.model_copy(update=sharding)
    rest = {"sft": None, "model": None, "distributed": None}
    assert again.model_copy(update=rest) == resolved.run.model_copy(update=rest)
    assert zhibei.load(run_dir.path, device="cpu").template.name == "alpaca_short"
    assert zhibei.write_report(run_dir.path).is_file()
    with pytest.raises(UserError):
        zhibei.train(run_file, ["seed=3"])  # a run never overwrites another


def test_reading_a_file_recognises_its_format(run_file: Path) -> None:
    assert len(list(zhibei.read_file(run_file.parent / "rows.json"))) == 24


def test_the_folder_of_loops_stays_callable_after_its_files_were_imported() -> None:
    import zhibei.train.offline

    assert callable(zhibei.train)
    assert zhibei.train.offline is not None
    assert callable(zhibei.plan)


def test_a_sound_run_has_no_findings_and_a_plan(run_file: Path) -> None:
    resolved = zhibei.read_run(run_file)
    found = zhibei.check(resolved)
    assert not found.findings
    assert found.num_checks > 50
    ahead = zhibei.plan(resolved, "t4")
    assert ahead.fits
    assert ahead.machine.name == "t4"
    assert ahead.as_dict()["predicted_gib"] == pytest.approx(ahead.search.chosen.memory.peak_gib, abs=1e-3)


def test_a_run_with_a_fault_is_found_planned_for_another_machine_and_never_started(run_file: Path) -> None:
    too_hot = zhibei.read_run(run_file, ["sft.learning_rate=0.5"])
    assert zhibei.check(too_hot).blocks
    with pytest.raises(UserError, match="learning_rate"):
        zhibei.train(too_hot)
    assert not (run_file.parent / "runs").exists()
    on_old_card = zhibei.read_run(run_file, ["model.precision=bf16", "device=auto"])
    assert "bf16-on-pre-ampere" in {one.id for one in zhibei.check(on_old_card, "v100-32g").findings}


def test_a_refused_run_loads_no_torch(run_file: Path) -> None:
    program = (
        "import sys, zhibei; from zhibei.config.errors import UserError\n"
        f"try: zhibei.train({str(run_file)!r}, ['sft.learning_rate=0.5'])\n"
        "except UserError: sys.exit('torch' in sys.modules)\n"
        "sys.exit('it was trained')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_warnings_of_the_check_are_heard_and_kept(run_file: Path) -> None:
    doubtful = zhibei.read_run(run_file, ["data.template=chatml"])  # its control tokens are strange to the model
    found = zhibei.check(doubtful)
    assert found.findings
    assert not found.blocks
    with pytest.warns(UserWarning, match=found.findings[0].id):
        run_dir = zhibei.train(doubtful)
    assert json.loads(run_dir.check.read_text())["findings"][0]["id"] == found.findings[0].id


def test_a_log_is_explained(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("step 3\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    explanation = zhibei.explain(log)
    assert explanation.verdict == "known"
    assert explanation.cause is not None


def test_a_model_is_merged_exported_and_compared(tmp_path: Path) -> None:
    from tests.export.making import adapter_folder

    base = tiny_model_folder(tmp_path)
    made = zhibei.merge(adapter_folder(base, tmp_path / "adapter"), out=tmp_path / "whole")
    assert made.path == tmp_path / "whole"
    report = zhibei.parity(tmp_path / "adapter", made.path, kind="f32")
    assert report.kl_mean < 1e-6
    delta = zhibei.export(made.path, to="delta", base=str(base), out=tmp_path / "delta")
    assert "base plus difference" in delta.notes[0]
    with pytest.raises(UserError, match="no form onnx"):
        zhibei.export(made.path, to="onnx")


def test_a_pipeline_runs_from_python(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"The number is {n}."} for n in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "two.yaml").write_text(
        f"""
runs: {tmp_path}/runs
model: {{path: {tiny_model_folder(tmp_path)}}}
data: {{sources: [{tmp_path}/rows.json], template: alpaca_short, validation: 4, max_tokens: 200, workers: 0}}
log: {{tensorboard: false}}
stages:
  - name: sft
    sft: {{max_steps: 1, global_batch: 8, sample_tokens: 0}}
  - {{name: scores, stage: evaluate, loss: $sft}}
"""
    )
    outcome = zhibei.run(tmp_path / "two.yaml", ["device=cpu"])
    assert set(outcome["stages"][1]["scores"]["scores"]["loss"]) == {"base", "sft"}
    assert (tmp_path / "runs/two/report.html").is_file()
