"""Every stage of the run file has a loop."""

from __future__ import annotations

from zhibei.config.effects import STAGES
from zhibei.train.loops import LOOPS
from zhibei.train.materials import TASKS


def test_every_stage_has_one_loop() -> None:
    assert set(STAGES) == set(LOOPS) | set(TASKS)
    assert not set(LOOPS) & set(TASKS)
