"""A pipeline runs end to end, goes on where it was killed, and never mixes what was asked before with what is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.small_pipeline import small_pipeline
from zhibei.cli.app import run_command
from zhibei.config.errors import UserError
from zhibei.pipeline.asked import read_asked, require_as_asked, settings_of
from zhibei.pipeline.compared import compare_all
from zhibei.pipeline.evaluation import Measured
from zhibei.pipeline.file import read_pipeline
from zhibei.pipeline.foresee import between_stages, foresee
from zhibei.pipeline.run import run_pipeline
from zhibei.store.metrics import read_metrics


class Killed(Exception):
    """The process is gone."""


def killed_at(stage: str, step: int) -> Any:
    """A watch that kills the run when a checkpoint of a stage is saved."""
    seen = [""]

    def watch(record: dict[str, Any]) -> None:
        if record["kind"] == "stage":
            seen[0] = record["name"]
        if seen[0] == stage and record.get("event") == "saved" and record["step"] == step:
            raise Killed

    return watch


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """A pipeline that was killed in two of its stages and then went on to its end."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZHIBEI_CACHE", str(folder / "cache"))
        pipeline = read_pipeline(small_pipeline(folder))
        for stage, step in (("sft", 2), ("ppo", 1)):
            with pytest.raises(Killed):
                run_pipeline(pipeline, watch=killed_at(stage, step))
            assert (pipeline.folder / "report.html").is_file(), "what is done has its page"
        records: list[dict[str, Any]] = []
        outcome = run_pipeline(pipeline, watch=records.append)
        whole = read_pipeline(folder / "small.yaml", ["name=whole"])
        run_pipeline(whole, watch=lambda record: None)
    return folder, outcome, records


def learned(path: Path) -> list[tuple[int, Any]]:
    records = [record for record in read_metrics(path) if record["kind"] in ("train", "iteration")]
    return [(record["step"], record.get("loss", record.get("reward_mean"))) for record in records]


@pytest.mark.slow
def test_killed_in_any_stage_it_ends_where_it_would_have_ended(done) -> None:
    folder, outcome, records = done
    told = [(record["name"], record["text"]) for record in records if record["kind"] == "stage"]
    assert [name for name, _ in told] == ["sft", "rm", "ppo", "scores", "whole"]
    assert [text for _, text in told][:3] == ["done already", "done already", "goes on"]
    for stage in ("sft", "ppo"):
        figures = [learned(folder / "runs" / name / stage / "metrics.jsonl") for name in ("small", "whole")]
        assert sorted(set(figures[0])) == figures[1]
    assert [entry["name"] for entry in outcome["stages"]] == ["sft", "rm", "ppo", "scores", "whole"]


@pytest.mark.slow
def test_scores_of_all_models_on_the_same_questions(done) -> None:
    folder, outcome, _ = done
    scores = outcome["stages"][3]["scores"]
    assert [model["name"] for model in scores["models"]] == ["base", "sft", "ppo"]
    assert set(scores["scores"]) == {"loss", "right", "judge"}
    assert set(scores["scores"]["loss"]) == {"base", "sft", "ppo"}
    assert len(scores["paired"]["judge"]) == 3
    for found in scores["scores"].values():
        assert all(one["low"] <= one["score"] <= one["high"] for one in found.values())
    page = (folder / "runs/small/report.html").read_text()
    assert 'href="ppo/report.html"' in page
    assert "得分" in page


@pytest.mark.slow
def test_a_finished_pipeline_is_left_alone_and_a_changed_one_is_refused(done, monkeypatch) -> None:
    folder, _, _ = done
    monkeypatch.setenv("ZHIBEI_CACHE", str(folder / "cache"))
    file = folder / "small.yaml"
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/small/ppo/model").iterdir()}
    run_pipeline(read_pipeline(file, ["stages.ppo.log.every=2", "device=cpu"]), watch=lambda record: None)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs/small/ppo/model").iterdir()}
    with pytest.raises(UserError, match=r"sft.beta1 of the finished stage sft was 0.9 and is 0.8"):
        require_as_asked(read_pipeline(file, ["stages.sft.sft.beta1=0.8"]))
    with pytest.raises(UserError, match=r"most of the finished stage scores was 10 and is 9"):
        require_as_asked(read_pipeline(file, ["stages.scores.most=9"]))
    require_as_asked(read_pipeline(file, ["stages.sft.sft.beta1=0.8", "name=other"]))


def test_fields_of_a_newer_version_are_no_change(tmp_path: Path) -> None:
    pipeline = read_pipeline(small_pipeline(tmp_path))
    (pipeline.folder / "sft").mkdir(parents=True)
    (pipeline.folder / "sft/metrics.jsonl").write_text("")
    settings = settings_of(pipeline.stage("sft"), pipeline)
    del settings["sft.neftune_alpha"]
    asked = {"sft": {"kind": "sft", "settings": settings, "inputs": {}}}
    (pipeline.folder / "asked.json").write_text(json.dumps({"format": 1, "stages": asked}))
    require_as_asked(pipeline)
    with pytest.raises(UserError, match="neftune_alpha of the interrupted stage sft was null"):
        require_as_asked(read_pipeline(tmp_path / "small.yaml", ["stages.sft.sft.neftune_alpha=5"]))


