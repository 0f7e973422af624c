"""metrics.jsonl survives kills and resumes as one curve, and the mirrors get the same numbers."""

from __future__ import annotations

import builtins
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from zhibei.config.errors import UserError
from zhibei.store.metrics import Metrics, read_metrics, rewind_metrics


def write_steps(run_dir: Path, *steps: int, **options: Any) -> list[str]:
    with Metrics(run_dir, **{"tensorboard": False, **options}) as metrics:
        for step in steps:
            metrics.write({"kind": "train", "step": step, "loss": 10.0 / step, "learning_rate": 1e-4})
        return metrics.notes


def test_records_come_back_and_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        record = {
            "kind": "train",
            "step": 1,
            "time": 5.0,
            "loss": 0.5,
            "text": "指北",
            "peak_gib": None,
            "is_best": True,
        }
        metrics.write(record)
        assert read_metrics(tmp_path / "metrics.jsonl") == [record]
        metrics.write({"kind": "event", "step": 1, "event": "saved"})
    later = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert later["time"] > 1.7e9
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_nan_and_infinity_are_null_in_the_file_and_floats_when_read(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.write({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": -math.inf, "tokens": 3})
    line = (tmp_path / "metrics.jsonl").read_text()
    raw = json.loads(line, parse_constant=lambda spelling: pytest.fail(f"{spelling} is not JSON"))
    assert (raw["loss"], raw["grad_norm"], raw["not_finite"]) == (None, None, {"loss": "nan", "grad_norm": "-inf"})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["tokens"]) == (-math.inf, 3)


def test_a_torn_last_line_is_left_out_and_said_and_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        notes: list[str] = []
        assert [record["step"] for record in read_metrics(path, notes=notes)] == [1, 2]
        assert notes == ["metrics.jsonl, line 3: cut in the middle (the process was killed); left out"]
    path.write_bytes(b"{" + whole)
    with pytest.raises(UserError) as caught:
        read_metrics(path)
    assert caught.value.where == f"{path}, line 1"
    path.write_bytes(whole + b"[1]\n")
    with pytest.raises(UserError, match="not an object with kind and step"):
        read_metrics(path)


def test_a_resumed_curve_does_not_fork_and_nothing_is_lost(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4, 5)
    path = tmp_path / "metrics.jsonl"
    before = read_metrics(path)
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')
    notes = write_steps(tmp_path, 4, 5, 6, resume_at_step=3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[:3] == before[:3]
    assert read_metrics(tmp_path / "metrics.dropped.jsonl") == before[3:]
    assert len(notes) == 2
    assert "line 6: cut" in notes[0]
    assert notes[1].startswith("2 records after step 3 moved")


def test_a_whole_last_line_without_its_newline_is_kept_on_its_own_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(tmp_path, 3, resume_at_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_rewinding_what_is_already_whole_changes_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    assert rewind_metrics(path, step=2) == []
    assert path.read_bytes() == before
    assert not (tmp_path / "metrics.dropped.jsonl").exists()


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("torch.utils.tensorboard")
    write_steps(tmp_path, 1, 2, 3, 4, tensorboard=True)
    write_steps(tmp_path, 3, 4, 5, tensorboard=True, resume_at_step=2)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == [1, 2, 3, 4, 5]
    assert [event.value for event in curve] == pytest.approx([10 / step for step in (1, 2, 3, 4, 5)])
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/learning_rate"}


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Importing these modules fails as if they were not installed."""
    real_import = builtins.__import__

    def hidden(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith(names):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", hidden)


def test_without_tensorboard_one_note_and_the_metrics_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "torch.utils.tensorboard")
    notes = write_steps(tmp_path, 1, tensorboard=True)
    assert len(notes) == 1
    assert 'pip install "zhibei[track]"' in notes[0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wandb_that_is_asked_for_and_absent_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "wandb")
    with pytest.raises(UserError) as caught:
        write_steps(tmp_path, 1, wandb="my-project")
    assert 'pip install "zhibei[wandb]"' in caught.value.fix


class FakeWandb(types.ModuleType):
    """Records what a run sends; has the three calls that we make."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.num_finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        self.id = options["id"] or "new-id"
        return self

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.num_finished += 1


def test_wandb_gets_the_numbers_and_a_resume_goes_into_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write_steps(tmp_path, 1, wandb="my-project", run_name="my-run", config={"seed": 1})
    write_steps(tmp_path, 2, wandb="my-project", run_name="my-run", resume_at_step=1)
    assert fake.inits[0] == {
        "project": "my-project", "name": "my-run", "config": {"seed": 1}, "dir": str(tmp_path), "id": None,
        "resume": "allow",
    }  # fmt: skip
    assert fake.inits[1]["id"] == "new-id"
    assert fake.logged == [{"train/loss": 10.0 / step, "train/learning_rate": 1e-4, "step": step} for step in (1, 2)]
    assert fake.num_finished == 2


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.close()
    metrics.close()
