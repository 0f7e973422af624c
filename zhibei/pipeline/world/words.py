"""The words of the small world, and how lists of them are drawn. Knows no task and no phrasing."""

from __future__ import annotations

from random import Random

FRUITS = ("apple", "banana", "cherry", "fig", "grape", "kiwi", "lemon", "plum")
ANIMALS = ("bear", "cat", "dog", "eagle", "fox", "horse", "mouse", "owl")
COLOURS = ("black", "blue", "brown", "green", "pink", "red", "white", "yellow")
THINGS = ("bag", "book", "cup", "door", "key", "lamp", "pen", "table")
NAMES = ("Anna", "Ben", "Emma", "Hugo", "Ida", "Jack", "Mia", "Tom")
PLURALS = ("apples", "books", "coins", "cups", "eggs", "keys", "pens", "stones")

LARGE_NUMBERS, STEPS = range(6, 26), range(1, 6)
"""A sum is a large number and a few steps up or down from it."""
NUMBERS = tuple(str(number) for number in range(31))

GROUPS = (FRUITS, ANIMALS, COLOURS, THINGS)
MIXED = FRUITS + ANIMALS + COLOURS + THINGS
MOST_LISTED = 4
MOST_COUNTED = 6


def draw_words(random: Random, fewest: int = 2, most: int = MOST_LISTED) -> list[str]:
    """Different words in random order: half of the lists come from one group, half from all of them."""
    group = random.choice((MIXED, random.choice(GROUPS)))
    return random.sample(group, random.randint(fewest, most))


def draw_numbers(random: Random, fewest: int = 2, most: int = MOST_LISTED) -> list[str]:
    """Different numbers in random order; never ones that follow one another, which counting shows."""
    while True:
        numbers = random.sample(range(len(NUMBERS)), random.randint(fewest, most))
        if max(numbers) - min(numbers) >= len(numbers):
            return [str(number) for number in numbers]


def draw_steps(random: Random) -> tuple[int, int]:
    """A large number, and how many steps are counted from it."""
    return random.choice(LARGE_NUMBERS), random.choice(STEPS)


def counted(start: int, steps: int) -> str:
    """Counting on from a number, down if `steps` is negative, and where it ends: 14, 3 -> '15 16 17, so 17'."""
    direction = 1 if steps > 0 else -1
    passed = [start + direction * number for number in range(1, abs(steps) + 1)]
    return f"{' '.join(map(str, passed))}, so {passed[-1]}"


def draw_repeats(random: Random) -> tuple[list[str], str]:
    """A list in which words come back, and one word of it."""
    few = random.sample(random.choice(GROUPS), 2)
    words = [random.choice(few) for _ in range(random.randint(3, MOST_COUNTED))]
    return words, random.choice(words)
