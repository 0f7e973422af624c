"""Running text about the small world, to pre-train on. Knows no instruction and no template.

A document opens with something that cannot be foreseen (a list, a table, a sum) and then says several true things
about it, so that most of what follows can be learned.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from zhibei.pipeline.world.contents import list_content, sum_content, table_content
from zhibei.pipeline.world.words import (
    ANIMALS,
    COLOURS,
    LARGEST_ADDEND,
    MOST_LISTED,
    NAMES,
    NUMBERS,
    PLURALS,
    draw_numbers,
    draw_repeats,
    draw_words,
)

Seen = Callable[[str], bool]
"""Whether these facts (their `content`) may be shown in training."""
Subject = Callable[[Random, Seen], str | None]
"""Writes a document, or None when it drew facts that may not be shown."""


def about_repetition(random: Random, seen: Seen) -> str | None:
    """A list, said several times: what a model must be able to do before anything else here."""
    words = random.choice((draw_words, draw_words, draw_numbers))(random)
    if not seen(list_content(words)):
        return None
    listed = " ".join(words)
    sayings = [random.choice((listed, f"Once more: {listed}")) for _ in range(3)]
    return _document(random, listed, sayings)


def about_words(random: Random, seen: Seen) -> str | None:
    """A list of words: copied, turned around, sorted, counted."""
    words = draw_words(random)
    listed = " ".join(words)
    if not seen(list_content(words)):
        return None
    name = random.choice(NAMES)
    ordered, backwards = " ".join(sorted(words)), " ".join(reversed(words))
    sayings = [
        random.choice((f"Once more: {listed}", f"{name} repeats {listed}", listed)),
        random.choice((f"Backwards: {backwards}", f"In reverse it is {backwards}", f"{name} turns it to {backwards}")),
        random.choice((f"In order: {ordered}", f"From A to Z: {ordered}", f"{name} sorts it to {ordered}")),
        random.choice((f"That makes {len(words)} words", f"{name} counts {len(words)}")),
    ]
    return _document(random, listed, sayings)


def about_numbers(random: Random, seen: Seen) -> str | None:
    """A list of numbers: copied, turned around, sorted."""
    numbers = draw_numbers(random)
    listed = " ".join(numbers)
    if not seen(list_content(numbers)):
        return None
    ordered = " ".join(sorted(numbers, key=int))
    sayings = [
        random.choice((f"Once more: {listed}", listed)),
        random.choice((f"In order: {ordered}", f"From small to large: {ordered}")),
        f"Backwards: {' '.join(reversed(numbers))}",
    ]
    return _document(random, listed, sayings)


def about_repeats(random: Random, seen: Seen) -> str | None:
    """A list in which words come back, and how often each does."""
    words, _ = draw_repeats(random)
    listed = " ".join(words)
    if not seen(list_content(words)):
        return None
    sayings = [f"That makes {len(words)} words"]
    for word in sorted(set(words)):
        times = words.count(word)
        sayings.append(random.choice((f"We see {word} {times} times", f"The number of {word} is {times}")))
    return _document(random, listed, sayings)


def about_sums(random: Random, seen: Seen) -> str | None:
    """Sums and differences, each of them complete."""
    lines: list[str] = []
    while len(lines) < 5:
        left, right = random.randint(0, LARGEST_ADDEND), random.randint(0, LARGEST_ADDEND)
        if not seen(sum_content(left, right)):
            continue
        total, things = left + right, random.choice(PLURALS)
        ways = (
            f"{left} + {right} = {total}",
            f"{left} plus {right} makes {total}",
            f"{left} {things} and {right} more are {total}",
            f"{total} - {left} = {right}",
            f"{total} minus {left} makes {right}",
            f"{total} {things} less {left} are {right}",
        )
        lines.append(random.choice(ways))
    return _document(random, lines[0], lines[1:])


def about_counting(random: Random, seen: Seen) -> str | None:
    """Numbers in equal steps, up or down."""
    step = random.choice((1, 1, 1, -1, -1, 2, -2, 5, 10))
    numbers = [random.randrange(len(NUMBERS))]
    while len(numbers) < 16 and 0 <= numbers[-1] + step < len(NUMBERS):
        numbers.append(numbers[-1] + step)
    # Shorter ones could be a held-out list.
    return "We count: " + " ".join(map(str, numbers)) + "." if len(numbers) > MOST_LISTED else None


def about_tables(random: Random, seen: Seen) -> str | None:
    """Who has what, and the same again name by name."""
    names = random.sample(NAMES, random.randint(2, 5))
    values = random.sample(random.choice((ANIMALS, COLOURS, NUMBERS)), len(names))
    pairs = list(zip(names, values, strict=True))
    shown = (
        "\n".join(f"{name}: {value}" for name, value in pairs),
        ", ".join(f"{name} has {value}" for name, value in pairs),
    )
    sayings = [
        random.choice((f"{name} has {value}", f"The table says {name}: {value}"))
        for name, value in pairs
        if seen(table_content(pairs, name))
    ]
    return _document(random, random.choice(shown), sayings)


def _document(random: Random, opening: str, sayings: list[str]) -> str:
    random.shuffle(sayings)
    joint = random.choice((". ", ". ", ". ", "\n"))
    return joint.join((f"{random.choice(('Here is', 'Look:', 'Now'))} {opening}", *sayings)) + "."


FIRST_SUBJECTS: tuple[Subject, ...] = (about_repetition,)
"""What the first texts are about."""
SUBJECTS: tuple[Subject, ...] = (
    about_words,
    about_words,
    about_numbers,
    about_repeats,
    about_sums,
    about_counting,
    about_tables,
)
"""What all later texts are about, each as often as it is named."""
