"""`zhibei data` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zhibei.cli.app import run_command

ROWS = [{"instruction": f"Name fruit number {i}.", "input": "", "output": "An apple."} for i in range(4)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def test_inspect_prints_and_plots(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = rows.with_suffix(".html")
    assert run_command(["data", "inspect", str(rows), "--plot", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "format alpaca" in shown
    assert "█" in shown
    assert "4 Conversation" in shown
    assert page.read_text().count("<rect") > 1


def test_inspect_json_is_one_document(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "inspect", str(rows), str(rows), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["records"] for each in facts["files"]] == [4, 4]


def test_a_broken_record_is_shown_and_is_for_the_user_to_act_on(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write_text(json.dumps([*ROWS, {"instruction": "a", "output": ""}]))
    assert run_command(["data", "inspect", str(rows)]) == 2
    assert "record 4 (line 1), field 'output': empty answer" in capsys.readouterr().out


def test_convert_and_refusal(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = rows.with_suffix(".jsonl")
    arguments = ["data", "convert", str(rows), str(target), "--to", "openai"]
    assert run_command(arguments) == 0
    assert json.loads(target.read_text().splitlines()[0])["messages"][1]["content"] == "An apple."
    capsys.readouterr()
    assert run_command([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["what"] == "exists already"
    assert run_command([*arguments, "--force", "--from", "alpaca", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4


def test_a_file_without_one_sound_record_is_shown_too(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write_text(json.dumps({"instruction": "a", "inptu": "b", "output": "c"}))
    assert run_command(["data", "inspect", str(rows)]) == 2
    assert "columns: {input: inptu}" in capsys.readouterr().out
    assert run_command(["data", "inspect", str(rows), "--columns", "input=inptu"]) == 0
    target = rows.with_suffix(".jsonl")
    assert run_command(["data", "convert", str(rows), str(target), "--to", "alpaca", "--columns", "input=inptu"]) == 0
    assert json.loads(target.read_text()) == {"instruction": "a", "input": "b", "output": "c"}


def test_formats_are_listed_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "formats", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"alpaca", "sharegpt", "openai", "preference", "kto", "text"} <= {each["name"] for each in facts}
    assert all(json.loads(each["example"]) for each in facts)
    assert run_command(["data", "formats"]) == 0
    assert "hh_rlhf" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "inspect"],
        ["data", "inspect", "nothing.json"],
        ["data", "inspect", "x.json", "--columns", "output"],
        ["data", "inspect", "x.json", "--plot", "a.png"],
    ],
)
def test_bad_requests_are_the_users(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    assert "to do:" in capsys.readouterr().err
