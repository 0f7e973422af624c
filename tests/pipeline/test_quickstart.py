"""The whole quickstart at a tiny size: world to PPO, the files keep their contract, every stage can be gone on from."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.tiny import tiny_model_folder
from zhibei.cli.app import run_command
from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.pipeline.outcome import Outcome
from zhibei.pipeline.place import Order, find_place, take_place
from zhibei.pipeline.quickstart import run_world
from zhibei.pipeline.stage import train_stage, write_run_file
from zhibei.pipeline.world.files import asked, read_questions

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
    base, tuned, _ = outcome.stages
    assert base.score <= 0.1
    assert tuned.score > base.score
    assert [(step.before, step.after) for step in outcome.steps] == [("base", "sft"), ("sft", "ppo")]
    # In a world this small a handful of answers decide; what the real one reaches is in benchmarks/results.
    assert outcome.steps[0].paired.p_value < 0.1


@pytest.mark.slow
def test_summary_keeps_its_contract(finished):
    runs, outcome, _ = finished
    summary = json.loads((runs / "quickstart" / "summary.json").read_text())
    assert set(summary) == {"stages", "seed", "total_seconds"}
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft", "ppo"]
    for stage in summary["stages"]:
        assert set(stage) == {"name", "metric", "score", "low", "high", "seconds"}
        assert stage["metric"] == "exact_match"
        assert 0 <= stage["low"] <= stage["score"] <= stage["high"] <= 1
    answers = [json.loads(line) for line in (runs / "quickstart" / "answers.jsonl").read_text().splitlines()]
    for stage in outcome.stages:
        assert stage.score == sum(answer["right"][stage.name] for answer in answers) / len(answers)


@pytest.mark.slow
def test_learned_reward_and_true_score_stand_side_by_side(finished):
    """The true scores of the course are those of the models themselves: its ends are the SFT model and the policy."""
    _, outcome, _ = finished
    first, last = outcome.course[0], outcome.course[-1]
    assert (first["step"], first["true_score"], first["kl"]) == (0, outcome.stages[1].score, 0.0)
    assert (last["step"], last["true_score"]) == (4, outcome.stages[2].score)
    assert first["learned_reward"] != last["learned_reward"]
    found = outcome.reward
    assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1
    assert sum(part["pairs"] for part in found["by_origin"].values()) == found["pairs"]
    assert 50 <= found["pairs"] <= 60, "of 60 held-out pairs, those that are no longer two answers are left out"


@pytest.mark.slow
def test_all_stages_are_ordinary_runs_and_the_watcher_hears_of_them(finished):
    runs, _, records = finished
    for name in ("pretrain", "sft", "reward", "ppo"):
        run = runs / "quickstart" / name
        for file in ("run.yaml", "resolved.yaml", "manifest.json", "metrics.jsonl", "proofs.json", "report.html"):
            assert (run / file).is_file(), file
        assert all(proof["passed"] for proof in json.loads((run / "proofs.json").read_text()))
    stages = [record["name"] for record in records if record["kind"] == "stage"]
    assert stages == [
        "world",
        "pretrain",
        "ask base",
        "sft",
        "ask sft",
        "preferences",
        "reward",
        "ppo",
        "ask ppo",
        "handover",
    ]


@pytest.mark.slow
def test_the_policy_is_handed_over_as_gguf_that_is_the_same_model(finished):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    runs, outcome, _ = finished
    assert outcome.handed_over is not None
    (form,) = outcome.handed_over.forms
    assert (form.what, form.path) == ("GGUF Q8_0", runs / "quickstart" / "exports" / "gguf" / "ppo-Q8_0.gguf")
    assert form.path.is_file()
    assert form.parity.failures(form.limits) == []
    assert form.parity.tokenizer.is_whole
    assert form.parity.template.is_whole


@pytest.mark.slow
def test_no_held_out_question_is_in_pairs_or_prompts(finished):
    runs, _, _ = finished
    folder = runs / "quickstart"
    held = {asked(question) for question in read_questions(folder / "world" / "heldout.jsonl")}
    files = [*(folder / "preferences" / "pairs").glob("*.jsonl"), folder / "preferences" / "prompts.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) > 700
    assert not held & {row["prompt"] for row in rows}
    assert not [row for row in rows if row.get("chosen", "") == row.get("rejected", "-")]


def test_what_learns_from_the_reward_model_cannot_see_the_checker():
    """No module of the training stages, nor of what they stand on, imports the world or its checker."""
    root = Path(__file__).parents[2] / "zhibei"
    seen = [
        name
        for folder in ("train", "generate", "model", "losses", "data", "store")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
        if name.startswith(("zhibei.pipeline", "zhibei.evaluate"))
    ]
    assert seen == []


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.slow
def test_the_policy_is_trained_by_the_learned_reward_alone(finished):
    runs, _, _ = finished
    asked_for = read_run(runs / "quickstart" / "ppo.yaml").run.ppo
    assert asked_for.reward is None
    assert asked_for.reward_model == str((runs / "quickstart" / "reward").resolve())


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
    assert not [record for record in records if record["kind"] in ("train", "iteration")]
    assert [stage.score for stage in again.stages] == [stage.score for stage in outcome.stages]
    assert json.loads(before)["stages"][2]["score"] == again.stages[2].score
    assert again.course == outcome.course


@pytest.mark.slow
@pytest.mark.parametrize(("until", "missing"), [("sft", ("preferences", "reward", "ppo")), ("reward", ("ppo",))])
def test_one_that_ended_early_goes_on_to_the_same_result(finished, until, missing, tmp_path, monkeypatch):
    """What is left after a stage is done in the folder that is there; the policy is the one of the whole run."""
    runs, outcome, _ = finished
    monkeypatch.setenv("ZHIBEI_CACHE", str(runs / "cache"))
    folder = runs / f"until-{until}"
    shutil.copytree(runs / "quickstart", folder, ignore=shutil.ignore_patterns(*missing))
    for name in ("sft", "reward", "pretrain"):
        _move_runs(folder / name, runs / "quickstart", folder)
    short = replace(ORDER, until=until)
    (folder / "quickstart.json").write_text(json.dumps(asdict(short)))
    assert not find_place(runs, folder.name, replace(ORDER, until="sft"), is_named=False).goes_on
    place = find_place(runs, folder.name, ORDER, is_named=True)
    assert place.goes_on
    records: list[dict] = []
    again = run_world(place, ORDER, watch=records.append, started=0.0)
    trained = {record["name"] for record in records if record["kind"] == "stage"}
    assert {"reward", "ppo"} <= trained
    assert [stage.score for stage in again.stages] == [stage.score for stage in outcome.stages]
    assert (folder / "summary.json").is_file()


def _move_runs(run: Path, before: Path, after: Path) -> None:
    """Make the paths that a copied run noted those of the copy."""
    for file in (run / "run.yaml", run / "resolved.yaml", run / "manifest.json"):
        if file.is_file():
            file.write_text(file.read_text().replace(str(before.resolve()), str(after.resolve())))


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
        (["--model", "m", "--data", "d", "--until", "ppo"], "--until ppo with your own model and data"),
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
