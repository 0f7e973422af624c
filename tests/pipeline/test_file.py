"""A pipeline file is as strict as a run file: every fault has its place, and a sound file means what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.small_pipeline import small_pipeline
from zhibei.config.errors import SeveralErrors, UserError
from zhibei.pipeline.file import is_pipeline, read_pipeline
from zhibei.pipeline.kinds import KINDS, refers_to


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return small_pipeline(tmp_path)


def changed(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    other = file.parent / "changed.yaml"
    other.write_text(text.replace(old, new, 1))
    return other


def fault_of(path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read_pipeline(path, overrides)
    return caught.value


def test_stages_take_what_is_shared_and_their_own_wins(file: Path) -> None:
    pipeline = read_pipeline(file, ["stages.rm.seed=5", "data.max_tokens=100"])
    assert [(stage.name, stage.kind) for stage in pipeline.stages] == [
        ("sft", "sft"),
        ("rm", "reward"),
        ("ppo", "ppo"),
        ("scores", "evaluate"),
        ("whole", "merge"),
    ]
    runs = {stage.name: stage.resolved({}, runs=pipeline.folder) for stage in pipeline.stages[:3]}
    assert [run.run.seed for run in runs.values()] == [1, 5, 1]
    assert {run.run.data.max_tokens for run in runs.values()} == {100}
    assert runs["ppo"].run.model.path == "$sft"
    assert runs["ppo"].origins["ppo.reward_model"] == "small.yaml:21"
    assert runs["rm"].origins["seed"] == "command line"
    placed = pipeline.stage("ppo").resolved({"sft": "/a/sft", "rm": "/a/rm"}, runs=Path("/a")).run
    assert (placed.model.path, placed.ppo.reward_model, placed.name, placed.runs) == ("/a/sft", "/a/rm", "ppo", "/a")


def test_the_text_of_a_stage_is_a_run_file_of_its_own(file: Path, tmp_path: Path) -> None:
    from zhibei.config.read import read_run

    pipeline = read_pipeline(file)
    resolved = pipeline.stage("sft").resolved({}, runs=pipeline.folder)
    (tmp_path / "alone.yaml").write_text(resolved.text)
    assert read_run(tmp_path / "alone.yaml").run == resolved.run


@pytest.mark.parametrize(
    ("old", "new", "what", "fix", "line"),
    [
        ("$rm\n      min", "$sft\n      min", "makes a language model", "kind that is needed", 21),
        ("path: $sft}", "path: $sfd}", "there is no stage 'sfd'", "did you mean $sft?", 14),
        ("path: $sft}", "path: $ppo}", "comes later", "change their order", 14),
        ("path: $sft}", "path: $rm}", "is this stage itself", "change their order", 14),
        ("judge: $rm", "judge: ${rm}", "not how stages are named", "write $rm", 34),
        ("judge: $rm", "juge: $rm", "unknown key 'juge'", "did you mean judge?", 34),
        ("most: 10", "most: ten", "most is the text 'ten'", "whole number", 36),
        ("min_reward_accuracy", "min_reward_acuracy", "unknown key", "did you mean ppo.min_reward_accuracy?", 22),
        ("name: rm", "name: sft", "two stages are named sft", "rename", 12),
        ("name: rm", "name: r-m", "is named 'r-m'", "name", 12),
        ("stage: reward", "stage: rewrad", "no stage 'rewrad'", "stage: reward?", 13),
        ("seed: 1", "sed: 1", "unknown key 'sed'", "did you mean seed?", 3),
        ("seed: 1", "sft: {epochs: 1}", "unknown key 'sft'", "belongs to a stage", 3),
        ("    data: {s", "    recipe: alpaca-7\n    data: {s", "no recipe 'alpaca-7'", "alpaca-7b", 10),
        ("    data: {s", "    runs: there\n    data: {s", "its own folder of runs", "top of the file", 10),
    ],
)
def test_a_fault_names_its_line_and_the_nearest_right_thing(
    file: Path, old: str, new: str, what: str, fix: str, line: int
) -> None:
    found = fault_of(changed(file, old, new))
    first = found.errors[0] if isinstance(found, SeveralErrors) else found
    assert what in first.what
    assert fix in first.fix + first.expected
    assert f"changed.yaml:{line}:" in first.where


def test_settings_on_the_command_line_name_a_stage_that_exists(file: Path) -> None:
    assert "did you mean stages.ppo?" in fault_of(file, "stages.pp.seed=1").fix
    assert fault_of(file, "stages.ppo.ppo.epochs=no").where == "command line: stages.ppo.ppo.epochs (stage ppo)"
    assert "stages.NAME" in fault_of(file, "stages=3").expected


def test_an_evaluation_that_measures_nothing_is_refused(file: Path) -> None:
    alone = changed(file, "    check: contains\n    judge: $rm\n", "")
    assert "nothing judges the answers" in fault_of(alone).what
    assert "without questions" in fault_of(changed(file, "    questions: $ppo\n", "")).what


def test_a_list_of_stages_makes_a_pipeline(file: Path, tmp_path: Path) -> None:
    assert is_pipeline(file)
    run = tmp_path / "run.yaml"
    run.write_text("model: {path: a}\n")
    assert not is_pipeline(run)
    assert "no list of stages" in fault_of(run).what
    run.write_text("stages: []\n")
    assert "stages is empty" in fault_of(run).what
    run.write_text("stages: [3]\n")
    assert "stage 1 is the number 3" in fault_of(run).what


def test_braces_in_a_flow_mapping_say_how_stages_are_named(file: Path) -> None:
    assert "$NAME" in fault_of(changed(file, "{path: $sft, ", "{path: ${sft}, ")).fix


def test_a_pipeline_given_as_a_run_and_a_name_that_is_not_shipped_say_what_to_do(file: Path) -> None:
    from zhibei.config.read import read_run

    with pytest.raises(UserError, match="several stages") as caught:
        read_run(file)
    assert caught.value.fix == f"run them with: zhibei run {file}"
    assert "did you mean coati-7b?" in fault_of(Path("coati-7")).fix
    assert read_pipeline(file, ["name=x y"]).command == f"zhibei run {file} 'name=x y'"


def test_every_kind_says_what_it_takes() -> None:
    for name, kind in KINDS.items():
        assert kind.trains == (not kind.settings)
        assert all(setting.meaning for setting in kind.settings.values())
        assert refers_to(name)
