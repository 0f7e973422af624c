"""Bytes of keys and values of answers under way. Knows sizes; zhibei/generate/cache.py holds what is counted here."""

from __future__ import annotations

from zhibei.plan.shapes import ModelShape


def cache_bytes(shape: ModelShape, *, slots: int, tokens: int, item_bytes: int) -> int:
    """The most that the cache of an engine with so many slots takes, each with room for `tokens` (prompt and answer).

    Keys and values of every layer; families with sliding windows keep all tokens too. Besides it stand only 16 bytes
    and, when sampling, 8 for every possible new token of a slot.
    """
    return 2 * shape.key_width * item_bytes * shape.num_layers * slots * tokens
