"""Which tokens are learned: spans of the text to a mask over tokens. Knows no template, tokenizer or file.

A token is learned if and only if it was read from at least one character of a learned span. A token that holds
characters of both the prompt and the answer (a border merge) is therefore learned, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zhibei.text.template import Span

# Dimensions: N tokens of all rows, R rows, I ranges of characters.

Mode = Literal["answers", "last_answer", "turns", "everything"]


def _answers(spans: Sequence[Span], length: int) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in spans if span.role == "assistant" and span.learn]


def _last_answer(spans: Sequence[Span], length: int) -> list[tuple[int, int]]:
    last = max((span.turn for span in spans if span.role == "assistant"), default=-1)
    return [(span.start, span.end) for span in spans if span.turn == last and span.learn]


def _turns(spans: Sequence[Span], length: int) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in spans if span.learn]


def _everything(spans: Sequence[Span], length: int) -> list[tuple[int, int]]:
    """The whole text, less what was marked as not to be learned."""
    pieces, reached = [], 0
    for span in sorted((span for span in spans if not span.learn), key=lambda span: span.start):
        pieces.append((reached, span.start))
        reached = span.end
    return [*pieces, (reached, length)]


MODES: dict[Mode, Callable[[Sequence[Span], int], list[tuple[int, int]]]] = {
    "answers": _answers,
    "last_answer": _last_answer,
    "turns": _turns,
    "everything": _everything,
}


def learned_intervals(spans: Sequence[Span], *, length: int, mode: Mode) -> list[tuple[int, int]]:
    """Character ranges of one text that are learned: sorted, disjoint, none empty."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(MODES[mode](spans, length)):
        if start == end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True, slots=True)
class Layout:
    """Tokens of R rows on one line of characters: row r begins at character `offset_R[r]`, so rows never touch.

    `starts_N`, `ends_N` are where each token begins and ends on that line; row r owns tokens
    `borders[r]:borders[r+1]`.
    """

    starts_N: np.ndarray
    ends_N: np.ndarray
    borders: np.ndarray
    offset_R: np.ndarray

    def on_line(self, intervals: Sequence[Sequence[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranges per row -> (row, start, end) of all of them, on the line."""
        rows_I = np.repeat(np.arange(len(intervals)), [len(row) for row in intervals])
        flat = np.array([pair for row in intervals for pair in row], dtype=np.int64).reshape(-1, 2)
        return rows_I, flat[:, 0] + self.offset_R[rows_I], flat[:, 1] + self.offset_R[rows_I]

    def covered(self, starts_I: np.ndarray, ends_I: np.ndarray) -> np.ndarray:
        """bool [N]: tokens that hold at least one character of the ranges (sorted, disjoint, none empty)."""
        if not len(starts_I):
            return np.zeros(len(self.starts_N), dtype=bool)
        # Of sorted, disjoint ranges that begin before the token ends, the last one reaches furthest.
        last_N = np.searchsorted(starts_I, self.ends_N, side="left") - 1
        return (last_N >= 0) & (ends_I[np.maximum(last_N, 0)] > self.starts_N)

    def straddled(self, edges_I: np.ndarray) -> np.ndarray:
        """bool [I]: whether some token holds characters on both sides of the edge."""
        before_I = np.searchsorted(self.starts_N, edges_I, side="left") - 1
        if not len(self.starts_N):
            return np.zeros(len(edges_I), dtype=bool)
        return (before_I >= 0) & (self.ends_N[np.maximum(before_I, 0)] > edges_I)

    def last_token_of(self, places_I: np.ndarray) -> np.ndarray:
        """int [I]: the last token that holds the character at each place, -1 where there is none."""
        found_I = np.searchsorted(self.starts_N, places_I, side="right") - 1
        if not len(self.starts_N):
            return np.full(len(places_I), -1)
        return np.where((found_I >= 0) & (self.ends_N[np.maximum(found_I, 0)] > places_I), found_I, -1)


def lay_out(starts: np.ndarray, ends: np.ndarray, *, borders: np.ndarray, num_chars: Sequence[int]) -> Layout:
    """`starts`, `ends` [N] count characters within each row; `num_chars` [R] is the length of each row's text."""
    widths_R = np.asarray(num_chars, dtype=np.int64) + 2
    offset_R = np.cumsum(widths_R) - widths_R
    offset_N = np.repeat(offset_R, np.diff(borders))
    # An empty token (a prefix that stands for no character) belongs to the character that follows.
    return Layout(starts + offset_N, np.maximum(ends, starts + 1) + offset_N, borders, offset_R)


def supervised_tokens(layout: Layout, intervals: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
    """bool [N]: which tokens are learned. The first token of a row never is: nothing comes before it."""
    _, starts_I, ends_I = layout.on_line(intervals)
    learned_N = layout.covered(starts_I, ends_I)
    learned_N[layout.borders[:-1][np.diff(layout.borders) > 0]] = False
    return learned_N


def border_merges(layout: Layout, intervals: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
    """int [R]: in each row, how many edges of learned ranges fall inside of a token."""
    rows_I, starts_I, ends_I = layout.on_line(intervals)
    merged_I = layout.straddled(starts_I).astype(np.int64) + layout.straddled(ends_I)
    return np.bincount(rows_I, weights=merged_I, minlength=len(layout.offset_R)).astype(np.int64)
