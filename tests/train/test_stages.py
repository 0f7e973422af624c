"""Stages without a training loop are refused before anything is written, and the error says what can be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.small_run import small_run
from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.train.offline import run_dir_of, train


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_stage_without_a_loop_is_refused_before_anything_is_written(stage: str, tmp_path: Path) -> None:
    small_run(tmp_path)
    file = tmp_path / "stage.yaml"
    file.write_text(
        f"stage: {stage}\nruns: {tmp_path / 'runs'}\nmodel: {{path: {tmp_path / 'tiny-llama'}}}\n"
        f"data: {{sources: [{tmp_path / 'rows.json'}]}}\n"
    )
    resolved = read_run(str(file))
    with pytest.raises(UserError, match=f"stage {stage} cannot be trained") as caught:
        train(resolved)
    assert "zhibei check" in caught.value.fix
    assert caught.value.where == "stage"
    assert not run_dir_of(resolved.run).path.exists()
