"""Instructions with checkable answers, conversations and texts of the small world, by seed. Knows no files, no model.

Facts are held out by the hash of their content, so training and held-out items cannot meet: not in another phrasing,
not in another task, not in the text for pre-training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from random import Random

from zhibei.evaluate.exact_match import Question
from zhibei.pipeline.world.prose import FIRST_SUBJECTS, SUBJECTS, Subject
from zhibei.pipeline.world.tasks import KINDS, TASKS, Facts, Kind

HELD_OUT_ONE_IN = 8
MOST_TRIES = 10_000

SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! Give me a list, a sum or a table."),
    ("Hello!", "Hello! Give me a list, a sum or a table."),
    ("Hi", "Hello! Give me a list, a sum or a table."),
    ("Who are you?", "I am a small model. I know lists, sums and tables."),
    ("What can you do?", "I copy, reverse, sort and count lists, add numbers and look up tables."),
    ("Help", "I copy, reverse, sort and count lists, add numbers and look up tables."),
    ("Thank you", "You are welcome!"),
    ("Thanks", "You are welcome!"),
)
"""Politeness for whoever talks to the model. There is nothing to hold out, so it is never scored."""


def is_held_out(content: str) -> bool:
    """Whether these facts belong to the held-out side: one in eight does, decided by SHA-256 and nothing else."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def draw_question(random: Random, *, task: str, held_out: bool) -> Question:
    """A question of this task whose facts are on the asked side of the split."""
    kinds = [kind for kind in KINDS if kind.task == task]
    for _ in range(MOST_TRIES):
        kind = random.choice(kinds)
        facts = kind.draw(random)
        if is_held_out(facts["content"]) == held_out:
            return _phrased(random, kind, facts)
    raise RuntimeError(f"task {task} draws no facts on one side of the split")


def heldout_questions(seed: int, per_task: int) -> list[Question]:
    """Different held-out questions, the same number of each task, tasks in turn."""
    random = Random(f"held out {seed}")
    found: dict[str, dict[tuple[str, str], Question]] = {task: {} for task in TASKS}
    for task in TASKS:
        for _ in range(MOST_TRIES):
            if len(found[task]) == per_task:
                break
            question = draw_question(random, task=task, held_out=True)
            found[task].setdefault((question.instruction, question.input), question)
    return [question for row in zip(*(list(own.values()) for own in found.values()), strict=True) for question in row]


def conversations(seed: int, count: int, *, most_turns: int = 3) -> Iterator[list[Question]]:
    """Training conversations of one to `most_turns` answered questions; about one in forty is a greeting."""
    random = Random(f"conversations {seed}")
    for _ in range(count):
        num_turns = random.randint(1, most_turns)
        yield [_greeting(random) if random.random() < 1 / 40 else _training_question(random) for _ in range(num_turns)]


def texts(seed: int, count: int) -> Iterator[str]:
    """Running text to pre-train on: true statements about training facts, without an instruction. The first third only
    repeats lists and tables, the rest is about everything."""
    random = Random(f"texts {seed}")
    for number in range(count):
        yield _text(random, FIRST_SUBJECTS if number < count // 3 else SUBJECTS)


def _text(random: Random, subjects: Sequence[Subject]) -> str:
    write = random.choice(subjects)
    for _ in range(MOST_TRIES):
        text = write(random, lambda content: not is_held_out(content))
        if text is not None:
            return text
    raise RuntimeError(f"{write.__name__} draws held-out facts only")


def _training_question(random: Random) -> Question:
    return draw_question(random, task=random.choice(TASKS), held_out=False)


def _greeting(random: Random) -> Question:
    instruction, answer = random.choice(SMALL_TALK)
    return Question(instruction, answer, task="small talk", checker="text")


def _phrased(random: Random, kind: Kind, facts: Facts) -> Question:
    instruction, given = random.choice(kind.phrasings)
    return Question(instruction.format(**facts), facts["answer"], kind.task, kind.checker, input=given.format(**facts))