@pytest.mark.slow
def test_a_stage_whose_input_was_made_again_is_refused(done, monkeypatch) -> None:
    folder, _, _ = done
    copy = folder / "runs/copy"
    shutil.copytree(folder / "runs/small", copy)
    pipeline = read_pipeline(folder / "small.yaml", ["name=copy"])
    shutil.rmtree(copy / "rm")
    with pytest.raises(UserError) as caught:
        require_as_asked(pipeline)
    assert "the finished stage ppo was made from rm, which is not there any more" in str(caught.value)
    asked = json.loads((copy / "asked.json").read_text())
    del asked["stages"]["ppo"]
    (copy / "asked.json").write_text(json.dumps(asked))
    with pytest.raises(UserError, match="this pipeline has not made it"):
        require_as_asked(pipeline)


@pytest.mark.slow
def test_a_merged_model_is_proved_and_a_stage_can_go_on_from_it(done) -> None:
    folder, outcome, _ = done
    handed = outcome["stages"][4]["handed_over"]
    assert handed["proofs"][0]["failures"] == []
    assert (folder / "runs/small/whole/model/config.json").is_file()
    text = (folder / "small.yaml").read_text() + "  - name: more\n    stage: sft\n    model: {path: $whole}\n"
    (folder / "more.yaml").write_text(text + f"    data: {{sources: [{folder / 'rows.json'}]}}\n")
    pipeline = read_pipeline(folder / "more.yaml")
    found = {one.stage.name: one.state for one in foresee(pipeline, plans=False)}
    assert found == {**dict.fromkeys(("sft", "rm", "ppo", "scores", "whole"), "finished"), "more": "new"}
    assert pipeline.product("whole").endswith("small/whole/model")


@pytest.mark.slow
def test_the_folder_talks_with_its_last_model(done) -> None:
    import zhibei

    folder, _, _ = done
    assert zhibei.load(folder / "runs/small", device="cpu").has_adapters


def test_everything_is_checked_before_anything_runs(tmp_path: Path, capsys, monkeypatch) -> None:
    file = small_pipeline(tmp_path)
    pipeline = read_pipeline(file, ["stages.ppo.data.sources=[nowhere.json]"])
    found = {one.stage.name: one for one in foresee(pipeline, plans=False)}
    assert {name: one.blocks for name, one in found.items()} == {
        "sft": False,
        "rm": False,
        "ppo": True,
        "scores": False,
        "whole": False,
    }
    with pytest.raises(UserError, match=r"nowhere.json"):
        run_pipeline(pipeline, watch=lambda record: None)
    assert not (tmp_path / "runs").exists()
    assert run_command(["run", str(file), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [stage["steps"] for stage in document["stages"][:3]] == [4, 4, 2]
    assert all(stage["peak_gib"] > 0 for stage in document["stages"][:3])
    assert not document["blocks"]
    assert run_command(["check", str(file), "stages.ppo.data.sources=[nowhere.json]"]) == 2
    assert run_command(["plan", str(file), "--machine", "t4"]) == 0
    assert "ppo" in capsys.readouterr().out
    assert run_command(["plan", str(file), "--price", "2"]) == 2


def test_stages_that_go_on_speak_one_template(tmp_path: Path) -> None:
    file = small_pipeline(tmp_path)
    assert list(between_stages(read_pipeline(file))) == []
    faults = list(between_stages(read_pipeline(file, ["stages.rm.data.template=alpaca"])))
    assert [fault.where for fault in faults] == ["command line (stage rm)", "small.yaml:6 (stage ppo)"]
    assert "renders its prompts in the template alpaca" in faults[0].what
    assert "no file" in next(iter(between_stages(read_pipeline(file, ["stages.scores.questions=gone.json"])))).what


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    pipeline = read_pipeline(small_pipeline(tmp_path))
    pipeline.folder.mkdir(parents=True)
    (pipeline.folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no pipeline's folder"):
        read_asked(pipeline)


def test_comparisons_are_those_of_their_formulas() -> None:
    first = Measured("a", "", loss_sums=[2.0, 4.0], loss_tokens=[1, 2], right=[0.0, 1.0], judged=[1.0, 2.0])
    second = Measured("b", "", loss_sums=[1.0, 2.0], loss_tokens=[1, 2], right=[1.0, 1.0], judged=[2.0, 2.0])
    found = compare_all([first, second])
    assert found["scores"]["loss"]["a"]["score"] == 2.0
    assert found["paired"]["loss"][0]["difference"] == -1.0
    assert (found["scores"]["right"]["a"]["score"], found["paired"]["right"][0]["gained"]) == (0.5, 1)
    wins = found["paired"]["judge"][0]
    assert (wins["wins"], wins["losses"], wins["ties"], wins["win_rate"]) == (1, 0, 1, 1.0)
    same = compare_all([first, Measured("c", "", judged=[1.0, 2.0])])["paired"]["judge"][0]
    assert same["win_rate"] is None
    graded = compare_all([Measured("a", "", right=[0.5, 0.25]), Measured("b", "", right=[1.0, 0.75])])
    assert graded["paired"]["right"][0]["difference"] == 0.5
    assert not graded["scores"]["right"]["a"]["is_share"]
