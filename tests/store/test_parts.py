"""A checkpoint that several processes write in parts is one checkpoint: whole, or not there."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from zhibei.config.errors import UserError
from zhibei.store.checkpoint import Draft, check_checkpoint, load_checkpoint, newest_sound, save_checkpoint, step_path
from zhibei.store.checkpoint_files import share_bytes, write_share
from zhibei.store.parts import Part, Span, uncovered
from zhibei.store.verify import inspect_folder

WEIGHT = torch.arange(70, dtype=torch.float32).reshape(7, 10)
HALF = torch.arange(12).reshape(3, 2, 2).to(torch.bfloat16)
WORLD = 3


def share_of(rank: int) -> dict[str, dict[str, torch.Tensor | Part]]:
    """Rank 0 has three rows, rank 1 three, rank 2 one; of the smaller tensor rank 2 has none."""
    rows = (slice(0, 3), slice(3, 6), slice(6, 7))[rank]
    model: dict[str, torch.Tensor | Part] = {"weight": Part(WEIGHT[rows], rows.start, 7)}
    if rank < 2:
        rows = (slice(0, 2), slice(2, 3))[rank]
        model["half"] = Part(HALF[rows], rows.start, 3)
    if rank == 0:
        model["score"] = torch.ones(4)
    return {"model": model, "random": {f"cpu.{rank}" if rank else "cpu": torch.tensor([rank], dtype=torch.uint8)}}


def write_together(checkpoints: Path, step: int) -> Path:
    needed = sum(share_bytes(share_of(rank), rank=rank, world=WORLD) for rank in range(WORLD))
    state = {"run_id": "run"}
    draft = Draft(checkpoints, step, groups=["model", "random"], state=state, needed_bytes=needed, world=WORLD)
    lines = []
    for rank in (2, 0, 1):
        lines += write_share(draft.folder, share_of(rank), purpose=draft.purpose, rank=rank, world=WORLD)
    return draft.commit(lines)


def test_parts_are_read_back_whole_and_by_rows(tmp_path: Path) -> None:
    path = write_together(tmp_path, 4)
    assert check_checkpoint(path, step=4) == []
    assert inspect_folder(path).is_sound
    groups, state = load_checkpoint(path)
    model = groups["model"]
    assert state["step"] == 4
    assert set(model) == {"weight", "half", "score"}
    assert {name: model.shape(name) for name in model} == {"weight": (7, 10), "half": (3, 2, 2), "score": (4,)}
    assert torch.equal(model["weight"], WEIGHT)
    assert torch.equal(model["half"], HALF)
    assert model["half"].dtype == model.dtype("half") == torch.bfloat16
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(model.rows("weight", start, stop), WEIGHT[start:stop])
    assert torch.equal(model.rows("score", 1, 3), torch.ones(2))
    assert {name: int(value) for name, value in groups["random"].items()} == {"cpu": 0, "cpu.1": 1, "cpu.2": 2}


def test_until_the_last_one_is_done_there_is_no_checkpoint(tmp_path: Path) -> None:
    older = write_together(tmp_path, 1)
    draft = Draft(tmp_path, 2, groups=["model"], state={"run_id": "run"}, needed_bytes=0, world=WORLD)
    lines = write_share(draft.folder, share_of(0), purpose=draft.purpose, rank=0, world=WORLD)
    found = newest_sound(tmp_path)
    assert found is not None
    assert found.path == older
    with pytest.raises(UserError, match=r"rows 3 to 7 are missing"):
        draft.commit(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    draft = Draft(tmp_path, 2, groups=["model"], state={"run_id": "run"}, needed_bytes=0, world=WORLD)
    draft.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def without_rank_1(path: Path, record: dict) -> None:
    for line in record["files"]:
        if line.get("rank") == 1:
            (path / line["name"]).unlink()
    record["files"] = [line for line in record["files"] if line.get("rank") != 1]


def rows_of_another(path: Path, record: dict) -> None:
    line = next(line for line in record["files"] if line["name"].startswith("model.rank-00002"))
    line["rows"]["weight"] = [5, 7, 7]


def no_numbers(path: Path, record: dict) -> None:
    record["files"][0]["rows"] = {"weight": ["a", "b", "c"]}


def of_the_future(path: Path, record: dict) -> None:
    record["format"] = 3


def a_file_of_another_save(path: Path, record: dict) -> None:
    line = next(line for line in record["files"] if line["name"].startswith("model.rank-00001"))
    os.truncate(path / line["name"], 10)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_rank_1, r"rows 3 to 6 are missing \(of 7\)"),
        (rows_of_another, "rows are there twice"),
        (no_numbers, "not as zhibei writes it"),
        (of_the_future, "of a newer zhibei"),
        (a_file_of_another_save, "truncated to 10"),
    ],
)
def test_damage_is_seen_and_the_older_one_is_found(damage, said: str, tmp_path: Path) -> None:
    older, newer = write_together(tmp_path, 1), write_together(tmp_path, 2)
    record = json.loads((newer / "files.json").read_text())
    damage(newer, record)
    (newer / "files.json").write_text(json.dumps(record))
    problems = check_checkpoint(newer, step=2)
    assert any(re.search(said, problem.what) for problem in problems), problems
    assert not inspect_folder(newer).is_sound
    found = newest_sound(tmp_path)
    assert found is not None
    assert found.path == older


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, groups={"model": {"weight": WEIGHT}}, state={"run_id": "run"})
    record = json.loads((path / "files.json").read_text())
    record["format"] = 1
    del record["world"]
    (path / "files.json").write_text(json.dumps(record))
    assert check_checkpoint(step_path(tmp_path, 1), step=1) == []
    groups, _ = load_checkpoint(path)
    assert torch.equal(groups["model"].rows("weight", 2, 4), WEIGHT[2:4])


def test_rows_that_none_or_two_hold_are_named() -> None:
    assert uncovered([Span(2, 4, 4), Span(0, 2, 4)]) is None
    assert uncovered([Span(0, 2, 4), Span(3, 4, 4)]) == "rows 2 to 3 are missing (of 4)"
    assert uncovered([Span(0, 3, 4), Span(2, 4, 4)]) == "rows are there twice (of 4)"
    assert uncovered([Span(0, 3, 4)]) == "rows 3 to 4 are missing (of 4)"
