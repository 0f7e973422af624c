"""A long text in pieces that fit into a row. Knows token ids, not texts or templates."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

from zhibei.data.mix import HASH_BYTES


def split_text(tokens: np.ndarray, name: str, *, limit: int) -> list[tuple[int, int, str, str]]:
    """(first token, last token, `name:number`, hash) of as few chunks as fit into `limit`, of nearly equal length (a
    last chunk of one token would teach nothing)."""
    num_chunks = -(-len(tokens) // limit)
    edges = np.linspace(0, len(tokens), num_chunks + 1).round().astype(int).tolist()
    return [
        (left, right, f"{name}:{number}", _hash(tokens[left:right]))
        for number, (left, right) in enumerate(pairwise(edges))
    ]


def _hash(tokens: np.ndarray) -> str:
    return hashlib.blake2b(tokens.tobytes(), digest_size=HASH_BYTES).hexdigest()
