"""Which language a text is in: by py3langid where it is installed, else only which script. Knows no files."""

from __future__ import annotations

import bisect
import unicodedata
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

SAMPLE_CHARACTERS = 300

BLOCKS = (
    (0x0041, "Latin"),
    (0x0250, ""),
    (0x0370, "Greek"),
    (0x0400, "Cyrillic"),
    (0x0530, "Armenian"),
    (0x0590, "Hebrew"),
    (0x0600, "Arabic"),
    (0x0780, ""),
    (0x0900, "Devanagari"),
    (0x0980, "Bengali"),
    (0x0A00, ""),
    (0x0B80, "Tamil"),
    (0x0C00, "Telugu"),
    (0x0C80, ""),
    (0x0E00, "Thai"),
    (0x0E80, ""),
    (0x10A0, "Georgian"),
    (0x1100, "Hangul"),
    (0x1200, ""),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, ""),
    (0x3040, "Kana"),
    (0x3100, ""),
    (0x3130, "Hangul"),
    (0x3190, ""),
    (0x3400, "Han"),
    (0xA000, ""),
    (0xAC00, "Hangul"),
    (0xD7B0, ""),
    (0xF900, "Han"),
    (0xFB00, "Latin"),
    (0xFB10, ""),
)
"""First code point of each range and its script, from the Unicode block names."""
STARTS = [start for start, _ in BLOCKS]


def script_of(text: str) -> str:
    """The script most letters of a text belong to; `Japanese` for Han with Kana, `none` without letters."""
    text = text[:SAMPLE_CHARACTERS]
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else "none"
    counts: Counter[str] = Counter()
    for character in text:
        if not unicodedata.category(character).startswith("L"):
            continue
        place = bisect.bisect_right(STARTS, ord(character)) - 1
        name = BLOCKS[place][1] if place >= 0 else ""
        counts[name or "other"] += 1
    if not counts:
        return "none"
    if counts["Kana"] * 5 > sum(counts.values()):
        return "Japanese"
    # A Han character says about as much as a word of letters.
    counts["Han"] *= 3
    return counts.most_common(1)[0][0]


def detector() -> tuple[str, Callable[[str], str]]:
    """Name and function of the best detector there is."""
    if find_spec("py3langid"):
        classify = import_module("py3langid").classify
        return "py3langid", lambda text: "none" if script_of(text) == "none" else classify(text[:SAMPLE_CHARACTERS])[0]
    return "scripts (pip install py3langid tells languages apart)", script_of
