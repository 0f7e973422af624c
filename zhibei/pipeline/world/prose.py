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
    MIXED,
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

Seen = Callable[[str], bool]
"""Whether these facts (their `content`) may be shown in training."""
Subject = Callable[[Random, Seen], str | None]
"""Writes a document, or None when it drew facts that may not be shown."""


def about_repetition(random: Random, seen: Seen) -> str | None:
    """A long list, said three times: what a model must be able to do before anything else here.

    In a short list, guessing among its words costs little; only in a long one does it pay to find the exact place.
    """
    listed = " ".join(random.sample(MIXED + NAMES + NUMBERS, random.randint(MOST_COUNTED + 1, 2 * MOST_COUNTED)))
    return _document(random, listed, [listed, listed])


def about_words(random: Random, seen: Seen) -> str | None:
    """Lists of words, each copied, turned around or sorted, and counted."""
    parts = []
    for _ in range(3):
        words = draw_words(random, most=MOST_COUNTED)
        if not seen(list_content(words)):
            return None
        listed, name = " ".join(words), random.choice(NAMES)
        # One order for each list: with several, what follows a word is ambiguous, and copying is learned late.
        saying = random.choice((_copied, _reversed, _sorted))(random, words)
        count = random.choice((f"That makes {len(words)} words", f"{name} counts {len(words)}", ""))
        parts.append(_document(random, listed, [saying, count] if count else [saying]))
    return " ".join(parts)


def about_numbers(random: Random, seen: Seen) -> str | None:
    """Lists of numbers, each copied, turned around or sorted."""
    parts = []
    for _ in range(3):
        numbers = draw_numbers(random, most=MOST_COUNTED)
        if not seen(list_content(numbers)):
            return None
        saying = random.choice((_copied, _reversed, _sorted, _sorted))(random, numbers)
        parts.append(_document(random, " ".join(numbers), [saying]))
    return " ".join(parts)


def _copied(random: Random, words: list[str]) -> str:
    listed = " ".join(words)
    return random.choice((f"Once more: {listed}", f"{random.choice(NAMES)} repeats {listed}"))


def _reversed(random: Random, words: list[str]) -> str:
    backwards = " ".join(reversed(words))
    return random.choice((f"Backwards: {backwards}", f"In reverse it is {backwards}"))


def _sorted(random: Random, words: list[str]) -> str:
    is_numeric = words[0].isdigit()
    ordered = " ".join(sorted(words, key=int) if is_numeric else sorted(words))
    from_to = "From small to large" if is_numeric else "From A to Z"
    return f"{random.choice(('In order', from_to))}: {ordered}"


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
    """Sums and differences, counted on step by step."""
    lines: list[str] = []
    while len(lines) < 3:
        number, steps = draw_steps(random)
        if not seen(sum_content(number, steps)):
            continue
        things = random.choice(PLURALS)
        ways = (
            f"{number} + {steps}: {counted(number, steps)}",
            f"{number} plus {steps} makes {counted(number, steps)}",
            f"{number} {things} and {steps} more: {counted(number, steps)}",
            f"{number} - {steps}: {counted(number, -steps)}",
            f"{number} minus {steps} makes {counted(number, -steps)}",
            f"{number} {things} less {steps}: {counted(number, -steps)}",
        )
        lines.append(random.choice(ways))
    return _document(random, lines[0], lines[1:])


def about_counting(random: Random, seen: Seen) -> str | None:
    """Numbers one by one, up or down."""
    step = random.choice((1, -1))
    numbers = [random.randrange(len(NUMBERS))]
    while len(numbers) < 16 and 0 <= numbers[-1] + step < len(NUMBERS):
        numbers.append(numbers[-1] + step)
    # Shorter ones could be a held-out list.
    return "We count: " + " ".join(map(str, numbers)) + "." if len(numbers) > MOST_COUNTED else None


def about_tables(random: Random, seen: Seen) -> str | None:
    """What goes with which name, and the same again name by name."""
    names = random.sample(NAMES, random.randint(4, len(NAMES)))
    values = random.sample(random.choice((ANIMALS, COLOURS, NUMBERS)), len(names))
    pairs = list(zip(names, values, strict=True))
    sayings = [
        f"{random.choice(('', 'The table says ', 'We find '))}{name} {value}"
        for name, value in pairs
        if seen(table_content(pairs, name))
    ]
    return _document(random, ", ".join(f"{name} {value}" for name, value in pairs), sayings)


def _document(random: Random, opening: str, sayings: list[str]) -> str:
    random.shuffle(sayings)
    return ". ".join((f"{random.choice(('Here is', 'Look:', 'Now'))} {opening}", *sayings)) + "."


FIRST_SUBJECTS: tuple[Subject, ...] = (about_repetition, about_repetition, about_repetition, about_tables)
"""What the first texts are about."""
SUBJECTS: tuple[Subject, ...] = (
    about_repetition,
    about_words,
    about_words,
    about_numbers,
    about_repeats,
    about_sums,
    about_counting,
    about_tables,
    about_tables,
)
"""What all later texts are about, each as often as it is named."""
