"""Safe changes are written into a copy of the run file that is the same run but for them; the rest is proposed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.doctor.checkup import Found
from zhibei.doctor.pitfall import Finding
from zhibei.doctor.repair import repair, safe_changes, write_repaired

FILE = """\
# mine
model:
  path: m  # the base
data: {sources: [a.json], max_tokens: 512}
sft:
  save_every: 500   # often
"""


def found(name: str, *, is_safe: bool = True, **changes: Any) -> Found:
    fields = {key.replace("__", "."): value for key, value in changes.items()}
    return Found(name, "config", "hours", Finding("what", "where", "do", changes=fields, is_safe=is_safe))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


def test_safe_changes_go_into_a_copy_with_comments_and_the_same_name(file: Path) -> None:
    resolved = read_run(file)
    mended = repair(resolved, [found("a", sft__save_every=50, log__every=5)], file=file)
    new = write_repaired(mended, resolved, file)
    assert new.name == "mine.fixed.yaml"
    assert file.read_text() == FILE
    assert "# mine\n" in new.read_text()
    assert "  save_every: 50   # often\n" in new.read_text()
    run = read_run(new).run
    assert (run.name, run.sft.save_every, run.log.every, run.data.max_tokens) == ("mine", 50, 5, 512)
    assert mended.diff.splitlines()[:2] == ["--- mine.yaml", "+++ mine.yaml (mended)"]
    assert "-  save_every: 500   # often" in mended.diff


def test_a_copy_is_never_written_over(file: Path) -> None:
    resolved = read_run(file)
    mended = repair(resolved, [found("a", sft__save_every=50)], file=file)
    names = [write_repaired(mended, resolved, file).name for _ in range(3)]
    assert names == ["mine.fixed.yaml", "mine.fixed-2.yaml", "mine.fixed-3.yaml"]


def test_unsafe_changes_are_not_made(file: Path) -> None:
    mended = repair(read_run(file), [found("a", is_safe=False, sft__save_every=50)], file=file)
    assert (dict(mended.changes), mended.text, mended.overrides) == ({}, "", ())


def test_what_the_command_line_set_is_mended_there(file: Path) -> None:
    mended = repair(read_run(file, ["sft.save_every=70"]), [found("a", sft__save_every=50)], file=file)
    assert mended.overrides == ("sft.save_every=50",)
    assert mended.text == ""


def test_a_recipe_is_mended_by_settings() -> None:
    resolved = read_run("alpaca-7b")
    mended = repair(resolved, [found("a", sft__save_every=50, model__precision="fp16")], file=None)
    assert mended.overrides == ("sft.save_every=50", "model.precision=fp16")


def test_two_findings_that_disagree_leave_the_field_alone() -> None:
    changes, left = safe_changes([found("a", log__every=1, seed=3), found("b", log__every=2), found("c", seed=3)])
    assert changes == {"seed": 3}
    assert left == ["log.every: a wants 1, b 2"]


def test_what_cannot_be_edited_is_said(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("x: &a {save_every: 5}\n".replace("x: ", "sft: ") + "model: {path: m}\ndata: {sources: [a.json]}\n")
    limit = Found("a", "", "run", Finding("x", "y", "z", changes={"data.sources[0].limit": None}, is_safe=True))
    mended = repair(read_run(file), [limit], file=file)
    assert mended.text == ""
    assert "data.sources[0].limit" in mended.left[0]


def test_a_copy_that_would_be_another_run_is_not_left_behind(file: Path) -> None:
    resolved = read_run(file)
    mended = repair(resolved, [found("a", sft__save_every=50)], file=file)
    other = type(mended)(mended.changes, text=mended.text.replace("512", "300"))
    with pytest.raises(UserError, match=r"would change data\.max_tokens"):
        write_repaired(other, resolved, file)
    assert sorted(path.name for path in file.parent.iterdir()) == ["mine.yaml"]
