"""Answers with one mistake in them, such as a careless writer makes. Knows tasks and their answers, no model.

Some of the preference pairs of the small world put such an answer beside the right one; the others put the model's own
mistakes there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from zhibei.evaluate.exact_match import Question, is_right
from zhibei.pipeline.world.words import MIXED, NAMES, NUMBERS

MOST_TRIES = 200
TABLE_ROW = re.compile(rf"\b({'|'.join(NAMES)}) ([a-z]+|\d+)(?=[,.\n]|$)")


def slip(random: Random, question: Question) -> str:
    """A wrong answer that looks like an answer to this question, as the world's checker confirms."""
    for _ in range(MOST_TRIES):
        answer = SLIPS[question.task](random, question)
        if answer and not is_right(question, answer):
            return answer
    raise RuntimeError(f"no wrong answer to {question.instruction!r} in {MOST_TRIES} tries")


def _in_a_list(random: Random, question: Question) -> str:
    """Two words change places, one is missing, said twice or another one."""
    words = question.answer.split()
    place = random.randrange(len(words))
    how = random.random()
    if how < 0.55:
        other = random.randrange(len(words))
        words[place], words[other] = words[other], words[place]
    elif how < 0.7:
        del words[place]
    elif how < 0.85:
        words.insert(random.randrange(len(words) + 1), words[place])
    else:
        words[place] = random.choice(NUMBERS if words[place].isdigit() else MIXED)
    return " ".join(words)


def _in_a_count(random: Random, question: Question) -> str:
    """One or two too many or too few."""
    return str(max(0, int(question.answer) + random.choice((-2, -1, -1, 1, 1, 2))))


def _in_counting_on(random: Random, question: Question) -> str:
    """A step too many or too few, a wrong start, a number that is not the next one, or a wrong end."""
    steps = [int(number) for number in re.findall(r"\d+", question.answer)[:-1]]
    upwards = len(steps) < 2 or steps[1] > steps[0]
    shift = random.choice((-1, 1))
    how, said = random.randrange(5), None
    if how == 0:
        steps.append(steps[-1] + (1 if upwards else -1))
    elif how == 1:
        steps.pop()
    elif how == 2:
        steps = [step + shift for step in steps]
    elif how == 3:
        steps[random.randrange(len(steps))] += shift
    else:
        said = steps[-1] + shift
    if not steps or min(steps) < 0:
        return ""
    return f"{' '.join(map(str, steps))}, so {steps[-1] if said is None else said}"


def _in_a_table(random: Random, question: Question) -> str:
    """The value of another row, or another row altogether."""
    name, value = question.answer.split()
    rows = TABLE_ROW.findall(f"{question.instruction}\n{question.input}")
    others = [row for row in rows if row != (name, value)]
    if not others:
        return f"{name} {random.choice(NUMBERS if value.isdigit() else MIXED)}"
    other_name, other_value = random.choice(others)
    return f"{name if random.random() < 0.8 else other_name} {other_value}"


SLIPS: dict[str, Callable[[Random, Question], str]] = {
    "copy": _in_a_list,
    "reverse": _in_a_list,
    "sort": _in_a_list,
    "count": _in_a_count,
    "arithmetic": _in_counting_on,
    "lookup": _in_a_table,
}
