"""The manifest says what a run was made from, and later stages refuse what differs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from zhibei.config.errors import UserError
from zhibei.store import manifest as manifest_module
from zhibei.store.manifest import (
    DESCRIBED,
    finish_manifest,
    model_fingerprint,
    new_manifest,
    read_manifest,
    require_manifest,
    template_entry,
    write_manifest,
)
from zhibei.store.shards import save_tensors


def described() -> dict[str, Any]:
    return {name: name for name in DESCRIBED} | {
        "template": template_entry("alpaca", jinja="{{ x }}"),
        "tokenizer": {"sha256": "abc"},
        "parent_run": None,
    }


def test_a_manifest_comes_back_and_can_be_finished(tmp_path: Path) -> None:
    manifest = new_manifest(described(), device_name="cpu")
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest["environment"]["torch"] == torch.__version__
    finished = finish_manifest(tmp_path, {"steps": 3})
    assert finished == read_manifest(tmp_path)
    assert finished["finished"]["steps"] == 3
    assert finished.pop("model_files") == []
    assert {**finished, "finished": None} == manifest


def test_two_runs_have_two_ids_and_a_missing_part_is_our_fault() -> None:
    first, second = (new_manifest(described(), device_name="cpu") for _ in range(2))
    assert first["run_id"] != second["run_id"]
    with pytest.raises(ValueError, match="a manifest needs base, seed"):
        new_manifest({name: 1 for name in DESCRIBED if name not in ("base", "seed")}, device_name="cpu")


def test_stages_require_the_manifest_and_name_both_values(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        require_manifest(tmp_path)
    write_manifest(tmp_path, new_manifest(described(), device_name="cpu"))
    assert require_manifest(tmp_path, {"tokenizer.sha256": "abc", "template.name": "alpaca"})["seed"] == "seed"
    with pytest.raises(UserError, match=r'tokenizer\.sha256 is "xyz" now, and was "abc" when the run was trained'):
        require_manifest(tmp_path, {"tokenizer.sha256": "xyz"})
    with pytest.raises(UserError, match=r"reward\.scale is 1 now, and was absent"):
        require_manifest(tmp_path, {"reward.scale": 1})
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="manifest of format 99"):
        require_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        require_manifest(tmp_path)


def model_folder(folder: Path, *, last: float = 1.0, hidden: int = 4) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden, "model_type": "llama"}))
    weight = torch.zeros(1000)
    weight[-1] = last
    save_tensors(folder, {"a": torch.ones(3), "weight": weight}, stem="model", max_shard_bytes=100)
    return folder


def test_the_fingerprint_follows_content_and_not_path_or_key_order(tmp_path: Path) -> None:
    one, same = model_folder(tmp_path / "one"), model_folder(tmp_path / "two")
    (same / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}, indent=4))
    os.utime(same / "config.json", (0, 0))
    (same / "README.md").write_text("notes")
    assert model_fingerprint(one) == model_fingerprint(same)
    assert model_fingerprint(model_folder(tmp_path / "weight", last=2.0)) != model_fingerprint(one)
    assert model_fingerprint(model_folder(tmp_path / "config", hidden=5)) != model_fingerprint(one)
    with pytest.raises(UserError, match="no safetensors weights"):
        model_fingerprint(tmp_path)


def test_sampled_blocks_cover_both_ends_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "WHOLE_BYTES", 100)
    monkeypatch.setattr(manifest_module, "SAMPLE_BYTES", 8)
    monkeypatch.setattr(manifest_module, "NUM_SAMPLES", 4)
    assert manifest_module._sampled_blocks(1000) == [(0, 8), (330, 8), (661, 8), (992, 8)]
    assert model_fingerprint(model_folder(tmp_path / "a")) != model_fingerprint(model_folder(tmp_path / "b", last=2.0))
