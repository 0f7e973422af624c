"""Checkpoints written beside the training, by one rank or several: copies, failures, and ranks that die."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.train.small_run import small_run
from tests.train.test_ranks import free_port
from tests.train.test_sft import losses
from zhibei.config.errors import UserError
from zhibei.model.ranks import ALONE
from zhibei.store.checkpoint import check_checkpoint, list_steps, load_checkpoint, newest_sound
from zhibei.store.files import HashedFile
from zhibei.store.metrics import Metrics, read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train import saving
from zhibei.train.offline import conclude_save, train
from zhibei.train.record import Recorder, ignore
from zhibei.train.saving import Saver
from zhibei.train.snapshot import Snapshot

NUM_KILLS = 60


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch):
    """Writers wait until they are let go."""
    gate, real = threading.Event(), saving.write_share

    def write(*args, **options):
        assert gate.wait(30)
        return real(*args, **options)

    monkeypatch.setattr(saving, "write_share", write)
    yield gate
    gate.set()


def test_what_is_written_is_what_was_there_when_the_save_began(tmp_path: Path, held_up: threading.Event) -> None:
    weight = torch.arange(6.0)
    with Saver(tmp_path, ALONE, background=True) as saver:
        saver.begin(3, {"model": {"weight": weight, "tied": weight}, "none": {}}, {"run_id": "r"}, best_step=2)
        assert saver.is_writing
        assert saver.step == 3
        weight.fill_(-1)
        assert newest_sound(tmp_path) is None, "until it is settled there is no checkpoint"
        held_up.set()
        saved = saver.settle()
        assert saver.settle() is None
    assert saved is not None
    assert (saved.path, saved.step, saved.best_step, saved.in_background) == (tmp_path / "step-000003", 3, 2, True)
    groups, _ = load_checkpoint(saved.path)
    assert torch.equal(groups["model"]["weight"], torch.arange(6.0))
    assert groups["model"].tied == {"tied": "weight"}
    assert saved.num_bytes == sum(file.stat().st_size for file in saved.path.iterdir() if file.suffix == ".safetensors")


def test_an_exception_elsewhere_waits_for_the_writer_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    def cut(step: int, error: type[BaseException]) -> None:
        with Saver(tmp_path, ALONE, background=True) as saver:
            saver.begin(step, {"model": {"weight": torch.ones(3)}}, {"run_id": "r"})
            raise error

    with pytest.raises(ZeroDivisionError):
        cut(1, ZeroDivisionError)
    assert [step for step, path in list_steps(tmp_path) if not check_checkpoint(path)] == [1]
    with pytest.raises(KeyboardInterrupt):
        cut(2, KeyboardInterrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_copies_are_made_into_the_same_memory_and_only_where_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Snapshot()
    groups = {"model": {"weight": torch.arange(6.0), "step": torch.tensor(3)}}
    first = snapshot.take(groups)["model"]["weight"]
    groups["model"]["weight"].add_(1)
    second = snapshot.take(groups)["model"]["weight"]
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, torch.arange(6.0) + 1)
    assert snapshot.num_bytes == 6 * 4 + 8
    monkeypatch.setattr(saving, "read_memory", lambda: (1.0, 1.0))
    for num_floats, copies in ((2**26, True), (2**28, False)):
        monkeypatch.setattr(saving, "share_bytes", lambda *_, n=4 * num_floats, **__: n)
        monkeypatch.setattr("zhibei.store.files.free_bytes", lambda _: 2**40)
        with Saver(tmp_path / str(num_floats), ALONE, background="auto") as saver:
            saver.begin(1, groups, {})
            saved = saver.settle()
        assert saved is not None
        assert saved.in_background == copies


def test_a_disk_that_fails_in_the_background_ends_the_run_by_the_step_it_belonged_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = HashedFile.write

    def write(self: HashedFile, data: bytes | memoryview) -> None:
        if "step-000008" in str(self.path) and self.path.name.startswith("optimizer"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        real(self, data)

    settings = ["sft.save_in_background=true", "sft.sample_tokens=0"]
    straight = train(small_run(tmp_path, *settings, "name=straight"))
    monkeypatch.setattr(HashedFile, "write", write)
    with pytest.raises(UserError, match=r"could not write checkpoint step-000008: the disk or quota is full"):
        train(small_run(tmp_path, *settings))
    run_dir = RunDir(tmp_path / "runs/small")
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step-000004"]
    failed = [r for r in read_metrics(run_dir.metrics) if r.get("event") == "save failed"]
    assert [record["step"] for record in failed] == [8]
    monkeypatch.undo()
    train(small_run(tmp_path, *settings), resume=run_dir)
    assert losses(run_dir) == losses(straight)
    saves = [r for r in read_metrics(run_dir.metrics) if r.get("event") == "saved"]
    assert [(r["step"], r["in_background"]) for r in saves] == [(4, True), (8, True), (12, False)]


def test_the_best_checkpoint_stays_until_a_better_one_is_written(tmp_path: Path, held_up: threading.Event) -> None:
    """Step 1 is the best when step 2 is saved. Step 3 is better, but is not written yet when step 2 counts."""
    run = small_run(tmp_path, "sft.keep_checkpoints=1").run
    run_dir, held = RunDir(tmp_path / "runs/small"), {"model": {"weight": torch.ones(3)}}
    held_up.set()
    with (
        Metrics(run_dir.path, tensorboard=False) as metrics,
        Saver(run_dir.checkpoints, ALONE, background=True) as saver,
    ):
        recorder = Recorder(metrics, ignore, torch.device("cpu"))
        kept = []
        for step, best in ((1, 1), (2, 1), (3, 3)):
            conclude_save(saver, run, run_dir, recorder)
            kept.append([number for number, _ in list_steps(run_dir.checkpoints)])
            saver.begin(step, held, {"run_id": "r", "best_step": best}, best_step=best)
        conclude_save(saver, run, run_dir, recorder)
    assert kept == [[], [1], [1, 2]]
    assert [number for number, _ in list_steps(run_dir.checkpoints)] == [3]


def run_ranks(module: str, *arguments: str, world: int = 2) -> list[str]:
    """What each rank prints."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    told = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for _, error in told)
    return [out for out, _ in told]


@pytest.mark.slow
def test_a_rank_killed_at_any_moment_of_a_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    trials = json.loads(run_ranks("tests.train.save_driver", str(tmp_path), str(NUM_KILLS))[0].splitlines()[-1])
    assert len(trials) == NUM_KILLS
    assert {trial["victim"] for trial in trials} == {0, 1}
    assert [trial for trial in trials if trial["unsound"] or not trial["equal"]] == []
    steps = [trial["step"] for trial in trials]
    assert steps == sorted(steps)
    assert len(set(steps)) > NUM_KILLS // 2, "the kills must hit saves that go on"
    assert sum(trial["inside_a_save"] for trial in trials) > NUM_KILLS // 6
