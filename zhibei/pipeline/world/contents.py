"""What identifies facts, however they are phrased: the one thing that decides whether they are held out.

All orders of the same words are one content, since reversing and sorting turn one order into another; so are all ways
to ask about the same two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence


def list_content(words: Sequence[str]) -> str:
    """A list of words or numbers in any order."""
    return "list " + " ".join(sorted(words))


def sum_content(number: int, steps: int) -> str:
    """14 + 3, 3 + 14 and 14 - 3: three steps from 14, up or down."""
    return f"sum {number} {steps}"


def table_content(pairs: Sequence[tuple[str, str]], asked: str) -> str:
    """The rows of a table in any order, and the one that is asked for."""
    return "table " + ", ".join(f"{name} {value}" for name, value in sorted(pairs)) + f": {asked}"
