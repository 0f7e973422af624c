"""Rewards that compare an answer with a known result: 1 where it is right, else 0. Knows texts only."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from zhibei.config.errors import UserError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
Verifier = Callable[[str, str | None], float]
"""(answer, reference) -> reward."""


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands commas taken out; behind `####` where the text has it, as GSM8K writes its
    results (arXiv:2110.14168)."""
    found = NUMBER.findall(text.rsplit("####", 1)[-1])
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def same_number(answer: str, reference: str | None) -> float:
    """1 where the last numbers are equal as numbers: 12, 12.0 and 12.00 are the same."""
    wanted = last_number(reference or "")
    return float(wanted is not None and last_number(answer) == wanted)


def exact(answer: str, reference: str | None) -> float:
    """1 where answer and reference are the same words, whatever the case and the white space."""
    return float(_words(answer) == _words(reference or ""))


def contains(answer: str, reference: str | None) -> float:
    """1 where the words of the reference come one after the other in the answer."""
    wanted = _words(reference or "")
    return float(bool(wanted) and f" {wanted} " in f" {_words(answer)} ")


def matches(pattern: str, *, where: str) -> Verifier:
    """1 where the regular expression is found in the answer. Raises UserError for one that cannot be read."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as problem:
        raise UserError(
            f"the regular expression {pattern!r} cannot be read: {problem}",
            expected="a regular expression as Python's re reads it",
            fix="correct it, or write the rule as a function: python:FILE.py:FUNCTION",
            where=where,
        ) from None
    return lambda answer, _reference: float(compiled.search(answer) is not None)


VERIFIERS: dict[str, Verifier] = {"number": same_number, "exact": exact, "contains": contains}


def _words(text: str) -> str:
    return " ".join(text.casefold().split())
