"""The section about good and bad answers shows the figures of the written weights, and only where there are any."""

from __future__ import annotations

import json
from pathlib import Path

from tests.report.fake_run import fake_run
from zhibei.report.inputs import read_inputs
from zhibei.report.judged import judged
from zhibei.report.page import TRAINING_PAGE, sections_of, write_report

FIGURES = {
    "accuracy": 0.75,
    "accuracy_low": 0.61,
    "accuracy_high": 0.85,
    "pairs": 48,
    "margin": 0.5,
    "length_correlation": 0.9,
    "by_source": {
        "a.json": {"right": 1, "total": 2, "low": 0.1, "high": 0.9},
        "b.json": {"right": 2, "total": 2, "low": 0.3, "high": 1.0},
    },
}


def test_runs_that_compare_nothing_have_no_such_section(tmp_path: Path) -> None:
    assert tuple(sections_of(read_inputs(fake_run(tmp_path)))) == TRAINING_PAGE


def test_accuracy_interval_sources_and_length_are_told(tmp_path: Path) -> None:
    run_dir = fake_run(tmp_path)
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    lines = [line | FIGURES if line["kind"] == "heldout" else line for line in lines]
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = read_inputs(run_dir)
    assert "judged" in sections_of(inputs)
    text = str(judged(inputs).body)
    for shown in ("0.750", "0.610 to 0.850", "48 held out", "a.json", "0.9"):
        assert shown in text
    assert "Good against bad answers" in write_report(run_dir).read_text()
