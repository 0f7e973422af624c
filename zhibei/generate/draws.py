"""Uniform numbers that depend on seed, row and position only. Knows no generator and leaves the global one alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): increment, then two rounds of xor-shift and multiply.
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_WORD = 2**64


def uniform(seed: int, rows: Sequence[int], *, start: int, count: int) -> torch.Tensor:
    """Draws `start .. start + count` of each row: float64 in [0, 1), shape (rows, count), on the CPU.

    Row r has its own SplitMix64 stream, whose key is mixed from seed and r; so a row's draws do not depend on which
    other rows are drawn beside it, on how many are drawn at once, or on the device.
    """
    keys = [_signed(_mix(_mix(seed + _GAMMA) + (row + 1) * _GAMMA)) for row in rows]
    keys_B1 = torch.tensor(keys, dtype=torch.int64).view(-1, 1)
    counters_T = torch.arange(start + 1, start + count + 1, dtype=torch.int64)
    return _to_unit(_mix_tensor(keys_B1 + counters_T * _signed(_GAMMA)))


def _mix(word: int) -> int:
    """The output function of SplitMix64 on one 64-bit word."""
    word %= _WORD
    for shift, factor in _ROUNDS:
        word = ((word ^ (word >> shift)) * factor) % _WORD
    return word ^ (word >> _LAST_SHIFT)


def _mix_tensor(words: torch.Tensor) -> torch.Tensor:
    """`_mix` on int64 tensors, whose products wrap as unsigned words do."""
    for shift, factor in _ROUNDS:
        words = (words ^ _shift_right(words, shift)) * _signed(factor)
    return words ^ _shift_right(words, _LAST_SHIFT)


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift in zeros: torch shifts int64 with its sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _to_unit(words: torch.Tensor) -> torch.Tensor:
    """The upper 53 bits as a float64 in [0, 1)."""
    return _shift_right(words, 11).to(torch.float64) * 2.0**-53


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
