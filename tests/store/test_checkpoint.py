"""A checkpoint is complete or absent: damage is seen and named, and an older sound one is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zhibei.config.errors import UserError
from zhibei.store import files as files_module
from zhibei.store import locks
from zhibei.store.checkpoint import (
    check_checkpoint,
    list_steps,
    load_checkpoint,
    newest_sound,
    prune,
    save_checkpoint,
    step_path,
)
from zhibei.store.files import HashedFile, write_json_atomic
from zhibei.store.folders import clean_left_overs, whole_folder
from zhibei.store.shards import LazyTensor

REPOSITORY = Path(__file__).resolve().parents[2]


def groups_of(step: int, *, num_floats: int = 50) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.arange(num_floats, dtype=torch.float32) * step
    return {
        "model": {"embed": weight, "head": weight},
        "optimizer": {"exp_avg": weight + 1, "step": torch.tensor(step)},
        "random": {"cpu": torch.get_rng_state()},
    }


def save(checkpoints: Path, *steps: int, run_id: str = "run") -> list[Path]:
    return [save_checkpoint(checkpoints, step, groups=groups_of(step), state={"run_id": run_id}) for step in steps]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    groups = {**groups_of(7), "empty": {}}
    state = {"run_id": "run", "cursor": {"epoch": 1, "row": 17}, "best_loss": None, "name": "指北 \ud800"}
    path = save_checkpoint(tmp_path, 7, groups=groups, state=state)
    assert path == step_path(tmp_path, 7)
    assert [child.name for child in tmp_path.iterdir()] == ["step-000007"]
    loaded, loaded_state = load_checkpoint(path)
    assert {name: loaded_state[name] for name in state} == state
    assert loaded_state["step"] == 7
    assert loaded.keys() == groups.keys()
    for group, tensors in groups.items():
        assert set(loaded[group]) == set(tensors)
        assert all(torch.equal(loaded[group][name], tensor) for name, tensor in tensors.items())
    assert loaded["model"].tied == {"head": "embed"}
    found = newest_sound(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.notes) == (path, 7, [])


def test_nothing_there_is_none_and_not_an_error(tmp_path: Path) -> None:
    assert newest_sound(tmp_path) is None
    assert newest_sound(tmp_path / "absent") is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 20)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(bytes(content))


def damage_record(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["files"][0]["sha256"]
    path.write_text(json.dumps(record))


DAMAGES = {
    "truncated file": ("model.safetensors", truncate, "truncated to"),
    "flipped bit": ("optimizer.safetensors", flip_one_bit, "hash differs"),
    "missing file": ("random.safetensors", Path.unlink, "missing"),
    "grown file": ("model.safetensors", lambda path: path.write_bytes(path.read_bytes() + b"\0"), "grown to"),
    "missing list": ("files.json", Path.unlink, "cannot be read"),
    "cut list": ("files.json", truncate, "not JSON"),
    "list without hashes": ("files.json", damage_record, "not as zhibei writes it"),
    "empty state": ("state.json", lambda path: path.write_text(""), "not JSON"),
    "changed state": ("state.json", lambda path: path.write_text(path.read_text().replace("run", "ran")), "hash"),
    "extra file": ("model.bin", lambda path: path.write_bytes(b"x"), "not in files.json"),
}


@pytest.mark.parametrize(("file_name", "damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_older_sound_checkpoint_is_found(file_name, damage, said, tmp_path: Path) -> None:
    older, newer = save(tmp_path, 100, 200)
    assert check_checkpoint(newer, step=200) == []
    damage(newer / file_name)
    found = newest_sound(tmp_path)
    assert found is not None
    assert found.path == older
    assert any(said in note.what and file_name in note.path for note in found.notes), found.notes
    loaded, state = load_checkpoint(found.path)
    assert state["step"] == 100
    assert torch.equal(loaded["model"]["embed"], groups_of(100)["model"]["embed"])


def test_a_group_that_was_removed_together_with_its_line_is_missed(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    record = json.loads((path / "files.json").read_text())
    record["files"] = [item for item in record["files"] if not item["name"].startswith("optimizer")]
    (path / "files.json").write_text(json.dumps(record))
    (path / "optimizer.safetensors").unlink()
    assert [problem.what for problem in check_checkpoint(path)] == ["no file of group optimizer"]


def test_a_checkpoint_under_the_name_of_another_step_is_not_sound(tmp_path: Path) -> None:
    (older,) = save(tmp_path, 100)
    shutil.copytree(older, step_path(tmp_path, 300))
    found = newest_sound(tmp_path)
    assert found is not None
    assert found.step == 100
    assert [note.what for note in found.notes] == ["holds step [100], its name says 300"]


def test_without_hashes_sizes_are_seen_and_bits_are_not(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    flip_one_bit(path / "model.safetensors")
    assert check_checkpoint(path, with_hashes=False) == []
    assert len(check_checkpoint(path)) == 1
    truncate(path / "model.safetensors")
    assert len(check_checkpoint(path, with_hashes=False)) == 1


def test_checkpoints_of_which_none_is_sound_are_an_error_that_names_each(tmp_path: Path) -> None:
    for path in save(tmp_path, 100, 200):
        truncate(path / "model.safetensors")
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as caught:
        newest_sound(tmp_path)
    assert "2 checkpoints, none of them sound" in caught.value.what
    assert "step-000100/model.safetensors: truncated" in caught.value.what
    assert "step-000200/model.safetensors: truncated" in caught.value.what
    assert snapshot(tmp_path) == before


def test_another_runs_step_is_not_replaced_and_the_same_runs_is(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 5, run_id="first")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="belongs to run first; this is run second"):
        save(tmp_path, 5, run_id="second")
    assert snapshot(tmp_path) == before
    save_checkpoint(tmp_path, 5, groups=groups_of(6), state={"run_id": "first"})
    assert torch.equal(load_checkpoint(path)[0]["model"]["embed"], groups_of(6)["model"]["embed"])
    truncate(path / "state.json")
    save(tmp_path, 5, run_id="first")
    assert check_checkpoint(path, step=5) == []
    assert list(tmp_path.iterdir()) == [path]


def test_nan_in_the_state_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, groups={}, state={"best_loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = snapshot(tmp_path)
    monkeypatch.setattr(files_module, "free_bytes", lambda folder: 2**20)
    with pytest.raises(UserError, match=r"bytes needed, 1,048,576 bytes free") as caught:
        save(tmp_path, 2)
    assert "keep_checkpoints" in caught.value.fix
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_in_the_middle_leaves_only_the_older_checkpoints(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    before = snapshot(tmp_path)
    real_write = HashedFile.write

    def write(self: HashedFile, data: bytes | memoryview) -> None:
        if self.path.name == "optimizer.safetensors":
            raise OSError(number, os.strerror(number), str(self.path))
        real_write(self, data)

    monkeypatch.setattr(HashedFile, "write", write)
    with pytest.raises(UserError) as caught:
        save(tmp_path, 2)
    said_full = "full" in caught.value.what
    assert said_full == (number != errno.EIO)
    assert "optimizer.safetensors" in caught.value.where
    assert snapshot(tmp_path) == before
    monkeypatch.undo()
    save(tmp_path, 2)
    assert [step for step, _ in list_steps(tmp_path)] == [1, 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MiB, which needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "zhibei-test", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_before_and_in_the_middle_of_a_save(small_disk: Path) -> None:
    checkpoints = small_disk / "checkpoints"
    save(checkpoints, 1)
    before = snapshot(checkpoints)
    too_large = {"model": {"weight": torch.zeros(2**20)}}
    with pytest.raises(UserError, match="the disk is too full for checkpoint step-000002"):
        save_checkpoint(checkpoints, 2, groups=too_large, state={"run_id": "run"})
    filler = small_disk / "of_another_program"

    def fill_the_disk() -> torch.Tensor:
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 2**16)
            except OSError:
                return torch.zeros(2**18)

    fits_at_first = {"model": {"weight": LazyTensor(torch.float32, (2**18,), fill_the_disk)}}
    with pytest.raises(UserError, match="the disk or quota is full"):
        save_checkpoint(checkpoints, 3, groups=fits_at_first, state={"run_id": "run"})
    assert snapshot(checkpoints) == before
    with pytest.raises(UserError, match=r"could not write state\.json: the disk or quota is full"):
        write_json_atomic(checkpoints / "state.json", {"text": "x" * 10**6})
    assert snapshot(checkpoints) == before
    filler.unlink()
    found = newest_sound(checkpoints)
    assert found is not None
    assert (found.step, found.notes) == (1, [])
    save(checkpoints, 4)


def test_left_overs_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    dead_pid = subprocess.Popen([sys.executable, "-c", ""])
    dead_pid.wait()
    dead = tmp_path / f".writing-step-000002-{dead_pid.pid}"
    alive = tmp_path / f".writing-step-000003-{os.getppid()}"
    foreign = tmp_path / ".writing-my-notes"
    for folder in (dead, alive, foreign):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    removing = tmp_path / f".removing-step-000000-{os.getppid()}"
    removing.mkdir()
    found = newest_sound(tmp_path)
    assert found is not None
    assert [note.path for note in found.notes] == [str(dead)]
    assert {child.name for child in tmp_path.iterdir()} == {path.name, alive.name, foreign.name}


def test_a_step_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    before = snapshot(path)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    path.rename(tmp_path / f".replaced-step-000001-{process.pid}")
    found = newest_sound(tmp_path)
    assert found is not None
    assert "the older one is back" in found.notes[0].what
    assert snapshot(path) == before


def test_a_folder_being_filled_by_another_thread_is_neither_cleaned_nor_filled_twice(tmp_path: Path) -> None:
    final = tmp_path / "step-000001"
    entered, leave = threading.Event(), threading.Event()

    def fill() -> None:
        with whole_folder(final, purpose="a test") as folder:
            (folder / "a").write_text("first")
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=fill)
    thread.start()
    assert entered.wait(30)
    assert clean_left_overs(tmp_path) == []
    with (
        pytest.raises(UserError, match="another thread or process is writing"),
        whole_folder(final, purpose="a test"),
    ):
        raise AssertionError("two writers of one folder")
    leave.set()
    thread.join()
    assert snapshot(tmp_path) == {"step-000001/a": b"first"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_goes_by_process_numbers(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    save(tmp_path, 1)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for pid in (process.pid, os.getppid()):
        (tmp_path / f".writing-step-000002-{pid}").mkdir()
        (tmp_path / ".writing-step-000002.lock").touch()
    found = newest_sound(tmp_path)
    assert found is not None
    assert [note.path for note in found.notes] == [str(tmp_path / f".writing-step-000002-{process.pid}")]


CONCURRENT = """
import sys, pathlib, torch
from tests.store.test_checkpoint import save
torch.set_num_threads(1)
checkpoints, first = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for step in range(5):
    save(checkpoints, first + 2 * step)
    save(checkpoints, 1000)
