"""Running text about the small world, to pre-train on. Knows no instruction and no template.

A document opens with something that cannot be foreseen (a list, a table, a sum) and then says several true things
about it, so that most of what follows can be learned.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from zhibei.pipeline.world.words import (
    ANIMALS,
    COLOURS,
    LARGEST_ADDEND,
    NAMES,
    NUMBERS,
    PLURALS,
    draw_numbers,
    draw_repeats,
    draw_words,
)

Seen = Callable[[str], bool]
"""Whether these facts (their `content`) may be shown in training."""


def _about_words(random: Random, seen: Seen) -> str | None:
    words = draw_words(random)
    listed = " ".join(words)
    if not seen(f"list {listed}"):
        return None
    name, other = random.sample(NAMES, 2)
    alphabetical, backwards = " ".join(sorted(words)), " ".join(reversed(words))
    sayings = [
        random.choice(
            (f"Once more: {listed}", f"{name} repeats {listed}", f"{listed}", f"{name} and {other} say {listed}")
        ),
        random.choice(
            (f"Backwards: {backwards}", f"In reverse it is {backwards}", f"{name} turns it around: {backwards}")
        ),
        random.choice(
            (
                f"In alphabetical order: {alphabetical}",
                f"From A to Z: {alphabetical}",
                f"{name} sorts it: {alphabetical}",
            )
        ),
        random.choice(
            (f"That makes {len(words)} words", f"There are {len(words)} words", f"{name} counts {len(words)}")
        ),
    ]
    return _document(random, listed, sayings)


def _about_numbers(random: Random, seen: Seen) -> str | None:
    numbers = draw_numbers(random)
    listed = " ".join(numbers)
    if not seen(f"list {listed}"):
        return None
    ordered = " ".join(sorted(numbers, key=int))
    sayings = [
        random.choice((f"Once more: {listed}", f"{listed}")),
        random.choice(
            (f"In order: {ordered}", f"From small to large: {ordered}", f"{random.choice(NAMES)} sorts it: {ordered}")
        ),
        f"Backwards: {' '.join(reversed(numbers))}",
    ]
    return _document(random, listed, sayings)


def _about_repeats(random: Random, seen: Seen) -> str | None:
    words, _ = draw_repeats(random)
    listed = " ".join(words)
    if not seen(f"list {listed}"):
        return None
    sayings = [f"{listed}", f"That makes {len(words)} words"]
    for word in sorted(set(words)):
        times = words.count(word)
        sayings.append(random.choice((f"We see {word} {times} times", f"The number of {word} is {times}")))
    return _document(random, listed, sayings)


def _about_sums(random: Random, seen: Seen) -> str | None:
    lines = []
    while len(lines) < 5:
        left, right = random.randint(0, LARGEST_ADDEND), random.randint(0, LARGEST_ADDEND)
        if not seen(f"sum {min(left, right)} {max(left, right)}"):
            continue
        total, things = left + right, random.choice(PLURALS)
        lines.append(
            random.choice(
                (
                    f"{left} + {right} = {total}",
                    f"{left} plus {right} makes {total}",
                    f"{left} {things} and {right} more are {total}",
                    f"{total} - {left} = {right}",
                    f"{total} minus {left} makes {right}",
                    f"{total} {things} less {left} are {right}",
                )
            )
        )
    return "\n".join(lines)


def _about_counting(random: Random, seen: Seen) -> str | None:
    start, step = random.choice(NUMBERS), random.choice((1, 1, -1, 2, -2, 5, 10))
    numbers = [int(start)]
    while len(numbers) < 12 and 0 <= numbers[-1] + step < len(NUMBERS):
        numbers.append(numbers[-1] + step)
    return "Counting: " + " ".join(map(str, numbers))


def _about_tables(random: Random, seen: Seen) -> str | None:
    names = random.sample(NAMES, random.randint(2, 5))
    values = random.sample(random.choice((ANIMALS, COLOURS, NUMBERS)), len(names))
    pairs = list(zip(names, values, strict=True))
    listed = ", ".join(f"{name} {value}" for name, value in pairs)
    opening = random.choice(("\n".join(f"{n}: {v}" for n, v in pairs), ", ".join(f"{n} has {v}" for n, v in pairs)))
    sayings = []
    for name, value in pairs:
        if not seen(f"table {listed}: {name}"):
            continue
        sayings.append(random.choice((f"{name} has {value}", f"The table says {value} for {name}", f"{name}: {value}")))
    return _document(random, opening, sayings)


def _document(random: Random, opening: str, sayings: list[str]) -> str:
    random.shuffle(sayings)
    joint = random.choice(("\n", ". "))
    return joint.join((opening, *sayings))


SUBJECTS: tuple[Callable[[Random, Seen], str | None], ...] = (
    _about_words,
    _about_words,
    _about_numbers,
    _about_repeats,
    _about_sums,
    _about_counting,
    _about_tables,
)
