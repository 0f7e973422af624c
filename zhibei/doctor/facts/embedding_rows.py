"""Norms of single embedding rows, read from the file without the rest of the matrix. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from zhibei.doctor.facts.weight_scan import LAYOUTS, as_floats, bits_of
from zhibei.store.headers import TensorEntry

ROWS_FOR_THE_MEDIAN = 512


def norms_of_rows(
    path: Path, entry: TensorEntry, *, data_start: int, rows: Iterable[int]
) -> tuple[dict[int, float], float | None]:
    """({row: Euclidean norm}, median norm over 512 rows spread evenly); rows beyond the matrix are left out.

    Quantised embeddings have no norms here: ({}, None).
    """
    if entry.dtype not in LAYOUTS or len(entry.shape) != 2 or 0 in entry.shape:
        return {}, None
    count, width = entry.shape
    matrix = bits_of(path, entry, data_start=data_start).reshape(count, width)

    def norm(row: int) -> float:
        return float(np.linalg.norm(as_floats(np.ascontiguousarray(matrix[row]), entry.dtype).astype(np.float64)))

    sample = np.unique(np.linspace(0, count - 1, min(count, ROWS_FOR_THE_MEDIAN)).round().astype(int))
    median = float(np.median([norm(int(row)) for row in sample]))
    return {row: norm(row) for row in rows if 0 <= row < count}, median
