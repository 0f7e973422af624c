"""What can be asked in the small world, in how many ways, and the right answer. Knows no files and no model.

A kind draws facts, and `phrasings` turn them into an instruction (and an input). The field `content`
(world/contents.py) alone decides whether they are held out, so the same list or sum is on one side in every task, every
phrasing and every document.

No word of a list or table stands right behind a line break: a word is then always the same token, space included, and
copying it is the same for all words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from zhibei.pipeline.world.contents import list_content, sum_content, table_content
from zhibei.pipeline.world.words import (
    ANIMALS,
    COLOURS,
    MOST_COUNTED,
    NAMES,
    NUMBERS,
    PLURALS,
    counted,
    draw_numbers,
    draw_repeats,
    draw_steps,
    draw_words,
)

Facts = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One way of drawing facts for a task. `phrasings` are pairs (instruction, input) with fields in braces."""

    task: str
    checker: str
    draw: Callable[[Random], Facts]
    phrasings: tuple[tuple[str, str], ...]


def _list_facts(words: list[str], answer: str) -> Facts:
    listed = " ".join(words)
    return {"content": list_content(words), "list": listed, "answer": answer}


def _copied(random: Random) -> Facts:
    words = draw_words(random)
    return _list_facts(words, " ".join(words))


def _reversed(random: Random) -> Facts:
    words = draw_words(random)
    return _list_facts(words, " ".join(reversed(words)))


def _sorted_words(random: Random) -> Facts:
    words = draw_words(random)
    return _list_facts(words, " ".join(sorted(words)))


def _sorted_numbers(random: Random) -> Facts:
    numbers = draw_numbers(random)
    return _list_facts(numbers, " ".join(sorted(numbers, key=int)))


def _length(random: Random) -> Facts:
    words = draw_words(random, most=MOST_COUNTED)
    return _list_facts(words, str(len(words)))


def _occurrences(random: Random) -> Facts:
    words, asked = draw_repeats(random)
    return {**_list_facts(words, str(words.count(asked))), "asked": asked}


def _plus(random: Random) -> Facts:
    number, steps = draw_steps(random)
    left, right = random.sample((number, steps), 2)
    return _sum_facts(random, number, steps, left=left, right=right)


def _minus(random: Random) -> Facts:
    number, steps = draw_steps(random)
    return _sum_facts(random, number, -steps, left=number, right=steps)


def _sum_facts(random: Random, number: int, steps: int, *, left: int, right: int) -> Facts:
    return {
        "content": sum_content(number, abs(steps)),
        "left": str(left),
        "right": str(right),
        "answer": counted(number, steps),
        "name": random.choice(NAMES),
        "things": random.choice(PLURALS),
    }


def _looked_up(random: Random) -> Facts:
    names = random.sample(NAMES, random.randint(2, 5))
    values = random.sample(random.choice((ANIMALS, COLOURS, NUMBERS)), len(names))
    asked = random.randrange(len(names))
    pairs = list(zip(names, values, strict=True))
    return {
        "content": table_content(pairs, names[asked]),
        "table": ", ".join(f"{name} {value}" for name, value in pairs),
        "asked": names[asked],
        "answer": f"{names[asked]} {values[asked]}",
    }


KINDS: tuple[Kind, ...] = (
    Kind(
        "copy",
        "words",
        _copied,
        phrasings=(
            ("Copy this list.", "List: {list}"),
            ("Repeat these words.", "Words: {list}"),
            ("Repeat after me: {list}", ""),
            ("Please say this again: {list}", ""),
            ("Write {list} once more.", ""),
        ),
    ),
    Kind(
        "reverse",
        "words",
        _reversed,
        phrasings=(
            ("Reverse this list.", "List: {list}"),
            ("Write these words backwards.", "Words: {list}"),
            ("Say this in reverse order: {list}", ""),
            ("What is {list} backwards?", ""),
            ("Please turn this list around: {list}", ""),
        ),
    ),
    Kind(
        "sort",
        "words",
        _sorted_words,
        phrasings=(
            ("Sort these words.", "Words: {list}"),
            ("Put these words in alphabetical order.", "Words: {list}"),
            ("Sort from A to Z: {list}", ""),
            ("What is the alphabetical order of {list}?", ""),
        ),
    ),
    Kind(
        "sort",
        "words",
        _sorted_numbers,
        phrasings=(
            ("Sort these numbers.", "Numbers: {list}"),
            ("Put these numbers in order, smallest first.", "Numbers: {list}"),
            ("Sort from small to large: {list}", ""),
        ),
    ),
    Kind(
        "count",
        "number",
        _length,
        phrasings=(
            ("How many words are in this list?", "List: {list}"),
            ("Count these words.", "Words: {list}"),
            ("How many words are these: {list}", ""),
        ),
    ),
    Kind(
        "count",
        "number",
        _occurrences,
        phrasings=(
            ("How often does {asked} appear in this list?", "List: {list}"),
            ("Count {asked} in this list.", "List: {list}"),
            ("How many times do you see {asked} here: {list}", ""),
        ),
    ),
    Kind(
        "arithmetic",
        "result",
        _plus,
        phrasings=(
            ("What is {left} plus {right}?", ""),
            ("Add {left} and {right}.", ""),
            ("Work out {left} + {right}", ""),
            ("{name} has {left} {things} and gets {right} more. How many {things} does {name} have now?", ""),
        ),
    ),
    Kind(
        "arithmetic",
        "result",
        _minus,
        phrasings=(
            ("What is {left} minus {right}?", ""),
            ("Take {right} away from {left}.", ""),
            ("Work out {left} - {right}", ""),
            ("{name} has {left} {things} and loses {right}. How many {things} are left?", ""),
        ),
    ),
    Kind(
        "lookup",
        "words",
        _looked_up,
        phrasings=(
            ("What does the table say for {asked}?", "Table: {table}"),
            ("Look up {asked} in this table.", "Table: {table}"),
            ("What belongs to {asked}?", "Table: {table}"),
            ("{table}. What goes with {asked}?", ""),
        ),
    ),
)

TASKS: tuple[str, ...] = tuple(dict.fromkeys(kind.task for kind in KINDS))
