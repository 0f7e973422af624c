"""Previews: the pieces joined are the decoded row, their mask is the row's, whatever the tokenizer and the text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shared_data import shared_path
from tests.tiny import tiny_tokenizer
from zhibei.data.prepared import PreparedRows
from zhibei.data.preview import MOST_TOKENS, preview_rows, split_by_mask
from zhibei.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(str(folder))
    return load_tokenizer(str(folder))


def joined(pieces: list[list[Any]], *, learned: bool | None = None) -> str:
    return "".join(text for text, is_learned in pieces if learned is None or is_learned is learned)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(st.text(max_size=12), st.booleans()), min_size=1, max_size=6))
def test_pieces_joined_are_the_decoded_row(tokenizer: Tokenizer, parts: list[tuple[str, bool]]) -> None:
    tokens: list[int] = []
    supervised: list[bool] = []
    for text, is_learned in parts:
        ids = tokenizer.encode(text)
        tokens += ids
        supervised += [is_learned] * len(ids)
    pieces = split_by_mask(tokens, supervised, tokenizer)
    assert joined(pieces) == tokenizer.decode(tokens)
    marks = [is_learned for _, is_learned in pieces]
    assert all(before != after for before, after in pairwise(marks))
    if "\ufffd" not in joined(pieces):
        assert joined(pieces, learned=True) == "".join(text for text, is_learned in parts if is_learned)


@pytest.mark.parametrize("name", ["llama2_tokenizer", "llama3_tokenizer"])
def test_real_tokenizers_keep_the_space_before_an_answer(name: str) -> None:
    real = load_tokenizer(str(shared_path("data", "derived", name)))
    prompt, answer = real.encode("USER: Hi, 你好 ASSISTANT:"), real.encode(" Hello 世界!")[-4:]
    pieces = split_by_mask([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), real)
    assert joined(pieces) == real.decode([*prompt, *answer])
    assert joined(pieces, learned=False).endswith("ASSISTANT:")


def test_rows_are_spread_and_long_ones_say_what_is_not_shown(tokenizer: Tokenizer) -> None:
    lengths = [3, 5, MOST_TOKENS + 50, 4, 4, 4, 4, 4]
    borders = np.cumsum([0, *lengths])
    total = int(borders[-1])
    rows = PreparedRows(np.full(total, 40, np.int32), np.arange(total) % 2 == 0, borders, [f"a#{n}" for n in range(8)])
    found = preview_rows(rows, tokenizer)
    assert [one["row"] for one in found] == ["a#0", "a#2", "a#4", "a#6"]
    assert [one["tokens"] for one in found] == [3, MOST_TOKENS + 50, 4, 4]
    assert [one["tokens_not_shown"] for one in found] == [0, 50, 0, 0]
    assert found[0]["tokens_supervised"] == 2
    assert len(found[1]["pieces"]) == MOST_TOKENS


def test_fewer_rows_than_asked(tokenizer: Tokenizer) -> None:
    empty = PreparedRows(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), [])
    assert preview_rows(empty, tokenizer) == []
