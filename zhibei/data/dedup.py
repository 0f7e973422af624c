"""Equal and nearly equal rows, in bounded memory and time. Knows texts, not files or formats.

Near duplicates: MinHash (Broder 1997) over runs of three words, locality-sensitive hashing over its bands (Indyk and
Motwani 1998), and every candidate checked by its exact Jaccard similarity. Chinese, Japanese and Korean text counts
each character as a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
RUN_WORDS = 3
BANDS, ROWS_PER_BAND = 16, 4
MIN_SIMILARITY = 0.8
BATCH_RUNS = 200_000
"""Hashes are made for so many runs at once: 16 * 4 * 8 bytes each, about 100 MB."""
MAX_ROWS = 200_000
"""More rows than this are not compared; the report says so."""

# Dimensions: R rows, N runs of words of all rows end to end, K hash functions.


@dataclass(frozen=True)
class NearDuplicates:
    """Rows that are alike: `pairs` are (earlier row, later row, similarity), one for each row that could go."""

    pairs: list[tuple[int, int, float]]
    num_rows_compared: int
    min_similarity: float = MIN_SIMILARITY


def word_runs(texts: Iterable[str]) -> list[np.ndarray]:
    """For each text the distinct hashes of its runs of three words (of all its words if it has fewer), as uint64."""
    numbers: dict[str, int] = {}
    runs = []
    for text in texts:
        words = WORD.findall(text.lower())
        ids = np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], dtype=np.uint64)
        runs.append(np.unique(_mixed_runs(ids)))
    return runs


def _mixed_runs(ids: np.ndarray) -> np.ndarray:
    width = min(RUN_WORDS, len(ids))
    if not width:
        return np.zeros(0, dtype=np.uint64)
    size = len(ids) - width + 1
    mixed = np.zeros(size, dtype=np.uint64)
    for offset in range(width):
        mixed = (mixed ^ ids[offset : offset + size]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def signatures(runs: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash of each row as uint64 [R, K]; rows without words must be left out before."""
    num_hashes = BANDS * ROWS_PER_BAND
    generator = np.random.default_rng(20090)
    factors_K = generator.integers(1, 2**63, num_hashes, dtype=np.uint64) | np.uint64(1)
    added_K = generator.integers(0, 2**63, num_hashes, dtype=np.uint64)
    result_RK = np.empty((len(runs), num_hashes), dtype=np.uint64)
    start = 0
    while start < len(runs):
        end, size = start, 0
        while end < len(runs) and (end == start or size + len(runs[end]) <= BATCH_RUNS):
            size += len(runs[end])
            end += 1
        flat_N = np.concatenate(runs[start:end])
        starts = np.concatenate([[0], np.cumsum([len(run) for run in runs[start : end - 1]])]).astype(np.int64)
        for k in range(num_hashes):
            hashed_N = flat_N * factors_K[k] + added_K[k]
            # The low bits of a product mod 2^64 are weak; the high ones decide.
            result_RK[start:end, k] = np.minimum.reduceat(hashed_N >> np.uint64(20), starts)
        start = end
    return result_RK


def similarity(left: np.ndarray, right: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets of runs."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared) if shared else 0.0


def near_duplicates(texts: Sequence[str], *, min_similarity: float = MIN_SIMILARITY) -> NearDuplicates:
    """Rows of which an earlier row holds nearly the same words. Each later row is named once, with the earliest match.

    A pair of similarity s is found with probability 1 - (1 - s^4)^16: 0.9998 at 0.8. Equal texts count too.
    """
    texts = texts[:MAX_ROWS]
    runs = word_runs(texts)
    rows = np.array([row for row, run in enumerate(runs) if len(run)], dtype=np.int64)
    if len(rows) < 2:
        return NearDuplicates([], len(texts), min_similarity)
    signatures_RK = signatures([runs[row] for row in rows])
    best: dict[int, tuple[int, float]] = {}
    for band in range(BANDS):
        band_RK = np.ascontiguousarray(signatures_RK[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND])
        key_R = band_RK.view([("", np.uint64)] * ROWS_PER_BAND).ravel()
        _, group_R = np.unique(key_R, return_inverse=True)
        order_R = np.argsort(group_R, kind="stable")
        starts = np.flatnonzero(np.diff(group_R[order_R], prepend=-1))
        sizes = np.diff(starts, append=len(order_R))
        # Every row of a bucket is compared with the bucket's first row only, so a bucket costs its size.
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            members = order_R[start : start + size]
            first = int(rows[members[0]])
            for later in (int(rows[member]) for member in members[1:]):
                if later in best and best[later][0] <= first:
                    continue
                alike = similarity(runs[first], runs[later])
                if alike >= min_similarity:
                    best[later] = (first, alike)
    pairs = [(first, later, alike) for later, (first, alike) in sorted(best.items())]
    return NearDuplicates(pairs, len(texts), min_similarity)
