"""A folder of several stages stands for its last run; a broken note about that is an error, not a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from zhibei.config.errors import UserError
from zhibei.store.pipeline_dir import PIPELINE_FILE, final_run, write_pipeline


def test_a_pipeline_stands_for_its_last_run_and_any_other_folder_for_itself(tmp_path: Path):
    (tmp_path / "sft").mkdir()
    assert final_run(tmp_path) == tmp_path
    write_pipeline(tmp_path, stages=["pretrain", "sft"], final="sft")
    assert final_run(tmp_path) == tmp_path / "sft"
    assert final_run(tmp_path / "sft") == tmp_path / "sft"
    assert final_run(tmp_path / "nothing") == tmp_path / "nothing"


@pytest.mark.parametrize("note", ['{"final": "ppo"}', '{"final": "../elsewhere"}', '{"final": 3}', "[]", "{"])
def test_a_note_that_names_no_run_is_refused(note: str, tmp_path: Path):
    (tmp_path / "sft").mkdir()
    (tmp_path.parent / "elsewhere").mkdir(exist_ok=True)
    (tmp_path / PIPELINE_FILE).write_text(note)
    with pytest.raises(UserError):
        final_run(tmp_path)
