"""A guard for tests: arrays whose names end in capitals have one dimension per letter, and one letter one size.

`logits_BTV` must have three dimensions, and within one call every B is the same number. The functions of a file are
looked at when they return, through the interpreter's own profiling hook; the product knows nothing of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

LETTERS = re.compile(r"_([A-Z]+)$")


class WrongShape(AssertionError):
    """A name promises other dimensions than its value has."""


def breaches_of(names: dict[str, Any]) -> list[str]:
    """What is wrong with these variables, in words; empty when every name keeps its promise."""
    breaches: list[str] = []
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in names.items():
        match = LETTERS.search(name)
        if match is None or not hasattr(value, "shape"):
            continue
        shape = tuple(value.shape)
        if len(shape) != len(match[1]):
            breaches.append(f"{name} promises {len(match[1])} dimensions and has the shape {shape}")
            continue
        for letter, size in zip(match[1], shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if known != size:
                breaches.append(f"{letter} is {known} in {owner} and {size} in {name}")
    return breaches


@contextmanager
def shape_names_checked(path_part: str) -> Iterator[None]:
    """Check every function whose file path contains `path_part`; WrongShape after the block names all breaches.

    Raised at the end and not inside the hook, because code under test may catch exceptions.
    """
    found: list[str] = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and path_part in frame.f_code.co_filename:
            place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
            found.extend(f"{place}: {breach}" for breach in breaches_of(frame.f_locals))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
    if found:
        raise WrongShape("\n".join(found))
