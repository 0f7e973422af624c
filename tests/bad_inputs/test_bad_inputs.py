"""Every bad input is stopped before training, or handled and said so; every sound one is left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs.cases import CASES, VARIANTS
from tests.bad_inputs.controls import CONTROLS
from tests.bad_inputs.place import Models
from tests.bad_inputs.recipes import recipe_controls
from tests.bad_inputs.scenario import Control, Scenario
from tests.bad_inputs.trial import run_control, run_scenario


@pytest.mark.parametrize("scenario", [*CASES, *VARIANTS], ids=lambda scenario: scenario.id)
def test_a_bad_input_is_named_with_value_place_and_remedy(scenario: Scenario, tmp_path: Path, models: Models) -> None:
    _, judgement, seen = run_scenario(scenario, tmp_path / "place", models)
    assert (judgement.is_right, judgement.grade) == (True, "A"), f"{judgement.faults}\n{seen.text}"


@pytest.mark.parametrize("control", [*CONTROLS, *recipe_controls()], ids=lambda control: control.id)
def test_a_sound_input_is_left_in_peace(control: Control, tmp_path: Path, models: Models) -> None:
    judgement, seen = run_control(control, tmp_path / "place", models)
    assert judgement.verdict == "clean", f"{judgement.faults}\n{seen.text}"


def test_ids_are_unique() -> None:
    ids = [scenario.id for scenario in [*CASES, *VARIANTS]]
    assert len(ids) == len(set(ids))
    assert len(CASES) == 68
