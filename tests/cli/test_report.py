"""`zhibei report` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.fake_run import fake_run
from zhibei.cli.app import run_command


def test_report_prints_path_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100)
    assert run_command(["report", str(run_dir.path)]) == 0
    printed = capsys.readouterr().out
    assert f"page: {run_dir.report}" in printed
    assert "best held-out loss" in printed


def test_report_as_json_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = fake_run(tmp_path / "run", num_steps=100)
    assert run_command(["report", str(run_dir.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["page"] == str(run_dir.report)
    assert document["runs"][str(run_dir.path)]["steps"] == 100


def test_report_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(fake_run(tmp_path / name, num_steps=100).path) for name in "ab"]
    out = tmp_path / "compare.html"
    assert run_command(["report", *names, "--out", str(out), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["runs"]) == names
    assert out.exists()


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["FILE"], ["EMPTY"], ["RUN", "--out", "x.html"]])
def test_what_is_no_run_is_said_without_traceback(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    run = fake_run(tmp_path / "run", num_steps=100).path
    places = {"FILE": str(tmp_path / "file"), "EMPTY": str(tmp_path / "empty"), "RUN": str(run)}
    assert run_command(["report", *(places.get(argument, argument) for argument in arguments)]) == 2
    assert "expected:" in capsys.readouterr().err
    assert list((tmp_path / "empty").iterdir()) == []
