"""Every bad input is stopped before training, or handled and said so; every sound one is left in peace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs.cases import CASES, VARIANTS
from tests.bad_inputs.controls import CONTROLS
from tests.bad_inputs.place import Models, Place
from tests.bad_inputs.recipes import recipe_controls
from tests.bad_inputs.scenario import Control, Scenario
from tests.bad_inputs.trial import run_control, run_scenario, try_command


@pytest.mark.parametrize("scenario", [*CASES, *VARIANTS], ids=lambda scenario: scenario.id)
def test_a_bad_input_is_named_with_value_place_and_remedy(scenario: Scenario, tmp_path: Path, models: Models) -> None:
    _, judgement, seen = run_scenario(scenario, tmp_path / "place", models)
    assert (judgement.is_right, judgement.grade) == (True, "A"), f"{judgement.faults}\n{seen.text}"


@pytest.mark.parametrize("control", [*CONTROLS, *recipe_controls()], ids=lambda control: control.id)
def test_a_sound_input_is_left_in_peace(control: Control, tmp_path: Path, models: Models) -> None:
    judgement, seen = run_control(control, tmp_path / "place", models)
    assert judgement.verdict == "clean", f"{judgement.faults}\n{seen.text}"


def test_a_refused_run_loads_no_torch(tmp_path: Path, models: Models) -> None:
    place = Place(tmp_path / "place", models)
    place.set("sft.warmup_steps", 500)
    command = place.write()
    code = (
        f"import sys; from zhibei.cli.app import run_command; code = run_command({command!r}); "
        "sys.exit(code if 'torch' not in sys.modules else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "warmup" in done.stderr


def test_as_json_a_refusal_is_one_document(tmp_path: Path, models: Models) -> None:
    place = Place(tmp_path / "place", models)
    place.set("sft.learning_rate", 5.0)
    for verb in ("check", "train"):
        place.verb = verb
        seen = try_command([*place.write(), "--json"], place.folder)
        assert seen.exit_code == 2
        assert isinstance(json.loads(seen.stdout), dict)


def test_the_real_command_leaves_the_same_exit_code(tmp_path: Path, models: Models) -> None:
    scenario = next(case for case in CASES if case.id == "d10_null_answer")
    _, judgement, seen = run_scenario(scenario, tmp_path / "place", models, in_process=False)
    assert (judgement.grade, seen.exit_code) == ("A", 2), seen.text


def test_ids_are_unique() -> None:
    ids = [scenario.id for scenario in [*CASES, *VARIANTS]]
    assert len(ids) == len(set(ids))
    assert len(CASES) == 68
