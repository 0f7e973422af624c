"""Tensors of which each file may hold some rows only: what a checkpoint of several ranks is made of. Knows no ranks.

A part is a run of rows along the first dimension. The files say nothing about that; who lists them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from zhibei.config.errors import UserError
from zhibei.store.headers import TensorEntry
from zhibei.store.shards import DTYPES, TensorFolder, Writable


@dataclass(frozen=True)
class Part:
    """The rows from `start` on of a tensor that has `num_rows` of them; the others lie elsewhere."""

    tensor: Writable
    start: int
    num_rows: int

    @property
    def stop(self) -> int:
        return self.start + self.tensor.shape[0]


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` (exclusive) of `num_rows`."""

    start: int
    stop: int
    num_rows: int


def uncovered(spans: Sequence[Span]) -> str | None:
    """What is wrong with the parts of one tensor: rows that none or two of them hold. None: they are the whole."""
    expected = 0
    for span in sorted(spans, key=lambda span: span.start):
        if span.start != expected or span.stop < span.start:
            what = f"rows {expected} to {span.start} are missing" if span.start > expected else "rows are there twice"
            return f"{what} (of {span.num_rows})"
        expected = span.stop
    totals = {span.num_rows for span in spans}
    if totals != {expected}:
        return f"rows {expected} to {max(totals)} are missing (of {max(totals)})"
    return None


class StoredTensors(Mapping[str, torch.Tensor]):
    """Named tensors in files, whole whatever parts they lie in; each is read from the disk when asked for.

    `rows` reads some rows alone, so that nothing larger than what is wanted is ever in memory.
    """

    def __init__(self, whole: TensorFolder, divided: Mapping[str, Sequence[tuple[Span, TensorFolder]]]) -> None:
        self._whole = whole
        self._divided = {
            name: sorted(((span, folder) for span, folder in parts), key=lambda part: part[0].start)
            for name, parts in divided.items()
        }
        for name, parts in self._divided.items():
            _require_whole(name, parts)

    @property
    def tied(self) -> dict[str, str]:
        """{later name: first name} of tensors that were one when written."""
        return self._whole.tied

    def __iter__(self) -> Iterator[str]:
        yield from self._whole
        yield from self._divided

    def __len__(self) -> int:
        return len(self._whole) + len(self._divided)

    def __contains__(self, name: object) -> bool:
        return name in self._divided or name in set(self._whole)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._divided:
            return self._whole[name]
        return self.rows(name, 0, self.shape(name)[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; nothing is read but headers."""
        if name not in self._divided:
            return tuple(self._whole.spec(name).shape)
        span, folder = self._divided[name][0]
        return (span.num_rows, *folder.spec(name).shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name).dtype]

    def _entry(self, name: str) -> TensorEntry:
        return self._divided[name][0][1].spec(name) if name in self._divided else self._whole.spec(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The rows `start` to `stop` (exclusive), by ordinary reads of exactly these bytes."""
        if name not in self._divided:
            return self._whole.read_unmapped(name, rows=(start, stop))
        found = torch.empty(stop - start, *self.shape(name)[1:], dtype=self.dtype(name))
        for span, folder in self._divided[name]:
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                part = folder.read_unmapped(name, rows=(first - span.start, last - span.start))
                found[first - start : last - start] = part
        return found


def _require_whole(name: str, parts: Sequence[tuple[Span, TensorFolder]]) -> None:
    spans = [span for span, _ in parts]
    problem = uncovered(spans)
    shapes = [tuple(folder.spec(name).shape) for _, folder in parts]
    if any(shape[0] != span.stop - span.start for span, shape in zip(spans, shapes, strict=True)):
        problem = problem or "a file holds other rows than files.json says"
    if problem is not None:
        raise UserError(
            f"{name}: {problem}",
            expected="every row in exactly one file",
            fix="files of two different saves were mixed; use an older checkpoint",
        )


def spans_of(listed: Mapping[str, Sequence[int]]) -> dict[str, Span]:
    """`{"name": [start, stop, rows]}` of a file's entry. Raises TypeError or ValueError where it is something else."""
    return {str(name): Span(*(int(number) for number in span)) for name, span in listed.items()}
