"""Stages that hand a model on, and hand_over of a stage that trains: asked before training, made after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.small_run import small_run
from zhibei.config.errors import SeveralErrors, UserError
from zhibei.pipeline.file import Pipeline, read_pipeline
from zhibei.pipeline.foresee import foresee, forms_asked_later
from zhibei.pipeline.run import run_pipeline
from zhibei.store.run_dir import RunDir

STAGES = """
  - name: folder
    stage: export
    model: $sft
    dtype: as-base
"""
FILES = """
  - name: files
    stage: gguf
    model: $sft
    types: [f16]
"""


def pipeline_of(folder: Path, stages: str, *overrides: str, method: str = "full") -> Pipeline:
    small_run(folder)
    file = folder / "handing.yaml"
    file.write_text(
        f"""name: handing
runs: {folder / "runs"}
device: cpu
model: {{path: {folder / "tiny-llama"}, method: {method}}}
data: {{sources: [{folder / "rows.json"}], template: alpaca, max_tokens: 200, validation: 0.2, workers: 0}}
log: {{tensorboard: false}}
stages:
  - name: sft
    sft: {{global_batch: 8, max_steps: 2, sample_tokens: 0, evaluate_every: 0}}
{stages}"""
    )
    return read_pipeline(file, overrides)


def test_what_later_stages_make_is_asked_before_training(tmp_path):
    pipeline = pipeline_of(tmp_path, STAGES + FILES)
    assert forms_asked_later(pipeline, pipeline.stage("sft")) == ["hf", "gguf:F16"]
    assert not foresee(pipeline, plans=False)[0].blocks
    config = tmp_path / "tiny-llama" / "config.json"
    settings = json.loads(config.read_text())
    settings["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config.write_text(json.dumps(settings))
    (sft, *_) = foresee(pipeline, plans=False)
    assert sft.checkup is not None
    assert "gguf-arch-unsupported" in [found.id for found in sft.checkup.findings if found.blocks]
    with pytest.raises(UserError):
        run_pipeline(pipeline, watch=lambda record: None)
    assert not (tmp_path / "runs").exists()


def test_a_form_that_a_model_does_not_have_is_refused_between_the_stages(tmp_path):
    stages = STAGES.replace("export", "merge")
    with pytest.raises(UserError, match="whole already"):
        foresee(pipeline_of(tmp_path, stages), plans=False)
    assert foresee(pipeline_of(tmp_path, stages, method="lora"), plans=False)


@pytest.mark.slow
def test_the_stages_finish_and_forms_can_be_asked_for_later(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    outcome = run_pipeline(pipeline_of(tmp_path, STAGES + FILES), watch=lambda record: None)
    handed = {stage["name"]: stage["handed_over"] for stage in outcome["stages"] if "handed_over" in stage}
    assert set(handed) == {"folder", "files"}
    assert all(proof["failures"] == [] for one in handed.values() for proof in one["proofs"])
    files = tmp_path / "runs" / "handing" / "files" / "model"
    assert [path.name for path in files.glob("*.gguf")] == ["sft-F16.gguf"]
    records = []
    more = pipeline_of(tmp_path, STAGES + FILES, "stages.sft.hand_over=[meta]")
    run_pipeline(more, watch=records.append)
    assert [record["form"] for record in records if record.get("event") == "handed over"] == ["meta"]
    sft = RunDir(tmp_path / "runs" / "handing" / "sft")
    assert (sft.exports / "meta" / "params.json").is_file()
    with pytest.raises((UserError, SeveralErrors), match="max_steps"):
        run_pipeline(pipeline_of(tmp_path, STAGES, "stages.sft.sft.max_steps=3"), watch=lambda record: None)
