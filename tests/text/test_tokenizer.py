"""The border to tokenizers: special ids checked once, nothing added, broken folders refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.text.small_tokenizers import SMALL, byte_level, tokenizer_called
from tests.tiny import tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.text.tokenizer import Tokenizer, check_tokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_and_nothing_is_added_while_encoding(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == ("<s>", "</s>", "<pad>", "<unk>")
    assert tokenizer.adds_bos
    assert tokenizer.bos_id not in tokenizer.encode("hello")
    assert tokenizer.encode("<s>hello").count(tokenizer.bos_id or -1) == 1
    assert tokenizer.decode(tokenizer.encode("<s>the cat</s>")) == "<s>the cat</s>"
    assert len(tokenizer) == len(tiny_tokenizer())


def test_the_folder_of_a_run_is_enough(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model", ignore=lambda *_: ["run"])
    assert load_tokenizer(str(run)).fingerprint == load_tokenizer(str(folder)).fingerprint


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_the_single_texts(name: str) -> None:
    tokenizer = tokenizer_called(name)
    texts = ["<s>Hello 你好 😀</s>", "", "a", "  b\n"]
    encoded = tokenizer.encode_batch(texts)
    for place, text in enumerate(texts):
        part = slice(encoded.borders[place], encoded.borders[place + 1])
        assert encoded.ids[part].tolist() == tokenizer.encode(text)
        ends = encoded.ends[part]
        assert not len(ends) or ends.max() <= len(text)


def test_offsets_keep_the_leading_space_of_a_token() -> None:
    """GPT-style tokenizers trim it by default; a lone space would then have no characters and be lost."""
    encoded = byte_level().encode_batch(["a  b"])
    covered = {place for s, e in zip(encoded.starts, encoded.ends, strict=True) for place in range(s, e)}
    assert covered == {0, 1, 2, 3}


def test_no_eos_is_an_error_with_a_remedy(folder: Path) -> None:
    for broken in (None, ""):
        rewrite(folder, eos_token=broken)
        special = folder / "special_tokens_map.json"
        special.unlink(missing_ok=True)
        with pytest.raises(UserError, match="never learn to stop") as caught:
            load_tokenizer(str(folder))
        assert '"eos_token": "</s>"' in caught.value.fix


def test_eos_that_is_the_unknown_token_is_an_error(folder: Path) -> None:
    rewrite(folder, eos_token="<unk>")
    with pytest.raises(UserError, match="unknown token"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_text()
    (folder / name).write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(folder))


def test_missing_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_padding_takes_an_existing_token_and_never_a_new_one() -> None:
    wrapped = tiny_tokenizer()
    size = len(wrapped)
    wrapped.pad_token = wrapped.eos_token
    checked = check_tokenizer(wrapped, source="x")
    assert checked.pad == "<pad>"
    assert "its EOS token" in checked.notes[0]
    assert len(checked) == size


def test_padding_of_the_real_ones(shared: Callable[..., Path]) -> None:
    assert tokenizer_called("llama2").pad == "<unk>"
    assert tokenizer_called("llama3").pad == "<|reserved_special_token_0|>"
    assert tokenizer_called("llama3").pad_id < len(tokenizer_called("llama3"))


def test_only_control_tokens_stop_generation() -> None:
    tokenizer = byte_level()
    end = tokenizer.id_of("<|im_end|>")
    assert tokenizer.stop_ids("<|im_end|>") == (tokenizer.eos_id, end)
    assert tokenizer.stop_ids("</s>") == (tokenizer.eos_id,)
    assert tokenizer.stop_ids("a") == (tokenizer.eos_id,), "'a' is a token, but no control token"


def test_the_fingerprint_follows_everything_that_changes_ids(folder: Path) -> None:
    before = load_tokenizer(str(folder))
    spec = json.loads((folder / "tokenizer.json").read_text())
    assert load_tokenizer(str(folder)).fingerprint == before.fingerprint
    changed = dict(spec, normalizer={"type": "Lowercase"})
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    assert load_tokenizer(str(folder)).fingerprint != before.fingerprint
    changed = dict(spec, model=dict(spec["model"], merges=spec["model"]["merges"][:-1]))
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    assert load_tokenizer(str(folder)).fingerprint != before.fingerprint
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    rewrite(folder, pad_token="<unk>")
    assert load_tokenizer(str(folder)).fingerprint != before.fingerprint


def test_it_travels_between_processes() -> None:
    tokenizer = byte_level()
    assert tokenizer.backend is tokenizer.backend
    copy: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    assert copy.encode("Hello 😀") == tokenizer.encode("Hello 😀")


def test_a_sentencepiece_file_alone_is_enough(shared: Callable[..., Path], tmp_path: Path) -> None:
    """tokenizer.model without tokenizer.json, as older folders have it: transformers converts it."""
    pytest.importorskip("sentencepiece")
    source = shared("data", "models", "stories260K")
    shutil.copy(source / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    converted = load_tokenizer(str(tmp_path))
    text = "<s>Once upon a time, Lily"
    assert converted.encode(text)[:1] == [1]
    assert converted.decode(converted.encode(text), skip_special_tokens=True).strip() == "Once upon a time, Lily"


def test_preparing_rows_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, zhibei.data.workers, zhibei.data.prepare, zhibei.text.families; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
