"""`zhibei config`: the effective file, its JSON, explanations, recipes and the schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zhibei.cli.app import run_command
from zhibei.config.read import read_run, recipe_names, recipe_text
from zhibei.config.resolve import render_resolved
from zhibei.config.run import RunFile
from zhibei.config.words import leaf_fields

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {path: m}\ndata: {sources: [a.json]}\n")
    return path


def test_prints_the_resolved_file_which_reads_back(run_file: Path, capsys: Captured, tmp_path: Path) -> None:
    assert run_command(["config", str(run_file), "sft.epochs=1"]) == 0
    text = capsys.readouterr().out
    assert text == render_resolved(read_run(run_file, ["sft.epochs=1"]))
    (tmp_path / "again.yaml").write_text(text)
    assert read_run(tmp_path / "again.yaml").run == read_run(run_file, ["sft.epochs=1"]).run


def test_json_holds_values_origins_and_notes(run_file: Path, capsys: Captured) -> None:
    assert run_command(["config", str(run_file), "sft.epochs=1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["values"]["sft.epochs"] == 1
    assert document["origins"]["sft.epochs"] == "command line"
    assert set(document["values"]) == {key for key, _ in leaf_fields()}
    assert document["notes"] == []


@pytest.mark.parametrize("name", ["sft.global_batch", "sft", "seed", "data.validation"])
def test_explain_gives_meaning_type_and_default(name: str, capsys: Captured) -> None:
    assert run_command(["config", "--explain", name]) == 0
    text = capsys.readouterr().out
    fields = [key for key, _ in leaf_fields() if key == name or key.startswith(f"{name}.")]
    assert all(f"{key}  " in text for key in fields)
    assert run_command(["config", "--explain", name, "--json"]) == 0
    assert [fact["field"] for fact in json.loads(capsys.readouterr().out)] == fields


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("learning_rate", "write sft.learning_rate"),
        ("sft.lr", "sft.learning_rate"),
        ("sft.lerning_rate", "sft.learning_rate"),
        ("cutoff_len", "data.max_tokens"),
    ],
)
def test_explain_of_an_unknown_field_names_the_nearest(name: str, fix: str, capsys: Captured) -> None:
    assert run_command(["config", "--explain", name]) == 2
    assert fix in capsys.readouterr().err


def test_recipes_are_listed_and_shown(capsys: Captured) -> None:
    assert run_command(["config", "--recipes", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == recipe_names()
    assert run_command(["config", "--recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())
    assert run_command(["config", "alpaca-7b", "--recipes"]) == 0
    assert capsys.readouterr().out == recipe_text("alpaca-7b")
    assert run_command(["config", "alpaca-7", "--recipes"]) == 2
    assert "did you mean alpaca-7b?" in capsys.readouterr().err


def test_schema_is_the_run_files(capsys: Captured) -> None:
    assert run_command(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == RunFile.model_json_schema()


def test_nothing_asked_is_told_what_can_be(capsys: Captured) -> None:
    assert run_command(["config"]) == 2
    assert "try  zhibei config alpaca-" in capsys.readouterr().err
