"""The whole quickstart at a tiny size: tuned beats base, the files keep their contract, the folder talks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny import tiny_model_folder
from zhibei.cli.app import run_command
from zhibei.config.errors import UserError
from zhibei.pipeline.outcome import Outcome
from zhibei.pipeline.place import Order, find_place, take_place
from zhibei.pipeline.quickstart import run_world
from zhibei.pipeline.stage import train_stage, write_run_file

ORDER = Order(seed=0, size="tiny")


def make(runs: Path, order: Order = ORDER, name: str = "quickstart") -> tuple[Outcome, list[dict]]:
    records: list[dict] = []
    place = find_place(runs, name, order, is_named=False)
    return run_world(place, order, watch=records.append, started=0.0), records


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, list[dict]]:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZHIBEI_CACHE", str(runs / "cache"))
        outcome, records = make(runs)
    return runs, outcome, records


@pytest.mark.slow
def test_no_watchdog_speaks(finished):
    _, _, records = finished
    assert [r for r in records if r.get("event") in ("warning", "stopped")] == []
    assert any(r.get("kind") == "look" for r in records), "they were awake"


@pytest.mark.slow
def test_tuned_beats_base_with_intervals_apart(finished):
    _, outcome, _ = finished
    base, tuned = outcome.stages
    assert base.score <= 0.1
    assert tuned.score > base.score
    assert tuned.low > base.score
    assert outcome.paired is not None
    assert outcome.paired.p_value < 0.01


@pytest.mark.slow
def test_summary_keeps_its_contract(finished):
    runs, outcome, _ = finished
    summary = json.loads((runs / "quickstart" / "summary.json").read_text())
    assert set(summary) == {"stages", "seed", "total_seconds"}
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft"]
    for stage in summary["stages"]:
        assert set(stage) == {"name", "metric", "score", "low", "high", "seconds"}
        assert stage["metric"] == "exact_match"
        assert 0 <= stage["low"] <= stage["score"] <= stage["high"] <= 1
    answers = [json.loads(line) for line in (runs / "quickstart" / "answers.jsonl").read_text().splitlines()]
    tuned = sum(answer["tuned_right"] for answer in answers) / len(answers)
    assert tuned == summary["stages"][1]["score"] == outcome.stages[1].score


@pytest.mark.slow
def test_both_stages_are_ordinary_runs_and_the_watcher_hears_of_them(finished):
    runs, _, records = finished
    for name in ("pretrain", "sft"):
        run = runs / "quickstart" / name
        for file in ("run.yaml", "resolved.yaml", "manifest.json", "metrics.jsonl", "proofs.json", "report.html"):
            assert (run / file).is_file(), file
        assert all(proof["passed"] for proof in json.loads((run / "proofs.json").read_text()))
    stages = [record["name"] for record in records if record["kind"] == "stage"]
    assert stages == ["world", "pretrain", "base", "sft", "tuned"]


@pytest.mark.slow
def test_the_folder_can_be_talked_to(finished, capsys, monkeypatch):
    runs, _, _ = finished
    prompt = ["--prompt", "Repeat after me: fig kiwi", "--temperature", "0", "--json"]
    assert run_command(["chat", str(runs / "quickstart"), *prompt]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert run_command(["chat", str(runs / "quickstart" / "sft"), *prompt]) == 0
    assert [turn for turn in json.dumps(whole).split('"') if turn == "Repeat after me: fig kiwi"]
    assert run_command(["chat", str(runs / "quickstart"), *prompt, "--compare", "base"]) == 0


@pytest.mark.slow
def test_a_finished_one_is_left_alone_and_an_interrupted_one_goes_on(finished, monkeypatch):
    runs, outcome, _ = finished
    monkeypatch.setenv("ZHIBEI_CACHE", str(runs / "cache"))
    before = (runs / "quickstart" / "summary.json").read_bytes()
    place = find_place(runs, "quickstart", ORDER, is_named=False)
    assert (place.folder.name, place.goes_on) == ("quickstart-2", False)
    with pytest.raises(UserError, match="exists already"):
        find_place(runs, "quickstart", ORDER, is_named=True)
    (runs / "quickstart" / "summary.json").unlink()
    place = find_place(runs, "quickstart", ORDER, is_named=True)
    assert (place.folder.name, place.goes_on) == ("quickstart", True)
    records: list[dict] = []
    again = run_world(place, ORDER, watch=records.append, started=0.0)
    assert not [record for record in records if record["kind"] == "train"]
    assert [stage.score for stage in again.stages] == [stage.score for stage in outcome.stages]
    assert json.loads(before)["stages"][1]["score"] == again.stages[1].score


def test_another_order_does_not_go_on_in_a_foreign_folder(tmp_path: Path):
    first = find_place(tmp_path, "quickstart", ORDER, is_named=False)
    take_place(first, ORDER)
    assert find_place(tmp_path, "quickstart", ORDER, is_named=False).goes_on
    other = find_place(tmp_path, "quickstart", replace(ORDER, seed=1), is_named=False)
    assert (other.folder.name, other.goes_on, other.skipped) == ("quickstart-2", False, (tmp_path / "quickstart",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="nothing that exists is overwritten"):
        find_place(tmp_path, "mine", ORDER, is_named=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "somewhere"], "--model alone"),
        (["--data", "rows.json"], "--data alone"),
        (["--steps", "7"], "--steps has no effect without --model and --data"),
        (["--template", "alpaca"], "--template has no effect"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, tmp_path, capsys):
    assert run_command(["quickstart", "--runs", str(tmp_path / "runs"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_stage_is_checked_before_it_is_trained(tmp_path: Path):
    rows = [{"instruction": f"Say {n}.", "output": f"The number is {n}."} for n in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = {
        "name": "hot",
        "runs": str(tmp_path / "runs"),
        "device": "cpu",
        "model": {"path": str(tiny_model_folder(tmp_path)), "compile": False},
        "data": {"sources": [str(tmp_path / "rows.json")], "template": "alpaca"},
        "sft": {"max_steps": 2, "global_batch": 8, "learning_rate": 0.5},
    }
    run_file = write_run_file(tmp_path / "hot.yaml", settings, about="Far too hot.")
    with pytest.raises(UserError, match="learning_rate"):
        train_stage(run_file, watch=[].append)
    assert not (tmp_path / "runs").exists()
