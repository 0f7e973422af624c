"""`zhibei check` and the check that `zhibei train` begins with, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.small_run import small_run
from zhibei.cli.app import run_command
from zhibei.doctor.facts import gather

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound run file; its rows are all short enough."""
    monkeypatch.setenv("ZHIBEI_CACHE", str(tmp_path / "cache"))
    small_run(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("max_tokens: 200", "max_tokens: 256"))
    return path


def checked(file: Path, *arguments: str, capsys: Capture) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run_command(["check", str(file), *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_sound_run_has_no_finding(file: Path, capsys: Capture) -> None:
    code, found = checked(file, capsys=capsys)
    assert (code, found["findings"], found["defects"]) == (0, [], [])
    assert run_command(["check", str(file)]) == 0
    assert "Nothing found" in capsys.readouterr().out
    assert not (file.parent / "runs").exists()


def test_a_finding_that_stops_ends_with_2_and_names_everything(file: Path, capsys: Capture) -> None:
    code, found = checked(file, "sft.learning_rate=0.9", capsys=capsys)
    assert code == 2
    (one,) = found["findings"]
    assert (one["id"], one["level"], one["where"]) == ("learning-rate-too-high", "stop", "command line")
    assert "0.9" in one["what"]
    assert run_command(["check", str(file), "sft.learning_rate=0.9"]) == 2
    out = capsys.readouterr().out
    assert all(part in out for part in ("learning-rate-too-high", "to do:", "zhibei pitfalls learning-rate-too-high"))


def test_broken_parts_do_not_hide_one_another(file: Path, capsys: Capture) -> None:
    """A misspelt key, a model that is not there, two broken records: one call tells them all."""
    rows = file.parent / "rows.json"
    sound = [{"instruction": "a", "output": "b"}] * 9
    rows.write_text(json.dumps([*sound, {"instruction": "a"}, {"instruction": "a", "output": ""}]))
    file.write_text(file.read_text().replace("model: {path: ", "model: {precison: bf16, path: /none") + "seeed: 1\n")
    code, found = checked(file, capsys=capsys)
    assert code == 2
    told = " ".join(one["what"] + one["where"] for one in found["findings"])
    for part in ("model.precison", "seeed", "/none", "rows.json, record 9", "rows.json, record 10"):
        assert part in told, part


def test_a_gatherer_that_fails_is_our_fault_and_hides_nothing(
    file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(gather, "read_template_facts", fail)
    code, found = checked(file, "sft.learning_rate=0.9", capsys=capsys)
    assert code == 2
    assert [one["id"] for one in found["findings"]] == ["learning-rate-too-high"]
    assert found["defects"][0]["place"] == "template"
    assert run_command(["check", str(file)]) == 0
    assert "zhibei's own fault" in capsys.readouterr().out


def test_fix_writes_a_copy_and_checks_it_again(file: Path, capsys: Capture) -> None:
    text = file.read_text().replace("  max_steps: 12\n", "  epochs: 20\n")
    file.write_text(text.replace("tensorboard: false}", "tensorboard: false, every: 5000}  # seldom"))
    before = file.read_text()
    code, found = checked(file, "--fix", capsys=capsys)
    assert code == 0
    assert [one["id"] for one in found["findings"]] == ["interval-longer-than-run"]
    assert found["fix"]["changes"] == {"log.every": 1}
    mended = Path(found["fix"]["file"])
    assert file.read_text() == before
    assert "every: 1}  # seldom" in mended.read_text()
    assert checked(mended, capsys=capsys)[1]["findings"] == []
    assert run_command(["check", str(file), "--fix"]) == 0
    out = capsys.readouterr().out
    assert "-log: {tensorboard: false, every: 5000}  # seldom" in out
    assert "has nothing that stops it" in out


def test_another_machine_can_be_asked_for(file: Path, capsys: Capture) -> None:
    code, found = checked(file, "--machine", "v100-32g:4", "model.precision=bf16", capsys=capsys)
    assert code == 2
    assert found["machine"] == "v100-32g:4"
    assert "bf16-on-pre-ampere" in [one["id"] for one in found["findings"]]


def test_an_area_alone_and_an_unknown_one(file: Path, capsys: Capture) -> None:
    code, found = checked(file, "sft.learning_rate=0.9", "--area", "labels", capsys=capsys)
    assert (code, found["findings"]) == (0, [])
    assert run_command(["check", str(file), "--area", "lables"]) == 2
    assert "labels" in capsys.readouterr().err


def test_training_is_refused_before_anything_is_written(file: Path, capsys: Capture) -> None:
    assert run_command(["train", str(file), "sft.learning_rate=0.9"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("learning-rate-too-high  ") == 1
    assert "No weights were loaded" in shown
    assert run_command(["train", str(file), "sft.learning_rate=0.9", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["pitfall"] == "learning-rate-too-high"
    assert document["error"]["check"]["blocks"]
    assert run_command(["train", str(file), "sft.learning_rate=0.9", "--quiet"]) == 2
    assert "sft.learning_rate: 0.9" in capsys.readouterr().err
    assert not (file.parent / "runs").exists()


def test_a_trained_run_keeps_its_check_and_what_was_accepted(file: Path, capsys: Capture) -> None:
    settings = ["sft.max_steps=3", "sft.beta2=0.5", "accept=[setting-far-from-published]", "sft.sample_tokens=0"]
    assert run_command(["train", str(file), *settings, "--quiet"]) == 0
    kept = json.loads((file.parent / "runs/small/check.json").read_text())
    assert (kept["blocks"], [one["id"] for one in kept["accepted"]]) == (False, ["setting-far-from-published"])
    capsys.readouterr()
    assert run_command(["train", str(file), "--json"]) == 2
    (one,) = json.loads(capsys.readouterr().out)["error"]["check"]["findings"]
    assert one["id"] == "output-directory-in-use"
    assert checked(file.parent / "runs/small", capsys=capsys)[0] == 0


def test_a_dry_run_shows_findings_and_plan_and_writes_nothing(file: Path, capsys: Capture) -> None:
    assert run_command(["train", str(file), "sft.beta2=0.5", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "setting-far-from-published" in out
    assert "optimiser steps" in out
    assert run_command(["train", str(file), "sft.learning_rate=0.9", "--dry-run", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["check"]["blocks"]
    assert not (file.parent / "runs").exists()
