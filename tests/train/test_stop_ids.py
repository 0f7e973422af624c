"""A trained model's files stop every program where training taught answers to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.text.small_tokenizers import byte_level
from zhibei.model.wording import add_stop_ids
from zhibei.text.families import find_template


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("chatml", {"eos_token_id": 2, "bos_token_id": 1}, [2, "<|im_end|>"]),
        ("chatml", {}, ["</s>", "<|im_end|>"]),
        ("llama3", {"eos_token_id": [9, 2]}, [9, 2, "<|eot_id|>"]),
        ("alpaca", {"eos_token_id": 2}, 2),
        ("vicuna_v0", {"eos_token_id": [2, 9]}, [2, 9]),
    ],
)
def test_the_terminator_joins_the_ids_that_end_generation(
    tmp_path: Path, family: str, before: dict[str, Any], after: int | list[int | str]
) -> None:
    tokenizer = byte_level()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"use_cache": True, **before}))
    add_stop_ids(tmp_path, tokenizer.stop_ids(find_template(family, tokenizer).terminator))
    ids = after if isinstance(after, list) else [after]
    found = [tokenizer.id_of(one) if isinstance(one, str) else one for one in ids]
    wanted = found if isinstance(after, list) else found[0]
    assert json.loads(path.read_text()) == {"use_cache": True, **before, "eos_token_id": wanted}


def test_an_adapter_folder_has_no_such_file_and_gets_none(tmp_path: Path) -> None:
    tokenizer = byte_level()
    add_stop_ids(tmp_path, tokenizer.stop_ids(find_template("chatml", tokenizer).terminator))
    assert list(tmp_path.iterdir()) == []
