"""The Python functions do what the commands do, on a tiny model."""

from __future__ import annotations

import json
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
    assert zhibei.read_run(run_dir.path).run == resolved.run
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
