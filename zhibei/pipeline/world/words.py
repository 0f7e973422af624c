"""The words of the small world, and how lists of them are drawn. Knows no task and no phrasing."""

from __future__ import annotations

from random import Random

FRUITS = ("apple", "banana", "cherry", "fig", "grape", "kiwi", "lemon", "plum")
ANIMALS = ("bear", "cat", "dog", "eagle", "fox", "horse", "mouse", "owl")
COLOURS = ("black", "blue", "brown", "green", "pink", "red", "white", "yellow")
THINGS = ("bag", "book", "cup", "door", "key", "lamp", "pen", "table")
NAMES = ("Anna", "Ben", "Emma", "Hugo", "Ida", "Jack", "Mia", "Tom")
PLURALS = ("apples", "books", "coins", "cups", "eggs", "keys", "pens", "stones")

LARGE_ADDENDS, SMALL_ADDENDS = range(21), range(1, 7)
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
    """Different numbers in random order."""
    return random.sample(NUMBERS, random.randint(fewest, most))


def draw_addends(random: Random) -> tuple[int, int]:
    """A number and a small one, in either order."""
    addends = [random.choice(LARGE_ADDENDS), random.choice(SMALL_ADDENDS)]
    random.shuffle(addends)
    return addends[0], addends[1]


def draw_repeats(random: Random) -> tuple[list[str], str]:
    """A list in which words come back, and one word of it."""
    few = random.sample(random.choice(GROUPS), 2)
    words = [random.choice(few) for _ in range(random.randint(3, MOST_COUNTED))]
    return words, random.choice(words)
