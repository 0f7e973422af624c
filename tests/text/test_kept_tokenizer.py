"""A tokenizer read back from the cache is the one that was loaded; a changed file is noticed; plain ones load alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import FAMILIES, tiny_model_folder, tiny_tokenizer
from zhibei.text import kept_tokenizer
from zhibei.text.tokenizer import PLAIN_FAMILIES, Tokenizer, check_tokenizer, is_plain, load_tokenizer


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return one.__getstate__() == other.__getstate__()


def kept_files(root: Path) -> list[Path]:
    return sorted((root / "tokenizers").glob("*.json"))


def test_what_is_read_back_is_what_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model_folder(tmp_path)
    loaded = load_tokenizer(str(folder))
    assert same(load_tokenizer(str(folder), cache=tmp_path / "cache"), loaded)
    monkeypatch.setattr("zhibei.text.tokenizer.load_hugging_face_tokenizer", None)
    again = load_tokenizer(str(folder), cache=tmp_path / "cache")
    assert same(again, loaded)
    assert again.fingerprint == loaded.fingerprint
    assert again.encode("hello <s>") == loaded.encode("hello <s>")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_changed_file_is_loaded_anew(name: str, tmp_path: Path) -> None:
    folder, cache = tiny_model_folder(tmp_path), tmp_path / "cache"
    load_tokenizer(str(folder), cache=cache)
    content = json.loads((folder / name).read_text())
    if name == "tokenizer_config.json":
        content["pad_token"] = "<unk>"
    (folder / name).write_text(json.dumps(content, indent=3))
    now = load_tokenizer(str(folder), cache=cache)
    assert len(kept_files(cache)) == 2
    assert now.pad == ("<unk>" if name == "tokenizer_config.json" else "<pad>")


def test_a_damaged_entry_is_not_believed(tmp_path: Path) -> None:
    folder, cache = tiny_model_folder(tmp_path), tmp_path / "cache"
    loaded = load_tokenizer(str(folder), cache=cache)
    (kept,) = kept_files(cache)
    kept.write_text(kept.read_text().replace("<pad>", "<unk>"))
    assert same(load_tokenizer(str(folder), cache=cache), loaded)
    kept.write_text("{")
    assert same(load_tokenizer(str(folder), cache=cache), loaded)


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert same(load_tokenizer(str(folder), cache=tmp_path / "cache"), load_tokenizer(str(folder)))


def test_every_field_that_travels_is_kept(tmp_path: Path) -> None:
    assert set(kept_tokenizer.FIELDS) == set(load_tokenizer(str(tiny_model_folder(tmp_path))).__getstate__())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_tokenizer_is_what_auto_tokenizer_gives(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_model_folder(tmp_path, family)
    expected = check_tokenizer(AutoTokenizer.from_pretrained(folder), source=str(folder))
    assert is_plain(folder) == (family in PLAIN_FAMILIES)
    assert same(load_tokenizer(str(folder)), expected)


def test_plain_families_are_none_that_transformers_corrects() -> None:
    from transformers.models.auto import tokenization_auto

    assert not set(PLAIN_FAMILIES) & tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


def test_a_tokenizer_of_a_familys_class_is_left_to_it(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert is_plain(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
    assert not is_plain(tmp_path)
