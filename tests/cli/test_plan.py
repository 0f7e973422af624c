"""`zhibei plan` as a person types it: from config.json alone, for machines that are not here, with errors that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.doctor.healthy import CONFIG
from zhibei.cli import app


def main(words: list[str]) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as left:
        app.main(words)
    return int(left.value.code or 0)


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch) -> Path:
    """A run of the 7B shape of which nothing but config.json is here."""
    monkeypatch.setenv("ZHIBEI_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "run.yaml"
    path.write_text(f"name: planned\nmodel: {{path: {folder}}}\ndata: {{sources: [rows.json], max_tokens: 512}}\n")
    return path


def test_a_run_that_fits_says_how_and_how_much(run_file, capsys):
    assert main(["plan", str(run_file), "--machine", "h200", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"]
    assert {phase["name"] for phase in document["phases"]} >= {"load", "first step", "steady", "evaluation", "save"}
    assert document["device_gib"] < document["capacity_gib"]
    assert sum(document["phases"][2]["causes_gib"].values()) == pytest.approx(document["phases"][2]["gib"], abs=0.01)


def test_a_run_that_does_not_fit_leaves_with_2_and_says_what_would(run_file, capsys):
    assert main(["plan", str(run_file), "--machine", "t4"]) == 2
    shown = capsys.readouterr().out
    assert "does not fit on" in shown
    assert "what would fit" in shown
    assert "GiB" in shown


def test_the_rule_of_thumb_explains_the_numbers(run_file, capsys):
    main(["plan", str(run_file), "--machine", "h200"])
    shown = capsys.readouterr().out
    assert "2 GB per billion" in shown
    assert "8 bytes per parameter" in shown


def test_money_and_sharding_are_asked_for(run_file, capsys):
    wanted = ["--machine", "v100-32g:4", "--price", "2", "--sharding", "full_shard", "--json", "sft.max_steps=100"]
    main(["plan", str(run_file), *wanted])
    document = json.loads(capsys.readouterr().out)
    assert document["sharding"] == "full_shard"
    assert document["cost"] > 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--machine", "v1000"], "v1000"),
        (["--sharding", "fullshard"], "full_shard"),
        (["model.path=nobody/knows-this"], "config.json"),
    ],
)
def test_what_cannot_be_planned_is_named(run_file, capsys, words, named):
    assert main(["plan", str(run_file), *words]) == 2
    shown = capsys.readouterr()
    assert named in shown.err + shown.out


@pytest.mark.parametrize("price", ["-3", "nan", "inf"])
def test_a_price_that_is_none_is_refused(price, run_file, capsys):
    assert main(["plan", str(run_file), "--machine", "h200", "--price", price]) == 2
    assert "--price" in capsys.readouterr().err
