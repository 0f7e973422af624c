"""`zhibei data show` and `zhibei data templates` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import tiny_tokenizer
from zhibei.cli.app import run_command
from zhibei.text.families import TEMPLATES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(5)]
    rows[3]["output"] = "word " * 2000
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "run.yaml").write_text(
        f"name: t\nmodel: {{path: {tmp_path / 'tokenizer'}}}\n"
        f"data: {{sources: [{tmp_path / 'rows.json'}], template: vicuna, validation: 0.0}}\n"
    )
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run_command(["data", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_what_is_learned_can_be_read_without_colour(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "show", folder / "rows.json", "--tokenizer", folder / "tokenizer", "--template", "alpaca")
    assert "### Response:⟦It is 0.</s>⟧" in text
    assert text.count("⟦It is") == 3
    assert "Say 1.⏎" in text


def test_a_run_file_says_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "show", folder / "run.yaml", "--row", 2, "--count", 1)
    assert "USER: Say 2. ASSISTANT:⟦ It is 2.</s>⟧" in text
    everything = shown(capsys, "show", folder / "run.yaml", "--count", 1, "--supervise", "everything")
    assert "<s>⟦A chat between" in everything


def test_json_holds_every_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "show", folder / "run.yaml", "--id", "rows.json#4", "--json"))
    (row,) = found["rows"]
    assert "".join(token["text"] for token in row["tokens"] if token["learned"]) == " It is 4.</s>"
    assert "".join(token["text"] for token in row["tokens"]).startswith("<s>A chat between")
    assert row["tokens"][-1] == {"id": 2, "piece": "</s>", "text": "</s>", "learned": True}
    assert (row["num_tokens"], row["fate"]) == (len(row["tokens"]), "kept")


def test_a_row_that_will_be_dropped_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dropped: too_long" in shown(capsys, "show", folder / "run.yaml", "--row", 3, "--count", 1)


def test_ids_show_one_token_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "show", folder / "run.yaml", "--count", 1, "--ids").splitlines()
    assert any(line.split() == ["0", "1", "<s>"] for line in lines)
    assert any(line.split()[1:] == ["2", "⟦</s>⟧"] for line in lines if line.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "rows.json"], "--tokenizer"),
        (["show", "run.yaml", "--row", "99"], "no row 99"),
        (["show", "run.yaml", "--template", "vicunna"], "data.template: vicuna"),
        (["show", "run.yaml", "--supervise", "answer"], "'answers', 'last_answer'"),
    ],
)
def test_mistakes_are_explained(
    folder: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert run_command(["data", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_every_template_is_listed_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "templates")
    assert all(name in text for name in TEMPLATES)
    assert "### Response:⟦Blue.</s>⟧" in text
    found = json.loads(shown(capsys, "templates", "--json"))["templates"]
    assert [one["name"] for one in found] == list(TEMPLATES)
    assert all(one["text"] and len(one["learned"]) == 2 for one in found)
