"""A few prepared rows as text with their mask, for a person. Knows token ids and a tokenizer, not templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zhibei.data.prepared import PreparedRows
from zhibei.text.tokenizer import Tokenizer

NUM_ROWS = 4
MOST_TOKENS = 600


def preview_rows(rows: PreparedRows, tokenizer: Tokenizer, *, num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Rows spread evenly over the set, as plain JSON values.

    Each has `row` (its id), `tokens`, `tokens_supervised`, `tokens_not_shown` (beyond the first 600) and `pieces`:
    pairs of text and whether the model learns it, which joined give the text that the ids decode to.
    """
    count = min(num_rows, len(rows))
    return [_preview(rows, index * len(rows) // count, tokenizer) for index in range(count)]


def _preview(rows: PreparedRows, index: int, tokenizer: Tokenizer) -> dict[str, Any]:
    part = slice(int(rows.borders[index]), int(rows.borders[index + 1]))
    tokens, supervised = np.asarray(rows.tokens[part]), np.asarray(rows.supervised[part])
    shown = [int(token) for token in tokens[:MOST_TOKENS]]
    return {
        "row": rows.row_ids[index],
        "tokens": len(tokens),
        "tokens_supervised": int(supervised.sum()),
        "tokens_not_shown": len(tokens) - len(shown),
        "pieces": split_by_mask(shown, supervised[:MOST_TOKENS].tolist(), tokenizer),
    }


def split_by_mask(tokens: Sequence[int], supervised: Sequence[bool], tokenizer: Tokenizer) -> list[list[Any]]:
    """Stretches of one mask value with their text. A character whose bytes lie on both sides goes to the later one.

    Text is the difference of two decoded prefixes, because a tokenizer may decode the middle of a row differently on
    its own (SentencePiece drops a space at the beginning).
    """
    borders = [place for place in range(1, len(tokens)) if supervised[place] != supervised[place - 1]] + [len(tokens)]
    pieces: list[list[Any]] = []
    done = 0
    for border in borders if tokens else []:
        text = tokenizer.decode(tokens[:border])
        if border < len(tokens):
            text = text.rstrip("\ufffd")
        pieces.append([text[done:], bool(supervised[border - 1])])
        done = max(done, len(text))
    return pieces
