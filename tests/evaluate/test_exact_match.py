"""What counts as the same answer, what does not, and the sums over tasks."""

from __future__ import annotations

import pytest

from zhibei.config.errors import UserError
from zhibei.evaluate.exact_match import CHECKERS, Question, is_right, score


@pytest.mark.parametrize(
    ("checker", "expected", "answer"),
    [
        ("words", "fig kiwi", "fig kiwi"),
        ("words", "fig kiwi", " Fig, kiwi.\n"),
        ("words", "fig kiwi", "fig\nkiwi"),
        ("number", "12", "12"),
        ("number", "12", " 12.\n"),
        ("number", "-3", "-3"),
        ("result", "15 16, so 16", "15 16, so 16."),
        ("result", "15 16, so 16", "16"),
        ("text", "A b", " A b\n"),
    ],
)
def test_the_same_answer(checker, expected, answer):
    assert CHECKERS[checker](answer, expected)


@pytest.mark.parametrize(
    ("checker", "expected", "answer"),
    [
        ("words", "fig kiwi", "kiwi fig"),
        ("words", "fig kiwi", "fig kiwi fig"),
        ("words", "fig kiwi", "fig"),
        ("words", "fig kiwi", "figkiwi"),
        ("words", "fig kiwi", ""),
        ("words", "fig kiwi", "The answer is fig kiwi"),
        ("number", "12", "21"),
        ("number", "12", "12.5"),
        ("number", "12", "012"),
        ("number", "12", "1 2"),
        ("number", "12", "twelve"),
        ("number", "12", "x = 12"),
        ("number", "12", ""),
        ("result", "15 16, so 16", "15 16, so 17"),
        ("result", "15 16, so 16", "16 is it"),
        ("result", "15 16, so 16", ""),
        ("text", "A b", "a b"),
    ],
)
def test_another_answer(checker, expected, answer):
    assert not CHECKERS[checker](answer, expected)


def test_scores_add_up_over_tasks():
    questions = [
        Question("Add 1 and 2.", "3", "arithmetic", "number"),
        Question("Add 1 and 3.", "4", "arithmetic", "number"),
        Question("Copy.", "fig kiwi", "copy", "words", input="fig kiwi"),
    ]
    found = score(questions, ["3", "5", "fig kiwi"])
    assert found.right == (True, False, True)
    assert (found.overall.right, found.overall.total) == (2, 3)
    assert {task: (share.right, share.total) for task, share in found.by_task.items()} == {
        "arithmetic": (1, 2),
        "copy": (1, 1),
    }
    assert found.overall.low < found.overall.score < found.overall.high


def test_bad_questions_are_refused():
    with pytest.raises(UserError, match="no questions"):
        score([], [])
    with pytest.raises(UserError, match="no checker 'numbr'"):
        is_right(Question("Add.", "3", "arithmetic", "numbr"), "3")
    with pytest.raises(ValueError, match="longer"):
        score([Question("Add.", "3", "arithmetic", "number")], ["3", "4"])
