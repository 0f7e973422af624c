"""Preference pairs and prompts of the small world: who is right is the world's word. Knows questions and answers, no
model.

All of them are about training facts: what is held out is neither in a pair nor in a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from zhibei.evaluate.exact_match import Question, is_right
from zhibei.pipeline.world.files import asked, write_json_lines
from zhibei.pipeline.world.hedges import without_hedge
from zhibei.pipeline.world.items import draw_question
from zhibei.pipeline.world.slips import slip
from zhibei.pipeline.world.tasks import TASKS
from zhibei.store.folders import whole_folder

HEDGE, OWN, SLIP = "hedge", "own", "slip"
"""Where a rejected answer comes from: the model's own right answer with a hedge behind it, its own wrong answer, or a
mistake put into the right one."""


@dataclass(frozen=True)
class Pair:
    """A question with its right answer and a wrong one."""

    question: Question
    rejected: str
    origin: str


@dataclass(frozen=True)
class PreferenceFiles:
    """`pairs/<task>-<origin>.jsonl` and `prompts.jsonl` in one folder."""

    folder: Path

    @property
    def pairs(self) -> list[Path]:
        return sorted((self.folder / "pairs").glob("*.jsonl"))

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"


def training_questions(purpose: str, seed: int, count: int) -> list[Question]:
    """Single questions about training facts, other ones for each purpose."""
    random = Random(f"{purpose} {seed}")
    return [draw_question(random, task=random.choice(TASKS), held_out=False) for _ in range(count)]


def own_pairs(questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Iterator[Pair]:
    """Every different wrong answer of the model (`answers[i]` are those to question i) beside the right one."""
    for question, own in zip(questions, answers, strict=True):
        for answer in dict.fromkeys(own):
            if answer and not is_right(question, answer):
                yield Pair(question, answer, HEDGE if is_right(question, without_hedge(answer)) else OWN)


def slip_pairs(questions: Iterable[Question], *, seed: int) -> Iterator[Pair]:
    """A mistake put into the right answer of each question."""
    random = Random(f"slips {seed}")
    for question in questions:
        yield Pair(question, slip(random, question), SLIP)


def write_preferences(folder: Path, pairs: Iterable[Pair], prompts: Iterable[Question]) -> PreferenceFiles:
    """The files that a reward model and a policy learn from, complete or absent."""
    named: dict[str, list[dict[str, str]]] = {}
    for pair in pairs:
        row = {"prompt": asked(pair.question), "chosen": pair.question.answer, "rejected": pair.rejected}
        named.setdefault(f"{pair.question.task}-{pair.origin}", []).append(row)
    with whole_folder(folder, purpose="preference pairs and prompts") as writing:
        (writing / "pairs").mkdir()
        for name, rows in named.items():
            write_json_lines(writing / "pairs" / f"{name}.jsonl", rows)
        write_json_lines(writing / "prompts.jsonl", ({"prompt": asked(question)} for question in prompts))
    return PreferenceFiles(folder)
