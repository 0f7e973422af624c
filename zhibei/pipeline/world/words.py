"""The words of the small world, and how lists of them are drawn. Knows no task and no phrasing."""

from __future__ import annotations

from random import Random

FRUITS = ("apple", "banana", "cherry", "date", "fig", "grape", "kiwi", "lemon", "mango", "olive", "peach", "plum")
ANIMALS = ("ant", "bear", "cat", "dog", "eagle", "fox", "goat", "horse", "lion", "mouse", "owl", "rabbit")
COLOURS = ("black", "blue", "brown", "gold", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
THINGS = ("bag", "book", "cup", "door", "key", "lamp", "map", "pen", "ring", "shoe", "spoon", "table")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NAMES = ("Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "Hugo", "Ida", "Jack", "Lena", "Mia", "Tom")
PLURALS = ("apples", "books", "coins", "cups", "eggs", "keys", "pens", "stones")

LARGEST_ADDEND = 25
LARGEST_NUMBER = 2 * LARGEST_ADDEND
NUMBERS = tuple(str(number) for number in range(LARGEST_NUMBER + 1))

LISTED = {"fruits": FRUITS, "animals": ANIMALS, "colours": COLOURS, "things": THINGS, "letters": LETTERS}
MIXED = FRUITS + ANIMALS + COLOURS + THINGS


def draw_words(random: Random, fewest: int = 2, most: int = 6) -> list[str]:
    """Different words in random order: half of the lists come from one group, half from all of them."""
    group = random.choice((MIXED, random.choice(tuple(LISTED.values()))))
    return random.sample(group, random.randint(fewest, most))


def draw_numbers(random: Random, fewest: int = 2, most: int = 6) -> list[str]:
    """Different numbers in random order."""
    return random.sample(NUMBERS, random.randint(fewest, most))


def draw_repeats(random: Random) -> tuple[list[str], str]:
    """A list in which words come back, and one word of it."""
    few = random.sample(random.choice(tuple(LISTED.values())), 2)
    words = [random.choice(few) for _ in range(random.randint(3, 6))]
    return words, random.choice(words)
