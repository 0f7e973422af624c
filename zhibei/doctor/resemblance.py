"""Pages that sound like a description in plain words. Knows words and how rare they are, no error messages.

People also describe what they see ("answers right but never stops"). No message can be found in that, but the pages
of the catalogue describe the same things, so the rarest words they share point to a page. It is a guess and said to be.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache

from zhibei.doctor.pitfall import Pitfall

LONGEST_DESCRIPTION = 2000
LEAST_SHARED = 0.18
"""Cosine below which a page has nothing to do with the words."""
FEWEST_WORDS = 5
WORD = re.compile(r"[a-z][a-z0-9_]{1,}|[\u4e00-\u9fff]")
ENDINGS = re.compile(r"(?:ing|ed|es|s|ly)$")


def resembling(text: str, catalogue: Mapping[str, Pitfall], *, most: int = 3) -> list[tuple[Pitfall, float]]:
    """Pitfalls whose pages share rare words with a short text, the likeliest first; none for a log."""
    if len(set(_words(text))) < FEWEST_WORDS or len(text) > LONGEST_DESCRIPTION or text.count("\n") > 12:
        return []
    pages = {name: Counter(_words(_page(one))) for name, one in catalogue.items()}
    in_pages = Counter(word for page in pages.values() for word in page)
    rarity = {word: math.log(len(pages) / count) for word, count in in_pages.items()}
    asked = Counter(_words(text))
    scored = [(_cosine(asked, page, rarity), name) for name, page in pages.items()]
    scored.sort(reverse=True)
    return [(catalogue[name], round(score, 2)) for score, name in scored[:most] if score >= LEAST_SHARED]


def _page(pitfall: Pitfall) -> str:
    """Its name and title say most, so they count three times."""
    named = pitfall.id.replace("-", " ")
    parts = [named, pitfall.english.title, pitfall.chinese.title] * 3
    return " ".join([*parts, pitfall.english.why, pitfall.chinese.why])


def _words(text: str) -> list[str]:
    return [_stem(word) for word in WORD.findall(text.lower())]


@cache
def _stem(word: str) -> str:
    shorter = ENDINGS.sub("", word)
    return shorter if len(shorter) > 2 else word


def _cosine(asked: Counter[str], page: Counter[str], rarity: Mapping[str, float]) -> float:
    def weight(count: int, word: str) -> float:
        return (1 + math.log(count)) * rarity.get(word, 0.0)

    shared = sum(weight(asked[word], word) * weight(page[word], word) for word in asked if word in page)
    lengths = [math.sqrt(sum(weight(count, word) ** 2 for word, count in one.items())) for one in (asked, page)]
    return shared / (lengths[0] * lengths[1]) if all(lengths) else 0.0
