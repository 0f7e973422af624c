"""Finding many patterns in many lines: what must stand in a line before a pattern is worth trying. Knows no pitfall.

Each pattern is reduced to literals of which one must occur in any match; those are found by plain substring search,
and the pattern itself runs only where one stands. Quotes are equal to one another: programs change them often.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

SHORTEST_LITERAL = 2
WORDS_KEPT = 500_000
QUOTES = dict.fromkeys(map(ord, '"`\u2018\u2019\u201c\u201d\u00b4'), "'")
BROKEN_AT = re.compile(r"['\"`\u2018\u2019\u201c\u201d\u00b4]|\s{2,}|\n")
"""A literal never spans what normalising changes."""
SPANS_LINES = re.compile(r"\\n|\\[sS]\\[sS]|\[\\s\\S\]|\[\\d\\D\]|\(\?[a-z]*s[a-z]*[):]")


@dataclass(frozen=True, slots=True)
class ErrorPattern:
    """`owner` is a pitfall's id; `spans_lines` says that it may begin in one line and end in a later one."""

    owner: str
    regex: re.Pattern[str]
    spans_lines: bool


def same_quotes(text: str) -> str:
    return text.translate(QUOTES)


class PatternIndex:
    """Patterns by the literals that announce them. `everywhere` are those without one; they are tried on every line."""

    def __init__(self, patterns: Mapping[str, Iterable[re.Pattern[str]]]) -> None:
        self.by_literal: dict[bytes, list[ErrorPattern]] = {}
        self.everywhere: list[ErrorPattern] = []
        self._awaited: dict[bytes, list[bytes]] = {}
        self._met: list[bytes] = []
        self._known_words: set[bytes] = set()
        for owner, regexes in patterns.items():
            for regex in regexes:
                self._add(owner, regex)

    def _add(self, owner: str, regex: re.Pattern[str]) -> None:
        prepared, literals = _prepared(regex)
        pattern = ErrorPattern(owner, prepared, SPANS_LINES.search(prepared.pattern) is not None)
        for literal in map(str.encode, literals):
            if literal not in self.by_literal:
                self._awaited.setdefault(max(literal.split(), key=len), []).append(literal)
            self.by_literal.setdefault(literal, []).append(pattern)
        if not literals:
            self.everywhere.append(pattern)

    def due_in(self, text: bytes) -> list[tuple[bytes, list[ErrorPattern]]]:
        """Literals that may stand in this lower-case text, by the words that this and earlier texts are made of.

        Logs repeat their words; literals of whose longest word nothing was seen yet need no search.
        """
        words = set(text.split())
        new = words - self._known_words
        if len(self._known_words) > WORDS_KEPT:
            self._known_words.clear()
        self._known_words |= new
        joined = b"\n".join(new)
        for word in [word for word in self._awaited if word in joined]:
            self._met += self._awaited.pop(word)
        return [(literal, self.by_literal[literal]) for literal in self._met]


@cache
def _prepared(regex: re.Pattern[str]) -> tuple[re.Pattern[str], tuple[str, ...]]:
    source = same_quotes(regex.pattern)
    return re.compile(source, regex.flags), required_literals(source)


def required_literals(source: str) -> tuple[str, ...]:
    """Lower-case texts of which at least one stands in whatever the regular expression matches; () if none is known.

    >>> required_literals(r"CUDA (error|exception): out of memory")
    (': out of memory',)
    >>> required_literals(r"return code = -9|exitcode\\s*: -9")
    ('return code = -9', 'exitcode')
    """
    try:
        parser = import_module("re._parser" if hasattr(re, "_parser") else "sre_parse")
        found = _of_sequence(parser.parse(source))
    except (ImportError, AttributeError):  # a Python whose parser is elsewhere: slower, not wrong
        return ()
    if not found or min(map(len, found)) < SHORTEST_LITERAL:
        return ()
    return tuple(dict.fromkeys(found))


def _of_sequence(items: Any) -> tuple[str, ...]:
    """The best set of literals of a sequence: the one whose shortest literal is longest."""
    best: tuple[str, ...] = ()
    run = ""
    for operation, argument in [*items, (None, None)]:
        if str(operation) == "LITERAL":
            run += chr(argument)
            continue
        for candidate in (_of_run(run), _of_item(str(operation), argument)):
            if min(map(len, candidate), default=0) > min(map(len, best), default=0):
                best = candidate
        run = ""
    return best


def _of_run(run: str) -> tuple[str, ...]:
    longest = max((part.strip() for part in BROKEN_AT.split(run)), key=len, default="")
    return (longest.lower(),) if longest.isascii() and longest else ()


def _of_item(operation: str, argument: Any) -> tuple[str, ...]:
    if operation == "SUBPATTERN":
        return _of_sequence(argument[-1])
    if operation in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and argument[0] >= 1:
        return _of_sequence(argument[2])
    if operation == "ATOMIC_GROUP":
        return _of_sequence(argument)
    if operation == "BRANCH":
        branches = [_of_sequence(branch) for branch in argument[1]]
        return tuple(one for branch in branches for one in branch) if all(branches) else ()
    return ()