"""


@pytest.mark.slow
def test_two_processes_saving_at_once_leave_only_sound_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONCURRENT, str(tmp_path)]
    processes = [subprocess.Popen([*command, first], cwd=REPOSITORY) for first in ("1", "2")]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert {step for step, _ in list_steps(tmp_path)} == {*range(1, 11), 1000}
    assert all(check_checkpoint(path, step=step) == [] for step, path in list_steps(tmp_path))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_prune_keeps_the_newest_the_best_and_the_newest_sound(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4, 5)
    assert prune(tmp_path, keep=2, protect=[paths[0]]) == [paths[2], paths[1]]
    assert [step for step, _ in list_steps(tmp_path)] == [1, 4, 5]
    assert prune(tmp_path, keep=2, protect=[paths[0]], verified=paths[4]) == []


def test_prune_never_removes_the_newest_sound_checkpoint(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4)
    truncate(paths[2] / "model.safetensors")
    flip_one_bit(paths[3] / "model.safetensors")
    assert prune(tmp_path, keep=1) == [paths[0]]
    found = newest_sound(tmp_path)
    assert found is not None
    assert found.path == paths[1]
    assert all(path.exists() for path in paths[1:])


@pytest.mark.slow
def test_sixty_kills_leave_a_sound_checkpoint_each_time(tmp_path: Path, record_property) -> None:
    """The newest checkpoint is never older than the last save that had returned, and holds exactly that step."""
    script = REPOSITORY / "tests" / "store" / "kill_trials.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(tmp_path / "run"), "60", "20260801"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    trials = json.loads(done.stdout)
    assert len(trials) == 60
    for trial in trials:
        assert trial["killed"], trial
        assert trial["tensors_equal"], trial
        assert trial["curve_is_whole"], trial
        assert trial["left_overs"] == [], trial
        assert trial["reported_step"] <= trial["sound_step"] <= trial["reported_step"] + 1, trial
    inside = sum(trial["inside_a_save"] for trial in trials)
    record_property("kills_inside_a_save", f"{inside} of {len(trials)}")
    assert inside >= 10
    assert trials[-1]["sound_step"] > 10
