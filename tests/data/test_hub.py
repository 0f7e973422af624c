"""Hub ids: which files are chosen, and how they are read by a fresh process from a hub on localhost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.hub_stub import serve
from zhibei.config.errors import UserError
from zhibei.config.run import Source
from zhibei.data.hub import choose_files
from zhibei.data.sources import is_hub_id


def choose(*names: str, split: str = "train", subset: str | None = None, configs: object = None) -> list[str]:
    return choose_files(names, Source(path="owner/name", split=split, subset=subset), configs=configs)


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        (("README.md", "alpaca_data.json", "LICENSE.txt"), {}, ["alpaca_data.json"]),
        (("data/train-00000-of-00001-a09b.parquet",), {}, ["data/train-00000-of-00001-a09b.parquet"]),
        (
            (
                "data/train-00001-of-00002.parquet",
                "data/train-00000-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ),
            {},
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (("train.jsonl", "validation.jsonl", "test.jsonl"), {"split": "validation"}, ["validation.jsonl"]),
        (("train.jsonl", "dev.jsonl"), {"split": "validation"}, ["dev.jsonl"]),
        (
            ("main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"),
            {"subset": "socratic"},
            ["socratic/train-00000-of-00001.parquet"],
        ),
        (
            ("harmless-base/train.jsonl.gz", "helpful-base/train.jsonl.gz"),
            {"subset": "helpful-base"},
            ["helpful-base/train.jsonl.gz"],
        ),
        (("train.json", "train.parquet"), {}, ["train.parquet"]),
        (
            ("data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"),
            {"split": "train_sft"},
            ["data/train_sft-00000-of-00001.parquet"],
        ),
        (
            ("a.json", "b.json"),
            {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "b.*"}]}]},
            ["b.json"],
        ),
        (
            ("x/a.json", "x/b.json"),
            {
                "subset": "two",
                "configs": [
                    {"config_name": "one", "data_files": "x/a.json"},
                    {"config_name": "two", "data_files": "x/b.json"},
                ],
            },
            ["x/b.json"],
        ),
    ],
)
def test_the_usual_layouts(names: tuple[str, ...], options: dict, chosen: list[str]) -> None:
    assert choose(*names, **options) == chosen


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (("main/train.parquet", "socratic/train.parquet"), {}, "one of main, socratic"),
        (("main/train.parquet", "socratic/train.parquet"), {"subset": "mian"}, "no subset 'mian'"),
        (("train.json", "test.json"), {"split": "validation"}, "one of test, train"),
        (("data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"), {}, "first: part 00001"),
        (("README.md", "name.py"), {}, "made by a script"),
        (("README.md", "picture.png"), {}, "no data files"),
    ],
)
def test_what_cannot_be_chosen_lists_what_there_is(names: tuple[str, ...], options: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(*names, **options)
    assert says in str(caught.value)


def test_names_of_files_are_no_hub_ids() -> None:
    assert is_hub_id("tatsu-lab/alpaca")
    assert not is_hub_id("data/alpaca.json")
    assert not is_hub_id("data/deep/alpaca")
    assert not is_hub_id("alpaca")


READ = """
import json, sys
from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, Source
from zhibei.data.readers import read_sources
notices = []
try:
    rows = list(read_sources(DataSection(sources=[Source(**json.loads(sys.argv[1]))]), notice=notices.append))
    answers = [record.messages[-1].content for _, record in rows]
    print(json.dumps({"answers": answers, "where": str(rows[0][1].origin), "notices": notices}))
except UserError as error:
    print(json.dumps(error.as_dict()))
"""


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    root = tmp_path / "hub"
    for name, answer in (("train-00000-of-00002", "1"), ("train-00001-of-00002", "2"), ("test-00000-of-00001", "3")):
        file = root / "owner" / "small" / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"prompt": "a", "completion": answer}))
    (root / "owner" / "small" / "README.md").write_text("---\nlicense: mit\n---\n# small\n")
    (root / "owner" / "gated").mkdir()
    (root / "owner" / "gated" / "train.jsonl").write_text("{}")
    return root


def read(tmp_path: Path, address: str, *, offline: bool = False, **source: str) -> dict:
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(source)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_data_set_is_downloaded_once_and_then_read_offline(tmp_path: Path, hub_folder: Path) -> None:
    with serve(hub_folder) as (address, requests):
        found = read(tmp_path, address, path="owner/small")
        assert found["answers"] == ["1", "2"]
        assert found["where"] == "owner/small@01234567/data/train-00000-of-00002.jsonl, record 0 (line 1)"
        assert not [request for request in requests if "test-0" in request], "only the split is downloaded"
    again = read(tmp_path, address, path="owner/small")
    assert again["answers"] == ["1", "2"]
    assert "using the earlier download" in again["notices"][0]
    offline = read(tmp_path, address, offline=True, path="owner/small")
    assert offline["answers"] == ["1", "2"]
    assert "HF_HUB_OFFLINE is set" in offline["notices"][0]


def test_errors_say_both_readings_of_a_name(tmp_path: Path, hub_folder: Path) -> None:
    with serve(hub_folder, gated="owner/gated") as (address, _):
        absent = read(tmp_path, address, path="owner/nothing")
        assert absent["what"].startswith("no file or folder of that name here, and as a hub id")
        gated = read(tmp_path, address, path="owner/gated")
        assert "accept them at" in gated["fix"]
        split = read(tmp_path, address, path="owner/small", split="validation")
        assert split["expected"] == "one of test, train"
    offline = read(tmp_path, address, offline=True, path="data/alpaca")
    assert "no file or folder of that name here" in offline["what"]
    assert "HF_HUB_OFFLINE is set" in offline["what"]


def test_a_local_folder_wins_over_the_hub(tmp_path: Path, hub_folder: Path) -> None:
    (tmp_path / "owner" / "small").mkdir(parents=True)
    (tmp_path / "owner" / "small" / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "local"}))
    with serve(hub_folder) as (address, requests):
        assert read(tmp_path, address, path="owner/small")["answers"] == ["local"]
        assert not requests
