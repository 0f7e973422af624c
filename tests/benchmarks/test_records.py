"""Records keep their form, a success is not replaced by a failure, and the page of tables is current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.plans import PLANS, failure, run_plan
from benchmarks.records import RESULTS, merge, read
from benchmarks.sft import parser

CONTRACT = {"benchmark", "who", "version", "method", "settings", "device", "versions", "command", "date"}


def record(**changes: Any) -> dict[str, Any]:
    settings = {"micro_batch": "8192 tokens", "packing": True, "checkpointing": "none", "weights": "bf16"}
    made = {
        "benchmark": "sft",
        "who": "zhibei",
        "version": "0.1.0",
        "method": "lora",
        "settings": settings,
        "useful_tokens_per_s": 100.0,
        "model_tflops": 2.5,
        "seconds": 3.0,
        "spread": {"useful_tokens_per_s": [90.0, 110.0], "seconds": [2.5, 3.5]},
        "peak_gib": 12.34,
        "warmup_seconds": 40.0,
        "device": "a GPU",
        "versions": {"torch": "2.11"},
        "command": "python -m benchmarks.sft zhibei",
        "date": "2026-01-01T00:00:00Z",
    }
    return {**made, **changes}


def test_a_newer_record_replaces_the_same_measurement_only(tmp_path: Path) -> None:
    file = tmp_path / "sft.json"
    other = record(settings={**record()["settings"], "checkpointing": "full"})
    merge(file, [record(), other])
    merge(file, [record(useful_tokens_per_s=200.0)])
    assert sorted(r["useful_tokens_per_s"] for r in read(file)) == [100.0, 200.0]


def test_a_failure_does_not_replace_a_success(tmp_path: Path) -> None:
    file = tmp_path / "sft.json"
    failed = {key: value for key, value in record(error="out of memory").items() if key in CONTRACT or key == "error"}
    merge(file, [failed])
    assert [r.get("error") for r in read(file)] == ["out of memory"]
    merge(file, [record()])
    merge(file, [failed])
    assert [r.get("error") for r in read(file)] == [None]


PLANNED = {"scale.json"}
"""Figures of the planner, which nobody measured; tests/plan/test_communication.py holds their page to them."""


@pytest.mark.parametrize(
    "file", sorted(path for path in RESULTS.glob("*.json") if path.name not in PLANNED), ids=lambda path: path.name
)
def test_committed_records_have_the_agreed_fields(file: Path) -> None:
    records = read(file)
    assert records
    for found in records:
        assert found.keys() >= CONTRACT, found.get("who")


def test_the_page_of_measurements_is_current() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page) == page, "run: python -m benchmarks.tables"
    assert all(f"<!-- table {name} -->" in page for name in tables.TABLES)


def test_a_stale_page_and_a_wrong_marker_are_found(tmp_path: Path) -> None:
    merge(tmp_path / "sft.json", [record()])
    page = "before\n<!-- table sft-lora -->\n<!-- end sft-lora -->\nafter\n"
    made = tables.filled(page, results=tmp_path)
    assert "100 (90 to 110)" in made
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert tables.filled(made, results=tmp_path) == made
    with pytest.raises(ValueError, match="no table is called nothing"):
        tables.filled("<!-- table nothing -->\n<!-- end nothing -->", results=tmp_path)


@pytest.mark.parametrize("plan", PLANS)
def test_every_measurement_of_a_plan_is_a_valid_command(plan: str) -> None:
    for measurement in PLANS[plan]:
        assert parser().parse_args(measurement.words.split()).verb == measurement.words.split()[0]


def test_a_failing_measurement_is_recorded_in_its_own_words() -> None:
    errors = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory.\nnoise"
    found = failure(["peer-trl", "--method", "full", "--liger"], errors)
    assert found["error"] == "torch.OutOfMemoryError: CUDA out of memory."
    assert (found["who"], found["method"]) == ("TRL + Liger", "full")


def test_nothing_is_started_that_would_end_too_late(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_plan(PLANS["peers"], extra=[], seconds=1, out=None, peer_packages="", only="")
    assert done == []
    assert capsys.readouterr().out.count("# not started") == len(PLANS["peers"])


def test_records_are_plain_json() -> None:
    assert json.loads(json.dumps(record())) == record()


def test_what_is_known_is_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = tmp_path / "sft.json"
    merge(known, [record(command=f"python -m benchmarks.sft {PLANS['peers'][0].words}")])
    run_plan(PLANS["peers"], extra=[], seconds=1, out=None, peer_packages="", skip=known)
    assert capsys.readouterr().out.count("# not started") == len(PLANS["peers"]) - 1
    run_plan(PLANS["peers"], extra=["--layers", "2"], seconds=1, out=None, peer_packages="", skip=known)
    assert capsys.readouterr().out.count("# not started") == len(PLANS["peers"])
