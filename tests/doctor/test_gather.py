"""Facts of a real small run: what training would read is read, once; the output directory is seen as it is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.small_run import alpaca_rows, small_run
from zhibei.config.resolve import ResolvedRun
from zhibei.data import prepare
from zhibei.doctor.facts.gather import gather_facts
from zhibei.doctor.facts.output import file_system_of, quota_free_bytes, read_output
from zhibei.plan.machines import parse_machine
from zhibei.store.run_dir import RunDir
from zhibei.train.materials import read_rows


@pytest.fixture
def resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedRun:
    monkeypatch.setenv("ZHIBEI_CACHE", str(tmp_path / "cache"))
    return small_run(tmp_path, "data.max_tokens=256")


def test_the_facts_are_those_of_the_run(resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gather_facts(resolved)
    assert (facts.faults, facts.defects) == ((), ())
    monkeypatch.setattr(prepare, "_prepare", None)  # training finds the rows that the check prepared
    ready = read_rows(resolved)
    assert facts.rows is not None
    assert facts.rows.audit == ready.rows.audit
    assert facts.rows.num_steps == ready.batches.num_steps
    assert facts.run.sft.save_every == ready.resolved.run.sft.save_every
    assert facts.template is not None
    assert facts.template.name == ready.template.name
    assert facts.tokenizer is not None
    assert facts.tokenizer.fingerprint == ready.tokenizer.fingerprint
    assert facts.model is not None
    assert facts.model.embedding_rows == 300
    assert facts.output is not None
    assert not facts.output.exists


def test_a_described_machine_stands_in(resolved: ResolvedRun) -> None:
    machine = parse_machine("v100-32g:4")
    assert gather_facts(resolved, machine=machine).machine == machine


@pytest.mark.parametrize(
    ("override", "told", "known"),
    [
        ("model.path=/none", "/none", {"output"}),
        ("data.sources=[/none.json]", "/none.json", {"output", "model", "tokenizer", "template"}),
        ("data.template=vicunna", "vicunna", {"output", "model", "tokenizer"}),
        ("model.tokenizer=/none", "/none", {"output", "model"}),
    ],
)
def test_a_broken_part_leaves_the_others(
    override: str, told: str, known: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZHIBEI_CACHE", str(tmp_path / "cache"))
    facts = gather_facts(small_run(tmp_path, override))
    assert facts.defects == ()
    assert len(facts.faults) == 1
    assert told in str(facts.faults[0])
    parts = ("output", "model", "tokenizer", "template", "rows")
    assert {name for name in parts if getattr(facts, name) is not None} == known


def test_broken_records_are_told_one_by_one_also_beside_a_broken_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZHIBEI_CACHE", str(tmp_path / "cache"))
    rows = [*alpaca_rows(20), {"instruction": "a"}, {"instruction": "a", "output": ""}]
    alone = gather_facts(small_run(tmp_path, rows=rows))
    assert [fault.where.partition("record ")[2].partition(" ")[0] for fault in alone.faults] == ["20", "21"]
    both = gather_facts(small_run(tmp_path, "model.path=/none", rows=rows))
    assert len(both.faults) == 3


def test_rows_that_make_no_step_are_a_fault(resolved: ResolvedRun) -> None:
    facts = gather_facts(small_run(Path(resolved.run.runs).parent, "data.max_tokens=256", "sft.global_batch=64"))
    assert [fault.where for fault in facts.faults] == ["sft.global_batch"]
    assert facts.rows is not None


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        ((), ""),
        (("manifest.json", "model"), "a run of zhibei"),
        (("checkpoint-500",), "a checkpoint of transformers' Trainer"),
        (("trainer_state.json",), "a checkpoint of transformers' Trainer"),
        (("notes.txt",), "other files"),
    ],
)
def test_what_the_output_directory_holds(names: tuple[str, ...], holds: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    output = read_output(RunDir(folder))
    assert (output.exists, output.holds, output.is_writable) == (True, holds, True)
    assert set(output.examples) == set(names)
    assert read_output(RunDir(folder), resume=RunDir(folder)).holds == ""


def test_the_disk_is_that_behind_links_and_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    output = read_output(RunDir(tmp_path / "link" / "deep" / "run"))
    assert output.place == (tmp_path / "real").resolve()
    assert output.free_bytes is not None
    assert output.free_bytes > 0
    assert not output.exists


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    assert not read_output(RunDir(tmp_path / "runs" / "a")).is_writable
    assert read_output(RunDir(tmp_path / "runs")).holds == "other files"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert not read_output(RunDir(tmp_path / "a")).is_writable


def test_quota_takes_the_tightest_limit() -> None:
    lines = [
        "Disk quotas for user a (uid 1000):",
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace",
        "      /dev/sda1  900000  1000000 1100000       0      10       0       0       0",
        "      /dev/sdb1  2000*      1000    3000       0      10       0       0       0",
    ]
    assert quota_free_bytes(lines[:3]) == 100_000 * 1024
    assert quota_free_bytes(lines) == 0
    assert quota_free_bytes(["nothing here"]) is None
    assert quota_free_bytes(["/dev/sda1 900000 0 0"]) is None


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:5 / /data rw shared:1 - nfs4 server:/x rw\n"
        "3 2 0:6 / /data/fast\\040disk rw - tmpfs tmpfs rw\n"
        "broken line\n"
    )
    found = {
        place: file_system_of(Path(place), str(mounts))
        for place in ("/home", "/data/a", "/data/fast disk/b", "/database")
    }
    assert found == {"/home": "ext4", "/data/a": "nfs4", "/data/fast disk/b": "tmpfs", "/database": "ext4"}
    assert file_system_of(Path("/"), str(tmp_path / "none")) == ""


def test_faults_are_told_once(resolved: ResolvedRun) -> None:
    model = resolved.run.model.model_copy(update={"path": "/none"})
    facts = gather_facts(replace(resolved, run=resolved.run.model_copy(update={"model": model})))
    assert len(facts.faults) == len({str(fault) for fault in facts.faults}) == 1
