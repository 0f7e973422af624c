"""Is an answer right? Checkers for answers that can be checked, and the score over many. Knows no model and no files.

What counts as the same answer (and nothing else does):
`words`: the same words in the same order, whatever the case, the commas or line breaks between them, and a full stop
at the end. `number`: the whole answer is that integer, a full stop at the end allowed. `result`: the answer may count
or reason, and its last word is that integer. `text`: equal after white space at the ends is removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zhibei.config.errors import UserError
from zhibei.losses.intervals import Share, wilson

Checker = Callable[[str, str], bool]


@dataclass(frozen=True)
class Question:
    """Something with one right answer. `task` is what it is counted under, `checker` a name from CHECKERS."""

    instruction: str
    answer: str
    task: str
    checker: str
    input: str = ""


@dataclass(frozen=True)
class ExactMatch:
    """How many were right, over all and by task, and which. `right[i]` belongs to question i."""

    overall: Share
    by_task: dict[str, Share]
    right: tuple[bool, ...]


def same_words(answer: str, expected: str) -> bool:
    return _words(answer) == _words(expected)


def same_number(answer: str, expected: str) -> bool:
    found = re.fullmatch(r"\s*([+-]?(?:0|[1-9]\d*))\s*\.?\s*", answer, flags=re.ASCII)
    return found is not None and int(found[1]) == int(expected)


def same_result(answer: str, expected: str) -> bool:
    return same_number(_last_word(answer), _last_word(expected))


def same_text(answer: str, expected: str) -> bool:
    return answer.strip() == expected.strip()


CHECKERS: dict[str, Checker] = {"words": same_words, "number": same_number, "result": same_result, "text": same_text}


def is_right(question: Question, answer: str) -> bool:
    """Whether the answer is the question's. Raises UserError for a checker that does not exist."""
    if question.checker not in CHECKERS:
        raise UserError(
            f"there is no checker {question.checker!r}",
            expected="one of " + ", ".join(CHECKERS),
            fix="correct the field checker",
            where=f"task {question.task}",
        )
    return CHECKERS[question.checker](answer, question.answer)


def score(questions: Sequence[Question], answers: Sequence[str], *, confidence: float = 0.95) -> ExactMatch:
    """Exact match of answers to questions in the same order, with Wilson intervals.

    Raises UserError when there are no questions, ValueError when there are not as many answers.
    """
    if not questions:
        raise UserError(
            "there are no questions to score",
            expected="at least one held-out question",
            fix="hold out more rows",
            where="exact match",
        )
    right = tuple(is_right(question, answer) for question, answer in zip(questions, answers, strict=True))
    by_task: dict[str, list[bool]] = {}
    for question, outcome in zip(questions, right, strict=True):
        by_task.setdefault(question.task, []).append(outcome)
    return ExactMatch(
        overall=wilson(sum(right), len(right), confidence=confidence),
        by_task={task: wilson(sum(own), len(own), confidence=confidence) for task, own in by_task.items()},
        right=right,
    )


def _last_word(text: str) -> str:
    return text.split()[-1] if text.split() else ""


def _words(text: str) -> list[str]:
    return re.split(r"[\s,]+", text.casefold().strip().removesuffix(".").strip(" ,\n\t"))
